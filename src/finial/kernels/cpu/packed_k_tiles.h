// The kind of K-quants for tile registers (packed_int8_tiles.h; arithmetic: packed_k.cpp). Included by packed_k.cpp.
//
// A block of 256 inputs of q4_k or q5_k is a chunk: its levels are taken out as bytes [8 groups][8][PANEL][4] once for
// all rows. They are scaled like q4_0's, and what a group's minimum adds comes behind. 512 rows of 1024 inputs on one
// core (Intel Xeon with AMX), TOP/s and with vectors: q4_k 0.58 (0.37), q5_k 0.59 (0.38).
//
// A group of q6_k is two halves with a scale each, so registers would be a quarter deep and take two products and two
// stores where the others have one: 0.83 to 0.95 of the time of vectors from 128 rows on, 1.1 to 1.5 times it below.
// It stays with vectors.
#pragma once

#include "simd.h"

#if defined(FINIAL_TILES)

#include "packed_int8_tiles.h"
#include "packed_k_levels.h"

namespace finial::FINIAL_ISA {

namespace {

// q4_k and q5_k: factors d s and m t.
template <class K>
struct ByGroups {
  static constexpr int64_t CHUNK_BYTES = K::BYTES, FACTORS = 2, STEP = LEVELS_BYTES, TAKEN = CHUNK * LEVELS_BYTES;

  template <int ODD>
  FINIAL_INLINE void take_group(const uint8_t* w, const typename K::Factors& f, int group, uint8_t* levels,
                                float* factors) {
    const uint8_t* pair = w + K::HEAD + group / 2 * K::PAIR;
    for (int v = 0; v < NV; ++v) {
      I q[2][4];
      K::template quads<ODD, 0>(pair, v, q[0]);
      K::template quads<ODD, 1>(pair, v, q[1]);
      for (int j = 0; j < 8; ++j) store_i(levels + j * QUAD + v * W * 4, q[j / 4][j % 4]);
      V scale, least;
      K::template of_group<ODD>(f, pair, group, v, scale, least);
      store(factors + v * W, scale), store(factors + STRIP_WIDTH + v * W, least);
    }
  }
  FINIAL_INLINE const uint8_t* take(const uint8_t* w, int64_t, uint8_t* levels, float* factors) {
    typename K::Factors f;
    K::load(w, f);
    for (int g = 0; g < GROUPS; g += 2) {
      take_group<0>(w, f, g, levels + g * STEP, factors + g * FACTORS * STRIP_WIDTH);
      take_group<1>(w, f, g + 1, levels + (g + 1) * STEP, factors + (g + 1) * FACTORS * STRIP_WIDTH);
    }
    return levels;
  }

  template <int ROWS>
  FINIAL_INLINE void scale(const int32_t* FINIAL_RESTRICT sums, int v, const Scaling& of) {
    const auto factor = [&](int i) { return load(of.factors + i * STRIP_WIDTH + v * W); };
    const V first = factor(0), least = factor(1), second = factor(2), least_too = factor(3);
    float* FINIAL_RESTRICT c = of.c + v * W;
#pragma GCC unroll 16
    for (int64_t r = 0; r < ROWS; ++r, sums += W, c += STRIP_WIDTH) {
      V a = fma(mul(exact(sums), set1(of.x[r].scale)), first, load(c));
      a = fma(least, set1(of.x[r].minimum), a);
      a = fma(mul(exact(sums + SUMS), set1(of.x_too[r].scale)), second, a);
      store(c, fma(least_too, set1(of.x_too[r].minimum), a));
    }
  }
};

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
