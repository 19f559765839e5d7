// Weight formats as they lie on the device, and how 16 bytes of one become floats.
//
// A matrix [OUT, K] is two arrays: rows of KP / UNIT · 16 bytes (K padded with zeros to KP), and scales: one f16 per 32
// weights (q8_0, q4_0), one float per row (fp8), or none.  backends/cuda/weights.py makes them.
// A unit is what one 16-byte load holds; a plane is four neighbouring weights of it.
#pragma once
#include "base.cuh"

// A byte under the exponent of 2^23 is the float 2^23 + byte: exact, and faster than a conversion.
FINIAL_DEVICE float byte_value(u32 word, int which, float offset) {
  return ptx::as_float(ptx::permute(word, 0x4b000000u, 0x7540u + which)) - offset;
}
FINIAL_DEVICE u32 word_of(const Vec4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

struct F32 {
  static constexpr int UNIT = 4;
  static constexpr bool BLOCKS = false, CHANNELS = false;
  struct Raw {
    Vec4 bits;
  };
  FINIAL_DEVICE static Raw load(const u8* row, const u8*, int unit) { return {ptx::load_stream(row + unit * 16)}; }
  FINIAL_DEVICE static void plane(const Raw& raw, int, float out[4]) {
    for (int i = 0; i < 4; i++) out[i] = ptx::as_float(word_of(raw.bits, i));
  }
  FINIAL_DEVICE static float scale(const Raw&) { return 1.0f; }
};

struct Bf16 {
  static constexpr int UNIT = 8;
  static constexpr bool BLOCKS = false, CHANNELS = false;
  struct Raw {
    Vec4 bits;
  };
  FINIAL_DEVICE static Raw load(const u8* row, const u8*, int unit) { return {ptx::load_stream(row + unit * 16)}; }
  FINIAL_DEVICE static void plane(const Raw& raw, int p, float out[4]) {
    const u32 a = word_of(raw.bits, 2 * p), b = word_of(raw.bits, 2 * p + 1);
    out[0] = bf16_low(a), out[1] = bf16_high(a), out[2] = bf16_low(b), out[3] = bf16_high(b);
  }
  FINIAL_DEVICE static float scale(const Raw&) { return 1.0f; }
};

struct F16 {
  static constexpr int UNIT = 8;
  static constexpr bool BLOCKS = false, CHANNELS = false;
  struct Raw {
    Vec4 bits;
  };
  FINIAL_DEVICE static Raw load(const u8* row, const u8*, int unit) { return {ptx::load_stream(row + unit * 16)}; }
  FINIAL_DEVICE static void plane(const Raw& raw, int p, float out[4]) {
    const u32 a = word_of(raw.bits, 2 * p), b = word_of(raw.bits, 2 * p + 1);
    out[0] = ptx::from_half(a & 0xffffu), out[1] = ptx::from_half(a >> 16);
    out[2] = ptx::from_half(b & 0xffffu), out[3] = ptx::from_half(b >> 16);
  }
  FINIAL_DEVICE static float scale(const Raw&) { return 1.0f; }
};

// e4m3 without infinities (OCP 8-bit floating point, 1.0, table 1): sign, exponent and mantissa shifted into an f16 are
// the value times 2^-8, subnormals too; the host puts the 2^8 into the channel's scale.
struct Fp8 {
  static constexpr int UNIT = 16;
  static constexpr bool BLOCKS = false, CHANNELS = true;
  struct Raw {
    Vec4 bits;
  };
  FINIAL_DEVICE static Raw load(const u8* row, const u8*, int unit) { return {ptx::load_stream(row + unit * 16)}; }
  FINIAL_DEVICE static void plane(const Raw& raw, int p, float out[4]) {
    const u32 word = word_of(raw.bits, p);
    for (int i = 0; i < 4; i++) {
      const u32 byte = word >> 8 * i & 255u;
      out[i] = ptx::from_half((byte & 0x80u) << 8 | (byte & 0x7fu) << 7);
    }
  }
  FINIAL_DEVICE static float scale(const Raw&) { return 1.0f; }
};

struct Q8 {
  static constexpr int UNIT = 16;
  static constexpr bool BLOCKS = true, CHANNELS = false;
  struct Raw {
    Vec4 bits;  // weights + 128
    u16 scale;
  };
  FINIAL_DEVICE static Raw load(const u8* row, const u8* scales, int unit) {
    return {ptx::load_stream(row + unit * 16), ptx::load_stream_half(scales + unit / 2 * 2)};
  }
  FINIAL_DEVICE static void plane(const Raw& raw, int p, float out[4]) {
    const u32 word = word_of(raw.bits, p);
    for (int i = 0; i < 4; i++) out[i] = byte_value(word, i, 8388608.0f + 128.0f);
  }
  FINIAL_DEVICE static float scale(const Raw& raw) { return ptx::from_half(raw.scale); }
};

struct Q4 {
  static constexpr int UNIT = 32;
  static constexpr bool BLOCKS = true, CHANNELS = false;
  struct Raw {
    Vec4 bits;  // low nibbles are weights 0 to 15, high ones 16 to 31, each + 8
    u16 scale;
  };
  FINIAL_DEVICE static Raw load(const u8* row, const u8* scales, int unit) {
    return {ptx::load_stream(row + unit * 16), ptx::load_stream_half(scales + unit * 2)};
  }
  FINIAL_DEVICE static void plane(const Raw& raw, int p, float out[4]) {
    const u32 word = word_of(raw.bits, p % 4) >> (p / 4 * 4) & 0x0f0f0f0fu;
    for (int i = 0; i < 4; i++) out[i] = byte_value(word, i, 8388608.0f + 8.0f);
  }
  FINIAL_DEVICE static float scale(const Raw& raw) { return ptx::from_half(raw.scale); }
};
