// int8 rows times panels in tile registers: for more than a few rows. What formats differ in is their kind: q8_0 and
// q4_0 here, K-quants in packed_k_tiles.h. Included by packed.cpp and packed_k.cpp.
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
#include "tiles.h"

#if defined(FINIAL_TILES)

namespace finial::FINIAL_ISA {

namespace {

constexpr int64_t STRIP_VECTORS = STRIP * PANEL_VECTORS, STRIP_WIDTH = STRIP * PANEL;
constexpr int64_t CHUNK = 8;                  // blocks of 32 inputs that stay in the first-level cache
constexpr int64_t SUMS = TILE * W;            // of a register
constexpr int64_t LEVELS_BYTES = 32 * PANEL;  // of a block: [8][PANEL][4]

// What sums of a tile's rows are made of: two blocks of 32 inputs.
struct Sums {
  const uint8_t* levels[STRIP];  // of the first, in each panel
  int64_t step;                  // bytes to those of the second, 0 where there is none
  const Int8Block *x, *x_too;
};

// How they become results, which are added to c [TILE][STRIP_WIDTH].
struct Scaling {
  const Int8Block *x, *x_too;
  const float* factors;  // of the weights, a row of STRIP_WIDTH for each factor
  float* c;
};

// A sum below 2^22 as a float, exactly: added to the bits of 1.5 2^23 it is the lowest bits of a float's significand.
FINIAL_INLINE V exact(const int32_t* sums) {
  const I biased = add_i(load_i(sums), _mm512_set1_epi32(0x4B400000));
  return sub(_mm512_castsi512_ps(biased), set1(12582912.0f));
}

// q8_0 and q4_0 (Q): a scale for each block.
template <class Q>
struct ByBlocks {
  static constexpr int64_t CHUNK_BYTES = CHUNK * Q::BLOCK, FACTORS = 1;
  static constexpr int64_t STEP = Q::WORDS == 4 ? LEVELS_BYTES : Q::BLOCK;  // from a block's levels to the next
  static constexpr int64_t TAKEN = Q::WORDS == 4 ? CHUNK * LEVELS_BYTES : 64;
  // So many rows are faster here than with vectors; a nibble has to be taken out for them. Prompts of 17 to 28 tokens
  // in q4_0 take 0.91 to 0.96 of the time with vectors, of 32 1.08; in q8_0 1.11 and of 24 1.23.
  static constexpr int64_t FROM = Q::WORDS == 4 ? 30 : TILE + 1;

  // Where the levels of `blocks` blocks of a panel lie as signed bytes: in `levels`, if they have to be taken out.
  // Factors are left in columns of rows of STRIP_WIDTH.
  FINIAL_INLINE const uint8_t* take(const uint8_t* w, int64_t blocks, uint8_t* levels, float* factors) {
    for (int64_t b = 0; b < blocks + blocks % 2; ++b)  // a second block that is none counts nothing
      for (int v = 0; v < PANEL_VECTORS; ++v)
        store(factors + b * STRIP_WIDTH + v * W, b < blocks ? load_f16(w + b * Q::BLOCK + v * W * 2) : zero());
    if constexpr (Q::WORDS == 8) return w + PANEL * 2;
    const I eight = _mm512_set1_epi8(8);
    uint8_t* out = levels;
    for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK, out += LEVELS_BYTES)
      for (int64_t i = 0; i < LEVELS_BYTES / 2; i += 64) {
        const I both = load_i(w + PANEL * 2 + i);
        store_i(out + i, _mm512_sub_epi8(low_nibbles(both), eight));
        store_i(out + LEVELS_BYTES / 2 + i, _mm512_sub_epi8(high_nibbles(both), eight));
      }
    return levels;
  }

  // Vector v of outputs of ROWS rows: sums [2][TILE][W] scaled and added.
  template <int ROWS>
  FINIAL_INLINE void scale(const int32_t* FINIAL_RESTRICT sums, int v, const Scaling& of) {
    const V first = load(of.factors + v * W), second = load(of.factors + STRIP_WIDTH + v * W);
    float* FINIAL_RESTRICT c = of.c + v * W;
#pragma GCC unroll 16
    for (int64_t r = 0; r < ROWS; ++r, sums += W, c += STRIP_WIDTH) {
      const V a = fma(mul(exact(sums), set1(of.x[r].scale)), first, load(c));
      store(c, fma(mul(exact(sums + SUMS), set1(of.x_too[r].scale)), second, a));
    }
  }
};

// Registers T and T + 1 = a vector of outputs.
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

// sums [STRIP_VECTORS][2][TILE][W], beside scaling the second half of those before and the first of these.
template <class Kind, int ROWS>
FINIAL_APART void sum_and_scale(const Sums& of, const Scaling& now, const Scaling& before, int32_t* sums) {
  constexpr int64_t PAIR = 2 * SUMS, BYTES = W * 4;
  tile_load<4>(of.x->q, sizeof(Int8Block));
  tile_load<5>(of.x_too->q, sizeof(Int8Block));
  sum<0>(of.levels[0], of.step);
  if (before.c != nullptr) Kind::template scale<ROWS>(sums + 2 * PAIR, 2, before);
  leave<0>(sums);
  sum<2>(of.levels[0] + BYTES, of.step);
  if (before.c != nullptr) Kind::template scale<ROWS>(sums + 3 * PAIR, 3, before);
  leave<2>(sums + PAIR);
  sum<0>(of.levels[1], of.step);
  Kind::template scale<ROWS>(sums, 0, now);
  leave<0>(sums + 2 * PAIR);
  sum<2>(of.levels[1] + BYTES, of.step);
  Kind::template scale<ROWS>(sums + PAIR, 1, now);
  leave<2>(sums + 3 * PAIR);
}

// What is left to scale.
template <class Kind, int ROWS>
FINIAL_APART void scale_rest(const Scaling& before, const int32_t* sums) {
  Kind::template scale<ROWS>(sums + 4 * SUMS, 2, before);
  Kind::template scale<ROWS>(sums + 6 * SUMS, 3, before);
}

// Panels [begin, end) times the rows of the product's tiles, none of which has more than ROWS.
template <class Kind, int ROWS>
void multiply_rows(const Product& p, const Rows& rows, int64_t begin, int64_t end) {
  constexpr int64_t SLOT = TILE * STRIP_WIDTH;  // a tile's results
  alignas(64) float c[GROUP * SLOT];
  alignas(64) int32_t sums[STRIP_VECTORS * 2 * SUMS];
  alignas(64) float factors[2][CHUNK * Kind::FACTORS * STRIP_WIDTH];  // of this chunk, and the one before
  alignas(64) uint8_t levels[STRIP][Kind::TAKEN];
  const int64_t blocks = p.first->n_in / 32, step = p.second == nullptr ? STRIP : 1;
  const Tiles registers(ROWS, LEVELS_BYTES / (PANEL * 4));
  int turn = 0;
  for (int64_t panel = begin; panel < end; panel += step) {
    const bool alone = p.second == nullptr && panel + 1 == end;  // it is its own neighbour
    const uint8_t* const w = p.first->packed + panel * p.first->stride;
    const uint8_t* strip[STRIP] = {w, p.second != nullptr ? p.second->packed + panel * p.second->stride
                                      : alone             ? w
                                                          : w + p.first->stride};
    Scaling before{};
    for (int64_t from = 0; from < blocks; from += CHUNK) {
      const int64_t some = blocks - from < CHUNK ? blocks - from : CHUNK;
      const uint8_t* taken[STRIP];
      turn ^= 1;
      for (int64_t i = 0; i < STRIP; ++i) taken[i] = Kind::take(strip[i], some, levels[i], factors[turn] + i * PANEL);
      // The next chunk, of this strip or the next one, is asked for a little with each two blocks.
      const bool last = from + CHUNK >= blocks;
      const int64_t turns = rows.tiles * ((some + 1) / 2),
                    ahead = last ? step * p.first->stride - from / CHUNK * Kind::CHUNK_BYTES : Kind::CHUNK_BYTES,
                    lines = last && panel + step >= end ? 0 : (Kind::CHUNK_BYTES / 64 + turns - 1) / turns;
      const uint8_t *soon = strip[0] + ahead, *soon_too = strip[1] + ahead;
      for (int64_t i = 0; i < rows.tiles; ++i) {
        float* at = c + i * SLOT;
        const int64_t count = rows.count[i];
        if (from == 0)
          for (int64_t k = 0; k < SLOT; k += W) store(at + k, zero());
        for (int64_t b = 0; b < some; b += 2) {
          const Int8Block* x = rows.x[i] + (from + b) * count;
          const bool two = b + 1 < some;
          const Int8Block* x_too = two ? x + count : x;
          const Sums of{{taken[0] + b * Kind::STEP, taken[1] + b * Kind::STEP}, two ? Kind::STEP : 0, x, x_too};
          const Scaling now{x, x_too, factors[turn] + b * Kind::FACTORS * STRIP_WIDTH, at};
          for (int64_t k = 0; k < lines; ++k, soon += 64, soon_too += 64)
            __builtin_prefetch(soon, 0, 2), __builtin_prefetch(soon_too, 0, 2);
          sum_and_scale<Kind, ROWS>(of, now, before, sums);
          before = now;
        }
      }
      for (const uint8_t*& part : strip) part += Kind::CHUNK_BYTES;
    }
    scale_rest<Kind, ROWS>(before, sums);
    for (int64_t i = 0; i < rows.tiles; ++i) {
      const Tile t = tile_of(p.rows, p.begin + i);
      const float* first = c + i * SLOT;
      if (p.second != nullptr) {
        finish(p, panel, t, 0, t.count, first, first + PANEL, STRIP_WIDTH);
        continue;
      }
      finish(p, panel, t, 0, t.count, first, nullptr, STRIP_WIDTH);
      if (!alone) finish(p, panel + 1, t, 0, t.count, first + PANEL, nullptr, STRIP_WIDTH);
    }
  }
}

// Panels [begin, end) times the rows of the product's tiles, with more than TILE rows in all.
template <class Kind>
void multiply_tiles(const Product& p, int64_t begin, int64_t end) {
  const Rows rows = rows_of(p.x, p.rows, p.begin, p.end, p.first->n_in / 32);
  int64_t most = 0;  // tiles differ by a row, in any order
  for (int64_t i = 0; i < rows.tiles; ++i) most = rows.count[i] > most ? rows.count[i] : most;
  most <= 12 ? multiply_rows<Kind, 12>(p, rows, begin, end) : multiply_rows<Kind, TILE>(p, rows, begin, end);
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
