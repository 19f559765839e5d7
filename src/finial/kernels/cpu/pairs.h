// The one step of which products with bf16 are made, of weights in panels, of keys and of values: a vector's lanes hold
// pairs of bf16, and each row brings a pair of its own, which all lanes meet. Rows are rounded to bf16 where an
// instruction multiplies such pairs, and stay float32 elsewhere: then a shift and a mask make floats of the lanes, once
// for all rows, and each row costs two fma.
#pragma once

#include "simd.h"

#if defined(FINIAL_PACKS_BF16) || defined(FINIAL_PACKS_F32)
#define FINIAL_BF16_PANELS 1

namespace finial::FINIAL_ISA {

#if defined(FINIAL_PACKS_BF16)

using Two = uint32_t;  // what a row brings: neighbours in bf16

// acc[r][v] += pair v at w . x[r * step], both products in one chain.
template <int M, int N>
FINIAL_INLINE void add_pair(const uint8_t* w, const Two* x, int64_t step, V (&acc)[M][N]) {
  if constexpr (M > N) {
    I pairs[N];
    for (int v = 0; v < N; ++v) pairs[v] = load_i(w + v * W * 4);
    for (int r = 0; r < M; ++r) {
      const I two = broadcast(x + r * step);
      for (int v = 0; v < N; ++v) acc[r][v] = dot_bf16(acc[r][v], pairs[v], two);
    }
  } else {
    I two[M];
    for (int r = 0; r < M; ++r) two[r] = broadcast(x + r * step);
    for (int v = 0; v < N; ++v) {
      const I pair = load_i(w + v * W * 4);
      for (int r = 0; r < M; ++r) acc[r][v] = dot_bf16(acc[r][v], pair, two[r]);
    }
  }
}

// out [n] += the even ones, or the odd ones, of pairs at w, times x's.
FINIAL_INLINE void add_half(const uint8_t* w, const Two* x, bool odd, float* out) {
  const I pair = load_i(w);
  store(out, dot_bf16(load(out), odd ? odd_halves(pair) : even_halves(pair), broadcast(x)));
}

#else

struct Two {  // what a row brings: neighbours
  float first, second;
};

#if defined(FINIAL_AVX2)

// acc[r][v] += the even ones, or the odd ones, of pair v at w, times row r's. Where sixteen registers hold twelve sums,
// each step stays where it stands, or the compiler takes some to memory and back.
template <bool ODD, int M, int N>
FINIAL_INLINE void add_halves(const uint8_t*& w, const Two*& x, int64_t step, V (&acc)[M][N]) {
  V floats[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) {
    floats[v] = ODD ? load_bf16_odd(w + v * W * 4) : load_bf16_even(w + v * W * 4);
    keep_in_register(floats[v]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r) {
    V a = set1(ODD ? x[r * step].second : x[r * step].first);
    keep_in_register(a);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[r][v] = fma(floats[v], a, acc[r][v]), keep_in_register(acc[r][v]);
    load_afresh(x);
  }
  load_afresh(w), load_afresh(x);
}

#endif

template <int M, int N>
FINIAL_INLINE void add_pair(const uint8_t* w, const Two* x, int64_t step, V (&acc)[M][N]) {
#if defined(FINIAL_AVX2)
  if constexpr (M > 2) {
    add_halves<false>(w, x, step, acc), add_halves<true>(w, x, step, acc);
    return;
  }
#endif
  if constexpr (M > N || W < 16) {  // the even ones of all, then the odd ones, loaded once more: few registers
    V floats[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) floats[v] = load_bf16_even(w + v * W * 4);
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r) {
      const V a = set1(x[r * step].first);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) acc[r][v] = fma(floats[v], a, acc[r][v]);
    }
    load_afresh(w), load_afresh(x);
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) floats[v] = load_bf16_odd(w + v * W * 4);
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r) {
      const V a = set1(x[r * step].second);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) acc[r][v] = fma(floats[v], a, acc[r][v]);
    }
  } else {
    V first[M], second[M];
    for (int r = 0; r < M; ++r) first[r] = set1(x[r * step].first), second[r] = set1(x[r * step].second);
    for (int v = 0; v < N; ++v) {
      V even, odd;
      load_bf16_pair(w + v * W * 4, even, odd);
      for (int r = 0; r < M; ++r) acc[r][v] = fma(even, first[r], acc[r][v]);
      for (int r = 0; r < M; ++r) acc[r][v] = fma(odd, second[r], acc[r][v]);
    }
  }
}

FINIAL_INLINE void add_half(const uint8_t* w, const Two* x, bool odd, float* out) {
  const V value = odd ? load_bf16_odd(w) : load_bf16_even(w);
  store(out, fma(value, set1(odd ? x->second : x->first), load(out)));
}

#endif

}  // namespace finial::FINIAL_ISA

#endif
