// int8 rows with blocks of q8_0 and q4_0 with the sixteen registers of AVX2, where bytes are multiplied in pairs that
// are summed in 16 bits; with AVX-VNNI four bytes are summed in 32 bits by one instruction, for both. Included by
// packed.cpp.
//
// q4_0: a nibble times a byte is below 2^11, so that a block's sixteen products of a lane stay within 16 bits (16 * 15
// * 127 = 30480) and are widened once, not quad by quad: 8 multiplications and additions for a block of a row and a
// vector of outputs, 1 multiplication to widen. q8_0: a sign for the row, a product, a sum and an addition for each
// quad; two nibbles a byte (q + 128 = 16 h + l) or 16 bits a byte come to as many cycles. ROWS rows share a load of
// PAIR vectors of weights; nibbles are unpacked to the first-level cache once for all rows. Every sum is exact, so it
// is the same to the bit as any other way. Measured on one core of an AMD EPYC (Zen 3) at 3.24 GHz, weights and rows in
// the first-level cache, cycles for a block of a row and a vector: q4_0 6.7 and q8_0 12.3, of 5.0 and 10.0 that the
// multiplications and additions alone take.
//
// Up to four rows of q4_0 and two of q8_0 take a block's quads as they come, without a turn through memory and a call
// for each two vectors. GB/s of weights from the second-level cache, one core of the same, best of many, and before, in
// turn: q4_0 1 row 42 (35), 2 rows 26 (14), 3 rows 15 (10), 4 rows 12 (10); q8_0 2 rows 30 (22). Left to
// itself the compiler adds up in a tree and keeps half of the sums on the stack.
#pragma once

#include "packed_int8.h"

#if defined(FINIAL_AVX2)

namespace finial::FINIAL_ISA {

namespace {

#if defined(FINIAL_AVX2_VNNI)
FINIAL_INLINE I multiply_pairs(I acc, I w, I x) { return dot_q4(acc, w, x); }
FINIAL_INLINE I widen(I sums) { return sums; }
#else
FINIAL_INLINE I multiply_pairs(I acc, I w, I x) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x)); }
FINIAL_INLINE I widen(I pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
#endif

constexpr int PAIR = 2;  // vectors of outputs that share a broadcast
constexpr int ROWS_INT8 = 4;

// How a block of each format is multiplied.  weights  where its quads lie, a byte for each weight: [8][PANEL][4].
struct PairsQ4 {
  alignas(32) uint8_t nibbles[32 * PANEL];

  FINIAL_INLINE const uint8_t* weights(const uint8_t* p, PairsQ4& at) {
    for (int64_t i = 0; i < 16 * PANEL; i += 4 * W) {
      const I both = load_i(p + i);
      store_i(at.nibbles + i, low_nibbles(both)), store_i(at.nibbles + 16 * PANEL + i, high_nibbles(both));
    }
    return at.nibbles;
  }
  template <int N>
  FINIAL_INLINE void quad(const I (&w)[PAIR], int r, I x, I (&sums)[N][PAIR]) {
    for (int i = 0; i < PAIR; ++i) sums[r][i] = multiply_pairs(sums[r][i], w[i], x);
  }
  FINIAL_INLINE I total(I pairs, const Int8Block& x) { return add_i(widen(pairs), start_q4(x.offset)); }

  static constexpr int STEPS = 4;
  static constexpr bool IN_ORDER = true;
  struct Taken {
    I low, high;
  };
  using Inputs = Taken;
  FINIAL_INLINE Taken take(const uint8_t* p) {
    I both = load_i(p);
    keep_in_register(both);
    return {low_nibbles(both), high_nibbles(both)};
  }
  FINIAL_INLINE Inputs inputs(const int8_t* q, int step) {
    return {broadcast(q + 4 * step), broadcast(q + 16 + 4 * step)};
  }
  template <bool>
  FINIAL_INLINE void add(I& sum, const Taken& taken, const Inputs& x) {
    sum = multiply_pairs(sum, taken.low, x.low), keep_in_register(sum);
    sum = multiply_pairs(sum, taken.high, x.high), keep_in_register(sum);
  }
};

struct PairsQ8 {
  FINIAL_INLINE const uint8_t* weights(const uint8_t* p, PairsQ8&) { return p; }
  template <int N>
  FINIAL_INLINE void quad(const I (&w)[PAIR], int r, I x, I (&sums)[N][PAIR]) {
    for (int i = 0; i < PAIR; ++i) sums[r][i] = dot_q8(sums[r][i], w[i], x);
  }
  FINIAL_INLINE I total(I sum, const Int8Block& x) { return add_i(sum, start_q8(x.offset_q8)); }

  static constexpr int STEPS = 8;
  static constexpr bool IN_ORDER = false;  // one row reads 2 % more in the compiler's order
  using Taken = I;
  using Inputs = I;
  FINIAL_INLINE Taken take(const uint8_t* p) { return load_i(p); }
  FINIAL_INLINE Inputs inputs(const int8_t* q, int step) { return broadcast(q + 4 * step); }
  template <bool HELD>
  FINIAL_INLINE void add(I& sum, Taken w, const Inputs& x) {
    if (HELD) keep_in_register(w);
    sum = dot_q8(sum, w, x);
    if (HELD) keep_in_register(sum);
  }
};

// Four inputs of N rows with PAIR vectors. The compiler would turn a chain of additions into a tree and then lack
// registers.
template <class P, int N>
FINIAL_INLINE void add_quad(const uint8_t*& from, const int8_t*& q, I (&sums)[N][PAIR]) {
  load_afresh(from), load_afresh(q);
  I w[PAIR];
  for (int i = 0; i < PAIR; ++i) w[i] = load_i(from + i * W * 4), keep_in_register(w[i]);
  for (int r = 0; r < N; ++r) {
    P::template quad<N>(w, r, broadcast(q + r * static_cast<int64_t>(sizeof(Int8Block))), sums);
    for (int i = 0; i < PAIR; ++i) keep_in_register(sums[r][i]);
  }
  from += PANEL * 4, q += 4;
}

// N rows with PAIR vectors of a block, whose weights lie at w.
template <class P, int N>
FINIAL_INLINE void add_block(const uint8_t* w, const V (&scale)[PAIR], const Int8Block* x, float* c) {
  I sums[N][PAIR];
  for (int r = 0; r < N; ++r)
    for (int i = 0; i < PAIR; ++i) sums[r][i] = _mm256_setzero_si256();
  const int8_t* q = x[0].q;
  add_quad<P, N>(w, q, sums), add_quad<P, N>(w, q, sums), add_quad<P, N>(w, q, sums), add_quad<P, N>(w, q, sums);
  add_quad<P, N>(w, q, sums), add_quad<P, N>(w, q, sums), add_quad<P, N>(w, q, sums), add_quad<P, N>(w, q, sums);
  for (int r = 0; r < N; ++r)
    for (int i = 0; i < PAIR; ++i) {
      float* at = c + r * PANEL + i * W;
      store(at, fma(to_floats(P::total(sums[r][i], x[r])), mul(scale[i], set1(x[r].scale)), load(at)));
    }
}

// All rows of a tile, at most N at a time.
template <class P, int N>
FINIAL_APART void add_rows(const uint8_t* w, const V (&scale)[PAIR], const Int8Block* x, int64_t rows, float* c) {
  for (; rows >= N; rows -= N, x += N, c += N * PANEL) add_block<P, N>(w, scale, x, c);
  if constexpr (N > 1)
    if (rows > 0) add_rows<P, N - 1>(w, scale, x, rows, c);
}

template <class Q>
struct PairsOf;
template <>
struct PairsOf<Q4> {
  using type = PairsQ4;
};
template <>
struct PairsOf<Q8> {
  using type = PairsQ8;
};

// sums [N][VS] = N rows times VS vectors of a block's quads, which lie at w as they were packed. One or two rows bring
// what they have of a step, then vectors pass by; more find the step's vectors in registers.
template <class P, int N, int VS>
FINIAL_INLINE void sum_few(const uint8_t* w, const Int8Block* x, I (&sums)[N][VS]) {
  constexpr bool IN_ORDER = N > 1 || P::IN_ORDER;
  for (int r = 0; r < N; ++r)
    for (int i = 0; i < VS; ++i) sums[r][i] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int j = 0; j < P::STEPS; ++j, w += PANEL * 4) {
    if constexpr (N <= 2) {
      typename P::Inputs inputs[N];
#pragma GCC unroll 2
      for (int r = 0; r < N; ++r) inputs[r] = P::inputs(x[r].q, j);
#pragma GCC unroll 4
      for (int i = 0; i < VS; ++i) {
        const typename P::Taken taken = P::take(w + i * W * 4);
#pragma GCC unroll 2
        for (int r = 0; r < N; ++r) P::template add<IN_ORDER>(sums[r][i], taken, inputs[r]);
      }
    } else {
      typename P::Taken taken[VS];
#pragma GCC unroll 4
      for (int i = 0; i < VS; ++i) taken[i] = P::take(w + i * W * 4);
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) {
        const typename P::Inputs inputs = P::inputs(x[r].q, j);
#pragma GCC unroll 4
        for (int i = 0; i < VS; ++i) P::template add<IN_ORDER>(sums[r][i], taken[i], inputs);
        load_afresh(x);
      }
    }
    if (IN_ORDER) load_afresh(w), load_afresh(x);
  }
}

// c [PANEL] = a panel times one row.
template <class Q>
void one_row(const uint8_t* FINIAL_RESTRICT w, const Int8Block* FINIAL_RESTRICT x, int64_t blocks,
             float* FINIAL_RESTRICT c) {
  using P = typename PairsOf<Q>::type;
  const Asked ask = asks(1, {2, 0});
  V acc[PANEL_VECTORS];
  for (V& a : acc) a = zero();
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK, ++x) {
    stream(ask, w, Q::BLOCK);
    I sums[1][PANEL_VECTORS];
    sum_few<P, 1, PANEL_VECTORS>(w + PANEL * 2, x, sums);
    for (int v = 0; v < PANEL_VECTORS; ++v)
      acc[v] = fma(to_floats(P::total(sums[0][v], *x)), mul(load_f16(w + v * W * 2), set1(x->scale)), acc[v]);
  }
  for (int v = 0; v < PANEL_VECTORS; ++v) store(c + v * W, acc[v]);
}

// c [N, PANEL] = a panel times 2 to 4 rows.
template <class Q, int N>
void few_rows(const uint8_t* FINIAL_RESTRICT w, const Int8Block* FINIAL_RESTRICT x, int64_t blocks,
              float* FINIAL_RESTRICT c) {
  using P = typename PairsOf<Q>::type;
  constexpr int VS = N <= 2 ? PANEL_VECTORS : PAIR;
  const Asked ask = asks(N, {TILE + 1, 0});
  for (int64_t i = 0; i < N * PANEL; i += W) store(c + i, zero());
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK, x += N) {
    stream(ask, w, Q::BLOCK);
#pragma GCC unroll 2
    for (int v = 0; v < PANEL_VECTORS; v += VS) {
      I sums[N][VS];
      sum_few<P, N, VS>(w + PANEL * 2 + v * W * 4, x, sums);
#pragma GCC unroll 4
      for (int i = 0; i < VS; ++i) {
        const V scale = load_f16(w + (v + i) * W * 2);
#pragma GCC unroll 4
        for (int r = 0; r < N; ++r) {
          float* y = c + r * PANEL + (v + i) * W;
          store(y, fma(to_floats(P::total(sums[r][i], x[r])), mul(scale, set1(x[r].scale)), load(y)));
        }
      }
    }
  }
}

// c [rows of the tiles, PANEL] = a panel times tiles [begin, end) of `rows` rounded rows at x.
template <class Q>
void tiles_int8(const uint8_t* FINIAL_RESTRICT w, const uint8_t* FINIAL_RESTRICT x, int64_t rows, int64_t begin,
                int64_t end, int64_t blocks, const Target& target, float* FINIAL_RESTRICT c) {
  using P = typename PairsOf<Q>::type;
  const Rows taken = rows_of(x, rows, begin, end, blocks);
  if (taken.rows == 1) return one_row<Q>(w, taken.x[0], blocks, c);
  if (rows == 2) return few_rows<Q, 2>(w, taken.x[0], blocks, c);
  if constexpr (Q::WORDS == 4) {  // three and four rows of q8_0 read 10 and 20 % less so, from memory
    if (rows == 3) return few_rows<Q, 3>(w, taken.x[0], blocks, c);
    if (rows == 4) return few_rows<Q, 4>(w, taken.x[0], blocks, c);
  }
  const int64_t share = (Q::BLOCK + 64 * taken.tiles) / (64 * taken.tiles) * 64;
  const int64_t soon = rows <= TILE ? AHEAD : Q::BLOCK;
  for (int64_t i = 0; i < taken.rows * PANEL; i += W) store(c + i, zero());
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK) {
    P room;
    const uint8_t* weights = P::weights(w + PANEL * 2, room);
    if (rows > TILE) expect(target, taken.rows * b / blocks, taken.rows * (b + 1) / blocks);
    float* at = c;
    for (int64_t i = 0; i < taken.tiles; ++i) {
      prefetch(w + soon + i * share, share);
      const int64_t count = taken.count[i];
      for (int v = 0; v < PANEL_VECTORS; v += PAIR) {
        const V scale[PAIR] = {load_f16(w + v * W * 2), load_f16(w + (v + 1) * W * 2)};
        add_rows<P, ROWS_INT8>(weights + v * W * 4, scale, taken.x[i] + b * count, count, at + v * W);
      }
      at += count * PANEL;
    }
  }
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
