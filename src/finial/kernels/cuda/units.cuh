// Streamed weights: 8 rows of a matrix by 32 of k, as mma.m16n8k16 takes them for its right side.
//
// Lane 4 g + t has row g and k = 8 t to 8 t + 7 of it, in two steps of 16: the instruction's k are in another order
// than memory's, and so are those of the left side, so that both are read as they lie, 16 bytes at once.
// backends/cuda/mega/ stream.py writes them.  Everything becomes bf16 without rounding: 8 bits of a mantissa hold an
// int8 and an e4m3.
#pragma once
#include "formats.cuh"

// weights(unit, lane, w): w[0], w[1] are the right side of the first step, w[2], w[3] of the second.
// An octet is 8 rows by 8 of k, for mma.m16n8k8 in memory's own order: lane 4 g + t has row g, k = 2 t and 2 t + 1.
template <class Format>
struct Unit;

template <>
struct Unit<Bf16> {  // u16 [8][32]
  static constexpr int BYTES = 512;
  static constexpr bool BLOCKS = false;
  FINIAL_DEVICE static void weights(const u8* unit, int lane, u32 w[4]) {
    const Vec4 v = *(const Vec4*)(unit + lane * 16);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  }
  FINIAL_DEVICE static void scales(const u8*, int, float s[2]) { s[0] = s[1] = 1.0f; }
  FINIAL_DEVICE static u32 octet(const u8* octet, int lane) { return *(const u32*)(octet + lane * 4); }
};

struct alignas(8) Vec2 {
  u32 x, y;
};

template <>
struct Unit<Fp8> {  // u8 [8][32]; the host puts 2^8 into the row's scale, see formats.cuh
  static constexpr int BYTES = 256;
  static constexpr bool BLOCKS = false;
  // Sign, exponent and mantissa moved to bf16's places are the value times 2^-120, of subnormals too, so 2^112 more.
  FINIAL_DEVICE static u32 pair(u32 bytes) {
    return ptx::fma_bf16x2((bytes & 0x00800080u) << 8 | (bytes & 0x007f007fu) << 4, 0x77807780u, 0x80008000u);
  }
  FINIAL_DEVICE static void weights(const u8* unit, int lane, u32 w[4]) {
    const Vec2 v = *(const Vec2*)(unit + lane * 8);
    w[0] = pair(ptx::permute(v.x, 0, 0x4140)), w[1] = pair(ptx::permute(v.x, 0, 0x4342));
    w[2] = pair(ptx::permute(v.y, 0, 0x4140)), w[3] = pair(ptx::permute(v.y, 0, 0x4342));
  }
  FINIAL_DEVICE static void scales(const u8*, int, float s[2]) { s[0] = s[1] = 1.0f; }
  FINIAL_DEVICE static u32 octet(const u8* octet, int lane) {
    return pair(ptx::permute(*(const u16*)(octet + lane * 2), 0, 0x4140));
  }
};

template <>
struct Unit<Q8> {  // u8 [8][32], weight + 128; then f16 [8]
  static constexpr int BYTES = 272;
  static constexpr bool BLOCKS = true;
  // Seven bits under the exponent of 2^7 are 128 + bits; the eighth says whether 128 or 256 goes off again.
  FINIAL_DEVICE static u32 pair(u32 bytes) {
    return ptx::fma_bf16x2((bytes & 0x007f007fu) | 0x43004300u, 0x3f803f80u, (bytes & 0x00800080u) ^ 0xc380c380u);
  }
  FINIAL_DEVICE static void weights(const u8* unit, int lane, u32 w[4]) {
    const Vec2 v = *(const Vec2*)(unit + lane * 8);
    w[0] = pair(ptx::permute(v.x, 0, 0x4140)), w[1] = pair(ptx::permute(v.x, 0, 0x4342));
    w[2] = pair(ptx::permute(v.y, 0, 0x4140)), w[3] = pair(ptx::permute(v.y, 0, 0x4342));
  }
  // Of the two weight rows whose sums a lane has.
  FINIAL_DEVICE static void scales(const u8* unit, int lane, float s[2]) {
    const u32 both = *(const u32*)(unit + 256 + lane % 4 * 4);
    s[0] = ptx::from_half(both & 0xffffu), s[1] = ptx::from_half(both >> 16);
  }
};
