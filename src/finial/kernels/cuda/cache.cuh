// A cached key or value as it lies in memory, by cache format: [slots][key, value][KV_HEADS][ROW_BYTES].
//
// A row of D values is padded with zeros to P, a multiple of 16.  Rounding as in quants.py: bf16 to nearest even; q8_0
// in blocks of 32 with an f16 scale of absmax / 127.
#pragma once
#include "formats.cuh"

FINIAL_DEVICE u64 cache_at(int slot, int which, int head, int heads, int row_bytes) {
  return (((u64)slot * 2 + which) * heads + head) * row_bytes;
}

// `store`: one warp writes a whole row of D values that lie in memory at `from`.
template <int D>
struct CacheBf16 {
  static constexpr int P = round_up(D, 16), VEC = 8, ROW_BYTES = 2 * P;
  struct Raw {
    Vec4 bits;
  };
  FINIAL_DEVICE static Raw load(const u8* row, int vec) { return {ptx::load_cached(row + vec * 16)}; }
  FINIAL_DEVICE static void decode(const Raw& raw, float out[VEC]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      out[2 * i] = bf16_low(word_of(raw.bits, i)), out[2 * i + 1] = bf16_high(word_of(raw.bits, i));
  }
  FINIAL_DEVICE static void store(u8* row, const float* from) {
    for (int i = threadIdx.x % 32; i < P; i += 32) ((u16*)row)[i] = i < D ? to_bf16(from[i]) : (u16)0;
  }
};

template <int D>
struct CacheF32 {
  static constexpr int P = round_up(D, 16), VEC = 4, ROW_BYTES = 4 * P;
  struct Raw {
    Vec4 bits;
  };
  FINIAL_DEVICE static Raw load(const u8* row, int vec) { return {ptx::load_cached(row + vec * 16)}; }
  FINIAL_DEVICE static void decode(const Raw& raw, float out[VEC]) {
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = ptx::as_float(word_of(raw.bits, i));
  }
  FINIAL_DEVICE static void store(u8* row, const float* from) {
    for (int i = threadIdx.x % 32; i < P; i += 32) ((float*)row)[i] = i < D ? from[i] : 0.0f;
  }
};

template <int D>
struct CacheQ8 {
  static_assert(D % 32 == 0, "whole blocks");
  static constexpr int P = D, VEC = 16, ROW_BYTES = round_up(D + D / 32 * 2, 16);  // D bytes, then the scales
  struct Raw {
    Vec4 bits;
    u16 scale;
  };
  FINIAL_DEVICE static Raw load(const u8* row, int vec) {
    return {ptx::load_cached(row + vec * 16), ptx::load_cached_half(row + D + vec / 2 * 2)};
  }
  FINIAL_DEVICE static void decode(const Raw& raw, float out[VEC]) {
    const float scale = ptx::from_half(raw.scale);
#pragma unroll
    for (int i = 0; i < 16; i++) out[i] = byte_value(word_of(raw.bits, i / 4), i % 4, 8388608.0f + 128.0f) * scale;
  }
  FINIAL_DEVICE static void store(u8* row, const float* from) {
    const int lane = threadIdx.x % 32;
    for (int block = 0; block < D / 32; block++) {
      const float v = from[block * 32 + lane];
      float largest = v < 0 ? -v : v;
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        const float other = ptx::shuffle_xor(largest, offset);
        largest = other > largest ? other : largest;
      }
      const float scale = largest / 127.0f, inverse = scale < 1.1754944e-38f ? 0.0f : 1.0f / scale;
      const float scaled = v * inverse;
      const int whole = (int)scaled;  // towards zero; the rest decides, halves away from zero
      const float rest = 2.0f * (scaled - (float)whole);
      row[block * 32 + lane] = (u8)(whole + (int)rest + 128);
      if (lane == 0) ((u16*)(row + D))[block] = (u16)ptx::to_half(scale);
    }
  }
};
