// What every attention kernel does beside its products: which positions a row sees, and merging chunks of a softmax.
#pragma once

#include "kernels.h"
#include "vector_exp.h"

namespace finial::FINIAL_ISA {

struct Span {  // positions of a chunk that a query sees
  int64_t from, to;
};

struct Softmax {
  float best, weight;  // largest score, sum of exp(score - best); weight 0: nothing seen yet
};

// What the row sees of the chunk that begins at `base`; {0, 0}: nothing.
FINIAL_INLINE Span span_of(const Attention& a, int64_t row, int64_t base) {
  const int64_t last = a.positions[row] - base, first = a.window > 0 ? last - a.window + 1 : -base;
  const Span span{first > 0 ? first : 0, last + 1 < ATTENTION_CHUNK ? last + 1 : ATTENTION_CHUNK};
  return span.from < span.to ? span : Span{0, 0};
}

// A query's place in q and out: query j of a piece is head j % group of row j / group.
FINIAL_INLINE int64_t place(const Attention& a, const AttentionPiece& piece, int64_t j) {
  const int64_t row = piece.row + j / a.group;
  return ((row * a.cache.kv_heads + piece.head) * a.group + j % a.group) * a.cache.head_dim;
}

// The results of one more chunk into those of the chunks before; n whole vectors.
FINIAL_INLINE void merge(Softmax& s, float* out, const Softmax& more, const float* added, int64_t n) {
  if (more.weight == 0) return;
  if (s.weight == 0) {
    s = more;
    std::memcpy(out, added, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  const float best = more.best > s.best ? more.best : s.best;
  const V keep = exp(set1(s.best - best)), take = exp(set1(more.best - best));
  const V weight = fma(set1(more.weight), take, mul(set1(s.weight), keep));
  float lanes[W];
  store(lanes, weight);
  s = {best, lanes[0]};
  for (int64_t d = 0; d < n; d += W) store(out + d, fma(load(added + d), take, mul(load(out + d), keep)));
}

}  // namespace finial::FINIAL_ISA
