// The two products of attention over a bf16 cache: queries times keys (`dots`), weights times values (`mix`), in loops
// for how many queries meet, in vectors. For attention_bf16_vectors.h; attention_bf16.cpp says in which order they sum
// and how fast they are.
#pragma once

#include "attention_bf16_room.h"

#if defined(FINIAL_BF16_PANELS) && !defined(FINIAL_TILES)

namespace finial::FINIAL_ISA {

namespace {

constexpr int KEYS = CACHE_BLOCK / W;  // vectors of a block's keys
// Queries, and vectors of values, that meet for few queries: as many sums as there are registers for.
constexpr int FEW = W >= 16 ? 3 : 2, SLICE = W >= 16 ? 8 : 4;

// Many queries read the same chunk again and again from the second-level cache: each asks for what lies this far on.
// So many are they if they are all of one tile, for one tile reads it from memory; with AVX-512 nine of one tile too.
constexpr int WIDE_FROM = W >= 16 ? 9 : 3;
constexpr bool wide(int64_t count, int64_t tiles) { return count >= WIDE_FROM && (W >= 16 || tiles > 1); }
constexpr int64_t AHEAD = 2048;
FINIAL_INLINE void prefetch_near(const uint8_t* p) { prefetch_line<3>(p); }
template <Ask ASK>
FINIAL_INLINE void ask(const uint8_t* p) {
  if (ASK == Ask::Near) prefetch_near(p);
  if (ASK == Ask::Far) prefetch(p);
}

// Whether what is read after block b lies elsewhere: hardware fetches ahead within a run only.
bool apart(const uint8_t* const* blocks, int64_t b, int64_t row) {
  return blocks[b + 1] != blocks[b] + CACHE_BLOCK * 4 * row;
}

// How few queries ask for what they read after block b.
Ask asks_after(const uint8_t* const* blocks, int64_t b, int64_t row) {
  return asking.always ? asking.how : apart(blocks, b, row) ? Ask::Far : Ask::Nothing;
}

// scores[m][k] = q[m] . keys[k] for M queries and a block of keys; q [pairs][M]. `next`: what is read later.
template <int M, Ask ASK>
void dots(const uint8_t* FINIAL_RESTRICT keys, const Two* FINIAL_RESTRICT q, int64_t pairs,
          float* FINIAL_RESTRICT scores, const uint8_t* FINIAL_RESTRICT next) {
  constexpr int N = W >= 16 || M < WIDE_FROM ? KEYS : KEYS / 2;
  for (int k = 0; k < KEYS; k += N) {
    const uint8_t* key = keys + k * W * 4;
    const Two* two = q;
    V acc[M][N];
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < N; ++v) acc[m][v] = zero();
#pragma GCC unroll 4
    for (int64_t i = 0; i < pairs; ++i, key += CACHE_BLOCK * 4, two += M) {
      if (k == 0) ask<ASK>(next), ask<ASK>(next + 64), next += CACHE_BLOCK * 4;
      if (k == 0 && M >= WIDE_FROM) prefetch_near(key + AHEAD), prefetch_near(key + AHEAD + 64);
      add_pair(key, two, 1, acc);
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < N; ++v) store(scores + m * LINE + (k + v) * W, acc[m][v]);
  }
}

using Dots = void (*)(const uint8_t*, const Two*, int64_t, float*, const uint8_t*);
template <Ask ASK>
constexpr Dots DOTS[MOST + 1] = {nullptr,       dots<1, ASK>,  dots<2, ASK>, dots<3, ASK>, dots<4, ASK>,
#if defined(FINIAL_AVX512)
                                 dots<5, ASK>,  dots<6, ASK>,  dots<7, ASK>, dots<8, ASK>, dots<9, ASK>,
                                 dots<10, ASK>, dots<11, ASK>, dots<12, ASK>
#endif
};
const Dots* dots_for(Ask ask) {
  return ask == Ask::Near ? DOTS<Ask::Near> : ask == Ask::Far ? DOTS<Ask::Far> : DOTS<Ask::Nothing>;
}

// A chunk's values: [BLOCKS] of [pairs of positions][width][2].
struct Values {
  const uint8_t* const* blocks;
  int64_t width;
};

// out[m] += sum over pairs i in [from, to) of weights[m][i] . values[i], for M queries and N vectors from element d.
template <int M, int N, Ask ASK>
void mix(const Two* weights, const Values& values, int64_t from, int64_t to, int64_t d, float* out, int64_t stride) {
  V acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) acc[m][v] = load(out + m * stride + d + v * W);
  while (from < to) {
    const uint8_t* value = values.blocks[from / PAIRS] + (from % PAIRS * values.width + d) * 4;
    const int64_t end = least(to, (from / PAIRS + 1) * PAIRS);
    const uint8_t* next =  // all slices of a block together ask for the next one, in order
        ASK != Ask::Nothing ? values.blocks[from / PAIRS + 1] + (d * PAIRS + from % PAIRS * N * W) * 4 : value;
    for (; from < end; ++from, value += values.width * 4, next += N * W * 4) {
      for (int v = 0; v < N; ++v) ask<ASK>(next + v * W * 4);
      add_pair(value, weights + from, LINE_PAIRS, acc);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) store(out + m * stride + d + v * W, acc[m][v]);
}

using Mix = void (*)(const Two*, const Values&, int64_t, int64_t, int64_t, float*, int64_t);
#if defined(FINIAL_AVX512)
template <Ask ASK>
constexpr Mix NARROW[FEW][SLICE] = {{mix<1, 1, ASK>, mix<1, 2, ASK>, mix<1, 3, ASK>, mix<1, 4, ASK>, mix<1, 5, ASK>,
                                     mix<1, 6, ASK>, mix<1, 7, ASK>, mix<1, 8, ASK>},
                                    {mix<2, 1, ASK>, mix<2, 2, ASK>, mix<2, 3, ASK>, mix<2, 4, ASK>, mix<2, 5, ASK>,
                                     mix<2, 6, ASK>, mix<2, 7, ASK>, mix<2, 8, ASK>},
                                    {mix<3, 1, ASK>, mix<3, 2, ASK>, mix<3, 3, ASK>, mix<3, 4, ASK>, mix<3, 5, ASK>,
                                     mix<3, 6, ASK>, mix<3, 7, ASK>, mix<3, 8, ASK>}};
#else
template <Ask ASK>
constexpr Mix NARROW[FEW][SLICE] = {{mix<1, 1, ASK>, mix<1, 2, ASK>, mix<1, 3, ASK>, mix<1, 4, ASK>},
                                    {mix<2, 1, ASK>, mix<2, 2, ASK>, mix<2, 3, ASK>, mix<2, 4, ASK>}};
#endif

const Mix (*narrow(Ask ask)) [SLICE] {
  return ask == Ask::Near ? NARROW<Ask::Near> : ask == Ask::Far ? NARROW<Ask::Far> : NARROW<Ask::Nothing>;
}

// How the values of a chunk that all queries see whole join those of the chunks before: out = out keep + values take.
struct Joining {
  float keep[W], take[W];
};

// The same for many queries and `pairs` pairs in one run of memory; from nothing if FRESH, joined to what is there if
// `joining` is not null. Unless loops over sums are unrolled from the first, AVX2's lie on the stack.
template <int M, int N, bool FRESH>
void mix_wide(const Two* FINIAL_RESTRICT weights, const uint8_t* FINIAL_RESTRICT value, int64_t row, int64_t pairs,
              float* FINIAL_RESTRICT out, int64_t stride, const Joining* joining) {
  V acc[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < N; ++v) acc[m][v] = FRESH ? zero() : load(out + m * stride + v * W);
  for (int64_t i = 0; i < pairs; ++i, value += row) add_pair(value, weights + i, LINE_PAIRS, acc);
  if (joining == nullptr) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < N; ++v) store(out + m * stride + v * W, acc[m][v]);
    return;
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < N; ++v) {
      float* y = out + m * stride + v * W;
      store(y, fma(acc[m][v], set1(joining->take[m]), mul(load(y), set1(joining->keep[m]))));
    }
}

using Wide = void (*)(const Two*, const uint8_t*, int64_t, int64_t, float*, int64_t, const Joining*);
#if defined(FINIAL_AVX512)
template <bool FRESH>
constexpr Wide WIDE[MOST - WIDE_FROM + 1][2] = {{mix_wide<9, 1, FRESH>, mix_wide<9, 2, FRESH>},
                                                {mix_wide<10, 1, FRESH>, mix_wide<10, 2, FRESH>},
                                                {mix_wide<11, 1, FRESH>, mix_wide<11, 2, FRESH>},
                                                {mix_wide<12, 1, FRESH>, mix_wide<12, 2, FRESH>}};
#else
template <bool FRESH>
constexpr Wide WIDE[MOST - WIDE_FROM + 1][2] = {{mix_wide<3, 1, FRESH>, mix_wide<3, 2, FRESH>},
                                                {mix_wide<4, 1, FRESH>, mix_wide<4, 2, FRESH>}};
#endif

// Slices of two vectors over pairs [from, to), from the second-level cache. What is joined must be one run of memory.
void mix_all(const Two* weights, const Values& values, int64_t count, int64_t from, int64_t to, float* out,
             int64_t stride, bool fresh, const Joining* joining) {
  const int64_t vectors = values.width / W, row = values.width * 4;
  for (int64_t end; from < to; from = end, fresh = false) {
    int64_t block = from / PAIRS;
    const uint8_t* value = values.blocks[block] + from % PAIRS * row;
    while (++block * PAIRS < to && values.blocks[block] == values.blocks[block - 1] + PAIRS * row) {
    }
    end = least(to, block * PAIRS);
    for (int64_t v = 0; v < vectors; v += 2)
      (fresh ? WIDE<true> : WIDE<false>)[count -
          WIDE_FROM][vectors - v > 1](weights + from, value + v* W* 4, row, end - from, out + v* W, stride, joining);
  }
}

// Whole pairs [from, to) for `count` queries. Many: slices of two vectors over all of them, from the second-level
// cache. Few: whole values, so that memory is read in order; block by block if that takes more than one go.
void mix_pairs(const Two* weights, const Values& values, int64_t count, int64_t from, int64_t to, float* out,
               int64_t stride, int64_t tiles, bool fetch) {
  const int64_t vectors = values.width / W;
  if (wide(count, tiles)) return mix_all(weights, values, count, from, to, out, stride, false, nullptr);
  const int64_t turns = (count + FEW - 1) / FEW;
  const auto asks = [&](int64_t i) {
    return fetch ? asks_after(values.blocks, i / PAIRS, values.width / 2) : Ask::Nothing;
  };
  for (int64_t end; from < to; from = end) {
    const Ask now = asks(from);
    end = least(to, (from / PAIRS + 1) * PAIRS);
    while (turns == 1 && vectors <= SLICE && end < to && asks(end) == now) end = least(to, end + PAIRS);
    for (int64_t turn = 0; turn < turns; ++turn) {
      const int64_t m = count * turn / turns, size = count * (turn + 1) / turns - m;
      const Mix* few = narrow(turn == 0 ? now : Ask::Nothing)[size - 1];
      for (int64_t v = 0; v < vectors; v += SLICE)
        few[least(SLICE, vectors - v) - 1](weights + m * LINE_PAIRS, values, from, end, v * W, out + m * stride,
                                           stride);
    }
  }
}

// One position of a pair: the odd one, or the even one.
void mix_half(const Two* weights, const Values& values, int64_t count, int64_t at, float* out, int64_t stride) {
  const int64_t i = at / 2;
  const uint8_t* value = values.blocks[i / PAIRS] + i % PAIRS * values.width * 4;
  for (int64_t m = 0; m < count; ++m)
    for (int64_t d = 0; d < values.width; d += W)
      add_half(value + d * 4, weights + m * LINE_PAIRS + i, at % 2 != 0, out + m * stride + d);
}

void mix_span(const Two* weights, const Values& values, int64_t count, Span span, float* out, int64_t stride,
              int64_t tiles, bool fetch) {
  if (span.from >= span.to) return;
  if (span.from % 2 != 0) mix_half(weights, values, count, span.from, out, stride);
  mix_pairs(weights, values, count, (span.from + 1) / 2, span.to / 2, out, stride, tiles, fetch);
  if (span.to % 2 != 0) mix_half(weights, values, count, span.to - 1, out, stride);
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
