// attention: softmax(scale * q k^T) v over the pages of a row's sequence, one row and one kv head at a time.
//
// Shapes: q, out [rows, heads * head_dim]; cache as in kernels.h. Row t sees positions max(0, p - window + 1) … p with
// p = positions[t]. Reference: backends/reference.py `attention`. Tolerance per output: (head_dim / W + log2 W + 4)
// * 2^-24 * |scale| * max_j sum_d |q k_j| relative in the weights, plus (number of keys) * 2^-24 in the weighted sum.
//
// Positions are taken in blocks of BLOCK aligned to position 0, whatever the pages are, with an online softmax
// (Milakov and Gimelshein, arXiv:1805.02867): a row's result depends on its own position and keys and on nothing else.
// A group of query heads shares each key and value, decoded once per block into the first-level cache.
// Traffic: 2 * positions * head_dim elements per item; 4 * group * positions * head_dim flops.
#include <math.h>

#include "vector_exp.h"
#include "weights.h"

namespace finial::FINIAL_ISA {

namespace {

constexpr int64_t BLOCK = 32;

void to_floats(CacheType type, const uint8_t* p, int64_t n, float* out) {
  if (type == CacheType::F32) {
    std::memcpy(out, p, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load_bf16(p + 2 * i));
  if (i < n) decode(Format::BF16, p + 2 * i, n - i, out + i);
}

// Keys (which = 0) or values (1) of positions [from, to) as floats [to - from, head_dim].
void gather(const Cache& cache, const int32_t* pages, int64_t head, int which, int64_t from, int64_t to, float* out) {
  while (from < to) {
    const int64_t at = from % cache.page_size, left = cache.page_size - at;
    const int64_t count = to - from < left ? to - from : left;
    const uint8_t* run = cache.keys(pages[from / cache.page_size], head) + which * cache.run_bytes();
    to_floats(cache.type, run + at * cache.head_dim * cache.element(), count * cache.head_dim, out);
    out += count * cache.head_dim;
    from += count;
  }
}

// scores[i] = scale * q . keys[i] for N keys: one accumulator each, so that N does not matter to the result.
template <int N>
void dots(const float* q, const float* keys, int64_t n, float scale, float* scores) {
  V acc[N];
  for (V& a : acc) a = zero();
  int64_t d = 0;
  for (; d + W <= n; d += W) {
    const V a = load(q + d);
    for (int i = 0; i < N; ++i) acc[i] = fma(a, load(keys + i * n + d), acc[i]);
  }
  if (d < n) {
    const V a = load_n(q + d, n - d);
    for (int i = 0; i < N; ++i) acc[i] = fma(a, load_n(keys + i * n + d, n - d), acc[i]);
  }
  for (int i = 0; i < N; ++i) scores[i] = sum(acc[i]) * scale;
}

// out[d] = out[d] * keep + sum_i p[i] values[i, d] for N vectors of d, i ascending.
template <int N>
void weigh(const float* p, const float* values, int64_t count, int64_t n, V keep, float* out) {
  V acc[N];
  for (int j = 0; j < N; ++j) acc[j] = mul(load(out + j * W), keep);
  for (int64_t i = 0; i < count; ++i) {
    const V weight = set1(p[i]);
    for (int j = 0; j < N; ++j) acc[j] = fma(weight, load(values + i * n + j * W), acc[j]);
  }
  for (int j = 0; j < N; ++j) store(out + j * W, acc[j]);
}

void weigh_all(const float* p, const float* values, int64_t count, int64_t n, float keep, float* out) {
  int64_t d = 0;
  for (; d + 4 * W <= n; d += 4 * W) weigh<4>(p, values + d, count, n, set1(keep), out + d);
  for (; d + W <= n; d += W) weigh<1>(p, values + d, count, n, set1(keep), out + d);
  if (d == n) return;
  V acc = mul(load_n(out + d, n - d), set1(keep));
  for (int64_t i = 0; i < count; ++i) acc = fma(set1(p[i]), load_n(values + i * n + d, n - d), acc);
  store_n(out + d, acc, n - d);
}

// Scores [BLOCK] to exp(score - best), with the running maximum and sum brought up to date. Returns the factor by which
// what was summed before has to shrink. Scores outside the row's range are -infinity.
float soften(float* scores, float& best, float& sum_of_weights) {
  V top = load(scores);
  for (int64_t i = W; i < BLOCK; i += W) top = max(top, load(scores + i));
  const float now = largest(top), next = now > best ? now : best;
  V weights = zero();
  for (int64_t i = 0; i < BLOCK; i += W) {
    const V p = exp(sub(load(scores + i), set1(next)));
    store(scores + i, p);
    weights = add(weights, p);
  }
  float keep[W];
  store(keep, exp(set1(best - next)));
  sum_of_weights = sum_of_weights * keep[0] + sum(weights);
  best = next;
  return keep[0];
}

}  // namespace

int64_t attention_scratch(const Attention& a) {
  return BLOCK * a.cache.head_dim + a.group * (BLOCK + a.cache.head_dim + 2);
}

void attention(const Attention& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = a.cache.head_dim;
  float* rows = scratch;                  // [BLOCK, head_dim] keys, then values
  float* scores = rows + BLOCK * n;       // [group, BLOCK]
  float* out = scores + a.group * BLOCK;  // [group, head_dim]
  float* best = out + a.group * n;        // [group]
  float* weight = best + a.group;         // [group]
  const float nothing = -HUGE_VALF;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / a.cache.kv_heads, head = item % a.cache.kv_heads;
    const int64_t last = a.positions[row];
    const int64_t first = a.window > 0 && last >= a.window ? last - a.window + 1 : 0;
    const int32_t* pages = a.pages + a.sequence[row] * a.pages_per_sequence;
    const int64_t at = (row * a.cache.kv_heads + head) * a.group * n;
    for (int64_t g = 0; g < a.group; ++g) best[g] = nothing, weight[g] = 0;
    for (int64_t i = 0; i < a.group * n; ++i) out[i] = 0;
    for (int64_t base = first / BLOCK * BLOCK; base <= last; base += BLOCK) {
      const int64_t from = first > base ? first : base, to = last + 1 < base + BLOCK ? last + 1 : base + BLOCK;
      const int64_t count = to - from;
      gather(a.cache, pages, head, 0, from, to, rows);
      for (int64_t g = 0; g < a.group; ++g) {
        float* s = scores + g * BLOCK;
        for (int64_t i = 0; i < BLOCK; ++i) s[i] = nothing;
        float* inside = s + (from - base);
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) dots<4>(a.q + at + g * n, rows + i * n, n, a.scale, inside + i);
        for (; i < count; ++i) dots<1>(a.q + at + g * n, rows + i * n, n, a.scale, inside + i);
      }
      gather(a.cache, pages, head, 1, from, to, rows);
      for (int64_t g = 0; g < a.group; ++g) {
        float* s = scores + g * BLOCK;
        const float keep = soften(s, best[g], weight[g]);
        weigh_all(s + (from - base), rows, count, n, keep, out + g * n);
      }
    }
    for (int64_t g = 0; g < a.group; ++g)
      for (int64_t i = 0; i < n; ++i) a.out[at + g * n + i] = out[g * n + i] / weight[g];
  }
}

}  // namespace finial::FINIAL_ISA
