// Row-wise and element-wise operations, and the table of this instruction set's kernels.
//
// Reference: backends/reference.py. Against it, per element: add exact; silu_mul and exp within 2 ulp of float32 plus
// the reference's own rounding; rms_norm within (log2(width) + 4) ulp, its sum running in W * ACC partial sums; rope
// within 2 ulp of |x1| + |x2|, cos and sin being given.
// Traffic bound: each reads its inputs once and writes once; for one row all stay in the first-level cache.
#include <math.h>

#include "kernels.h"
#include "vector_exp.h"
#include "weights.h"

namespace finial::FINIAL_ISA {

// From matmul.cpp and attention.cpp.
int64_t linear_scratch(const Linear&, int64_t rows);
void linear(const Linear&, const float* x, float* y, int64_t rows, int64_t begin, int64_t end, float* scratch);
int64_t attention_scratch(const Attention&);
void attention(const Attention&, int64_t begin, int64_t end, float* scratch);

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

// gate / (1 + exp(-gate)) * up
void silu_mul(const float* gate, const float* up, float* y, int64_t n) {
  map2(gate, up, y, n, [](V g, V u) { return mul(div(g, add(set1(1), exp(sub(zero(), g)))), u); });
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

void store_cache(CacheType type, const float* x, uint8_t* out, int64_t n) {
  if (type == CacheType::F32) {
    std::memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
    return;
  }
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
                         linear,
                         linear_scratch,
                         decode,
                         attention,
                         attention_scratch,
                         rms_norm,
                         rope,
                         store_cache,
                         add_rows,
                         silu_mul,
                         exp_rows,
                         read};

}  // namespace finial::FINIAL_ISA
