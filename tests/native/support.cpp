#include "support.h"

#include <cmath>
#include <cstdio>
#include <cstring>

namespace finial::test {

void Report::expect(bool right, const std::string& what) {
  ++(right ? passed : failed);
  if (!right) std::printf("FAILED %s\n", what.c_str());
}

void Report::near(const Floats& got, const Doubles& expected, const Doubles& tolerance, const std::string& what) {
  size_t wrong = 0, worst = 0;
  double most = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double off = std::fabs(static_cast<double>(got[i]) - expected[i]);
    if (off <= tolerance[i]) continue;
    ++wrong;
    if (!(off - tolerance[i] <= most)) most = off - tolerance[i], worst = i;
  }
  std::string text = what;
  if (wrong > 0)
    text += ": " + std::to_string(wrong) + " of " + std::to_string(got.size()) + " values off; element " +
            std::to_string(worst) + " is " + std::to_string(got[worst]) + ", expected " +
            std::to_string(expected[worst]) + " within " + std::to_string(tolerance[worst] * 1e6) + "e-6";
  expect(wrong == 0 && got.size() == expected.size(), text);
}

void Report::equal(const float* a, const float* b, int64_t n, const std::string& what) {
  expect(n == 0 || std::memcmp(a, b, static_cast<size_t>(n) * sizeof(float)) == 0, what);
}

uint64_t Random::next() {  // splitmix64 (Steele, Lea and Flood, 2014)
  uint64_t z = state_ += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

float Random::normal() {  // Box and Muller
  const double radius = std::sqrt(-2 * std::log(1 - uniform()));
  return static_cast<float>(radius * std::cos(6.283185307179586 * uniform()));
}

Floats Random::normals(int64_t n) {
  Floats out(static_cast<size_t>(n));
  for (float& x : out) x = normal();
  return out;
}

double rounded(double x, int bits, int least) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::ilogb(x) < least ? least : std::ilogb(x);
  return std::ldexp(std::nearbyint(std::ldexp(x, bits - 1 - exponent)), exponent - bits + 1);
}

Doubles cached(CacheType type, const float* x, int64_t n) {
  Doubles out(x, x + n);
  if (type == CacheType::BF16)
    for (double& a : out) a = to_bf16(a);
  if (type != CacheType::Q8_0) return out;
  for (int64_t i = 0; i < n; i += 32) {
    float top = 0;
    for (int64_t j = i; j < i + 32; ++j) top = std::fmax(top, std::fabs(x[j]));
    const float scale = top / 127, inverse = scale < 1.17549435e-38f ? 0 : 1 / scale;
    for (int64_t j = i; j < i + 32; ++j)  // halves away from zero
      out[static_cast<size_t>(j)] = std::round(static_cast<double>(x[j] * inverse)) * to_f16(scale);
  }
  return out;
}

const FormatInfo& info(Format format) { return FORMATS[static_cast<int>(format)]; }

double half_value(const uint8_t* p) {
  const int bits = p[0] | p[1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

namespace {

double float_value(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

int nibble(const uint8_t* q, int i) { return i < 16 ? q[i] & 15 : q[i - 16] >> 4; }
int bit(const uint8_t* p, int i) { return p[i / 8] >> (i % 8) & 1; }

// q4_k and q5_k: the 6-bit scale (which = 0) or minimum (1) of one of eight groups, in twelve bytes.
int six_bits(const uint8_t* p, int which, int group) {
  const uint8_t *low = p + 4 * which, *rest = p + 8;
  if (group < 4) return low[group] & 63;
  return (which == 0 ? rest[group - 4] & 15 : rest[group - 4] >> 4) | (low[group - 4] >> 6) << 4;
}

}  // namespace

double element(Format format, const uint8_t* row, int64_t index, double* size) {
  const FormatInfo& f = info(format);
  const uint8_t* p = row + index / f.block * f.block_bytes;
  const int i = static_cast<int>(index % f.block);
  double first = 0, second = -0.0;  // adding which changes nothing, not even the sign of a zero
  switch (format) {
    case Format::F32:
      first = float_value(p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24);
      break;
    case Format::F16:
      first = half_value(p);
      break;
    case Format::BF16:
      first = float_value(p[0] << 16 | static_cast<uint32_t>(p[1]) << 24);
      break;
    case Format::Q8_0:
      first = half_value(p) * static_cast<int8_t>(p[2 + i]);
      break;
    case Format::Q4_0:
      first = half_value(p) * (nibble(p + 2, i) - 8);
      break;
    case Format::Q4_1:
      first = half_value(p) * nibble(p + 4, i), second = half_value(p + 2);
      break;
    case Format::Q5_0:
      first = half_value(p) * (nibble(p + 6, i) + 16 * bit(p + 2, i) - 16);
      break;
    case Format::Q5_1:
      first = half_value(p) * (nibble(p + 8, i) + 16 * bit(p + 4, i)), second = half_value(p + 2);
      break;
    case Format::Q4_K:
    case Format::Q5_K: {
      const bool five = format == Format::Q5_K;
      const int group = i / 32, byte = p[(five ? 48 : 16) + group / 2 * 32 + i % 32];
      int level = group % 2 == 0 ? byte & 15 : byte >> 4;
      if (five) level += 16 * (p[16 + i % 32] >> group & 1);
      first = half_value(p) * six_bits(p + 4, 0, group) * level;
      second = -half_value(p + 2) * six_bits(p + 4, 1, group);
      break;
    }
    case Format::Q6_K: {
      const int half = i / 128, group = i % 128 / 32, byte = p[half * 64 + group % 2 * 32 + i % 32];
      const int low = group < 2 ? byte & 15 : byte >> 4, high = p[128 + half * 32 + i % 32] >> (2 * group) & 3;
      first = half_value(p + 208) * static_cast<int8_t>(p[192 + i / 16]) * (low + 16 * high - 32);
      break;
    }
    case Format::COUNT:
      break;
  }
  if (size != nullptr) *size = std::fabs(first) + std::fabs(second);
  return first + second;
}

bool exact(Format format) {
  for (Format f : {Format::Q4_1, Format::Q5_1, Format::Q4_K, Format::Q5_K, Format::Q6_K})
    if (f == format) return false;
  return true;
}

Weight::Weight(Format format, int64_t n_out, int64_t n_in, uint64_t seed)
    : format(format), n_out(n_out), n_in(n_in), row_bytes_(n_in / info(format).block * info(format).block_bytes) {
  bytes_.resize(static_cast<size_t>(n_out * row_bytes_ + 1));
  bytes_.shrink_to_fit();
  Random random(seed);
  const int64_t block = info(format).block_bytes;
  for (uint8_t* p = bytes_.data() + 1; p < bytes_.data() + bytes_.size(); p += block) {
    for (int64_t i = 0; i < block; ++i) p[i] = static_cast<uint8_t>(random.next());
    // Values of a sane size: floats about 1, scales and minimums about 2^-6, either sign.
    const auto top = [&](int64_t at, int mask, int bits) { p[at] = static_cast<uint8_t>((p[at] & mask) | bits); };
    if (format == Format::F32) top(3, 0x80, 0x3F);
    if (format == Format::BF16) top(1, 0x80, 0x3F);
    if (format == Format::F16) top(1, 0x83, 0x38);
    if (info(format).block == 1) continue;
    if (format == Format::Q6_K) top(209, 0x83, 0x24);
    if (format != Format::Q6_K) top(1, 0x83, 0x24);
    if (!exact(format) && format != Format::Q6_K) top(3, 0x83, 0x24);
  }
}

Linear Weight::linear(const float* bias) const {
  Linear l{};
  l.weight = row(0), l.bias = bias, l.n_in = n_in, l.n_out = n_out, l.row_bytes = row_bytes_, l.format = format;
  return l;
}

FloatArray array(const Floats& data, int64_t rows) {
  return {const_cast<float*>(data.data()), rows, rows == 0 ? 0 : static_cast<int64_t>(data.size()) / rows};
}

}  // namespace finial::test
