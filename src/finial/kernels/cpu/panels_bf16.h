// bf16 matrices to panels (layout: packed.h) and back, a row at a time. Included by packed.cpp.
#pragma once

#include "panels.h"

#if defined(FINIAL_BF16_PANELS)

namespace finial::FINIAL_ISA {

namespace {

// turn: TURN pairs of TURN rows, `row_bytes` apart, so that a pair's rows are neighbours, PANEL pairs apart.
#if defined(FINIAL_AVX512)

constexpr int64_t TURN = 16;

FINIAL_INLINE void turn(const uint8_t* from, int64_t row_bytes, uint8_t* to) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) {
    a[i] = _mm512_loadu_si512(from + i * row_bytes);
    _mm_prefetch(reinterpret_cast<const char*>(from + i * row_bytes + 256), _MM_HINT_T0);
  }
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

#elif defined(FINIAL_ISA_avx2)

constexpr int64_t TURN = 8;

FINIAL_INLINE void turn(const uint8_t* from, int64_t row_bytes, uint8_t* to) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * row_bytes));
    _mm_prefetch(reinterpret_cast<const char*>(from + i * row_bytes + 256), _MM_HINT_T0);
  }
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

void pack_bf16(const Linear& l, uint8_t* out, int64_t first) {
  constexpr int64_t STEP = 16;  // pairs: a cache line of each row
  const int64_t whole = l.n_in / 2;
  const uint8_t* rows = l.weight + first * l.row_bytes;
  for (int64_t k = 0; k < whole; k += STEP) {
    const int64_t count = whole - k < STEP ? whole - k : STEP;
    for (int64_t o = 0; o < PANEL && first + o < l.n_out; ++o) {
      const uint8_t* from = rows + o * l.row_bytes + k * 4;
      uint8_t* to = out + (k * PANEL + o) * 4;
      if (count == STEP && first + o + TURN <= l.n_out && o + TURN <= PANEL) {
        for (int64_t i = 0; i < STEP; i += TURN) turn(from + i * 4, l.row_bytes, to + i * PANEL * 4);
        o += TURN - 1;
        continue;
      }
      for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * PANEL * 4, from + i * 4, 4);
    }
  }
  if (l.n_in % 2 != 0)
    for (int64_t o = 0; o < PANEL && first + o < l.n_out; ++o)
      std::memcpy(out + (whole * PANEL + o) * 4, rows + o * l.row_bytes + whole * 4, 2);
}

void unpack_bf16(const uint8_t* panel, int64_t o, int64_t n_in, float* out) {
  for (int64_t k = 0; k < n_in; ++k) out[k] = bf16_to_float(panel + (k / 2 * PANEL + o) * 4 + k % 2 * 2);
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
