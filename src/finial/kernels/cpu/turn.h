// Words of rows to words of columns, in registers: how bf16 pairs come into panels and into a cache's blocks.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace finial::FINIAL_ISA {

namespace {

// turn: TURN pairs of TURN rows, `row_bytes` apart, so that a pair's rows are neighbours, PANEL pairs apart.
#if defined(FINIAL_AVX512)

constexpr int64_t TURN = 16;

FINIAL_INLINE void turn(const uint8_t* from, int64_t row_bytes, uint8_t* to) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * row_bytes);
  for (int i = 0; i < 16; i += 2)
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  for (int i = 0; i < 16; i += 4)  // a[i + q]: of four rows, pairs q, 4 + q, 8 + q, 12 + q
    for (int h = 0; h < 2; ++h) {
      a[i + 2 * h] = _mm512_unpacklo_epi64(b[i + h], b[i + h + 2]);
      a[i + 2 * h + 1] = _mm512_unpackhi_epi64(b[i + h], b[i + h + 2]);
    }
  for (int q = 0; q < 4; ++q) {
    const __m512i x = _mm512_shuffle_i32x4(a[q], a[4 + q], 0x44), y = _mm512_shuffle_i32x4(a[q], a[4 + q], 0xee),
                  z = _mm512_shuffle_i32x4(a[8 + q], a[12 + q], 0x44),
                  w = _mm512_shuffle_i32x4(a[8 + q], a[12 + q], 0xee);
    const __m512i turned[4] = {_mm512_shuffle_i32x4(x, z, 0x88), _mm512_shuffle_i32x4(x, z, 0xdd),
                               _mm512_shuffle_i32x4(y, w, 0x88), _mm512_shuffle_i32x4(y, w, 0xdd)};
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + (4 * i + q) * PANEL * 4, turned[i]);
  }
}

#elif defined(FINIAL_AVX2)

constexpr int64_t TURN = 8;

FINIAL_INLINE void turn(const uint8_t* from, int64_t row_bytes, uint8_t* to) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * row_bytes));
  for (int i = 0; i < 8; i += 2)
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  for (int i = 0; i < 8; i += 4)  // a[i + q]: of four rows, pairs q and 4 + q
    for (int h = 0; h < 2; ++h) {
      a[i + 2 * h] = _mm256_unpacklo_epi64(b[i + h], b[i + h + 2]);
      a[i + 2 * h + 1] = _mm256_unpackhi_epi64(b[i + h], b[i + h + 2]);
    }
  for (int q = 0; q < 4; ++q) {
    const __m256i first = _mm256_permute2x128_si256(a[q], a[4 + q], 0x20);
    const __m256i second = _mm256_permute2x128_si256(a[q], a[4 + q], 0x31);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + q * PANEL * 4), first);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (4 + q) * PANEL * 4), second);
  }
}

#else

constexpr int64_t TURN = 1;

FINIAL_INLINE void turn(const uint8_t* from, int64_t, uint8_t* to) { std::memcpy(to, from, 4); }

#endif

}  // namespace

}  // namespace finial::FINIAL_ISA
