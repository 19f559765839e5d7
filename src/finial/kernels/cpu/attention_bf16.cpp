// attention over a bf16 cache where an instruction multiplies pairs of bf16: queries and attention weights are rounded.
//
// Reference: backends/reference.py `attention`, with q scale log2(e) rounded to bf16, so that a score is a power of
// two, and each 2^(score - its chunk's largest) too; sums are float32, and the weights' sum is that of the rounded
// ones. With u = 2^-8 a score is off by at most u sum_d |q k| |scale| beside the float32 rounding, a weight by u
// relatively. Subnormal queries, keys, weights and values count as zero.
//
// Order of operations, the same for a row whatever is computed beside it:
//   score     one chain over pairs of elements, d ascending.
//   softmax   chunks of ATTENTION_CHUNK positions aligned to position 0: every score, their maximum, the weights; their
//             sum in lanes of (position / 2) % W.
//   values    one chain over pairs of positions, ascending. What a row does not see of a pair is masked in the values
//             too: the weight 0 does not make a NaN or an infinity vanish that another sequence left there.
// Chunks are merged in ascending order (softmax.h), a row of one chunk not at all.
//
// The cache's blocks (kernels.h) are the panels of a matrix product: 32 keys are two vectors for each pair of elements,
// and a value's elements are vectors for each pair of positions. So a prompt is two blocked products and a decode step
// the same loops with few rows: each byte of the cache is read once, in order, and meets every head of its group.
// Caches that are not blocked (odd page sizes or rows) are rearranged chunk by chunk first.
//
// Per kv head and position: 2 row_bytes read (512 bytes at head_dim 128), and for each query head_dim multiplying
// instructions of 64 flops for 16 keys, so 4 head_dim flops. A block of 32 keys and 12 queries: 24 multiplying
// instructions for each 2 loads and 12 broadcasts; a query's softmax of a chunk takes about 140 cycles beside 2048 (200
// before largest scores were sought for a whole tile first). A tile of queries does its whole chunk before the next
// one, so that its scores stay in the first-level cache; the first one asks for the values that all will read. Where
// all see all of a chunk, its values are joined to those before in registers.
//
// Measured on Zen 4 beside other work, 16 query and 8 kv heads of 128, pages of 32 in ascending order, median and best
// of half a second: at depth 4,096 one thread reads 26.3 and 27.5 GB/s, 86 and 90 % of the read bandwidth beside it,
// two 30.9 and 33.5 GB/s, 87 and 95 %; pages in random order 15 to 20 GB/s (python -m benchmarks.attention --threads 1,
// or 2; records: benchmarks/results/attention-bf16-*.json). Prompts, interleaved with the loops before these (a
// throwaway program around this file; medians, of the instruction's peak): 512 on one thread 61.6 % (58.4), on two 58.1
// (55.7); 2,048 on one 69.3 (64.4); the last 512 of 2,048 on two 73.9 (69.2); best 63 to 80. Alone and from the
// second-level cache scores reach 97 and values 95 %; a prompt of 512 further spends 6 % on rounding queries and 9 % on
// the softmax.
#include <math.h>

#include <algorithm>

#include "softmax.h"

namespace finial::FINIAL_ISA {

#if !defined(FINIAL_PACKS_BF16)

int64_t attention_bf16_scratch(int64_t, int64_t) { return 0; }
int64_t attention_bf16_partial(int64_t) { return 0; }
void store_blocked(const Cache&, const float*, const float*, const int32_t*, int64_t, int64_t) {}

#else

namespace {

constexpr int64_t BLOCKS = ATTENTION_CHUNK / CACHE_BLOCK;
constexpr int64_t PAIRS = CACHE_BLOCK / 2;     // pairs of positions of a block
constexpr int64_t LINE = ATTENTION_CHUNK + W;  // floats of a query's scores: lines of 12 queries fall into sets apart
constexpr int KEYS = CACHE_BLOCK / W;          // vectors of a block's keys
constexpr int MOST = 12;                       // queries that meet a block of keys at once
constexpr int FEW = 3, SLICE = 8;              // queries, and vectors of values, that meet for few queries
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

int64_t padded(int64_t n) { return (n + W - 1) / W * W; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

FINIAL_INLINE void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

// Many queries read the same chunk again and again from the second-level cache: each asks for what lies this far on.
constexpr int WIDE_FROM = 9;
constexpr int64_t AHEAD = 2048;
FINIAL_INLINE void prefetch_near(const uint8_t* p) { __builtin_prefetch(p, 0, 3); }

// scores[m][k] = q[m] . keys[k] for M queries and a block of keys; q [pairs][M][2]. `next`: what is read later.
template <int M, bool FETCH>
void dots(const uint8_t* FINIAL_RESTRICT keys, const uint32_t* FINIAL_RESTRICT q, int64_t pairs,
          float* FINIAL_RESTRICT scores, const uint8_t* FINIAL_RESTRICT next) {
  V acc[M][KEYS];
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < KEYS; ++k) acc[m][k] = zero();
#pragma GCC unroll 4
  for (int64_t i = 0; i < pairs; ++i, keys += CACHE_BLOCK * 4, q += M, next += CACHE_BLOCK * 4) {
    I key[KEYS];
    if (FETCH) prefetch(next), prefetch(next + 64);
    if (M >= WIDE_FROM) prefetch_near(keys + AHEAD), prefetch_near(keys + AHEAD + 64);
    for (int k = 0; k < KEYS; ++k) key[k] = load_i(keys + k * W * 4);
    for (int m = 0; m < M; ++m) {
      const I pair = broadcast(q + m);
      for (int k = 0; k < KEYS; ++k) acc[m][k] = dot_bf16(acc[m][k], key[k], pair);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < KEYS; ++k) store(scores + m * LINE + k * W, acc[m][k]);
}

using Dots = void (*)(const uint8_t*, const uint32_t*, int64_t, float*, const uint8_t*);
template <bool FETCH>
constexpr Dots DOTS[MOST + 1] = {nullptr,         dots<1, FETCH>,  dots<2, FETCH>, dots<3, FETCH>, dots<4, FETCH>,
                                 dots<5, FETCH>,  dots<6, FETCH>,  dots<7, FETCH>, dots<8, FETCH>, dots<9, FETCH>,
                                 dots<10, FETCH>, dots<11, FETCH>, dots<12, FETCH>};

// Whether what is read after block b lies elsewhere: then it is fetched ahead; hardware does that better within a run.
bool apart(const uint8_t* const* blocks, int64_t b, int64_t row) {
  return blocks[b + 1] != blocks[b] + CACHE_BLOCK * 4 * row;
}

// A chunk's values: [BLOCKS] of [pairs of positions][width][2].
struct Values {
  const uint8_t* const* blocks;
  int64_t width;
};

// out[m] += sum over pairs i in [from, to) of weights[m][i] . values[i], for M queries and N vectors from element d.
template <int M, int N, bool FETCH>
void mix(const float* weights, const Values& values, int64_t from, int64_t to, int64_t d, float* out, int64_t stride) {
  V acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) acc[m][v] = load(out + m * stride + d + v * W);
  while (from < to) {
    const uint8_t* value = values.blocks[from / PAIRS] + (from % PAIRS * values.width + d) * 4;
    const int64_t end = least(to, (from / PAIRS + 1) * PAIRS);
    const uint8_t* next = FETCH ? value + (values.blocks[from / PAIRS + 1] - values.blocks[from / PAIRS]) : value;
    for (; from < end; ++from, value += values.width * 4, next += values.width * 4) {
      if (FETCH)
        for (int v = 0; v < N; ++v) prefetch(next + v * W * 4);
      if constexpr (M > N) {
        I pairs[N];
        for (int v = 0; v < N; ++v) pairs[v] = load_i(value + v * W * 4);
        for (int m = 0; m < M; ++m) {
          const I weight = broadcast(weights + m * LINE + from);
          for (int v = 0; v < N; ++v) acc[m][v] = dot_bf16(acc[m][v], pairs[v], weight);
        }
      } else {
        I weight[M];
        for (int m = 0; m < M; ++m) weight[m] = broadcast(weights + m * LINE + from);
        for (int v = 0; v < N; ++v) {
          const I pair = load_i(value + v * W * 4);
          for (int m = 0; m < M; ++m) acc[m][v] = dot_bf16(acc[m][v], pair, weight[m]);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) store(out + m * stride + d + v * W, acc[m][v]);
}

using Mix = void (*)(const float*, const Values&, int64_t, int64_t, int64_t, float*, int64_t);
template <bool FETCH>
constexpr Mix NARROW[FEW][SLICE] = {{mix<1, 1, FETCH>, mix<1, 2, FETCH>, mix<1, 3, FETCH>, mix<1, 4, FETCH>,
                                     mix<1, 5, FETCH>, mix<1, 6, FETCH>, mix<1, 7, FETCH>, mix<1, 8, FETCH>},
                                    {mix<2, 1, FETCH>, mix<2, 2, FETCH>, mix<2, 3, FETCH>, mix<2, 4, FETCH>,
                                     mix<2, 5, FETCH>, mix<2, 6, FETCH>, mix<2, 7, FETCH>, mix<2, 8, FETCH>},
                                    {mix<3, 1, FETCH>, mix<3, 2, FETCH>, mix<3, 3, FETCH>, mix<3, 4, FETCH>,
                                     mix<3, 5, FETCH>, mix<3, 6, FETCH>, mix<3, 7, FETCH>, mix<3, 8, FETCH>}};

// How the values of a chunk that all queries see whole join those of the chunks before: out = out keep + values take.
struct Joining {
  float keep[W], take[W];
};

// The same for many queries and `pairs` pairs in one run of memory; from nothing if FRESH, joined to what is there if
// `joining` is not null.
template <int M, int N, bool FRESH>
void mix_wide(const float* FINIAL_RESTRICT weights, const uint8_t* FINIAL_RESTRICT value, int64_t row, int64_t pairs,
              float* FINIAL_RESTRICT out, int64_t stride, const Joining* joining) {
  V acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) acc[m][v] = FRESH ? zero() : load(out + m * stride + v * W);
  for (int64_t i = 0; i < pairs; ++i, value += row) {
    I pair[N];
    for (int v = 0; v < N; ++v) pair[v] = load_i(value + v * W * 4);
    for (int m = 0; m < M; ++m) {
      const I weight = broadcast(weights + m * LINE + i);
      for (int v = 0; v < N; ++v) acc[m][v] = dot_bf16(acc[m][v], pair[v], weight);
    }
  }
  if (joining == nullptr) {
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < N; ++v) store(out + m * stride + v * W, acc[m][v]);
    return;
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) {
      float* y = out + m * stride + v * W;
      store(y, fma(acc[m][v], set1(joining->take[m]), mul(load(y), set1(joining->keep[m]))));
    }
}

using Wide = void (*)(const float*, const uint8_t*, int64_t, int64_t, float*, int64_t, const Joining*);
template <bool FRESH>
constexpr Wide WIDE[MOST - WIDE_FROM + 1][2] = {{mix_wide<9, 1, FRESH>, mix_wide<9, 2, FRESH>},
                                                {mix_wide<10, 1, FRESH>, mix_wide<10, 2, FRESH>},
                                                {mix_wide<11, 1, FRESH>, mix_wide<11, 2, FRESH>},
                                                {mix_wide<12, 1, FRESH>, mix_wide<12, 2, FRESH>}};

// Slices of two vectors over pairs [from, to), from the second-level cache. What is joined must be one run of memory.
void mix_all(const float* weights, const Values& values, int64_t count, int64_t from, int64_t to, float* out,
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
void mix_pairs(const float* weights, const Values& values, int64_t count, int64_t from, int64_t to, float* out,
               int64_t stride, bool fetch) {
  const int64_t vectors = values.width / W;
  if (count >= WIDE_FROM) return mix_all(weights, values, count, from, to, out, stride, false, nullptr);
  const int64_t turns = (count + FEW - 1) / FEW;
  for (int64_t end; from < to; from = end) {
    const int64_t block = from / PAIRS;
    const bool far = fetch && apart(values.blocks, block, values.width / 2);
    end = least(to, (block + 1) * PAIRS);
    if (turns == 1 && vectors <= SLICE && !far)
      while (end < to && !(fetch && apart(values.blocks, end / PAIRS, values.width / 2))) end = least(to, end + PAIRS);
    for (int64_t turn = 0; turn < turns; ++turn) {
      const int64_t m = count * turn / turns, size = count * (turn + 1) / turns - m;
      const Mix* few = far && turn == 0 ? NARROW<true>[size - 1] : NARROW<false>[size - 1];
      for (int64_t v = 0; v < vectors; v += SLICE)
        few[least(SLICE, vectors - v) - 1](weights + m * LINE, values, from, end, v * W, out + m * stride, stride);
    }
  }
}

// One position of a pair: the odd one, or the even one.
void mix_half(const float* weights, const Values& values, int64_t count, int64_t at, float* out, int64_t stride) {
  const int64_t i = at / 2;
  const uint8_t* value = values.blocks[i / PAIRS] + i % PAIRS * values.width * 4;
  for (int64_t m = 0; m < count; ++m) {
    const I weight = broadcast(weights + m * LINE + i);
    for (int64_t d = 0; d < values.width; d += W) {
      const I pair = load_i(value + d * 4);
      float* y = out + m * stride + d;
      store(y, dot_bf16(load(y), at % 2 == 0 ? even_halves(pair) : odd_halves(pair), weight));
    }
  }
}

void mix_span(const float* weights, const Values& values, int64_t count, Span span, float* out, int64_t stride,
              bool fetch) {
  if (span.from >= span.to) return;
  if (span.from % 2 != 0) mix_half(weights, values, count, span.from, out, stride);
  mix_pairs(weights, values, count, (span.from + 1) / 2, span.to / 2, out, stride, fetch);
  if (span.to % 2 != 0) mix_half(weights, values, count, span.to - 1, out, stride);
}

// The blocks that a span touches, as positions.
Span blocks_of(const Span& span) {
  return {span.from / CACHE_BLOCK * CACHE_BLOCK, (span.to + CACHE_BLOCK - 1) / CACHE_BLOCK * CACHE_BLOCK};
}

// A query's largest score of a span; the rest of the blocks that it touches becomes as small as can be.
float highest(float* scores, const Span& span) {
  const Span all = blocks_of(span);
  for (int64_t i = all.from; i < span.from; ++i) scores[i] = -HUGE_VALF;
  for (int64_t i = span.to; i < all.to; ++i) scores[i] = -HUGE_VALF;
  V top = load(scores + all.from), second = load(scores + all.from + W);
  for (int64_t i = all.from + CACHE_BLOCK; i < all.to; i += CACHE_BLOCK)
    top = max(top, load(scores + i)), second = max(second, load(scores + i + W));
  return largest(max(top, second));
}

// Its scores of these blocks, to weights in pairs of bf16, in place; their sum.
float soften(float* scores, const Span& blocks, float best) {
  const V highest = set1(best);
  V sums = zero();
  for (int64_t i = blocks.from; i < blocks.to; i += CACHE_BLOCK) {
    V a = power_of_two(sub(load(scores + i), highest)), b = power_of_two(sub(load(scores + i + W), highest));
    store_bf16_pairs(scores + i / 2, a, b);  // behind what is still to be read
    sums = add(sums, add(a, b));
  }
  return sum(sums);
}

// What a thread needs beside the cache, for pieces of `queries`.
struct Room {
  int64_t pairs, width, stride;
  float *scores, *sums, *added;        // [queries, LINE], [queries, stride], [queries, stride]
  uint8_t *key_blocks, *value_blocks;  // a chunk, rearranged
  uint32_t* q;                         // tiles [pairs][queries of the tile][2]
  const uint8_t **keys, **values;      // [BLOCKS + 1]: a chunk's, and what is read after each
  Softmax *state, *fresh;              // [queries]
  Span* spans;                         // [queries]

  static int64_t bytes(int64_t head_dim, int64_t queries) {
    const int64_t each = 4 * LINE + 8 * (padded(head_dim) + W) + 4 * ((head_dim + 1) / 2) + 8;
    return queries * (each + static_cast<int64_t>(2 * sizeof(Softmax) + sizeof(Span))) +
           ATTENTION_CHUNK * (4 * ((head_dim + 1) / 2) + 2 * padded(head_dim)) +
           2 * (BLOCKS + 1) * static_cast<int64_t>(sizeof(const uint8_t*));
  }

  Room(int64_t head_dim, int64_t queries, float* scratch) {
    pairs = (head_dim + 1) / 2, width = padded(head_dim), stride = width + W;
    scores = scratch;
    sums = scores + queries * LINE;
    added = sums + queries * stride;
    key_blocks = reinterpret_cast<uint8_t*>(added + queries * stride);
    value_blocks = key_blocks + ATTENTION_CHUNK * pairs * 4;
    q = reinterpret_cast<uint32_t*>(value_blocks + ATTENTION_CHUNK * width * 2);
    keys = reinterpret_cast<const uint8_t**>(q + (queries * pairs + 1) / 2 * 2);
    values = keys + BLOCKS + 1;
    state = reinterpret_cast<Softmax*>(values + BLOCKS + 1);
    fresh = state + queries;
    spans = reinterpret_cast<Span*>(fresh + queries);
  }
};

struct Tile {  // queries of a piece
  int64_t begin, end;
};

// A tile's queries, scaled and rounded; the next one's are asked for.
void round_queries(const Attention& a, const AttentionPiece& piece, const Tile& tile, const Room& room) {
  const int64_t n = a.cache.head_dim, count = tile.end - tile.begin, queries = piece.rows * a.group;
  const V scale = set1(a.scale * LOG2_E);
  for (int64_t j = tile.end; j < least(tile.end + count, queries); ++j)
    for (int64_t d = 0; d < n; d += W) __builtin_prefetch(a.q + place(a, piece, j) + d);
  uint32_t* to = room.q + tile.begin * room.pairs;
  int64_t d = 0;
  for (; count >= 4 && d + 2 * W <= n; d += 2 * W, to += W * count)
    for (int64_t m = 0; m < count; m += 4) {
      const int64_t at = least(m, count - 4);
      const auto pairs = [&](int64_t i) {
        const float* from = a.q + place(a, piece, tile.begin + at + i) + d;
        return bf16_pairs(mul(load(from), scale), mul(load(from + W), scale));
      };
      store_four(to + at, count, pairs(0), pairs(1), pairs(2), pairs(3));
    }
  for (; d < n; d += 2 * W, to += W * count)
    for (int64_t m = 0; m < count; ++m) {
      const float* from = a.q + place(a, piece, tile.begin + m);
      const auto part = [&](int64_t at) {
        return at >= n ? zero() : n - at < W ? load_n(from + at, n - at) : load(from + at);
      };
      uint32_t words[W];
      store_i(words, bf16_pairs(mul(part(d), scale), mul(part(d + W), scale)));
      const int64_t size = least(W, room.pairs - d / 2);
      for (int64_t i = 0; i < size; ++i) to[i * count + m] = words[i];
    }
}

// Where blocks [from, to) of a chunk lie; a cache of rows is rearranged: positions [low, high), the rest is anything.
void locate(const Attention& a, const AttentionPiece& piece, int64_t base, int64_t low, int64_t high, bool more,
            Room& room) {
  const Cache& cache = a.cache;
  const int32_t* pages = a.pages + a.sequence[piece.row] * a.pages_per_sequence;
  const int64_t size = cache.page_size, row = cache.row_bytes(), n = cache.head_dim;
  if (cache.blocked) {
    for (int64_t b = low / CACHE_BLOCK; b * CACHE_BLOCK < high; ++b) {
      const int64_t page = pages[(base + b * CACHE_BLOCK) / size], offset = (base + b * CACHE_BLOCK) % size * row;
      room.keys[b] = cache.keys(page, piece.head) + offset;
      room.values[b] = cache.values(page, piece.head) + offset;
    }
    const int64_t next = base + ATTENTION_CHUNK, last = (high + CACHE_BLOCK - 1) / CACHE_BLOCK;
    room.keys[last] = room.values[low / CACHE_BLOCK];
    room.values[last] = more ? cache.keys(pages[next / size], piece.head) + next % size * row : room.values[last - 1];
    return;
  }
  for (int64_t b = 0; b <= BLOCKS; ++b) {
    room.keys[b] = room.key_blocks + b * CACHE_BLOCK * room.pairs * 4;
    room.values[b] = room.value_blocks + b * PAIRS * room.width * 4;
  }
  for (int64_t i = low; i < high; ++i) {
    const int64_t page = pages[(base + i) / size], offset = (base + i) % size * row;
    const uint8_t *key = cache.keys(page, piece.head) + offset, *value = cache.values(page, piece.head) + offset;
    uint8_t* k = room.key_blocks + (i / CACHE_BLOCK * room.pairs * CACHE_BLOCK + i % CACHE_BLOCK) * 4;
    for (int64_t d = 0; d < n; d += 2, k += CACHE_BLOCK * 4) {
      uint32_t pair = 0;
      std::memcpy(&pair, key + 2 * d, n - d > 1 ? 4 : 2);
      std::memcpy(k, &pair, 4);
    }
    uint8_t* v = room.value_blocks + (i / 2 * room.width * 2 + i % 2) * 2;
    for (int64_t d = 0; d < room.width; ++d) {
      const uint16_t nothing = 0;
      std::memcpy(v + 4 * d, d < n ? value + 2 * d : reinterpret_cast<const uint8_t*>(&nothing), 2);
    }
  }
}

// The scores of a chunk's keys for a tile. The first of many asks meanwhile for the values, which all will read.
void score(const Room& room, const Tile& tile, bool first) {
  const int64_t count = tile.end - tile.begin;
  int64_t from = ATTENTION_CHUNK, to = 0;
  for (int64_t j = tile.begin; j < tile.end; ++j)
    if (room.spans[j].to > 0) from = least(from, room.spans[j].from), to = most(to, room.spans[j].to);
  for (int64_t b = from / CACHE_BLOCK; b * CACHE_BLOCK < to; ++b) {
    const bool wide = count >= WIDE_FROM, fetch = first && (wide || apart(room.keys, b, room.pairs));
    (fetch ? DOTS<true> : DOTS<false>)[count](room.keys[b], room.q + tile.begin* room.pairs, room.pairs,
                                              room.scores + tile.begin* LINE + b* CACHE_BLOCK,
                                              wide ? room.values[b] : room.keys[b + 1]);
  }
}

// A tile's scores to weights. Meanwhile it asks for where its results will go, if these are the last.
void weigh(const Attention& a, const AttentionPiece& piece, const Room& room, const Tile& tile, bool last) {
  for (int64_t j = tile.begin; j < tile.end; ++j) {
    room.fresh[j] = {0, 0};
    if (room.spans[j].to > 0) room.fresh[j].best = highest(room.scores + j * LINE, room.spans[j]);
  }
  for (int64_t j = tile.begin; j < tile.end; ++j) {
    const float* out = a.out + place(a, piece, j);
    for (int64_t d = 0; last && d < a.cache.head_dim; d += W) __builtin_prefetch(out + d, 1);
    if (room.spans[j].to == 0) continue;
    const float best = room.fresh[j].best;
    room.fresh[j] = {best * LN_2, soften(room.scores + j * LINE, blocks_of(room.spans[j]), best)};
  }
}

// What every query of a tile sees goes together; what only some see goes row by row.
void mix_tile(const Room& room, const Values& values, const Tile& tile, int64_t group, bool first, float* out) {
  Span common{0, ATTENTION_CHUNK};
  for (int64_t j = tile.begin; j < tile.end; ++j)
    common = {most(common.from, room.spans[j].from), least(common.to, room.spans[j].to)};
  common = {(common.from + 1) / 2 * 2, common.to / 2 * 2};
  const auto rows = [&](auto part) {
    for (int64_t m = tile.begin, to; m < tile.end; m = to) {
      for (to = m + 1; to < tile.end && to % group > 0;) ++to;
      mix_span(room.scores + m * LINE, values, to - m, part(room.spans[m]), out + (m - tile.begin) * room.stride,
               room.stride, first);
    }
  };
  if (common.from >= common.to) return rows([](Span s) { return s; });
  rows([&](Span s) { return Span{s.from, common.from}; });
  mix_pairs(room.scores + tile.begin * LINE, values, tile.end - tile.begin, common.from / 2, common.to / 2, out,
            room.stride, first);
  rows([&](Span s) { return Span{common.to, s.to}; });
}

// Merges the softmax of a tile's queries, as `merge` does.
Joining join(Softmax* state, const Softmax* fresh, int64_t count) {
  Joining joining;
  float old[W] = {}, more[W] = {}, weights[W] = {}, added[W] = {};
  for (int64_t m = 0; m < count; ++m) {
    const float best = fresh[m].best > state[m].best ? fresh[m].best : state[m].best;
    old[m] = state[m].best - best, more[m] = fresh[m].best - best;
    weights[m] = state[m].weight, added[m] = fresh[m].weight;
    state[m].best = best;
  }
  const V keep = exp(load(old)), take = exp(load(more));
  store(joining.keep, keep), store(joining.take, take);
  store(weights, fma(load(added), take, mul(load(weights), keep)));
  for (int64_t m = 0; m < count; ++m) state[m].weight = weights[m];
  return joining;
}

// The values of a chunk for a tile, joined to what the chunks before gave, or left to be merged.
void gather(const Room& room, const Tile& tile, int64_t group, bool first, float* left) {
  const Values values{room.values, room.width};
  const int64_t count = tile.end - tile.begin;
  const float* weights = room.scores + tile.begin * LINE;
  Softmax *state = room.state + tile.begin, *fresh = room.fresh + tile.begin;
  int64_t whole = 0, merged = 0;  // queries that see all of the chunk, that have seen others
  for (int64_t m = 0; m < count; ++m) {
    const Span& span = room.spans[tile.begin + m];
    whole += span.from == 0 && span.to == ATTENTION_CHUNK, merged += state[m].weight != 0;
  }
  float* sums = left != nullptr ? left + tile.begin * room.stride : room.sums + tile.begin * room.stride;
  const bool run = values.blocks[BLOCKS - 1] == values.blocks[0] + (BLOCKS - 1) * PAIRS * values.width * 4;
  if (count >= WIDE_FROM && whole == count && (merged == 0 || (merged == count && run))) {
    const Joining joining = merged > 0 ? join(state, fresh, count) : Joining{};
    mix_all(weights, values, count, 0, ATTENTION_CHUNK / 2, sums, room.stride, true, merged > 0 ? &joining : nullptr);
    if (merged == 0 && left == nullptr) std::copy(fresh, fresh + count, state);
  } else {
    float* out = merged == 0 ? sums : room.added;
    for (int64_t m = 0; m < count; ++m)
      for (int64_t d = 0; d < room.width; d += W) store(out + m * room.stride + d, zero());
    mix_tile(room, values, tile, group, first, out);
    for (int64_t m = 0; m < count && left == nullptr; ++m) {
      if (merged > 0)
        merge(state[m], sums + m * room.stride, fresh[m], out + m * room.stride, room.width);
      else
        state[m] = fresh[m];
    }
  }
  for (int64_t m = 0; m < count && left != nullptr; ++m)
    std::memcpy(sums + m * room.stride + room.width, &fresh[m], sizeof(Softmax));
}

void finish(const Softmax& s, const float* sums, int64_t n, float* out) {
  const V weight = set1(s.weight);
  for (int64_t d = 0; d < n; d += W) {
    const V y = div(load(sums + d), weight);
    n - d < W ? store_n(out + d, y, n - d) : store(out + d, y);
  }
}

}  // namespace

int64_t attention_bf16_scratch(int64_t head_dim, int64_t queries) { return Room::bytes(head_dim, queries) / 4 + 1; }

int64_t attention_bf16_partial(int64_t head_dim) { return padded(head_dim) + W; }

void attention_bf16(const Attention& a, const AttentionPiece& piece, float* partial, float* scratch) {
  const int64_t queries = piece.rows * a.group, tiles = (queries + MOST - 1) / MOST;
  Room room(a.cache.head_dim, queries, scratch);
  for (int64_t t = 0; t < tiles; ++t) round_queries(a, piece, {queries * t / tiles, queries * (t + 1) / tiles}, room);
  for (int64_t j = 0; j < queries; ++j) room.state[j] = {0, 0};
  for (int64_t chunk = piece.begin; chunk < piece.end; ++chunk) {
    const int64_t base = chunk * ATTENTION_CHUNK;
    int64_t low = ATTENTION_CHUNK, high = 0;
    for (int64_t j = 0; j < queries; ++j) {
      room.spans[j] = j % a.group > 0 ? room.spans[j - 1] : span_of(a, piece.row + j / a.group, base);
      if (room.spans[j].to > 0) low = least(low, room.spans[j].from), high = most(high, room.spans[j].to);
    }
    if (low < high) locate(a, piece, base, low, high, chunk + 1 < piece.end && high == ATTENTION_CHUNK, room);
    float* left = partial != nullptr ? partial + (chunk - piece.begin) * queries * room.stride : nullptr;
    const bool last = partial == nullptr && chunk + 1 == piece.end;
    for (int64_t t = 0; t < tiles; ++t) {
      const Tile tile{queries * t / tiles, queries * (t + 1) / tiles};
      score(room, tile, t == 0);
      weigh(a, piece, room, tile, last);
      gather(room, tile, a.group, t == 0, left);
      for (int64_t j = tile.begin; last && j < tile.end; ++j)
        finish(room.state[j], room.sums + j * room.stride, a.cache.head_dim, a.out + place(a, piece, j));
    }
  }
}

void attention_bf16_merge(const Attention& a, const AttentionPiece& piece, const float* partial, float* scratch) {
  const int64_t n = a.cache.head_dim, width = padded(n), stride = width + W, queries = piece.rows * a.group;
  for (int64_t j = 0; j < queries; ++j) {
    Softmax state{0, 0};
    const float* chunk = partial + j * stride;
    for (int64_t c = piece.begin; c < piece.end; ++c, chunk += queries * stride) {
      Softmax more;
      std::memcpy(&more, chunk + width, sizeof more);
      merge(state, scratch, more, chunk, width);
    }
    finish(state, scratch, n, a.out + place(a, piece, j));
  }
}

void store_blocked(const Cache& cache, const float* keys, const float* values, const int32_t* slots, int64_t begin,
                   int64_t end) {
  const int64_t n = cache.head_dim, heads = cache.kv_heads;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t slot = slots[i / heads], page = slot / cache.page_size, head = i % heads;
    const int64_t at = slot % cache.page_size, block = at / CACHE_BLOCK * CACHE_BLOCK * cache.row_bytes();
    uint8_t* k = cache.keys(page, head) + block + at % CACHE_BLOCK * 4;
    uint8_t* v = cache.values(page, head) + block + at % CACHE_BLOCK / 2 * n * 4;
    for (int64_t d = 0; d < n; d += W) {
      uint8_t words[2 * W];
      store_bf16(words, load(keys + i * n + d));
      for (int64_t w = 0; w < W / 2; ++w, k += CACHE_BLOCK * 4) std::memcpy(k, words + 4 * w, 4);
      store_bf16_halves(v + d * 4, load(values + i * n + d), at % 2 != 0);  // the other half is another thread's
    }
  }
}

#endif

}  // namespace finial::FINIAL_ISA
