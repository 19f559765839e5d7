// NEON of ARMv8.0, which every 64-bit ARM has: four floats, eight accumulators (four FMAs per cycle of latency 4 want
// sixteen chains; a matrix block of 4 x 3 carries two of each product in 24 of 32 registers). "neon_dot" is the same
// with the four-byte dot product of ARMv8.2 (FEAT_DotProd).
#pragma once

#include <arm_neon.h>

namespace finial::FINIAL_ISA {

using V = float32x4_t;
constexpr int W = 4;
constexpr int ACC = 8;
constexpr int PASS = 2;
constexpr int WIDE = 4;

FINIAL_INLINE V zero() { return vdupq_n_f32(0); }
FINIAL_INLINE V set1(float x) { return vdupq_n_f32(x); }
FINIAL_INLINE V load(const float* p) { return vld1q_f32(p); }
FINIAL_INLINE V load_n(const float* p, int64_t n) {
  if (n <= 0) return zero();
  if (n == 1) return vsetq_lane_f32(*p, zero(), 0);
  const V two = vcombine_f32(vld1_f32(p), vdup_n_f32(0));
  return n == 2 ? two : n == 3 ? vsetq_lane_f32(p[2], two, 2) : load(p);
}
FINIAL_INLINE void store(float* p, V a) { vst1q_f32(p, a); }
FINIAL_INLINE void store_n(float* p, V a, int64_t n) {
  if (n >= 4) return store(p, a);
  if (n >= 2) vst1_f32(p, vget_low_f32(a));
  if (n == 1) *p = vgetq_lane_f32(a, 0);
  if (n == 3) p[2] = vgetq_lane_f32(a, 2);
}

FINIAL_INLINE V add(V a, V b) { return vaddq_f32(a, b); }
FINIAL_INLINE V sub(V a, V b) { return vsubq_f32(a, b); }
FINIAL_INLINE V mul(V a, V b) { return vmulq_f32(a, b); }
FINIAL_INLINE V div(V a, V b) { return vdivq_f32(a, b); }
FINIAL_INLINE V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
FINIAL_INLINE V max(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // b where either is NaN
FINIAL_INLINE V min(V a, V b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
FINIAL_INLINE V absolute(V a) { return vabsq_f32(a); }
FINIAL_INLINE float sum(V a) { return vaddvq_f32(a); }  // (0 + 1) + (2 + 3)
FINIAL_INLINE float largest(V a) { return vmaxvq_f32(a); }
FINIAL_INLINE V sum_each(const V (&a)[W]) { return vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])); }

FINIAL_INLINE V power_of_two(int32x4_t n) {  // 2^n for -126 <= n <= 127
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
// a * 2^n for integral |n| <= 252, in two factors so that a subnormal or infinite result is right.
FINIAL_INLINE V scale_by_power(V a, V n) {
  const int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1);
  return vmulq_f32(vmulq_f32(a, power_of_two(half)), power_of_two(vsubq_s32(whole, half)));
}
FINIAL_INLINE V round(V a) { return vrndnq_f32(a); }

FINIAL_INLINE uint16x4_t load_u16(const uint8_t* p) { return vreinterpret_u16_u8(vld1_u8(p)); }
FINIAL_INLINE V load_bf16(const uint8_t* p) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(load_u16(p)), 16)); }
FINIAL_INLINE void load_bf16_pair(const uint8_t* p, V& even, V& odd) {
  const uint32x4_t x = vreinterpretq_u32_u8(vld1q_u8(p));
  even = vreinterpretq_f32_u32(vshlq_n_u32(x, 16));
  odd = vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xFFFF0000u)));
}
FINIAL_INLINE void part(V a, V b, V& even, V& odd) { even = vuzp1q_f32(a, b), odd = vuzp2q_f32(a, b); }
FINIAL_INLINE void join(V even, V odd, V& a, V& b) { a = vzip1q_f32(even, odd), b = vzip2q_f32(even, odd); }
FINIAL_INLINE V load_f16(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(load_u16(p))); }
FINIAL_INLINE float half_to_float(const uint8_t* p) {
  __fp16 half;
  std::memcpy(&half, p, 2);
  return half;
}
FINIAL_INLINE V set1_half(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half)));
}
FINIAL_INLINE uint16x4_t load_u8(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return vget_low_u16(vmovl_u8(vcreate_u8(word)));
}
FINIAL_INLINE V load_i8(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(word));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}

// Round to nearest even; a NaN stays a quiet NaN.
FINIAL_INLINE void store_bf16(uint8_t* p, V a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  const uint32x4_t out = vbslq_u32(vceqq_f32(a, a), rounded, quiet);
  vst1_u8(p, vreinterpret_u8_u16(vshrn_n_u32(out, 16)));
}

using Levels = V;  // no table of sixteen floats fits a register: the factor d
FINIAL_INLINE Levels levels_q4(float d) { return set1(d); }
FINIAL_INLINE V level(Levels d, uint16x4_t nibble) {
  return vmulq_f32(d, vcvtq_f32_s32(vsubl_s16(vreinterpret_s16_u16(nibble), vdup_n_s16(8))));
}
// The W nibbles of the W bytes at p: low ones, or high ones.
FINIAL_INLINE V pick_low(Levels d, const uint8_t* p) { return level(d, vand_u16(load_u8(p), vdup_n_u16(15))); }
FINIAL_INLINE V pick_high(Levels d, const uint8_t* p) { return level(d, vshr_n_u16(load_u8(p), 4)); }

// Products of packed weights. I: W lanes of int32, or of four bytes.
#define FINIAL_PACKS_INT8 1
using I = int32x4_t;
constexpr uint32_t BIAS_Q8 = 0;  // packed bytes are q itself
FINIAL_INLINE I load_i(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
FINIAL_INLINE I broadcast(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return vdupq_n_s32(word);
}
FINIAL_INLINE I start_q8(int32_t) { return vdupq_n_s32(0); }
FINIAL_INLINE I start_q4(int32_t offset) { return vdupq_n_s32(offset); }
FINIAL_INLINE I biased_q8(I w) { return w; }
FINIAL_INLINE I dot_q8(I acc, I w, I x) {
  const int8x16_t a = vreinterpretq_s8_s32(w), b = vreinterpretq_s8_s32(x);
#if defined(FINIAL_ISA_neon_dot)
  return vdotq_s32(acc, a, b);
#else
  // Pairs are summed in 16 bits: |q| <= 128 times |x| <= 127 twice is 32512.
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vpadalq_s16(acc, vpaddq_s16(low, high));
#endif
}
FINIAL_INLINE I dot_q4(I acc, I w, I x) { return dot_q8(acc, w, x); }
FINIAL_INLINE I low_nibbles(I a) { return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(a), vdupq_n_u8(15))); }
FINIAL_INLINE I high_nibbles(I a) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(a), 4)); }
// Bytes [n] of three planes to four of six bits each (packed_k.h). vsriq shifts right and keeps the upper bits as they
// were, so the fourth is put together from its highest bits down.
FINIAL_INLINE void six_bits(I a, I b, I c, I (&q)[4]) {
  const uint8x16_t x = vreinterpretq_u8_s32(a), y = vreinterpretq_u8_s32(b), z = vreinterpretq_u8_s32(c);
  const uint8x16_t six = vdupq_n_u8(63);
  q[0] = vreinterpretq_s32_u8(vandq_u8(x, six)), q[1] = vreinterpretq_s32_u8(vandq_u8(y, six));
  q[2] = vreinterpretq_s32_u8(vandq_u8(z, six));
  q[3] = vreinterpretq_s32_u8(vshrq_n_u8(vsriq_n_u8(z, vsriq_n_u8(y, x, 2), 2), 2));
}
// Nibbles and bit J of each byte as their fifth.
template <int J>
FINIAL_INLINE I with_fifth(I nibbles, I bits) {
  const uint8x16_t x = vreinterpretq_u8_s32(bits);
  uint8x16_t at = x;
  if constexpr (J < 4) at = vshlq_n_u8(x, 4 - J);
  if constexpr (J > 4) at = vshrq_n_u8(x, J - 4);
  return vreinterpretq_s32_u8(vorrq_u8(vreinterpretq_u8_s32(nibbles), vandq_u8(at, vdupq_n_u8(16))));
}
// acc + products of four times four bytes in each lane; w of BITS bits.
template <int BITS>
FINIAL_INLINE I dot_four(I acc, const I (&w)[4], const I (&x)[4]) {
  for (int j = 0; j < 4; ++j) acc = dot_q8(acc, w[j], x[j]);
  return acc;
}
FINIAL_INLINE void store_i(void* p, I a) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(a)); }
FINIAL_INLINE I add_i(I a, I b) { return vaddq_s32(a, b); }
FINIAL_INLINE V to_floats(I a) { return vcvtq_f32_s32(a); }
FINIAL_INLINE void store_i8(int8_t* p, V a) {  // nearest even
  const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(a));
  const int32x2_t bytes = vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(words, words)));
  const int32_t word = vget_lane_s32(bytes, 0);
  std::memcpy(p, &word, 4);
}
FINIAL_INLINE int32_t sum_i8(const int8_t* p) { return vaddlvq_s8(vld1q_s8(p)); }  // of 16

}  // namespace finial::FINIAL_ISA
