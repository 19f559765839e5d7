// No instruction set assumed: four floats that the compiler turns into SSE2 or NEON, element by element otherwise.
// A multiplication and an addition round apart (the build forbids contraction), on every CPU alike.
#pragma once

namespace finial::FINIAL_ISA {

constexpr int W = 4;
constexpr int ACC = 2;
constexpr int PASS = 1;
constexpr int WIDE = 4;

#if defined(__GNUC__)  // GCC and Clang keep this type in a register; operators come with it
typedef float V __attribute__((vector_size(16)));
#else
struct V {
  float lane[4];
  float& operator[](int i) { return lane[i]; }
  float operator[](int i) const { return lane[i]; }
};
#define FINIAL_EACH(op)                              \
  FINIAL_INLINE V operator op(V a, V b) {            \
    V y;                                             \
    for (int i = 0; i < W; ++i) y[i] = a[i] op b[i]; \
    return y;                                        \
  }
FINIAL_EACH(+)
FINIAL_EACH(-)
FINIAL_EACH(*)
FINIAL_EACH(/)
#undef FINIAL_EACH
#endif

FINIAL_INLINE V set1(float x) {
  V y;
  for (int i = 0; i < W; ++i) y[i] = x;
  return y;
}
FINIAL_INLINE V zero() { return set1(0); }
FINIAL_INLINE V load(const float* p) {
  V y;
  std::memcpy(&y, p, sizeof y);
  return y;
}
FINIAL_INLINE V load_n(const float* p, int64_t n) {
  float lanes[W] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(float));
  return load(lanes);
}
FINIAL_INLINE void store(float* p, V a) { std::memcpy(p, &a, sizeof a); }
FINIAL_INLINE void store_n(float* p, V a, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = a[static_cast<int>(i)];
}

FINIAL_INLINE V add(V a, V b) { return a + b; }
FINIAL_INLINE V sub(V a, V b) { return a - b; }
FINIAL_INLINE V mul(V a, V b) { return a * b; }
FINIAL_INLINE V div(V a, V b) { return a / b; }
FINIAL_INLINE V fma(V a, V b, V c) { return a * b + c; }
FINIAL_INLINE V max(V a, V b) {  // b where either is NaN
  V y;
  for (int i = 0; i < W; ++i) y[i] = a[i] > b[i] ? a[i] : b[i];
  return y;
}
FINIAL_INLINE V min(V a, V b) {
  V y;
  for (int i = 0; i < W; ++i) y[i] = a[i] < b[i] ? a[i] : b[i];
  return y;
}
FINIAL_INLINE float sum(V a) { return (a[0] + a[2]) + (a[1] + a[3]); }
FINIAL_INLINE float largest(V a) {
  const float x = a[0] > a[2] ? a[0] : a[2], y = a[1] > a[3] ? a[1] : a[3];
  return x > y ? x : y;
}

FINIAL_INLINE float power_of_two(int32_t n) {  // 2^n for -126 <= n <= 127
  const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
// a * 2^n for integral |n| <= 252, in two factors so that a subnormal or infinite result is right.
FINIAL_INLINE V scale_by_power(V a, V n) {
  V y;
  for (int i = 0; i < W; ++i) {
    const int32_t whole = n[i] == n[i] ? static_cast<int32_t>(n[i]) : 0, half = whole >> 1;
    y[i] = a[i] * power_of_two(half) * power_of_two(whole - half);
  }
  return y;
}
// Adding and taking away 1.5 * 2^23 leaves the nearest integer for |a| < 2^22, ties to even.
FINIAL_INLINE V round(V a) { return (a + set1(12582912.0f)) - set1(12582912.0f); }

// IEEE half to float, exact. The exponent is rebased by a multiplication, which also normalises subnormals.
FINIAL_INLINE float half_to_float(const uint8_t* source) {
  uint16_t half;
  std::memcpy(&half, source, 2);
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFF) << 13;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  uint32_t bits;
  if (magnitude >= 0x0F800000u) {  // infinity, NaN
    bits = magnitude | 0x7F800000u;
  } else {
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 5.192296858534828e33f;  // 2^112
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

#if defined(__GNUC__)
typedef uint32_t Words __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

FINIAL_INLINE Words load_u16(const uint8_t* p) {
  typedef uint16_t Halves __attribute__((vector_size(8)));
  Halves x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Words);
}
FINIAL_INLINE V load_bf16(const uint8_t* p) { return (V)(load_u16(p) << 16); }
FINIAL_INLINE V load_f16(const uint8_t* p) {
  const Words x = load_u16(p), magnitude = (x & 0x7FFF) << 13;
  const Words special = (Words)(magnitude >= 0x0F800000u) & 0x7F800000u;
  return (V)((Words)((V)magnitude * set1(5.192296858534828e33f)) | special | ((x & 0x8000) << 16));
}
FINIAL_INLINE V to_floats(Ints x) { return __builtin_convertvector(x, V); }
FINIAL_INLINE Words load_u8(const uint8_t* p) {  // by shifts: SSE2 widens bytes only pairwise
  uint32_t x;
  std::memcpy(&x, p, sizeof x);
  const Words shift = {0, 8, 16, 24};
  return ((Words){x, x, x, x} >> shift) & 0xFF;
}
FINIAL_INLINE V load_i8(const uint8_t* p) { return to_floats((Ints)(load_u8(p) << 24) >> 24); }
#else
FINIAL_INLINE V load_bf16(const uint8_t* p) {
  V y;
  for (int i = 0; i < W; ++i) {
    uint16_t upper;
    std::memcpy(&upper, p + 2 * i, 2);
    const uint32_t bits = static_cast<uint32_t>(upper) << 16;
    std::memcpy(&y.lane[i], &bits, 4);
  }
  return y;
}
FINIAL_INLINE V load_f16(const uint8_t* p) {
  V y;
  for (int i = 0; i < W; ++i) y[i] = half_to_float(p + 2 * i);
  return y;
}
FINIAL_INLINE V load_i8(const uint8_t* p) {
  V y;
  for (int i = 0; i < W; ++i) y[i] = static_cast<float>(static_cast<int8_t>(p[i]));
  return y;
}
#endif

#if defined(__GNUC__)
FINIAL_INLINE void load_bf16_pair(const uint8_t* p, V& even, V& odd) {
  Words x;
  std::memcpy(&x, p, sizeof x);
  even = (V)(x << 16);
  odd = (V)(x & 0xFFFF0000u);
}
#else
FINIAL_INLINE void load_bf16_pair(const uint8_t* p, V& even, V& odd) {
  const V a = load_bf16(p), b = load_bf16(p + 2 * W);
  for (int i = 0; i < W; ++i) {
    even[i] = 2 * i < W ? a[2 * i] : b[2 * i - W];
    odd[i] = 2 * i < W ? a[2 * i + 1] : b[2 * i + 1 - W];
  }
}
#endif
FINIAL_INLINE V set1_half(const uint8_t* p) { return set1(half_to_float(p)); }
FINIAL_INLINE void part(V a, V b, V& even, V& odd) {
  for (int i = 0; i < W; ++i) {
    even[i] = 2 * i < W ? a[2 * i] : b[2 * i - W];
    odd[i] = 2 * i < W ? a[2 * i + 1] : b[2 * i + 1 - W];
  }
}
FINIAL_INLINE void join(V even, V odd, V& a, V& b) {
  for (int i = 0; i < W; ++i) {
    a[i] = i % 2 ? odd[i / 2] : even[i / 2];
    b[i] = i % 2 ? odd[(i + W) / 2] : even[(i + W) / 2];
  }
}
FINIAL_INLINE V sum_each(const V (&a)[W]) {
  V y;
  for (int i = 0; i < W; ++i) y[i] = sum(a[i]);
  return y;
}

// Round to nearest even; a NaN stays a quiet NaN.
FINIAL_INLINE void store_bf16(uint8_t* p, V a) {
  uint32_t bits[W];
  std::memcpy(bits, &a, sizeof bits);
  uint16_t out[W];
  for (int i = 0; i < W; ++i) {
    const uint32_t rounded = bits[i] + 0x7FFF + ((bits[i] >> 16) & 1);
    const bool nan = (bits[i] & 0x7FFFFFFFu) > 0x7F800000u;
    out[i] = static_cast<uint16_t>((nan ? bits[i] | 0x400000 : rounded) >> 16);
  }
  std::memcpy(p, out, sizeof out);
}

using Levels = float;
FINIAL_INLINE Levels levels_q4(float d) { return d; }
// The W nibbles of the W bytes at p: low ones, or high ones.
#if defined(__GNUC__)
FINIAL_INLINE V pick_low(Levels d, const uint8_t* p) { return to_floats((Ints)(load_u8(p) & 15) - 8) * set1(d); }
FINIAL_INLINE V pick_high(Levels d, const uint8_t* p) { return to_floats((Ints)(load_u8(p) >> 4) - 8) * set1(d); }
#else
FINIAL_INLINE V pick_low(Levels d, const uint8_t* p) {
  V y;
  for (int i = 0; i < W; ++i) y[i] = d * static_cast<float>((p[i] & 15) - 8);
  return y;
}
FINIAL_INLINE V pick_high(Levels d, const uint8_t* p) {
  V y;
  for (int i = 0; i < W; ++i) y[i] = d * static_cast<float>((p[i] >> 4) - 8);
  return y;
}
#endif

}  // namespace finial::FINIAL_ISA
