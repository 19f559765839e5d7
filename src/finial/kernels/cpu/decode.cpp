// Every weight format, block by block, in the arithmetic and the order of quants.py: bit-equal to it.
#include "weights.h"

namespace finial::FINIAL_ISA {

namespace {

// Blocks of 32 with low nibbles first. `fifth` adds 16 where its bit is set; then (q - offset) d, or q d + m.
FINIAL_INLINE void nibbles32(const uint8_t* q, uint32_t fifth, int offset, float d, float m, float* y) {
  for (int i = 0; i < 16; ++i) {
    const int low = (q[i] & 15) + static_cast<int>((fifth >> i) & 1) * 16 - offset;
    const int high = (q[i] >> 4) + static_cast<int>((fifth >> (i + 16)) & 1) * 16 - offset;
    y[i] = static_cast<float>(low) * d + m;
    y[i + 16] = static_cast<float>(high) * d + m;
  }
}

uint32_t word(const uint8_t* p) {
  uint32_t out;
  std::memcpy(&out, p, 4);
  return out;
}

// The eight 6-bit scales and minimums of a q4_k or q5_k block (layout: quants.py, _k_scales).
struct KScales {
  float scale[8], minimum[8];

  explicit KScales(const uint8_t* p) {
    const float d = half_to_float(p), least = half_to_float(p + 2);
    const uint8_t *first = p + 4, *second = p + 8, *third = p + 12;
    for (int i = 0; i < 4; ++i) {
      scale[i] = d * static_cast<float>(first[i] & 63);
      minimum[i] = least * static_cast<float>(second[i] & 63);
      scale[i + 4] = d * static_cast<float>((third[i] & 15) | ((first[i] >> 6) << 4));
      minimum[i + 4] = least * static_cast<float>((third[i] >> 4) | ((second[i] >> 6) << 4));
    }
  }
};

void block_q4_k(const uint8_t* p, float* y) {
  const KScales k(p);
  for (int group = 0; group < 8; ++group) {
    const uint8_t* q = p + 16 + group / 2 * 32;
    for (int i = 0; i < 32; ++i) {
      const int level = group % 2 ? q[i] >> 4 : q[i] & 15;
      y[group * 32 + i] = static_cast<float>(level) * k.scale[group] - k.minimum[group];
    }
  }
}

void block_q5_k(const uint8_t* p, float* y) {
  const KScales k(p);
  const uint8_t* high = p + 16;
  for (int group = 0; group < 8; ++group) {
    const uint8_t* q = p + 48 + group / 2 * 32;
    for (int i = 0; i < 32; ++i) {
      const int level = (group % 2 ? q[i] >> 4 : q[i] & 15) + ((high[i] >> group) & 1) * 16;
      y[group * 32 + i] = static_cast<float>(level) * k.scale[group] - k.minimum[group];
    }
  }
}

void block_q6_k(const uint8_t* p, float* y) {
  const float d = half_to_float(p + 208);
  for (int half = 0; half < 2; ++half) {
    const uint8_t *low = p + half * 64, *high = p + 128 + half * 32;
    for (int group = 0; group < 4; ++group) {
      for (int i = 0; i < 32; ++i) {
        const uint8_t byte = low[(group % 2) * 32 + i];
        const int level = ((group < 2 ? byte & 15 : byte >> 4) | (((high[i] >> (2 * group)) & 3) << 4)) - 32;
        const int at = half * 128 + group * 32 + i;
        y[at] = static_cast<float>(level) * (d * static_cast<float>(static_cast<int8_t>(p[192 + at / 16])));
      }
    }
  }
}

template <class F>
FINIAL_INLINE void blocks(const uint8_t* source, int64_t n, int size, int bytes, float* out, F f) {
  for (int64_t i = 0; i < n; i += size, source += bytes, out += size) f(source, out);
}

}  // namespace

void decode(Format format, const uint8_t* source, int64_t n, float* out) {
  switch (format) {
    case Format::F32:
      std::memcpy(out, source, static_cast<size_t>(n) * 4);
      break;
    case Format::F16:
      blocks(source, n, 1, 2, out, [](const uint8_t* p, float* y) { *y = half_to_float(p); });
      break;
    case Format::BF16:
      blocks(source, n, 1, 2, out, [](const uint8_t* p, float* y) { *y = bf16_to_float(p); });
      break;
    case Format::Q8_0:
      blocks(source, n, 32, 34, out, [](const uint8_t* p, float* y) {
        const float d = half_to_float(p);
        for (int i = 0; i < 32; ++i) y[i] = static_cast<float>(static_cast<int8_t>(p[2 + i])) * d;
      });
      break;
    case Format::Q4_0:  // adding -0 changes nothing, not even the sign of a zero
      blocks(source, n, 32, 18, out,
             [](const uint8_t* p, float* y) { nibbles32(p + 2, 0, 8, half_to_float(p), -0.0f, y); });
      break;
    case Format::Q4_1:
      blocks(source, n, 32, 20, out,
             [](const uint8_t* p, float* y) { nibbles32(p + 4, 0, 0, half_to_float(p), half_to_float(p + 2), y); });
      break;
    case Format::Q5_0:
      blocks(source, n, 32, 22, out,
             [](const uint8_t* p, float* y) { nibbles32(p + 6, word(p + 2), 16, half_to_float(p), -0.0f, y); });
      break;
    case Format::Q5_1:
      blocks(source, n, 32, 24, out, [](const uint8_t* p, float* y) {
        nibbles32(p + 8, word(p + 4), 0, half_to_float(p), half_to_float(p + 2), y);
      });
      break;
    case Format::Q4_K:
      blocks(source, n, 256, 144, out, [](const uint8_t* p, float* y) { block_q4_k(p, y); });
      break;
    case Format::Q5_K:
      blocks(source, n, 256, 176, out, [](const uint8_t* p, float* y) { block_q5_k(p, y); });
      break;
    case Format::Q6_K:
      blocks(source, n, 256, 210, out, [](const uint8_t* p, float* y) { block_q6_k(p, y); });
      break;
    case Format::COUNT:
      break;
  }
}

}  // namespace finial::FINIAL_ISA
