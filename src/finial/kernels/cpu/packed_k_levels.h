// How levels and factors of K-quants are taken out of a panel (layouts: packed_k.h), and what a group's sums become.
// Included by packed_k.cpp.
#pragma once

#include "panels.h"

#if defined(FINIAL_PACKS_INT8)

namespace finial::FINIAL_ISA {

namespace {

constexpr int NV = PANEL_VECTORS;
constexpr int QUAD = static_cast<int>(PANEL) * 4;  // bytes of four inputs of a panel
constexpr int GROUPS = 8;                          // of a block

FINIAL_INLINE void load_six(const uint8_t* p, int64_t stride, I (&q)[4]) {
  six_bits(load_i(p), load_i(p + stride), load_i(p + 2 * stride), q);
}

// What q4_k and q5_k have in common: two factors of a block, a scale and a minimum of a group.
template <int BITS>
struct Scaled {
  static constexpr int HEAD = 512;

  struct Factors {
    V d[NV], least[NV];
    alignas(64) uint8_t level[2 * GROUPS * PANEL];
  };

  FINIAL_INLINE void load(const uint8_t* p, Factors& f) {
    for (int v = 0; v < NV; ++v) f.d[v] = load_f16(p + v * W * 2), f.least[v] = load_f16(p + PANEL * 2 + v * W * 2);
    for (int i = 0; i < QUAD; i += W * 4) {
      I q[4];
      load_six(p + PANEL * 4 + i, QUAD, q);
      for (int k = 0; k < 4; ++k) store_i(f.level + k * QUAD + i, q[k]);
    }
  }
  template <int ODD>
  FINIAL_INLINE void of_group(const Factors& f, const uint8_t*, int group, int v, V& scale, V& second) {
    const uint8_t* at = f.level + group * PANEL + v * W;
    scale = mul(f.d[v], load_i8(at)), second = mul(f.least[v], load_i8(at + GROUPS * PANEL));
  }

  template <class Scale>
  FINIAL_INLINE void start(const Int8Block& x, I& low, I& high) {
    low = start_q4(0), high = Scale::start(x);
  }
  FINIAL_INLINE V scaled(V, V scale) { return scale; }
  template <class Scale>
  FINIAL_INLINE V add(const typename Scale::Row& row, I low, I high, V, V second, V product, const Int8Block& x,
                      V acc) {
    acc = fma(Scale::floats(row, add_i(low, high)), product, acc);
    return fma(second, set1(x.minimum), acc);
  }
};

struct Q4K : Scaled<4> {
  static constexpr int LEVEL_BITS = 4, PAIR = 8 * QUAD, BYTES = HEAD + 4 * PAIR;

  // Levels of 16 inputs, half a group, of W outputs.
  template <int ODD, int HALF>
  FINIAL_INLINE void quads(const uint8_t* pair, int v, I (&q)[4]) {
    for (int j = 0; j < 4; ++j) {
      const I both = load_i(pair + (4 * HALF + j) * QUAD + v * W * 4);
      q[j] = ODD ? high_nibbles(both) : low_nibbles(both);
    }
  }
};

struct Q5K : Scaled<5> {
  static constexpr int LEVEL_BITS = 5, PAIR = 10 * QUAD, BYTES = HEAD + 4 * PAIR;

  template <int ODD, int HALF>
  FINIAL_INLINE void quads(const uint8_t* pair, int v, I (&q)[4]) {
    const I bits = load_i(pair + ODD * QUAD + v * W * 4);
    Q4K::quads<ODD, HALF>(pair + 2 * QUAD, v, q);
    q[0] = with_fifth<4 * HALF>(q[0], bits), q[1] = with_fifth<4 * HALF + 1>(q[1], bits);
    q[2] = with_fifth<4 * HALF + 2>(q[2], bits), q[3] = with_fifth<4 * HALF + 3>(q[3], bits);
  }
};

struct Q6K {
  static constexpr int LEVEL_BITS = 6, HEAD = PANEL * 2, GROUP = PANEL * 2 + 6 * QUAD, PAIR = 2 * GROUP,
                       BYTES = HEAD + 4 * PAIR;

  struct Factors {
    V d[NV];
  };

  FINIAL_INLINE void load(const uint8_t* p, Factors& f) {
    for (int v = 0; v < NV; ++v) f.d[v] = load_f16(p + v * W * 2);
  }
  template <int ODD>
  FINIAL_INLINE void of_group(const Factors&, const uint8_t* pair, int, int v, V& scale, V& second) {
    const uint8_t* at = pair + ODD * GROUP + v * W;
    scale = load_i8(at), second = load_i8(at + PANEL);
  }
  template <int ODD, int HALF>
  FINIAL_INLINE void quads(const uint8_t* pair, int v, I (&q)[4]) {
    load_six(pair + ODD * GROUP + PANEL * 2 + 3 * HALF * QUAD + v * W * 4, QUAD, q);
  }
  template <class Scale>
  FINIAL_INLINE void start(const Int8Block& x, I& low, I& high) {  // a level's bias of 32
    low = add_i(start_q4(4 * x.first), Scale::start(x));
    high = add_i(start_q4(4 * (x.offset - x.first)), Scale::start(x));
  }
  FINIAL_INLINE V scaled(V d, V) { return d; }
  template <class Scale>
  FINIAL_INLINE V add(const typename Scale::Row& row, I low, I high, V scale, V second, V product, const Int8Block&,
                      V acc) {
    return fma(fma(Scale::floats(row, high), second, mul(Scale::floats(row, low), scale)), product, acc);
  }
};

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
