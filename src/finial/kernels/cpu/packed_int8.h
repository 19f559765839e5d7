// What products of int8 rows with q8_0 and q4_0 panels begin with: how rows are rounded and matrices packed (layouts
// and arithmetic: packed.h, packed.cpp). Blocks are multiplied in packed_int8_quads.h and, for AVX2,
// packed_int8_pairs.h.
#pragma once

#include <math.h>

#include "panels.h"
#include "weights.h"

#if defined(FINIAL_PACKS_INT8)

namespace finial::FINIAL_ISA {

namespace {

// Quads of a block at p: all of them (load), or f(j, quad j of each output) as they come (each). In the order in which
// they lie, whatever the compiler prefers: out of order the processor's prefetching falls behind. For one row the
// compiler's order reads 3 % more (EPYC Genoa).
struct Q8 {
  static constexpr int WORDS = 8;  // 4-byte groups of an output's block
  static constexpr int BLOCK = 32 * 34;
  static constexpr int IN_REGISTERS = 2;  // so many rows do better with `each`
  static constexpr Enough ENOUGH{5, 16384};
  template <bool IN_ORDER = true>
  FINIAL_INLINE void load(const uint8_t* p, I (&w)[8][PANEL_VECTORS]) {
    for (int j = 0; j < 8; ++j)
      for (int v = 0; v < PANEL_VECTORS; ++v) w[j][v] = quad<IN_ORDER>(p, j * PANEL_VECTORS + v);
  }
  template <class F>
  FINIAL_INLINE void each(const uint8_t* p, F f) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      I w[PANEL_VECTORS];
      for (int v = 0; v < PANEL_VECTORS; ++v) w[v] = quad<true>(p, j * PANEL_VECTORS + v);
      f(j, w);
    }
  }
  template <bool IN_ORDER>
  FINIAL_INLINE I quad(const uint8_t*& p, int i) {
    if (IN_ORDER) load_afresh(p);
    return biased_q8(load_i(p + i * W * 4));
  }
  FINIAL_INLINE I start(const Int8Block& x) { return start_q8(x.offset_q8); }
  FINIAL_INLINE I dot(I acc, I w, I x) { return dot_q8(acc, w, x); }
};

struct Q4 {
  static constexpr int WORDS = 4;
  static constexpr int BLOCK = 32 * 18;
  static constexpr int IN_REGISTERS = 6;
  static constexpr Enough ENOUGH{4, 16384};
  template <bool IN_ORDER = true>
  FINIAL_INLINE void load(const uint8_t* p, I (&w)[8][PANEL_VECTORS]) {
    for (int j = 0; j < 4; ++j)
      for (int v = 0; v < PANEL_VECTORS; ++v) {
        const I both = quads<IN_ORDER>(p, j * PANEL_VECTORS + v);
        w[j][v] = low_nibbles(both), w[j + 4][v] = high_nibbles(both);
      }
  }
  template <class F>
  FINIAL_INLINE void each(const uint8_t* p, F f) {
#pragma GCC unroll 8
    for (int j = 0; j < 4; ++j) {
      I low[PANEL_VECTORS], high[PANEL_VECTORS];
      for (int v = 0; v < PANEL_VECTORS; ++v) {
        const I both = quads<true>(p, j * PANEL_VECTORS + v);
        low[v] = low_nibbles(both), high[v] = high_nibbles(both);
      }
      f(j, low), f(j + 4, high);
    }
  }
  template <bool IN_ORDER>
  FINIAL_INLINE I quads(const uint8_t*& p, int i) {
    if (IN_ORDER) load_afresh(p);
    return load_i(p + i * W * 4);
  }
  FINIAL_INLINE I start(const Int8Block& x) { return start_q4(x.offset); }
  FINIAL_INLINE I dot(I acc, I w, I x) { return dot_q4(acc, w, x); }
};

constexpr float LEAST = 7.9e-31f;           // about 2^-100: a block of this scale is zero to any result that matters
constexpr uint32_t DROPPED = 1u << 19;      // the bits of a float below five significant ones
constexpr float TOO_LARGE = 1.2980742e33f;  // 2^110: what is as large has no `magic`, and counts as infinite
constexpr float MAGIC = 12582912.0f;        // 1.5 2^23

// The scale of a block whose largest magnitude this is, as bits.
FINIAL_INLINE float scale_of(float most) {
  const float exact = most / 127.0f;
  uint32_t bits;
  std::memcpy(&bits, &exact, 4);
  bits = (bits + DROPPED - 1) & ~(DROPPED - 1);
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// 2^e of a positive 2^e m, 1 <= m < 2; infinity for NaN.
FINIAL_INLINE float power_in(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits &= 0x7F800000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

FINIAL_INLINE void round_block(const float* x, Int8Block* out) {
  V top = zero(), poison = zero();
  for (int i = 0; i < 32; i += W) {
    const V a = load(x + i);
    top = max(top, absolute(a));
    poison = fma(a, zero(), poison);  // NaN where an activation is not finite: it must reach the result
  }
  const float most = largest(top), scale = scale_of(most), finite = sum(poison) + (most < TOO_LARGE ? 0.0f : NAN);
  const V by = set1(scale >= LEAST ? 1.0f / scale : 0.0f);
  for (int i = 0; i < 32; i += W) store_i8(out->q + i, mul(load(x + i), by));
  out->scale = (scale >= LEAST ? scale : 1.0f) + finite;
  out->magic = power_in(out->scale) * MAGIC + finite;
  out->first = -8 * sum_i8(out->q);
  out->offset = out->first - 8 * sum_i8(out->q + 16);
  out->offset_q8 = 16 * out->offset;
  out->minimum = out->scale * 0.125f * static_cast<float>(out->offset);
}

#if defined(FINIAL_AVX512)

constexpr int64_t TOGETHER = 7;  // so many blocks are rounded faster at once than one by one

// Up to sixteen blocks, `step` apart at their destination: what is alike of each is done for all at once.
void round_blocks(const float* x, Int8Block* out, int64_t step, int64_t n) {
  const I magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  I tops[W], first[W], second[W];
  const auto block = [&](int i) { return x + 32 * (i < n ? i : 0); };
  for (int i = 0; i < W; ++i)  // as integers, for NaN and infinity are the largest then
    tops[i] = _mm512_max_epi32(_mm512_and_si512(load_i(block(i)), magnitude),
                               _mm512_and_si512(load_i(block(i) + W), magnitude));
  const I top = reduce_each(tops, [](I a, I b) { return _mm512_max_epi32(a, b); });
  const I exact = _mm512_castps_si512(div(_mm512_castsi512_ps(top), set1(127)));
  const V rounded = _mm512_castsi512_ps(
      _mm512_andnot_si512(_mm512_set1_epi32(DROPPED - 1), _mm512_add_epi32(exact, _mm512_set1_epi32(DROPPED - 1))));
  const __mmask16 counts = _mm512_cmp_ps_mask(rounded, set1(LEAST), _CMP_GE_OQ);
  alignas(64) float scale[W], by[W], minimum[W], magic[W];
  alignas(64) int32_t offsets[2][W];
  store(by, _mm512_maskz_div_ps(counts, set1(1), rounded));
  const __mmask16 finite = _mm512_cmplt_epi32_mask(top, _mm512_castps_si512(set1(TOO_LARGE)));
  const V scales = _mm512_mask_mov_ps(set1(NAN), finite, _mm512_mask_mov_ps(set1(1), counts, rounded));
  store(scale, scales);
  store(magic, scale_by_power(set1(MAGIC), exponent(scales)));
  for (int i = 0; i < W; ++i) {
    const V factor = set1(by[i]);
    const I a = _mm512_cvtps_epi32(mul(load(block(i)), factor));
    const I b = _mm512_cvtps_epi32(mul(load(block(i) + W), factor));
    first[i] = a, second[i] = b;
    if (i >= n) continue;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out[i * step].q), _mm512_cvtsepi32_epi8(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out[i * step].q + W), _mm512_cvtsepi32_epi8(b));
  }
  const auto offset = [](I sum) { return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 3)); };
  const I half = offset(reduce_each(first, add_i)), whole = add_i(half, offset(reduce_each(second, add_i)));
  _mm512_store_si512(offsets[0], half);
  _mm512_store_si512(offsets[1], whole);
  store(minimum, mul(mul(load(scale), set1(0.125f)), to_floats(whole)));
  for (int i = 0; i < n; ++i) {
    Int8Block& to = out[i * step];
    to.scale = scale[i];
    to.offset = offsets[1][i];
    to.offset_q8 = 16 * offsets[1][i];
    to.first = offsets[0][i];
    to.minimum = minimum[i];
    to.magic = magic[i];
  }
}

#endif

void round_int8(const float* x, int64_t n_in, int64_t rows, uint8_t* tile) {
#if defined(FINIAL_AVX512)
  if (n_in == 32)  // of each row one block
    for (int64_t n; rows >= TOGETHER; rows -= n, x += 32 * n, tile += n * static_cast<int64_t>(sizeof(Int8Block))) {
      n = rows < W ? rows : W;
      round_blocks(x, reinterpret_cast<Int8Block*>(tile), 1, n);
    }
#endif
  for (int64_t row = 0; row < rows; ++row, x += n_in) {
    Int8Block* out = reinterpret_cast<Int8Block*>(tile) + row;
    int64_t k = 0;
#if defined(FINIAL_AVX512)
    for (; k + 32 * W <= n_in; k += 32 * W) round_blocks(x + k, out + k / 32 * rows, rows, W);
#endif
    for (; k < n_in; k += 32) round_block(x + k, out + k / 32 * rows);
  }
}

template <class Q>
void pack_blocks(const Linear& l, uint8_t* out, int64_t first, uint32_t flip) {
  for (int64_t b = 0; b < l.n_in / 32; ++b, out += Q::BLOCK) {
    for (int64_t o = 0; o < PANEL && first + o < l.n_out; ++o) {
      const uint8_t* from = l.weight + (first + o) * l.row_bytes + b * (2 + 4 * Q::WORDS);
      std::memcpy(out + 2 * o, from, 2);
      for (int j = 0; j < Q::WORDS; ++j) {
        uint32_t word;
        std::memcpy(&word, from + 2 + 4 * j, 4);
        word ^= flip;
        std::memcpy(out + PANEL * 2 + (j * PANEL + o) * 4, &word, 4);
      }
    }
  }
}

template <class Q>
void unpack_blocks(Format format, const uint8_t* panel, int64_t o, int64_t n_in, uint32_t flip, float* out) {
  for (int64_t k = 0; k < n_in; k += 32, panel += Q::BLOCK) {
    uint8_t block[2 + 4 * Q::WORDS];
    std::memcpy(block, panel + 2 * o, 2);
    for (int j = 0; j < Q::WORDS; ++j) {
      uint32_t word;
      std::memcpy(&word, panel + PANEL * 2 + (j * PANEL + o) * 4, 4);
      word ^= flip;
      std::memcpy(block + 2 + 4 * j, &word, 4);
    }
    decode(format, block, 32, out + k);
  }
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
