// int8 rows times q8_0 and q4_0 panels in tile registers: for more than a few rows. Included by packed.cpp.
//
// A block of 32 inputs is half a register deep, and its sums are scaled before they meet the next one's, exactly as
// packed_int8_quads.h does, so the bits are the same. For 16 rows, 16 outputs and a block: a product (16 cycles), a
// store of its sums (16), and for each row a conversion, a product of scales and an fma. What decides is how these
// share the core (Intel Xeon with AMX, a throwaway program, cycles for 32 vector instructions alone and beside tile
// loads, a product and a store): fma, multiplications and conversions 16 and 43, additions 16 and 32. While tile
// registers work, one port multiplies and two add. So an integer becomes a float by two additions instead of a
// conversion (`exact`), and sums are scaled two blocks later than computed, a vector of outputs of all rows at a time:
// where a load's address agrees with that of a store under way in its last 12 bits it waits, and this way it rarely
// does. A pair of panels meets the rows: 16 rows are a register for four of weights, and CHUNK blocks of weights, their
// levels and scales taken out, stay in the first-level cache while all rows pass by.
//
// TOP/s of 512 rows on one core, 1024 > 4096, 3072 > 1024 + add, 1024 > 3072 gated (and before, a block at a time):
//   q8_0 0.72, 0.79, 0.79 (0.56, 0.62, 0.61)   q4_0 0.69, 0.80, 0.77 (0.55, 0.63, 0.59)
// 0.89 in the first if results are left where they are: they go to lines that no cache of a core holds.
#pragma once

#include "finish.h"
#include "packed_int8.h"
#include "tiles.h"

#if defined(FINIAL_TILES)

namespace finial::FINIAL_ISA {

namespace {

constexpr int64_t STRIP_VECTORS = STRIP * PANEL_VECTORS;
constexpr int64_t CHUNK = 8;                  // blocks of them that stay in the first-level cache
constexpr int64_t SUMS = TILE * W;            // of a register
constexpr int64_t LEVELS_BYTES = 32 * PANEL;  // of a block: [8][PANEL][4]

// Where the levels of a block of a panel lie as signed bytes, STEP bytes from one to the next; those of CHUNK blocks
// are taken out to `levels` if they do not lie there already.
template <class Q>
struct PanelLevels;
template <>
struct PanelLevels<Q8> {
  static constexpr int64_t STEP = Q8::BLOCK, TAKEN = 64;
  FINIAL_INLINE const uint8_t* take(const uint8_t* w, int64_t, uint8_t*) { return w + PANEL * 2; }
};
template <>
struct PanelLevels<Q4> {
  static constexpr int64_t STEP = LEVELS_BYTES, TAKEN = CHUNK * LEVELS_BYTES;
  FINIAL_INLINE const uint8_t* take(const uint8_t* w, int64_t blocks, uint8_t* levels) {
    const I eight = _mm512_set1_epi8(8);
    uint8_t* out = levels;
    for (int64_t b = 0; b < blocks; ++b, w += Q4::BLOCK, out += LEVELS_BYTES)
      for (int64_t i = 0; i < LEVELS_BYTES / 2; i += 64) {
        const I both = load_i(w + PANEL * 2 + i);
        store_i(out + i, _mm512_sub_epi8(low_nibbles(both), eight));
        store_i(out + LEVELS_BYTES / 2 + i, _mm512_sub_epi8(high_nibbles(both), eight));
      }
    return levels;
  }
};

// Two blocks of a strip and of a tile's rows, and where their results are added: c [TILE][STRIP_VECTORS W].
struct TwoBlocks {
  const uint8_t* levels[STRIP];  // of the first block of each panel
  int64_t step;                  // bytes to those of the second, 0 where there is none
  const Int8Block *first, *second;
  const float* scales;  // of the weights [2][STRIP_VECTORS W], zero for a second block that is none
  float* c;
};

// A sum below 2^22 as a float, exactly: added to the bits of 1.5 2^23 it is the lowest bits of a float's significand.
FINIAL_INLINE V exact(const int32_t* sums) {
  const I biased = add_i(load_i(sums), _mm512_set1_epi32(0x4B400000));
  return sub(_mm512_castsi512_ps(biased), set1(12582912.0f));
}

// Vector v of outputs of all rows: sums [2][TILE][W] scaled and added.
FINIAL_INLINE void scale(const int32_t* FINIAL_RESTRICT sums, int v, const TwoBlocks& of) {
  const V first = load(of.scales + v * W), second = load(of.scales + (STRIP_VECTORS + v) * W);
  float* FINIAL_RESTRICT c = of.c + v * W;
#pragma GCC unroll 16
  for (int64_t r = 0; r < TILE; ++r, sums += W, c += STRIP_VECTORS * W) {
    const V a = fma(mul(exact(sums), set1(of.first[r].scale)), first, load(c));
    store(c, fma(mul(exact(sums + SUMS), set1(of.second[r].scale)), second, a));
  }
}

// Registers T and T + 1 = a vector of outputs of two blocks.
template <int T>
FINIAL_INLINE void sum(const uint8_t* levels, int64_t step) {
  tile_load<6>(levels, PANEL * 4);
  tile_zero<T>();
  tile_dot_int8<T, 4, 6>();
  tile_load<7>(levels + step, PANEL * 4);
  tile_zero<T + 1>();
  tile_dot_int8<T + 1, 5, 7>();
}
template <int T>
FINIAL_INLINE void leave(int32_t* sums) {
  tile_store<T>(sums, W * 4);
  tile_store<T + 1>(sums + SUMS, W * 4);
}

// sums [STRIP_VECTORS][2][TILE][W] of two blocks, beside scaling the second half of those before and the first of
// these.
FINIAL_APART void sum_and_scale(const TwoBlocks& now, const TwoBlocks& before, int32_t* sums) {
  constexpr int64_t PAIR = 2 * SUMS, BYTES = W * 4;
  tile_load<4>(now.first->q, sizeof(Int8Block));
  tile_load<5>(now.second->q, sizeof(Int8Block));
  sum<0>(now.levels[0], now.step);
  if (before.c != nullptr) scale(sums + 2 * PAIR, 2, before);
  leave<0>(sums);
  sum<2>(now.levels[0] + BYTES, now.step);
  if (before.c != nullptr) scale(sums + 3 * PAIR, 3, before);
  leave<2>(sums + PAIR);
  sum<0>(now.levels[1], now.step);
  scale(sums, 0, now);
  leave<0>(sums + 2 * PAIR);
  sum<2>(now.levels[1] + BYTES, now.step);
  scale(sums + PAIR, 1, now);
  leave<2>(sums + 3 * PAIR);
}

// What is left to scale.
FINIAL_APART void scale_rest(const TwoBlocks& before, const int32_t* sums) {
  scale(sums + 4 * SUMS, 2, before);
  scale(sums + 6 * SUMS, 3, before);
}

// Panels [begin, end) times the rows of the product's tiles, with more than TILE rows in all.
template <class Q>
void multiply_int8(const Product& p, int64_t begin, int64_t end) {
  using L = PanelLevels<Q>;
  constexpr int64_t SLOT = TILE * STRIP_VECTORS * W;  // a tile's results
  alignas(64) float c[GROUP * SLOT];
  alignas(64) int32_t sums[STRIP_VECTORS * 2 * SUMS];
  alignas(64) float scales[2][CHUNK * STRIP_VECTORS * W];  // of this chunk, and the one before
  alignas(64) uint8_t levels[STRIP][L::TAKEN];
  const int64_t blocks = p.first->n_in / 32, step = p.second == nullptr ? STRIP : 1;
  const Rows rows = rows_of(p.x, p.rows, p.begin, p.end, blocks);
  int64_t most = 0;  // tiles differ by a row, in any order
  for (int64_t i = 0; i < rows.tiles; ++i) most = rows.count[i] > most ? rows.count[i] : most;
  const Tiles registers(most, 8);
  int turn = 0;
  for (int64_t panel = begin; panel < end; panel += step) {
    const bool alone = p.second == nullptr && panel + 1 == end;  // it is its own neighbour
    const uint8_t* const w = p.first->packed + panel * p.first->stride;
    const uint8_t* const strip[STRIP] = {w, p.second != nullptr ? p.second->packed + panel * p.second->stride
                                            : alone             ? w
                                                                : w + p.first->stride};
    TwoBlocks before{};
    for (int64_t from = 0; from < blocks; from += CHUNK) {
      const int64_t some = blocks - from < CHUNK ? blocks - from : CHUNK;
      const uint8_t* taken[STRIP];
      turn ^= 1;
      for (int64_t i = 0; i < STRIP; ++i) {
        const uint8_t* part = strip[i] + from * Q::BLOCK;
        taken[i] = L::take(part, some, levels[i]);
        for (int64_t b = 0; b < some + some % 2; ++b)
          for (int v = 0; v < PANEL_VECTORS; ++v)
            store(scales[turn] + ((b * STRIP + i) * PANEL_VECTORS + v) * W,
                  b < some ? load_f16(part + b * Q::BLOCK + v * W * 2) : zero());
      }
      // The next chunk, of this strip or the next one, is asked for a little with each two blocks.
      const bool last = from + CHUNK >= blocks;
      const int64_t ahead = last ? step * p.first->stride : (from + CHUNK) * Q::BLOCK,
                    turns = rows.tiles * ((some + 1) / 2);
      const int64_t lines = last && panel + step >= end ? 0 : (CHUNK * Q::BLOCK / 64 + turns - 1) / turns;
      const uint8_t *soon = strip[0] + ahead, *soon_too = strip[1] + ahead;
      for (int64_t i = 0; i < rows.tiles; ++i) {
        float* at = c + i * SLOT;
        const Int8Block* x = rows.x[i] + from * rows.count[i];
        if (from == 0)
          for (int64_t k = 0; k < SLOT; k += W) store(at + k, zero());
        for (int64_t b = 0; b < some; b += 2) {
          const bool two = b + 1 < some;
          const TwoBlocks now{{taken[0] + b * L::STEP, taken[1] + b * L::STEP},
                              two ? L::STEP : 0,
                              x + b * rows.count[i],
                              x + (b + two) * rows.count[i],
                              scales[turn] + b * STRIP_VECTORS * W,
                              at};
          for (int64_t k = 0; k < lines; ++k, soon += 64, soon_too += 64)
            __builtin_prefetch(soon, 0, 2), __builtin_prefetch(soon_too, 0, 2);
          sum_and_scale(now, before, sums);
          before = now;
        }
      }
    }
    scale_rest(before, sums);
    for (int64_t i = 0; i < rows.tiles; ++i) {
      const Tile t = tile_of(p.rows, p.begin + i);
      const float* first = c + i * SLOT;
      if (p.second != nullptr) {
        finish(p, panel, t, 0, t.count, first, first + PANEL, STRIP * PANEL);
        continue;
      }
      finish(p, panel, t, 0, t.count, first, nullptr, STRIP * PANEL);
      if (!alone) finish(p, panel + 1, t, 0, t.count, first + PANEL, nullptr, STRIP * PANEL);
    }
  }
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
