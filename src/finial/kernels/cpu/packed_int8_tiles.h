// int8 rows times q8_0 and q4_0 panels in tile registers: for more than a few rows. Included by packed.cpp.
//
// A block of 32 inputs is half a register deep, and its sums are scaled before they meet the next one's: for 16 rows
// and 32 outputs two products (32 cycles), two stores (32), and 32 conversions, products of scales and fma, which share
// one port while a product runs. So sums of a block are scaled while the next one's are computed. They are exact and
// scaled as packed_int8_quads.h does, so the bits are the same. q4_0 is taken out of its nibbles once for all tiles.
#pragma once

#include "packed_int8.h"
#include "tiles.h"

#if defined(FINIAL_TILES)

namespace finial::FINIAL_ISA {

namespace {

constexpr int64_t LEVELS_BYTES = 32 * PANEL;  // of a block: [8][PANEL][4]
constexpr int64_t MOST_LEVELS = 128;          // blocks that are taken out at once: 4096 inputs

// Where the levels of a block of a panel lie as signed bytes.
template <class Q>
struct PanelLevels;
template <>
struct PanelLevels<Q8> {
  static constexpr int64_t BLOCK = Q8::BLOCK, HEAD = PANEL * 2;
  FINIAL_INLINE void take(const uint8_t*, int64_t, uint8_t*) {}
  FINIAL_INLINE const uint8_t* at(const uint8_t* w, const uint8_t*, int64_t block) { return w + block * BLOCK + HEAD; }
};
template <>
struct PanelLevels<Q4> {
  static constexpr int64_t BLOCK = Q4::BLOCK, HEAD = PANEL * 2;
  FINIAL_INLINE void take(const uint8_t* w, int64_t blocks, uint8_t* out) {
    const I eight = _mm512_set1_epi8(8);
    for (int64_t b = 0; b < blocks; ++b, w += BLOCK, out += LEVELS_BYTES)
      for (int64_t i = 0; i < LEVELS_BYTES / 2; i += 64) {
        const I both = load_i(w + HEAD + i);
        store_i(out + i, _mm512_sub_epi8(low_nibbles(both), eight));
        store_i(out + LEVELS_BYTES / 2 + i, _mm512_sub_epi8(high_nibbles(both), eight));
      }
  }
  FINIAL_INLINE const uint8_t* at(const uint8_t*, const uint8_t* levels, int64_t block) {
    return levels + block * LEVELS_BYTES;
  }
};

// A block whose sums are there: they are scaled and added to c [rows, PANEL].
struct Summed {
  const int32_t* sums;  // [2][TILE][W]
  V scale[PANEL_VECTORS];
  const Int8Block* x;
  float* c;
};

// Rows [from, to) of it; a conversion, a product of scales and an fma for each vector.
FINIAL_INLINE void add_summed(const Summed& s, int64_t from, int64_t to) {
  for (int64_t r = from; r < to; ++r) {
    const V by = set1(s.x[r].scale);
    for (int v = 0; v < PANEL_VECTORS; ++v) {
      float* at = s.c + r * PANEL + v * W;
      store(at, fma(to_floats(load_i(s.sums + (v * TILE + r) * W)), mul(s.scale[v], by), load(at)));
    }
  }
}

// The sums of a tile's rows with a block, to s [2][TILE][W]; meanwhile the block before it is scaled, all of its rows.
FINIAL_INLINE void sum_block(const uint8_t* levels, const Int8Block* x, int32_t* s, const Summed* before,
                             int64_t rows) {
  const auto quarter = [&](int64_t i) {
    if (before != nullptr) add_summed(*before, rows * i / 4, rows * (i + 1) / 4);
  };
  tile_load<4>(x->q, sizeof(Int8Block));
  tile_load<6>(levels, PANEL * 4);
  tile_zero<0>(), tile_zero<1>();
  tile_dot_int8<0, 4, 6>();
  quarter(0);
  tile_load<7>(levels + W * 4, PANEL * 4);
  tile_dot_int8<1, 4, 7>();
  quarter(1);
  tile_store<0>(s, W * 4);
  quarter(2);
  tile_store<1>(s + TILE * W, W * 4);
  quarter(3);
}

// c [rows of the tiles, PANEL] = a panel times rows.
template <class Q>
void meet_registers(const uint8_t* w, const Rows& rows, int64_t blocks, float* c) {
  using L = PanelLevels<Q>;
  int64_t most = 0;  // tiles differ by a row, in any order
  for (int64_t i = 0; i < rows.tiles; ++i) most = rows.count[i] > most ? rows.count[i] : most;
  const Tiles registers(most, 8);
  alignas(64) int32_t sums[2][2 * TILE * W];
  alignas(64) uint8_t levels[Q::WORDS == 4 ? MOST_LEVELS * LEVELS_BYTES : 64];
  for (int64_t i = 0; i < rows.rows * PANEL; i += W) store(c + i, zero());
  for (int64_t from = 0; from < blocks; from += MOST_LEVELS) {
    const int64_t some = blocks - from < MOST_LEVELS ? blocks - from : MOST_LEVELS;
    const uint8_t* part = w + from * Q::BLOCK;
    L::take(part, some, levels);
    float* at = c;
    for (int64_t i = 0; i < rows.tiles; ++i) {
      const int64_t count = rows.count[i];
      const Int8Block* x = rows.x[i] + from * count;
      sum_block(L::at(part, levels, 0), x, sums[0], nullptr, count);
      for (int64_t b = 0; b < some; ++b) {
        Summed now{sums[b % 2], {}, x + b * count, at};
        for (int v = 0; v < PANEL_VECTORS; ++v) now.scale[v] = load_f16(part + b * Q::BLOCK + v * W * 2);
        if (b + 1 < some)
          sum_block(L::at(part, levels, b + 1), x + (b + 1) * count, sums[(b + 1) % 2], &now, count);
        else
          add_summed(now, 0, count);
      }
      at += count * PANEL;
    }
  }
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
