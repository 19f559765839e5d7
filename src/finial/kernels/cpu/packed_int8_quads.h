// int8 rows times q8_0 and q4_0 panels, where an instruction multiplies four bytes and sums them in 32 bits. Included
// by packed.cpp.
//
// A block of one row costs 16 multiplying instructions (at 16 lanes), and then for each vector of outputs a conversion,
// the product of both scales (int8_scales.h), and an fma. The fma runs where the multiplications do, conversions and
// additions beside them: 89 % is the most that blocks of 32 allow, on AMD. Measured on one core of EPYC Genoa, 512
// rows, 1024 and 3072 inputs, of 473 GFLOP/s of the instruction alone: 81 and 83 %; the loop over rows by itself 88 %,
// all of it in the first-level cache. What is between them: a block's beginning and end, and zeroing and writing
// results. EPYC Turin, which starts two of these instructions each cycle, did 512 rows at 73 to 77 % of 1,060 GFLOP/s,
// the loop alone at 86 %, with products of scales from a table of sixteen; with one chain a sum and without asking for
// rows 67 to 72 %. On Ice Lake all of a block's arithmetic shares two ports (24 instructions a row, 67 % of them
// multiplications), and a broadcast or load of 64 bytes takes 0.9 cycles: what counts is to load less, so there scales
// stay in registers and are multiplied. One core does 168 rows at 395 of 825 GFLOP/s, 342 with tables; the loop alone
// 440, in hand-written assembly 490.
#pragma once

#include "int8_scales.h"
#include "packed_int8.h"
#include "packed_int8_tiles.h"

#if defined(FINIAL_PACKS_INT8) && !defined(FINIAL_AVX2)

namespace finial::FINIAL_ISA {

namespace {

// Chains in which an output's sum of a block runs, where there are registers for them: then four instructions wait for
// each other instead of eight.
constexpr int SPLIT = W == 16 ? 2 : 1;

// N rows with one block of 32 inputs of a panel: each output's sum of the block, exact, times both scales, added to c.
template <class Q, int N, class Scale>
FINIAL_INLINE void add_block(const I (&w)[8][PANEL_VECTORS], const Scale& scale, const Int8Block* x, float* c) {
  I sums[N][SPLIT][PANEL_VECTORS];
  for (int r = 0; r < N; ++r)
    for (int v = 0; v < PANEL_VECTORS; ++v)
      for (int s = 0; s < SPLIT; ++s) sums[r][s][v] = s == 0 ? Q::start(x[r]) : start_q4(0);
  for (int j = 0; j < 8; j += SPLIT)
    for (int r = 0; r < N; ++r)
      for (int s = 0; s < SPLIT; ++s) {
        const I quad = broadcast(x[r].q + 4 * (j + s));
        for (int v = 0; v < PANEL_VECTORS; ++v) sums[r][s][v] = Q::dot(sums[r][s][v], w[j + s][v], quad);
      }
  for (int r = 0; r < N; ++r)
    for (int s = 1; s < SPLIT; ++s)
      for (int v = 0; v < PANEL_VECTORS; ++v) sums[r][0][v] = add_i(sums[r][0][v], sums[r][s][v]);
  for (int r = 0; r < N; ++r) {
    const typename Scale::Row row = Scale::row(scale, x[r]);
    for (int v = 0; v < PANEL_VECTORS; ++v) {
      float* at = c + r * PANEL + v * W;
      store(at, fma(to_floats(sums[r][0][v]), Scale::product(scale, row, v), load(at)));
    }
  }
}

constexpr Enough ENOUGH_INT8{4, 16384};

// c [PANEL] = a panel times one row.
template <class Q>
void one_int8(const uint8_t* FINIAL_RESTRICT w, const Int8Block* FINIAL_RESTRICT x, int64_t blocks,
              float* FINIAL_RESTRICT c) {
  const Asked ask = asks(1, ENOUGH_INT8);
  V acc[PANEL_VECTORS];
  for (V& a : acc) a = zero();
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK, ++x) {
    I weights[8][PANEL_VECTORS], sums[PANEL_VECTORS];
    V scale[PANEL_VECTORS];
    stream(ask, w, Q::BLOCK);
    for (int v = 0; v < PANEL_VECTORS; ++v) scale[v] = load_f16(w + v * W * 2);
    Q::load(w + PANEL * 2, weights);
    for (I& s : sums) s = Q::start(*x);
    for (int j = 0; j < 8; ++j) {
      const I quad = broadcast(x->q + 4 * j);
      for (int v = 0; v < PANEL_VECTORS; ++v) sums[v] = Q::dot(sums[v], weights[j][v], quad);
    }
    for (int v = 0; v < PANEL_VECTORS; ++v) acc[v] = fma(to_floats(sums[v]), mul(scale[v], set1(x->scale)), acc[v]);
  }
  for (int v = 0; v < PANEL_VECTORS; ++v) store(c + v * W, acc[v]);
}

#if !defined(FINIAL_TILES)

// Block b of a panel, at p, with all rows: two at a time, so that more sums are under way than one row has. A function
// of its own, so that the weights stay in registers. Meanwhile the next block is asked for, a few lines with each tile:
// a block lasts so long that the processor's own prefetching has forgotten it. The next tile's rows are asked for too.
template <class Q, class Scale>
FINIAL_APART void add_rows(const uint8_t* FINIAL_RESTRICT p, const Scale& scale, const Rows& rows, int64_t b,
                           float* FINIAL_RESTRICT c) {
  I w[8][PANEL_VECTORS];
  Q::load(p + PANEL * 2, w);
  const typename Scale::Held held = scale;
  const int64_t ahead = (Q::BLOCK + 64 * rows.tiles) / (64 * rows.tiles) * 64;
  for (int64_t i = 0; i < rows.tiles; ++i) {
    prefetch(p + Q::BLOCK + i * ahead, ahead);
    const int64_t count = rows.count[i];
    const Int8Block *x = rows.x[i] + b * count, *end = x + count;
    const int64_t then = i + 1 < rows.tiles ? i + 1 : 0;
    const uint8_t* next = reinterpret_cast<const uint8_t*>(rows.x[then] + (then > 0 ? b : b + 1) * rows.count[then]);
    for (; x + 2 <= end; x += 2, c += 2 * PANEL, next += 128) {
      prefetch(next, 128);
      add_block<Q, 2>(w, held, x, c);
    }
    if (x < end) add_block<Q, 1>(w, held, x, c), c += PANEL;
  }
}

#endif

// c [rows, PANEL] = a panel times 2 to TILE rows. Without AVX-512, where their arithmetic takes about as long as
// reading the panel, it is asked for AHEAD bytes early, a few lines with each pair of rows.
template <class Q>
void few_int8(const uint8_t* FINIAL_RESTRICT w, const Int8Block* FINIAL_RESTRICT x, int64_t rows, int64_t blocks,
              float* FINIAL_RESTRICT c) {
#if defined(FINIAL_AVX512)
  constexpr int64_t share = 0;
#else
  const int64_t share = rows * 192 < Q::BLOCK ? 0 : (Q::BLOCK + 32 * rows - 1) / (32 * rows) * 64;  // for two rows
#endif
  const Asked ask = asks(rows, ENOUGH_INT8);
  for (int64_t i = 0; i < rows * PANEL; i += W) store(c + i, zero());
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK) {
    I weights[8][PANEL_VECTORS];
    V scale[PANEL_VECTORS];
    for (int v = 0; v < PANEL_VECTORS; ++v) scale[v] = load_f16(w + v * W * 2);
    const Multiplied scales(scale);
    Q::load(w + PANEL * 2, weights);
    const uint8_t* next = w + AHEAD;
    stream(ask, w, Q::BLOCK);
    float* at = c;
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2, x += 2, at += 2 * PANEL, next += share) {
      prefetch(next, share);
      add_block<Q, 2>(weights, scales, x, at);
    }
    if (r < rows) add_block<Q, 1>(weights, scales, x++, at);
  }
}

// c [rows of the tiles, PANEL] = a panel times tiles [begin, end) of `rows` rounded rows at x.
template <class Q>
void tiles_int8(const uint8_t* FINIAL_RESTRICT w, const uint8_t* FINIAL_RESTRICT x, int64_t rows, int64_t begin,
                int64_t end, int64_t blocks, const Target& target, float* FINIAL_RESTRICT c) {
  const Rows taken = rows_of(x, rows, begin, end, blocks);
  if (taken.rows == 1) return one_int8<Q>(w, taken.x[0], blocks, c);
  if (rows <= TILE) return few_int8<Q>(w, taken.x[0], taken.rows, blocks, c);
#if defined(FINIAL_TILES)
  (void)target;
  return meet_registers<Q>(w, taken, blocks, c);
#else
  for (int64_t i = 0; i < taken.rows * PANEL; i += W) store(c + i, zero());
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK) {
    V scale[PANEL_VECTORS];
    for (int v = 0; v < PANEL_VECTORS; ++v) scale[v] = load_f16(w + v * W * 2);
    expect(target, taken.rows * b / blocks, taken.rows * (b + 1) / blocks);
#if defined(FINIAL_INT8_DIGITS)
    if (taken.rows >= DIGITS_ROWS) {
      add_rows<Q>(w, Digits(scale), taken, b, c);
      continue;
    }
#endif
    add_rows<Q>(w, Multiplied(scale), taken, b, c);
  }
#endif
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
