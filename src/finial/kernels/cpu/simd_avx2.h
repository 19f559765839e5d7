// AVX2, FMA and F16C, and AVX-VNNI where it is there: eight floats, two accumulators, both of them in a 2 x 3 block of
// sixteen registers: one at a time in 4 x 3 would load each cache line twice.
#pragma once

#include <immintrin.h>

namespace finial::FINIAL_ISA {

using V = __m256;
constexpr int W = 8;
constexpr int ACC = 2;
constexpr int PASS = 2;
constexpr int WIDE = 2;

FINIAL_INLINE __m256i mask(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

FINIAL_INLINE V zero() { return _mm256_setzero_ps(); }
FINIAL_INLINE V set1(float x) { return _mm256_set1_ps(x); }
FINIAL_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
FINIAL_INLINE V load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, mask(n)); }
FINIAL_INLINE void store(float* p, V a) { _mm256_storeu_ps(p, a); }
FINIAL_INLINE void store_n(float* p, V a, int64_t n) { _mm256_maskstore_ps(p, mask(n), a); }

FINIAL_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
FINIAL_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
FINIAL_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
FINIAL_INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
FINIAL_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
FINIAL_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }  // b where either is NaN
FINIAL_INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
FINIAL_INLINE float sum(V a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
FINIAL_INLINE float largest(V a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

FINIAL_INLINE V power_of_two(__m256i n) {  // 2^n for -126 <= n <= 127
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// a * 2^n for integral |n| <= 252, in two factors so that a subnormal or infinite result is right.
FINIAL_INLINE V scale_by_power(V a, V n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}
// Its floor and what is beyond, for x <= 0; below -150, where 2^x is no float, that.
FINIAL_INLINE void split_whole(V x, V& whole, V& fraction) {
  x = max(set1(-150.0f), x);  // NaN comes through
  whole = _mm256_round_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), fraction = sub(x, whole);
}
FINIAL_INLINE V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

FINIAL_INLINE V load_bf16(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
FINIAL_INLINE V load_bf16_even(const uint8_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
}
FINIAL_INLINE V load_bf16_odd(const uint8_t* p) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), upper));
}
FINIAL_INLINE void load_bf16_pair(const uint8_t* p, V& even, V& odd) {
  even = load_bf16_even(p), odd = load_bf16_odd(p);
}
FINIAL_INLINE V sorted_pairs(V a) {  // quarters 0, 2, 1, 3
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xD8));
}
FINIAL_INLINE void part(V a, V b, V& even, V& odd) {
  even = sorted_pairs(_mm256_shuffle_ps(a, b, 0x88));
  odd = sorted_pairs(_mm256_shuffle_ps(a, b, 0xDD));
}
FINIAL_INLINE void join(V even, V odd, V& a, V& b) {
  const V x = _mm256_unpacklo_ps(even, odd), y = _mm256_unpackhi_ps(even, odd);
  a = _mm256_permute2f128_ps(x, y, 0x20);
  b = _mm256_permute2f128_ps(x, y, 0x31);
}
// Four vectors to one: half k of the result holds half k of each, summed.
FINIAL_INLINE V sum_quarters(V a, V b, V c, V d) {
  const V x = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const V y = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256d u = _mm256_castps_pd(x), v = _mm256_castps_pd(y);
  return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(u, v)), _mm256_castpd_ps(_mm256_unpackhi_pd(u, v)));
}
FINIAL_INLINE V sum_each(const V (&a)[W]) {
  const V x = sum_quarters(a[0], a[1], a[2], a[3]), y = sum_quarters(a[4], a[5], a[6], a[7]);
  return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
}
FINIAL_INLINE V load_f16(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FINIAL_INLINE float half_to_float(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
}
FINIAL_INLINE V set1_half(const uint8_t* p) {
  int16_t half;
  std::memcpy(&half, p, 2);
  return _mm256_cvtph_ps(_mm_set1_epi16(half));
}
FINIAL_INLINE V load_i8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// As bf16 in the upper half of each lane, nearest even; a NaN stays a quiet NaN.
FINIAL_INLINE __m256i rounded_to_bf16(V a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}
FINIAL_INLINE void store_bf16(uint8_t* p, V a) {
  const __m256i out = _mm256_srli_epi32(rounded_to_bf16(a), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
// Words whose halves are these, as bf16, nearest even.
FINIAL_INLINE __m256i bf16_words(V low, V high) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  return _mm256_or_si256(_mm256_srli_epi32(rounded_to_bf16(low), 16), _mm256_and_si256(rounded_to_bf16(high), upper));
}
// W floats to bf16, nearest even, as the even or the odd ones of 2 W; the others stay as they are.
FINIAL_INLINE void store_bf16_halves(uint8_t* p, V a, bool odd) {
  uint16_t packed[W];
  store_bf16(reinterpret_cast<uint8_t*>(packed), a);
  for (int i = 0; i < W; ++i) std::memcpy(p + 4 * i + (odd ? 2 : 0), &packed[i], 2);
}

// Four pairs of each of four rows to [pair][rows]: pairs of neighbouring rows, `rows` of them from one to the next.
FINIAL_INLINE void store_four(float* out, int64_t rows, V a, V b, V c, V d) {
  const auto low = [](V x, V y) { return _mm256_unpacklo_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)); };
  const auto high = [](V x, V y) { return _mm256_unpackhi_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)); };
  const __m256d even[2] = {low(a, b), low(c, d)}, odd[2] = {high(a, b), high(c, d)};  // pairs 0 and 2, 1 and 3
  for (int two = 0; two < 2; ++two) {
    const auto to = [&](int pair) { return reinterpret_cast<double*>(out + (pair * rows + 2 * two) * 2); };
    _mm_storeu_pd(to(0), _mm256_castpd256_pd128(even[two]));
    _mm_storeu_pd(to(1), _mm256_castpd256_pd128(odd[two]));
    _mm_storeu_pd(to(2), _mm256_extractf128_pd(even[two], 1));
    _mm_storeu_pd(to(3), _mm256_extractf128_pd(odd[two], 1));
  }
}

using Levels = __m256;  // no table of sixteen fits a register: the factor d
FINIAL_INLINE Levels levels_q4(float d) { return set1(d); }
FINIAL_INLINE V level(Levels d, __m256i nibble) {
  return _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_sub_epi32(nibble, _mm256_set1_epi32(8))));
}
// The W nibbles of the W bytes at p: low ones, or high ones.
FINIAL_INLINE V pick_low(Levels d, const uint8_t* p) {
  const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return level(d, _mm256_and_si256(x, _mm256_set1_epi32(15)));
}
FINIAL_INLINE V pick_high(Levels d, const uint8_t* p) {
  const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return level(d, _mm256_srli_epi32(x, 4));
}

// Products of packed weights. I: W lanes of int32, or of four bytes.
#define FINIAL_PACKS_INT8 1
#define FINIAL_PACKS_F32 1  // bf16 panels take float32 rows
using I = __m256i;
#if defined(FINIAL_AVX2_VNNI)
constexpr uint32_t BIAS_Q8 = 0x80808080u;  // packed bytes are q + 128, for the instruction takes them unsigned
#else
constexpr uint32_t BIAS_Q8 = 0;  // packed bytes are q itself
#endif
FINIAL_INLINE I load_i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
FINIAL_INLINE I broadcast(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}
FINIAL_INLINE I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
FINIAL_INLINE I start_q4(int32_t offset) { return _mm256_set1_epi32(offset); }
#if defined(FINIAL_AVX2_VNNI)
FINIAL_INLINE I start_q8(int32_t offset) { return _mm256_set1_epi32(offset); }
FINIAL_INLINE I dot_q4(I acc, I w, I x) {
#if defined(FINIAL_ISA_avx2_vnni)
  return _mm256_dpbusd_avx_epi32(acc, w, x);
#else
  const I low =
      _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  return _mm256_add_epi32(acc,
                          _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(x, 8))));
#endif
}
FINIAL_INLINE I dot_q8(I acc, I w, I x) { return dot_q4(acc, w, x); }
#else
FINIAL_INLINE I start_q8(int32_t) { return _mm256_setzero_si256(); }
// Pairs of bytes are summed in 16 bits: |q| <= 128 times |x| <= 127 twice is 32512, so nothing saturates.
FINIAL_INLINE I dot_q8(I acc, I w, I x) {
  const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
FINIAL_INLINE I dot_q4(I acc, I w, I x) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
#endif
FINIAL_INLINE I biased_q8(I w) { return w; }
FINIAL_INLINE I low_nibbles(I a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
FINIAL_INLINE I high_nibbles(I a) { return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15)); }
// Bytes [n] of three planes to four of six bits each (packed_k.h).
FINIAL_INLINE void six_bits(I a, I b, I c, I (&q)[4]) {
  const I six = _mm256_set1_epi8(63);
  q[0] = _mm256_and_si256(a, six), q[1] = _mm256_and_si256(b, six), q[2] = _mm256_and_si256(c, six);
  const I low = _mm256_and_si256(_mm256_srli_epi16(a, 6), _mm256_set1_epi8(3));
  const I middle = _mm256_and_si256(_mm256_srli_epi16(b, 4), _mm256_set1_epi8(12));
  const I high = _mm256_and_si256(_mm256_srli_epi16(c, 2), _mm256_set1_epi8(48));
  q[3] = _mm256_or_si256(_mm256_or_si256(low, middle), high);
}
// Nibbles and bit J of each byte as their fifth.
template <int J>
FINIAL_INLINE I with_fifth(I nibbles, I bits) {
  const I at = J < 4 ? _mm256_slli_epi16(bits, J < 4 ? 4 - J : 0) : _mm256_srli_epi16(bits, J < 4 ? 0 : J - 4);
  return _mm256_or_si256(nibbles, _mm256_and_si256(at, _mm256_set1_epi8(16)));
}
// acc + products of four times four bytes in each lane; w of BITS bits. In 16 bits a pair of products is below 2^(BITS
// + 8), so that four pairs of 5 bits (31 * 127 * 2 * 4 = 31496) and two of 6 bits stay within them.
template <int BITS>
FINIAL_INLINE I dot_four(I acc, const I (&w)[4], const I (&x)[4]) {
  static_assert(BITS <= 6, "pairs of pairs must fit 16 bits");
#if defined(FINIAL_AVX2_VNNI)
  for (int j = 0; j < 4; ++j) acc = dot_q4(acc, w[j], x[j]);
  return acc;
#else
  const I one = _mm256_set1_epi16(1);
  const I a = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], x[0]), _mm256_maddubs_epi16(w[1], x[1]));
  const I b = _mm256_add_epi16(_mm256_maddubs_epi16(w[2], x[2]), _mm256_maddubs_epi16(w[3], x[3]));
  if (BITS <= 5) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_add_epi16(a, b), one));
  return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(a, one), _mm256_madd_epi16(b, one)));
#endif
}
FINIAL_INLINE void store_i(void* p, I a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
FINIAL_INLINE V to_floats(I a) { return _mm256_cvtepi32_ps(a); }
FINIAL_INLINE V absolute(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
FINIAL_INLINE void store_i8(int8_t* p, V a) {  // nearest even
  const __m256i x = _mm256_cvtps_epi32(a);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
FINIAL_INLINE int32_t sum_i8(const int8_t* p) {  // of 16
  int32_t total = 0;
  for (int i = 0; i < 16; ++i) total += p[i];
  return total;
}

}  // namespace finial::FINIAL_ISA
