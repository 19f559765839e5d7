// Row-wise and element-wise operations, and the table of this instruction set's kernels.
//
// Reference: backends/reference.py. Against it, per element: add exact; silu_mul and exp within 2 ulp of float32 plus
// the reference's own rounding; rms_norm within (log2(width) + 4) ulp, its sum running in W * ACC partial sums; rope
// within 2 ulp of |x1| + |x2|, cos and sin being given.
// Traffic bound: each reads its inputs once and writes once; for one row all stay in the first-level cache.
#include <math.h>

#include "kernels.h"
#include "panels.h"
#include "vector_exp.h"
#include "weights.h"

namespace finial::FINIAL_ISA {

// From matmul.cpp, packed.cpp, attention.cpp, attention_bf16.cpp and sampling.cpp.
int64_t linear_scratch(const Linear&, int64_t rows);
void linear(const Linear&, const float* x, float* y, int64_t rows, int64_t begin, int64_t end, float* scratch);
Rounding rounding(Format);
void pack(const Linear&, uint8_t* panels, int64_t begin, int64_t end);
void unpack(const Linear&, int64_t row, float* out);
void round_tile(Rounding, const float* x, int64_t n_in, int64_t rows, uint8_t* tile);
void multiply(const Product&, int64_t begin, int64_t end);
void rest();
int64_t peak(Rounding, int64_t rounds, float* sink);
int64_t attention_scratch(CacheType, int64_t head_dim, int64_t queries);
int64_t attention_partial(CacheType, int64_t head_dim);
int64_t attention_queries(CacheType);
bool attention_in_blocks(CacheType);
Rounding attention_rounding(CacheType);
void store_blocked(const Cache&, const float* keys, const float* values, const int32_t* slots, int64_t, int64_t);
void attention(const Attention&, const AttentionPiece&, float* partial, float* scratch);
void attention_merge(const Attention&, const AttentionPiece&, const float* partial, float* scratch);
int64_t highest(const float* x, int64_t n);
float largest_of(const float* x, int64_t n);
void weigh(const float* x, int64_t n, float best, double temperature, double* out);

namespace {

// y[i] = f(a[i], b[i]), the tail in the same vector arithmetic with lanes unused.
template <class F>
void map2(const float* a, const float* b, float* y, int64_t n, F f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, f(load(a + i), load(b + i)));
  if (i < n) store_n(y + i, f(load_n(a + i, n - i), load_n(b + i, n - i)), n - i);
}

void add_rows(const float* a, const float* b, float* y, int64_t n) {
  map2(a, b, y, n, [](V x, V z) { return add(x, z); });
}

void silu_mul(const float* gate, const float* up, float* y, int64_t n) {
  map2(gate, up, y, n, [](V a, V b) { return gated(a, b); });
}

void exp_rows(const float* x, float* y, int64_t n) {
  map2(x, x, y, n, [](V a, V) { return exp(a); });
}

// y = x / sqrt(mean(x^2) + eps) * weight
void rms_norm(const float* x, const float* weight, float* y, int64_t width, float eps) {
  V squares[ACC];
  for (V& s : squares) s = zero();
  int64_t i = 0;
  for (; i + W * ACC <= width; i += W * ACC) {
    for (int j = 0; j < ACC; ++j) {
      const V a = load(x + i + j * W);
      squares[j] = fma(a, a, squares[j]);
    }
  }
  for (int j = 0; i < width; ++j) {
    const int64_t n = width - i < W ? width - i : W;
    const V a = n == W ? load(x + i) : load_n(x + i, n);
    squares[j] = fma(a, a, squares[j]);
    i += n;
  }
  for (int j = 1; j < ACC; ++j) squares[0] = add(squares[0], squares[j]);
  const V scale = set1(1.0f / sqrtf(sum(squares[0]) / static_cast<float>(width) + eps));
  map2(x, weight, y, width, [scale](V a, V w) { return mul(mul(a, scale), w); });
}

// Half-split rotation of one head: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin). y may be x.
void rope(const float* x, const float* cos, const float* sin, float* y, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i += W) {
    const int64_t n = half - i < W ? half - i : W;
    const auto get = [n](const float* p) { return n == W ? load(p) : load_n(p, n); };
    const V a = get(x + i), b = get(x + half + i), c = get(cos + i), s = get(sin + i);
    const V first = sub(mul(a, c), mul(b, s)), second = add(mul(b, c), mul(a, s));
    if (n == W) {
      store(y + i, first);
      store(y + half + i, second);
    } else {
      store_n(y + i, first, n);
      store_n(y + half + i, second, n);
    }
  }
}

// IEEE half of a float that is not negative, to nearest even; what is too large becomes infinity.
uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (bits >= 0x47800000u) return bits > 0x7F800000u ? 0x7E00 : 0x7C00;  // 65536 and above, NaN
  if (bits < 0x38800000u) {                                              // below 2^-14: units of 2^-24
    const float units = x + 0.5f;                                        // whose last bit, at 0.5, is 2^-24
    uint32_t low;
    std::memcpy(&low, &units, 4);
    return static_cast<uint16_t>(low - 0x3F000000u);
  }
  return static_cast<uint16_t>((bits - 0x38000000u + 0xFFF + (bits >> 13 & 1)) >> 13);
}

// As quants.py encodes: the inverse of the float32 scale, halves away from zero.
void store_q8_0(const float* x, uint8_t* out, int64_t n) {
  for (; n > 0; n -= 32, x += 32, out += 34) {
    V top = zero(), poison = zero();
    for (int i = 0; i < 32; i += W) {
      top = max(top, max(load(x + i), sub(zero(), load(x + i))));
      poison = fma(load(x + i), zero(), poison);  // NaN where x is no number, and so is the block
    }
    const float scale = largest(top) / 127.0f + sum(poison);
    const float inverse = scale < 1.17549435e-38f ? 0.0f : 1.0f / scale;
    const uint16_t half = to_half(scale);
    std::memcpy(out, &half, 2);
    int8_t whole[32];
    for (int i = 0; i < 32; ++i) {
      const float scaled = x[i] * inverse, up = scaled + copysignf(0.49999997f, scaled);  // the number below a half:
      const float kept = up > -128.0f && up < 128.0f ? up : 0.0f;  // cut off, halves are rounded away from zero
      whole[i] = static_cast<int8_t>(static_cast<int32_t>(kept));
    }
    std::memcpy(out + 2, whole, 32);
  }
}

void store_cache(CacheType type, const float* x, uint8_t* out, int64_t n) {
  if (type == CacheType::F32) {
    std::memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  if (type == CacheType::Q8_0) return store_q8_0(x, out, n);
  int64_t i = 0;
  for (; i + W <= n; i += W) store_bf16(out + 2 * i, load(x + i));
  if (i < n) {
    uint8_t tail[2 * W];
    store_bf16(tail, load_n(x + i, n - i));
    std::memcpy(out + 2 * i, tail, static_cast<size_t>(2 * (n - i)));
  }
}

float read(const float* x, int64_t n) {
  V sums[8];
  for (V& s : sums) s = zero();
  for (int64_t i = 0; i + 8 * W <= n; i += 8 * W)
    for (int j = 0; j < 8; ++j) sums[j] = add(sums[j], load(x + i + j * W));
  for (int j = 1; j < 8; ++j) sums[0] = add(sums[0], sums[j]);
  return sum(sums[0]);
}

#define FINIAL_TEXT_(x) #x
#define FINIAL_TEXT(x) FINIAL_TEXT_(x)

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {FINIAL_TEXT(FINIAL_ISA),
                         BLOCKING,
                         linear,
                         linear_scratch,
                         rounding,
                         pack,
                         unpack,
                         round_tile,
                         multiply,
                         rest,
                         peak,
                         decode,
                         attention,
                         attention_merge,
                         attention_scratch,
                         attention_partial,
                         attention_queries,
                         attention_in_blocks,
                         attention_rounding,
                         store_blocked,
                         rms_norm,
                         rope,
                         store_cache,
                         add_rows,
                         silu_mul,
                         exp_rows,
                         highest,
                         largest_of,
                         weigh,
                         read};

}  // namespace finial::FINIAL_ISA
