// AMX: eight registers of up to 16 rows of 64 bytes, and products of two of them added to a third.
//
// Their roles here are always the same: 0 to 3 hold results, 4 and 5 rows of activations, 6 and 7 weights. What
// tile_dot_bf16 computes, for row m and column n (Intel SDM volume 2, TDPBF16PS; the tests hold it to that bit for
// bit):
//   even = odd = 0;  for each pair k: even = fma(a[m][2 k], b[k][n][0], even), odd = fma(a[m][2 k + 1], b[k][n][1],
//   odd) c[m][n] += even + odd
// where subnormal inputs and results are zero. The time of a product is 16 cycles for 16 rows, 9 for up to 8, whatever
// its depth; a load takes 8 cycles from the first-level cache and 32 from the second, a store 16 in which no product
// runs (measured on an Intel Xeon of 2024 at about 3.8 GHz: 3.77 TFLOP/s on a core).
#pragma once

#include <math.h>

#include "simd.h"

#if defined(FINIAL_TILES)

namespace finial::FINIAL_ISA {

namespace {

struct TileConfig {  // what the instruction for it reads
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Results and activations of `rows` rows; `depth` rows of weights, which is `depth` words of each row of activations.
  TileConfig(int64_t count, int64_t depth) {
    for (int t = 0; t < 8; ++t) {
      rows[t] = static_cast<uint8_t>(t < 6 ? count : depth);
      row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? 4 * depth : 64);
    }
  }
};

#if !defined(FINIAL_TILES_EMULATED)

// The registers have this shape from here on. To ask for their shape takes 5 ns, to set it 48: a small model's products
// are as short.
struct Tiles {
  Tiles(int64_t rows, int64_t depth) {
    const TileConfig config(rows, depth);
    TileConfig now(0, 0);
    __asm__ volatile("sttilecfg %0" : "=m"(now) : : "memory");
    if (std::memcmp(&now, &config, sizeof config) != 0) __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
};
// What the system keeps of them when it interrupts a thread is given up.
inline void release_tiles() { __asm__ volatile("tilerelease" : : : "memory"); }

template <int T>
FINIAL_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
FINIAL_INLINE void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
// What is not read again soon: it leaves the first-level cache to the rest.
template <int T>
FINIAL_INLINE void tile_load_once(const void* p, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
FINIAL_INLINE void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
FINIAL_INLINE void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
// Signed bytes of both.
template <int C, int A, int B>
FINIAL_INLINE void tile_dot_int8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#else  // the same in plain words, so that tests run the kernels on processors without tile registers

struct Emulated {
  TileConfig config{0, 0};
  uint8_t data[8][16][64] = {};
};
thread_local Emulated emulated;

struct Tiles {
  Tiles(int64_t rows, int64_t depth) { emulated = Emulated{TileConfig(rows, depth), {}}; }
};
inline void release_tiles() { emulated.config = TileConfig(0, 0); }

template <int T>
void tile_zero() {
  std::memset(emulated.data[T], 0, sizeof emulated.data[T]);
}
template <int T>
void tile_load(const void* p, int64_t stride) {
  tile_zero<T>();
  for (int64_t r = 0; r < emulated.config.rows[T]; ++r)
    std::memcpy(emulated.data[T][r], static_cast<const uint8_t*>(p) + r * stride, emulated.config.row_bytes[T]);
}
template <int T>
void tile_load_once(const void* p, int64_t stride) {
  tile_load<T>(p, stride);
}
template <int T>
void tile_store(void* p, int64_t stride) {
  for (int64_t r = 0; r < emulated.config.rows[T]; ++r)
    std::memcpy(static_cast<uint8_t*>(p) + r * stride, emulated.data[T][r], emulated.config.row_bytes[T]);
}

inline float no_subnormal(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0, x) : x; }
inline float bf16_of_pair(const uint8_t* p) { return no_subnormal(bf16_to_float(p)); }
inline float fma_of_tiles(float a, float b, float c) { return no_subnormal(fmaf(a, b, c)); }

template <int C, int A, int B>
void tile_dot_bf16() {
  const Emulated& e = emulated;
  for (int m = 0; m < e.config.rows[C]; ++m)
    for (int n = 0; n < 16; ++n) {
      float even = 0, odd = 0, c;
      for (int k = 0; k < e.config.rows[B]; ++k) {
        const uint8_t *a = e.data[A][m] + 4 * k, *b = e.data[B][k] + 4 * n;
        even = fma_of_tiles(bf16_of_pair(a), bf16_of_pair(b), even);
        odd = fma_of_tiles(bf16_of_pair(a + 2), bf16_of_pair(b + 2), odd);
      }
      std::memcpy(&c, e.data[C][m] + 4 * n, 4);
      c = no_subnormal(no_subnormal(c) + no_subnormal(even + odd));
      std::memcpy(emulated.data[C][m] + 4 * n, &c, 4);
    }
}
template <int C, int A, int B>
void tile_dot_int8() {
  const Emulated& e = emulated;
  for (int m = 0; m < e.config.rows[C]; ++m)
    for (int n = 0; n < 16; ++n) {
      int32_t c;
      std::memcpy(&c, e.data[C][m] + 4 * n, 4);
      for (int k = 0; k < 4 * e.config.rows[B]; ++k)
        c += static_cast<int8_t>(e.data[A][m][k]) * static_cast<int8_t>(e.data[B][k / 4][4 * n + k % 4]);
      std::memcpy(emulated.data[C][m] + 4 * n, &c, 4);
    }
}

#endif

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
