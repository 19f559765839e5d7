// AVX-512 F, BW, VL, DQ: sixteen floats, four accumulators (they hide the latency of one FMA per cycle).
#pragma once

#include <immintrin.h>

namespace finial::FINIAL_ISA {

using V = __m512;
constexpr int W = 16;
constexpr int ACC = 4;
constexpr int PASS = 2;
constexpr int WIDE = 4;

FINIAL_INLINE __mmask16 mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

FINIAL_INLINE V zero() { return _mm512_setzero_ps(); }
FINIAL_INLINE V set1(float x) { return _mm512_set1_ps(x); }
FINIAL_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
FINIAL_INLINE V load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
FINIAL_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a); }
FINIAL_INLINE void store_n(float* p, V a, int64_t n) { _mm512_mask_storeu_ps(p, mask(n), a); }

FINIAL_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
FINIAL_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
FINIAL_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
FINIAL_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
FINIAL_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
FINIAL_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where either is NaN
FINIAL_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
FINIAL_INLINE float sum(V a) { return _mm512_reduce_add_ps(a); }
FINIAL_INLINE float largest(V a) { return _mm512_reduce_max_ps(a); }

// a * 2^n for integral n, also where the result is subnormal or infinite.
FINIAL_INLINE V scale_by_power(V a, V n) { return _mm512_scalef_ps(a, n); }
// n where a = 2^n m and 1 <= m < 2; NaN for NaN.
FINIAL_INLINE V exponent(V a) { return _mm512_getexp_ps(a); }
// Its floor and what is beyond; scale_by_power takes the floor itself.
FINIAL_INLINE void split_whole(V x, V& whole, V& fraction) {
  whole = x, fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
FINIAL_INLINE V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

FINIAL_INLINE V load_bf16(const uint8_t* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
FINIAL_INLINE void split_bf16(__m512i x, V& even, V& odd) {
  even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
FINIAL_INLINE void load_bf16_pair(const uint8_t* p, V& even, V& odd) { split_bf16(_mm512_loadu_si512(p), even, odd); }
FINIAL_INLINE V load_bf16_even(const uint8_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
FINIAL_INLINE V load_bf16_odd(const uint8_t* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
FINIAL_INLINE void load_bf16_pair_n(const uint8_t* p, int64_t n, V& even, V& odd) {
  split_bf16(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p), even, odd);
}
FINIAL_INLINE void part(V a, V b, V& even, V& odd) {
  const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = _mm512_permutex2var_ps(a, at, b);
  odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(at, _mm512_set1_epi32(1)), b);
}
FINIAL_INLINE void join(V even, V odd, V& a, V& b) {
  const __m512i at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a = _mm512_permutex2var_ps(even, at, odd);
  b = _mm512_permutex2var_ps(even, _mm512_add_epi32(at, _mm512_set1_epi32(8)), odd);
}
// Four vectors to one: quarter k of the result holds quarter k of each, summed.
FINIAL_INLINE V sum_quarters(V a, V b, V c, V d) {
  const V x = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const V y = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d u = _mm512_castps_pd(x), v = _mm512_castps_pd(y);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(u, v)), _mm512_castpd_ps(_mm512_unpackhi_pd(u, v)));
}
FINIAL_INLINE V sum_halves(V a, V b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
FINIAL_INLINE V sum_each(const V (&a)[W]) {
  const V x = sum_halves(sum_quarters(a[0], a[1], a[2], a[3]), sum_quarters(a[4], a[5], a[6], a[7]));
  const V y = sum_halves(sum_quarters(a[8], a[9], a[10], a[11]), sum_quarters(a[12], a[13], a[14], a[15]));
  return sum_halves(x, y);
}
FINIAL_INLINE V load_f16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FINIAL_INLINE float half_to_float(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
}
FINIAL_INLINE V set1_half(const uint8_t* p) {
  int16_t half;
  std::memcpy(&half, p, 2);
  return _mm512_cvtph_ps(_mm256_set1_epi16(half));
}
FINIAL_INLINE V load_i8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// As bf16 in the upper half of each lane, nearest even; a NaN stays a quiet NaN. (The instruction for it flushes
// subnormals, so it is not used.)
FINIAL_INLINE __m512i rounded_to_bf16(V a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet);
}
FINIAL_INLINE void store_bf16(uint8_t* p, V a) {
  const __m512i out = _mm512_srli_epi32(rounded_to_bf16(a), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}

using Levels = __m512;
FINIAL_INLINE Levels levels_q4(float d) {
  return _mm512_mul_ps(_mm512_set1_ps(d), _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
}
// The W nibbles of the W bytes at p: low ones, or high ones.
FINIAL_INLINE V pick_low(Levels levels, const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(x), levels);  // uses the low four bits of each index
}
FINIAL_INLINE V pick_high(Levels levels, const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_cvtepu8_epi32(x), 4), levels);
}

// Products of packed weights. I: W lanes of int32, or of four bytes, or of two bf16.
#if defined(FINIAL_ISA_avx512_vnni)
#define FINIAL_PACKS_F32 1  // bf16 panels take float32 rows
#else
#define FINIAL_PACKS_BF16 1
#endif
#define FINIAL_PACKS_INT8 1
using I = __m512i;
// The instruction takes its first operand unsigned, so it multiplies q + 128; packed bytes are that, but for tile
// registers, which take them signed.
#if defined(FINIAL_TILES)
constexpr uint32_t BIAS_Q8 = 0;
#else
constexpr uint32_t BIAS_Q8 = 0x80808080u;
#endif
FINIAL_INLINE I load_i(const void* p) { return _mm512_loadu_si512(p); }
FINIAL_INLINE I broadcast(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
FINIAL_INLINE I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
FINIAL_INLINE I start_q8(int32_t offset) { return _mm512_set1_epi32(offset); }
FINIAL_INLINE I start_q4(int32_t offset) { return _mm512_set1_epi32(offset); }
FINIAL_INLINE I biased_q8(I w) {
  return BIAS_Q8 == 0 ? _mm512_xor_si512(w, _mm512_set1_epi32(static_cast<int>(0x80808080u))) : w;
}
FINIAL_INLINE I dot_q8(I acc, I w, I x) { return _mm512_dpbusd_epi32(acc, w, x); }
FINIAL_INLINE I dot_q4(I acc, I w, I x) { return _mm512_dpbusd_epi32(acc, w, x); }
FINIAL_INLINE I low_nibbles(I a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
FINIAL_INLINE I high_nibbles(I a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
// Bytes [n] of three planes to four of six bits each (packed_k.h): selections, an immediate is the table of a function
// of three bits, 0xCA "second where the first is set, else third", 0xF8 "first, or second and third".
FINIAL_INLINE void six_bits(I a, I b, I c, I (&q)[4]) {
  const I six = _mm512_set1_epi8(63);
  q[0] = _mm512_and_si512(a, six), q[1] = _mm512_and_si512(b, six), q[2] = _mm512_and_si512(c, six);
  const I low = _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), _mm512_srli_epi16(a, 6), _mm512_srli_epi16(b, 4), 0xCA);
  const I all = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), low, _mm512_srli_epi16(c, 2), 0xCA);
  q[3] = _mm512_and_si512(all, six);
}
// Nibbles and bit J of each byte as their fifth.
template <int J>
FINIAL_INLINE I with_fifth(I nibbles, I bits) {
  const I at = J < 4 ? _mm512_slli_epi16(bits, J < 4 ? 4 - J : 0) : _mm512_srli_epi16(bits, J < 4 ? 0 : J - 4);
  return _mm512_ternarylogic_epi32(nibbles, at, _mm512_set1_epi8(16), 0xF8);
}
// acc + products of four times four bytes in each lane; w of BITS bits.
template <int BITS>
FINIAL_INLINE I dot_four(I acc, const I (&w)[4], const I (&x)[4]) {
  for (int j = 0; j < 4; ++j) acc = _mm512_dpbusd_epi32(acc, w[j], x[j]);
  return acc;
}
FINIAL_INLINE void store_i(void* p, I a) { _mm512_storeu_si512(p, a); }
FINIAL_INLINE V to_floats(I a) { return _mm512_cvtepi32_ps(a); }
FINIAL_INLINE V of_bits(I a) { return _mm512_castsi512_ps(a); }
FINIAL_INLINE V absolute(V a) { return _mm512_abs_ps(a); }
FINIAL_INLINE void store_i8(int8_t* p, V a) {  // nearest even
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
}
FINIAL_INLINE int32_t sum_i8(const int8_t* p) {  // of 16
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i h = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), x);
  const __m128i q = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xB1)));
}
// Lane i is f over the lanes of a[i].
template <class F>
FINIAL_INLINE I reduce_each(const I (&a)[W], F f) {
  I quarters[4], halves[2];
  for (int i = 0; i < 4; ++i) {
    const I x = f(_mm512_unpacklo_epi32(a[4 * i], a[4 * i + 1]), _mm512_unpackhi_epi32(a[4 * i], a[4 * i + 1]));
    const I y = f(_mm512_unpacklo_epi32(a[4 * i + 2], a[4 * i + 3]), _mm512_unpackhi_epi32(a[4 * i + 2], a[4 * i + 3]));
    quarters[i] = f(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
  }
  const auto fold = [&](I x, I y) { return f(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xDD)); };
  for (int i = 0; i < 2; ++i) halves[i] = fold(quarters[2 * i], quarters[2 * i + 1]);
  return fold(halves[0], halves[1]);
}
// Words whose halves are these, as bf16, nearest even.
FINIAL_INLINE I bf16_words(V low, V high) {
  const I upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  return _mm512_or_si512(_mm512_srli_epi32(rounded_to_bf16(low), 16), _mm512_and_si512(rounded_to_bf16(high), upper));
}
// W floats to bf16, nearest even, as the even or the odd ones of 2 W; the others stay as they are.
FINIAL_INLINE void store_bf16_halves(uint8_t* p, V a, bool odd) {
  uint8_t packed[2 * W];
  store_bf16(packed, a);
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  if (odd)
    _mm512_mask_storeu_epi16(p, 0xAAAAAAAAu, _mm512_slli_epi32(wide, 16));
  else
    _mm512_mask_storeu_epi16(p, 0x55555555u, wide);
}

#if defined(FINIAL_PACKS_F32)
// Eight pairs of each of four rows to [pair][rows]: pairs of neighbouring rows, `rows` of them from one to the next.
FINIAL_INLINE void store_four(float* out, int64_t rows, V a, V b, V c, V d) {
  const auto low = [](V x, V y) { return _mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)); };
  const auto high = [](V x, V y) { return _mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)); };
  const __m512d even[2] = {low(a, b), low(c, d)}, odd[2] = {high(a, b), high(c, d)};  // pairs 0, 2, 4, 6; 1, 3, 5, 7
  for (int two = 0; two < 2; ++two) {
    const auto to = [&](int pair) { return reinterpret_cast<double*>(out + (pair * rows + 2 * two) * 2); };
    _mm_storeu_pd(to(0), _mm512_castpd512_pd128(even[two]));
    _mm_storeu_pd(to(1), _mm512_castpd512_pd128(odd[two]));
    _mm_storeu_pd(to(2), _mm512_extractf64x2_pd(even[two], 1));
    _mm_storeu_pd(to(3), _mm512_extractf64x2_pd(odd[two], 1));
    _mm_storeu_pd(to(4), _mm512_extractf64x2_pd(even[two], 2));
    _mm_storeu_pd(to(5), _mm512_extractf64x2_pd(odd[two], 2));
    _mm_storeu_pd(to(6), _mm512_extractf64x2_pd(even[two], 3));
    _mm_storeu_pd(to(7), _mm512_extractf64x2_pd(odd[two], 3));
  }
}
#endif

#if defined(FINIAL_PACKS_BF16)
// acc + both products of each pair; subnormals count as zero, each step rounds to nearest even.
FINIAL_INLINE V dot_bf16(V acc, I w, I x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }

// 32 floats to pairs of bf16, nearest even; subnormals become zero, as they count in products anyway.
FINIAL_INLINE I bf16_pairs(V a, V b) { return (I)_mm512_cvtne2ps_pbh(b, a); }
// Sixteen words of each of two rows, in turn.
FINIAL_INLINE void store_two(uint32_t* out, I a, I b) {
  const __m512i at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi32(a, at, b));
  _mm512_storeu_si512(out + W, _mm512_permutex2var_epi32(a, _mm512_add_epi32(at, _mm512_set1_epi32(8)), b));
}
// Sixteen words of each of four rows to [word][rows]: words of four neighbouring rows, `rows` of them from one to the
// next.
FINIAL_INLINE void store_four(uint32_t* out, int64_t rows, I a, I b, I c, I d) {
  const I ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
  const I ab2 = _mm512_unpackhi_epi32(a, b), cd2 = _mm512_unpackhi_epi32(c, d);
  const I turned[4] = {_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd), _mm512_unpacklo_epi64(ab2, cd2),
                       _mm512_unpackhi_epi64(ab2, cd2)};  // of each quarter, its word 0 to 3
  for (int i = 0; i < 4; ++i, out += rows) {
    const auto to = [&](int quarter) { return reinterpret_cast<__m128i*>(out + quarter * rows * 4); };
    _mm_storeu_si128(to(0), _mm512_castsi512_si128(turned[i]));
    _mm_storeu_si128(to(1), _mm512_extracti32x4_epi32(turned[i], 1));
    _mm_storeu_si128(to(2), _mm512_extracti32x4_epi32(turned[i], 2));
    _mm_storeu_si128(to(3), _mm512_extracti32x4_epi32(turned[i], 3));
  }
}

// Attention with rounded queries and weights. Subnormals count as zero.
// 32 floats to pairs of bf16; a and b become what the pairs hold: even ones, odd ones.
FINIAL_INLINE void store_bf16_pairs(void* p, V& a, V& b) {
  const I pairs = bf16_pairs(a, b);
  _mm512_storeu_si512(p, pairs);
  split_bf16(pairs, a, b);
}
FINIAL_INLINE I even_halves(I a) { return _mm512_and_si512(a, _mm512_set1_epi32(0xFFFF)); }
FINIAL_INLINE I odd_halves(I a) { return _mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))); }
// 2^x within 2^-18, for x <= 0: 2^(x - floor x) by a polynomial of least maximum relative error (Lawson's reweighted
// least squares), times 2^floor(x). 0 where that is below all floats, infinity too; NaN stays NaN.
FINIAL_INLINE V power_of_two(V x) {
  const V r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  V y = _mm512_set1_ps(0.0135341678f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.0520114601f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.241442755f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.693003833f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.00000262f));
  return _mm512_scalef_ps(y, x);
}

#endif

}  // namespace finial::FINIAL_ISA
