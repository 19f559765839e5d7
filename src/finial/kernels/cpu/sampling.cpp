// What choosing a token reads a whole row of logits for.
//
// `highest` and `largest` compare, so they are exact. `weigh` is exp in float64, off by a few of its last bits; whoever
// compares sums of it leaves room for them (choose.cpp; tests/test_choose.py holds the choices to NumPy's). Whole
// choices among 151,936 random logits on one Zen 4 core, _native.choose, best of 15: greedy 11.8 us, temperature alone
// 227 us (docs/cpu.md).
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace finial::FINIAL_ISA {

namespace {

constexpr int64_t BLOCK = 1024;

// The highest of n >= 1 floats. `poison` becomes NaN when one of them is NaN or infinite.
float top_of(const float* x, int64_t n, V& poison) {
  if (n < W) {
    float best = x[0];
    for (int64_t i = 0; i < n; ++i) {
      best = x[i] > best ? x[i] : best;
      poison = fma(set1(x[i]), zero(), poison);
    }
    return best;
  }
  V top[4];
  for (V& t : top) t = load(x);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) {
      const V a = load(x + i + j * W);
      top[j] = max(top[j], a);
      poison = fma(a, zero(), poison);
    }
  for (; i < n; i += W) {
    const V a = load(x + (i + W <= n ? i : n - W));
    top[0] = max(top[0], a);
    poison = fma(a, zero(), poison);
  }
  return largest(max(max(top[0], top[1]), max(top[2], top[3])));
}

}  // namespace

float largest_of(const float* x, int64_t n) {
  V poison = zero();
  return top_of(x, n, poison);
}

int64_t highest(const float* x, int64_t n) {
  V poison = zero();
  float best = 0;
  int64_t at = -1;
  for (int64_t i = 0; i < n; i += BLOCK) {
    const float top = top_of(x + i, n - i < BLOCK ? n - i : BLOCK, poison);
    if (at < 0 || top > best) best = top, at = i;
  }
  if (sum(poison) == 0.0f) {
    while (x[at] != best) ++at;
    return at;
  }
  at = 0;
  for (int64_t i = 0; i < n; ++i) {  // something is not finite: one by one
    if (x[i] != x[i]) return i;
    if (x[i] > x[at]) at = i;
  }
  return at;
}

// exp as in vector_exp.h: n ln 2 + r, a polynomial, 2^n by its exponent; to the sum of the series up to r^12, whose
// rest is below 2^-56 for |r| <= ln(2) / 2. Below -700 it is exp(-700), which no sum beside 1 notices.
void weigh(const float* x, int64_t n, float best, double temperature, double* out) {
  constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52: its last bit is 1, so adding it rounds to integers
  for (int64_t i = 0; i < n; ++i) {
    double v = (static_cast<double>(x[i]) - static_cast<double>(best)) / temperature;
    v = v > -700.0 ? v : -700.0;
    const double k = v * 1.4426950408889634 + MAGIC;
    uint64_t power;
    std::memcpy(&power, &k, 8);
    const double whole = k - MAGIC;
    const double r = (v - whole * 6.93147180369123816490e-01) - whole * 1.90821492927058770002e-10;
    double y = 1.0 / 479001600;
    y = y * r + 1.0 / 39916800;
    y = y * r + 1.0 / 3628800;
    y = y * r + 1.0 / 362880;
    y = y * r + 1.0 / 40320;
    y = y * r + 1.0 / 5040;
    y = y * r + 1.0 / 720;
    y = y * r + 1.0 / 120;
    y = y * r + 1.0 / 24;
    y = y * r + 1.0 / 6;
    y = y * r + 0.5;
    y = y * r + 1.0;
    y = y * r + 1.0;
    uint64_t bits;
    std::memcpy(&bits, &y, 8);
    bits += power << 52;
    std::memcpy(out + i, &bits, 8);
  }
}

}  // namespace finial::FINIAL_ISA
