// int8 rows times q8_0 and q4_0 panels, where an instruction multiplies four bytes and sums them in 32 bits. Included
// by packed.cpp.
//
// A block of one row costs 16 multiplying instructions (at 16 lanes), and then for each vector of outputs a conversion,
// the product of both scales (int8_scales.h), and an fma. The fma runs where the multiplications do, conversions and
// additions beside them: 89 % is the most that blocks of 32 allow, on AMD. Measured on one core of EPYC Genoa, 512
// rows, 1024 and 3072 inputs, of 473 GFLOP/s of the instruction alone: 81 and 83 %; the loop over rows by itself 88 %,
// all of it in the first-level cache. What is between them: a block's beginning and end, and zeroing and writing
// results. EPYC Turin, which starts two of these instructions each cycle, does 256 rows at 74 to 76 % of 1,100 GFLOP/s;
// without finishing results it is 81, without storing sums 83, with an addition instead of the fma 95, with the
// multiplications alone 98. Weights that are loaded for six rows with all sums in registers do worse there, 62 to 65 %.
// On Ice Lake all of a block's arithmetic shares two ports (24 instructions a row, 67 % of them multiplications), and a
// broadcast or load of 64 bytes takes 0.9 cycles: what counts is to load less, so there scales stay in registers and
// are multiplied. One core does 168 rows at 395 of 825 GFLOP/s, 342 with tables; the loop alone 440, in hand-written
// assembly 490.
#pragma once

#include <array>
#include <utility>

#include "int8_scales.h"
#include "packed_int8.h"

#if defined(FINIAL_PACKS_INT8) && !defined(FINIAL_AVX2)

namespace finial::FINIAL_ISA {

namespace {

// Chains in which an output's sum of a block runs, where there are registers for them: then four instructions wait for
// each other instead of eight.
template <int N>
constexpr int CHAINS_OF = W == 16 && N < 3 ? 2 : 1;

// N rows with one block of 32 inputs of a panel: each output's sum of the block, exact, times both scales, added to c.
template <class Q, int N, class Scale>
FINIAL_INLINE void add_block(const I (&w)[8][PANEL_VECTORS], const Scale& scale, const Int8Block* x, float* c) {
  constexpr int SPLIT = CHAINS_OF<N>;
  I sums[N][SPLIT][PANEL_VECTORS];
  for (int r = 0; r < N; ++r)
    for (int v = 0; v < PANEL_VECTORS; ++v)
      for (int s = 0; s < SPLIT; ++s) {
        const I start = s == SPLIT - 1 ? Scale::start(x[r]) : start_q4(0);
        sums[r][s][v] = s == 0 ? add_i(Q::start(x[r]), start) : start;
      }
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
      store(at, fma(Scale::floats(row, sums[r][0][v]), Scale::product(scale, row, v), load(at)));
    }
  }
}

// c [N, PANEL] = a panel times N rows: weights are used as they come, and sums and results stay in registers.
template <class Q, int N>
void some_int8(const uint8_t* FINIAL_RESTRICT w, const Int8Block* FINIAL_RESTRICT x, int64_t blocks,
               float* FINIAL_RESTRICT c) {
  const Asked ask = asks(N, Q::ENOUGH);
#if defined(FINIAL_TILES)
  constexpr bool evenly = N > 1;  // few_int8 says why
#else
  constexpr bool evenly = Q::WORDS == 8;
#endif
  constexpr int LINES = Q::BLOCK / 64;
  V acc[N][PANEL_VECTORS];
  for (int r = 0; r < N; ++r)
    for (V& a : acc[r]) a = zero();
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK, x += N) {
    I sums[N][PANEL_VECTORS];
    V scale[PANEL_VECTORS];
    if (!evenly) stream(ask, w, Q::BLOCK);
    if (N == 1 && Q::WORDS == 4) keep_near(x + 6);  // q8_0 reads as fast without
    for (int v = 0; v < PANEL_VECTORS; ++v) scale[v] = load_f16(w + v * W * 2);
    for (int r = 0; r < N; ++r)
      for (I& s : sums[r]) s = Q::start(x[r]);
    const auto multiply = [&](int j, const I(&quad)[PANEL_VECTORS]) {
      if (evenly) stream(ask, w + LINES * j / 8 * 64, (LINES * (j + 1) / 8 - LINES * j / 8) * 64);
      for (int r = 0; r < N; ++r) {
        const I q = broadcast(x[r].q + 4 * j);
        for (int v = 0; v < PANEL_VECTORS; ++v) sums[r][v] = Q::dot(sums[r][v], quad[v], q);
      }
    };
    if constexpr (N == 1) {
      I quads[8][PANEL_VECTORS];
      Q::template load<false>(w + PANEL * 2, quads);
      for (int j = 0; j < 8; ++j) multiply(j, quads[j]);
    } else {
      Q::each(w + PANEL * 2, multiply);
    }
    for (int r = 0; r < N; ++r)
      for (int v = 0; v < PANEL_VECTORS; ++v)
        acc[r][v] = fma(to_floats(sums[r][v]), mul(scale[v], set1(x[r].scale)), acc[r][v]);
  }
  for (int r = 0; r < N; ++r)
    for (int v = 0; v < PANEL_VECTORS; ++v) store(c + r * PANEL + v * W, acc[r][v]);
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

// Few rows: what two threads of EPYC Genoa read with them of 55 to 60 GB/s, 1024 inputs, in % (and before, a loop over
// pairs whose weights the compiler loaded in an order of its own and kept on the stack): q8_0 2 rows 100 (85), 3 98
// (90), 4 87 (74), 5 94 (78), 6 89 (79), 8 71 (64); q4_0 2 rows 99 (97), 3 92 (88), 4 76 (73), 5 63 (59). Of 32 to 36
// GB/s 4 rows of q8_0 97 (88), 6 95 (88), 8 94 (88). What is in registers shows up in that: with results there and
// weights as they come (some_int8) 3 to 6 rows of q8_0 read 5 to 20 % less, with weights there two read 20 % less.
// Arithmetic alone takes 20 cycles a row and block, 22 in the second-level cache.

// While rows [done, done + n) of ROWS meet block p of a panel, their share of what is asked for with it. Without
// AVX-512, where few rows take about as long as reading the panel, that lies AHEAD.
template <class Q, int ROWS>
FINIAL_INLINE void ask_beside(const Asked& ask, const uint8_t* p, int done, int n) {
  constexpr int LINES = (Q::BLOCK + 63) / 64;
  const int64_t from = LINES * done / ROWS * 64, bytes = LINES * (done + n) / ROWS * 64 - from;
  if (W == 16)
    stream(ask, p + from, bytes);
  else if (ROWS * 192 >= Q::BLOCK)
    prefetch(p + AHEAD + from, bytes);
}

// Block at p of a panel with rows [DONE, DONE + COUNT) of ROWS, at x, N at a time. A function for each N: in one for
// several GCC keeps weights on the stack.
template <class Q, int N, int DONE, int COUNT, int ROWS>
FINIAL_APART void add_few(const uint8_t* FINIAL_RESTRICT p, const Int8Block* FINIAL_RESTRICT x, Asked ask,
                          float* FINIAL_RESTRICT c) {
  ask_beside<Q, ROWS>(ask, p, DONE, N);
  V scale[PANEL_VECTORS];
  for (int v = 0; v < PANEL_VECTORS; ++v) scale[v] = load_f16(p + v * W * 2);
  I w[8][PANEL_VECTORS];
  Q::load(p + PANEL * 2, w);
  const Multiplied scales(scale);
#pragma GCC unroll 8
  for (int r = 0; r < COUNT; r += N, x += N, c += N * PANEL) {
    if (r > 0) ask_beside<Q, ROWS>(ask, p, DONE + r, N);
    add_block<Q, N>(w, scales, x, c);
  }
}

// c [ROWS, PANEL] = a panel times so many rows, N at a time, and three of an odd number.
template <class Q, int N, int ROWS>
FINIAL_INLINE void meet_few(const uint8_t* w, const Int8Block* x, int64_t blocks, const Asked& ask, float* c) {
  constexpr int OVER = ROWS % 2 == 0 ? 0 : W == 16 ? 3 : 1, FIRST = ROWS - OVER;
  for (int64_t i = 0; i < ROWS * PANEL; i += W) store(c + i, zero());
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK, x += ROWS) {
    if constexpr (FIRST > 0) add_few<Q, N, 0, FIRST, ROWS>(w, x, ask, c);
    if constexpr (OVER > 0) add_few<Q, OVER, FIRST, OVER, ROWS>(w, x + FIRST, ask, c + FIRST * PANEL);
  }
}

// c [ROWS, PANEL] = a panel times so many rows: pairs, and three of an odd number. Four at once where nothing is asked
// for, and with tile registers of 8, 12 and 16 (prompts of so many tokens 0.99, 0.96 and 0.96 of the time in q4_0,
// 1.00, 1.01, 0.98 in q8_0). Where the processor always gains from asking, results of 3 to 5 rows stay in registers:
// q8_0 0.95, 0.95 and 0.96 of the time on EPYC Turin (two threads that read 57 GB/s; one thread 0.90, 0.91, 0.96).
// Eight in halves of four so 1.00 to 1.02.
//
// What is asked for with a block is asked for evenly: all at once keeps the weights waiting for a way into the
// first-level cache, so that reading and arithmetic take turns. With tile registers 2 to 6 rows of q4_0 take 0.79 to
// 0.91 of the time so, 4 rows of q8_0 0.95, 8 rows of both 0.85, 12 rows 0.90 and 0.93, 16 0.90 and 0.96 (one thread,
// 151,936 outputs from memory, in turn). On EPYC Turin one row of q8_0 takes 0.96 where two threads read 53 GB/s and
// 0.90 where they read 84, of which it then reads 82; 2 and 6 to 12 rows 0.91 to 0.95. Rows of q4_0 take as long as
// before, 1 to 6 in the second-level cache 1.01 to 1.05: these do not. Not measured on EPYC Genoa and Ice Lake.
template <class Q, int ROWS>
void few_int8(const uint8_t* FINIAL_RESTRICT w, const Int8Block* FINIAL_RESTRICT x, int64_t blocks,
              float* FINIAL_RESTRICT c) {
  if constexpr (ROWS <= (W == 16 ? Q::IN_REGISTERS : 1)) {
    some_int8<Q, ROWS>(w, x, blocks, c);
  } else {
    const Asked ask = asks(ROWS, Q::ENOUGH);
#if defined(FINIAL_TILES)
    constexpr int N = ROWS % 4 == 0 && ROWS > 4 ? 4 : 2;
#else
    constexpr int N = 2;
    if constexpr (W == 16 && ROWS <= 5)
      if (asking.always) return some_int8<Q, ROWS>(w, x, blocks, c);
    if constexpr (W == 16 && ROWS == 4)
      if (ask.how == Ask::Nothing) return meet_few<Q, 4, ROWS>(w, x, blocks, ask, c);
#endif
    meet_few<Q, N, ROWS>(w, x, blocks, ask, c);
  }
}

using FewInt8 = void (*)(const uint8_t*, const Int8Block*, int64_t, float*);
template <class Q, int... ROWS>
constexpr std::array<FewInt8, TILE> few_of(std::integer_sequence<int, ROWS...>) {
  return {{few_int8<Q, ROWS + 1>...}};
}
template <class Q>
constexpr std::array<FewInt8, TILE> FEW_INT8 = few_of<Q>(std::make_integer_sequence<int, TILE>());

// c [rows of the tiles, PANEL] = a panel times tiles [begin, end) of `rows` rounded rows at x.
template <class Q>
void tiles_int8(const uint8_t* FINIAL_RESTRICT w, const uint8_t* FINIAL_RESTRICT x, int64_t rows, int64_t begin,
                int64_t end, int64_t blocks, const Target& target, float* FINIAL_RESTRICT c) {
  const Rows taken = rows_of(x, rows, begin, end, blocks);
  if (rows <= TILE || taken.rows == 1)
    return FEW_INT8<Q>[static_cast<size_t>(taken.rows - 1)](w, taken.x[0], blocks, c);
#if defined(FINIAL_TILES)
  (void)target;  // fewer rows than multiply_tiles takes, or beside a panel of another format in a gated product
  for (int64_t i = 0; i < taken.tiles; c += taken.count[i++] * PANEL)
    FEW_INT8<Q>[static_cast<size_t>(taken.count[i] - 1)](w, taken.x[i], blocks, c);
#else
  for (int64_t i = 0; i < taken.rows * PANEL; i += W) store(c + i, zero());
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK) {
    V scale[PANEL_VECTORS];
    for (int v = 0; v < PANEL_VECTORS; ++v) scale[v] = load_f16(w + v * W * 2);
    expect(target, taken.rows * b / blocks, taken.rows * (b + 1) / blocks);
#if defined(FINIAL_INT8_TABLE)
    if (taken.rows >= TABLE_ROWS) {
      add_rows<Q>(w, Table(scale), taken, b, c);
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
