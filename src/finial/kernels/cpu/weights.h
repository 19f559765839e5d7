// Weights to vectors of floats. Shapes: a row is n_in elements in a format of quants.py; a chunk is CHUNK of them.
//
// Decoding is exact to the bit against quants.py in every instruction set (tests/test_cpu_native.py), so that nothing
// downstream depends on where a weight was decoded.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace finial::FINIAL_ISA {

// Any format, one element at a time; n whole blocks.
void decode(Format format, const uint8_t* source, int64_t n, float* out);

constexpr int CHUNK = W * ACC > 32 ? W * ACC : 32;  // whole accumulator rounds and whole blocks of 32
constexpr int VECTORS = CHUNK / W;

// The formats that are decoded in registers, chunk by chunk.
struct LoadF32 {
  static constexpr int64_t CHUNK_BYTES = CHUNK * 4;
  FINIAL_INLINE void chunk(const uint8_t* p, V (&w)[VECTORS]) {
    for (int i = 0; i < VECTORS; ++i) w[i] = load(reinterpret_cast<const float*>(p) + i * W);
  }
};

struct LoadF16 {
  static constexpr int64_t CHUNK_BYTES = CHUNK * 2;
  FINIAL_INLINE void chunk(const uint8_t* p, V (&w)[VECTORS]) {
    for (int i = 0; i < VECTORS; ++i) w[i] = load_f16(p + i * W * 2);
  }
};

struct LoadBF16 {
  static constexpr int64_t CHUNK_BYTES = CHUNK * 2;
  FINIAL_INLINE void chunk(const uint8_t* p, V (&w)[VECTORS]) {
    for (int i = 0; i < VECTORS; ++i) w[i] = load_bf16(p + i * W * 2);
  }
};

struct LoadQ8_0 {  // f16 d, int8 q[32]; d q is exact in float32
  static constexpr int64_t CHUNK_BYTES = CHUNK / 32 * 34;
  FINIAL_INLINE void chunk(const uint8_t* p, V (&w)[VECTORS]) {
    for (int b = 0; b < CHUNK / 32; ++b, p += 34) {
      const V d = set1(half_to_float(p));
      for (int i = 0; i < 32 / W; ++i) w[b * (32 / W) + i] = mul(d, load_i8(p + 2 + i * W));
    }
  }
};

struct LoadQ4_0 {  // f16 d, 16 bytes: elements 0-15 in the low nibbles, 16-31 in the high; d (q - 8) is exact in
                   // float32
  static constexpr int64_t CHUNK_BYTES = CHUNK / 32 * 18;
  FINIAL_INLINE void chunk(const uint8_t* p, V (&w)[VECTORS]) {
    constexpr int HALF = 16 / W;
    for (int b = 0; b < CHUNK / 32; ++b, p += 18) {
      const Levels levels = levels_q4(half_to_float(p));
      for (int i = 0; i < HALF; ++i) {
        w[b * 2 * HALF + i] = pick_low(levels, p + 2 + i * W);
        w[b * 2 * HALF + HALF + i] = pick_high(levels, p + 2 + i * W);
      }
    }
  }
};

}  // namespace finial::FINIAL_ISA
