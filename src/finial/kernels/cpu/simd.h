// The few vector operations that kernels are written in, once per instruction set. Included after FINIAL_ISA is set.
//
//   V            W floats. Loads and stores take any alignment.
//   ACC          accumulators of a dot product: element k goes to lane k % W of accumulator (k / W) % ACC. Every dot
//                product of every kernel keeps this order, which makes results independent of blocking and batching.
//   PASS         how many of them a matrix block carries at a time, for WIDE rows of weights; see matmul.cpp.
//   load_n       the first n < W elements, the rest zero;  store_n  only the first n.
//   load_bf16_pair  2 W elements, even ones to one vector, odd ones to the other: a shift and a mask, no shuffle.
//   part, join   two vectors of neighbours to even and odd ones, and back.  sum_each  lane i is the sum of a[i].
//   levels_q4    sixteen values d * (0 - 8) … d * (15 - 8);  pick  looks W of them up by nibble.
//
// Everything here is in the namespace of its instruction set, and kernels use no templates of the standard library: an
// inline function compiled for AVX-512 must never be the copy that the linker keeps for the baseline.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(_MSC_VER)
#define FINIAL_INLINE static __forceinline
#define FINIAL_RESTRICT __restrict
#define FINIAL_APART __declspec(noinline)
#define FINIAL_RARE __declspec(noinline)
#else
#define FINIAL_INLINE static inline __attribute__((always_inline))
#define FINIAL_RESTRICT __restrict__
#define FINIAL_APART __attribute__((noinline))
#define FINIAL_RARE __attribute__((noinline, cold))
#endif

// avx2_vnni: AVX2 with an instruction that multiplies four bytes; avx2_vnni_emulated: with plain words for it, for
// tests. avx512_vnni: AVX-512 without its instructions for bf16; amx: with tile registers beside it; amx_emulated: with
// what tiles.h makes of them, for tests.
#if defined(FINIAL_ISA_amx_emulated)
#define FINIAL_TILES_EMULATED 1
#endif
#if defined(FINIAL_ISA_amx) || defined(FINIAL_TILES_EMULATED)
#define FINIAL_TILES 1
#endif
#if defined(FINIAL_ISA_avx512) || defined(FINIAL_ISA_avx512_vnni) || defined(FINIAL_TILES)
#define FINIAL_AVX512 1
#endif

#if defined(FINIAL_ISA_avx2_vnni) || defined(FINIAL_ISA_avx2_vnni_emulated)
#define FINIAL_AVX2_VNNI 1
#endif
#if defined(FINIAL_ISA_avx2) || defined(FINIAL_AVX2_VNNI)
#define FINIAL_AVX2 1
#endif

namespace finial::FINIAL_ISA {

FINIAL_INLINE float bf16_to_float(const uint8_t* source) {
  uint16_t upper;
  std::memcpy(&upper, source, 2);
  const uint32_t bits = static_cast<uint32_t>(upper) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

}  // namespace finial::FINIAL_ISA

#if defined(FINIAL_AVX512)
#include "simd_avx512.h"
#elif defined(FINIAL_AVX2)
#include "simd_avx2.h"
#elif defined(FINIAL_ISA_neon) || defined(FINIAL_ISA_neon_dot)
#include "simd_neon.h"
#else
#include "simd_baseline.h"
#endif

namespace finial::FINIAL_ISA {

// A value that is used several times: GCC would fold its load into each use and so load it as often.
template <class T>
FINIAL_INLINE void keep_in_register(T& a) {
#if defined(__GNUC__) && defined(__x86_64__)
  __asm__("" : "+v"(a));
#else
  (void)a;
#endif
}

// What comes from here is loaded here: not kept from before, and not asked for early, in registers that are wanted.
template <class T>
FINIAL_INLINE void load_afresh(const T*& p) {
#if defined(__GNUC__)
  __asm__("" : "+r"(p));
#else
  (void)p;
#endif
}

#if !defined(FINIAL_AVX512)
FINIAL_INLINE void load_bf16_pair_n(const uint8_t* p, int64_t n, V& even, V& odd) {
  uint8_t whole[4 * W] = {};
  std::memcpy(whole, p, static_cast<size_t>(2 * n));
  load_bf16_pair(whole, even, odd);
}
#endif

}  // namespace finial::FINIAL_ISA
