// attention: softmax(scale * q k^T) v, straight from the pages, for a tile of rows and one kv head at a time.
//
// Shapes: q, out [rows, heads * head_dim]; cache as in kernels.h. Row t sees positions max(0, p - window + 1) … p with
// p = positions[t]. Reference: backends/reference.py `attention`. Tolerance per output: (head_dim / W + log2 W + 4)
// * 2^-24 * |scale| * max_j sum_d |q k_j| relative in the weights, plus (number of keys) * 2^-24 in the weighted sum.
//
// Order of operations, the same for a row whatever is computed beside it:
//   score     element d of a dot product goes to one of W lanes, d ascending within a lane; the lanes are summed as a
//             tree (sum_each).
//   softmax   chunks of ATTENTION_CHUNK positions aligned to position 0. In each: maximum, exp(score - maximum), lanes
//             of position % W summed, values added up position by position. The chunks' results are merged in ascending
//             order (Milakov and Gimelshein, arXiv:1805.02867), so a chunk may be computed anywhere, by any thread
//             (Dao et al., flash-decoding, 2023). A row of one chunk is not merged at all.
// A tile's queries, rows times the group's heads, share each key and value, which are converted in registers: up to
// QUERIES of them at a time, W / QUERIES keys at a time, BLOCK positions in the first-level cache.
//
// Per kv head and position: 2 row_bytes read (512 bytes at head_dim 128 in bf16), 4 head_dim flops for each query.
// Measured on Zen 4, AVX-512, one thread, 16 query and 8 kv heads of 128 at depth 4,096: an f32 cache is read at
// 22 GB/s, 70 % of the read bandwidth beside it; q8_0 at 13 GB/s, bound by its decoding.
// python -m benchmarks.attention --threads 1 --kv f32 (or q8_0); before rows were asked for in their order
// A bf16 cache comes here from NEON and portable code; attention_bf16.cpp has the other.
#include <math.h>

#include "pairs.h"
#include "softmax.h"
#include "vector_exp.h"
#include "weights.h"

namespace finial::FINIAL_ISA {

namespace {

constexpr int64_t CHUNK_LENGTH = ATTENTION_CHUNK;
constexpr int64_t BLOCK = 64;
constexpr int64_t STEP = 2 * W;           // elements that a pair of vectors holds
constexpr int QUERIES = W >= 16 ? 4 : 2;  // as many as accumulators fit the registers
constexpr int SLICE = W >= 16 ? 4 : 2;    // pairs of value vectors that one query carries
constexpr int64_t AHEAD = 64;             // positions from what is computed to what is fetched: the latency of memory
constexpr int64_t LINE = 64;              // bytes
constexpr int64_t POINTERS = (CHUNK_LENGTH + AHEAD) * 2 * static_cast<int64_t>(sizeof(const uint8_t*) / sizeof(float));

int64_t padded(int64_t n) { return (n + STEP - 1) / STEP * STEP; }

FINIAL_INLINE void prefetch(const uint8_t* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, W >= 16 ? 2 : 3);  // Zen 4 reads faster into the second level, Zen 3 into the first
#else
  (void)p;
#endif
}

// How a row of keys or values is taken apart: elements [d, d + STEP) as two vectors, in an order of the type's own, in
// which queries and outputs are kept too.  pair_n  takes the first n of them, the rest zero.
struct RowF32 {
  static constexpr int64_t bytes(int64_t n) { return 4 * n; }
  FINIAL_INLINE void pair(const uint8_t* row, int64_t d, V& a, V& b) {
    a = load(reinterpret_cast<const float*>(row) + d);
    b = load(reinterpret_cast<const float*>(row) + d + W);
  }
  FINIAL_INLINE void pair_n(const uint8_t* row, int64_t d, int64_t n, V& a, V& b) {
    const float* p = reinterpret_cast<const float*>(row) + d;
    a = n < W ? load_n(p, n) : load(p);
    b = n > W ? load_n(p + W, n - W) : zero();
  }
  FINIAL_INLINE void arrange(float*) {}
  FINIAL_INLINE void restore(float*) {}
};

struct RowBF16 {
  static constexpr int64_t bytes(int64_t n) { return 2 * n; }
  FINIAL_INLINE void pair(const uint8_t* row, int64_t d, V& a, V& b) { load_bf16_pair(row + 2 * d, a, b); }
  FINIAL_INLINE void pair_n(const uint8_t* row, int64_t d, int64_t n, V& a, V& b) {
    load_bf16_pair_n(row + 2 * d, n, a, b);
  }
  FINIAL_INLINE void arrange(float* p) {
    V a, b;
    part(load(p), load(p + W), a, b);
    store(p, a);
    store(p + W, b);
  }
  FINIAL_INLINE void restore(float* p) {
    V a, b;
    join(load(p), load(p + W), a, b);
    store(p, a);
    store(p + W, b);
  }
};

struct RowQ8_0 {  // blocks of 32: f16 d, int8 q[32]; d q is exact in float32. Rows are whole blocks, and those pairs
  static constexpr int64_t bytes(int64_t n) { return n * 34 / 32; }
  FINIAL_INLINE void pair(const uint8_t* row, int64_t d, V& a, V& b) {
    const uint8_t* block = row + d / 32 * 34;
    const V scale = set1_half(block);
    a = mul(scale, load_i8(block + 2 + d % 32));
    b = mul(scale, load_i8(block + 2 + d % 32 + W));
  }
  FINIAL_INLINE void pair_n(const uint8_t* row, int64_t d, int64_t, V& a, V& b) { pair(row, d, a, b); }
  FINIAL_INLINE void arrange(float*) {}
  FINIAL_INLINE void restore(float*) {}
};

// Rows that are asked for line after line, in the order in which they lie: in that order alone the processor fetches
// further by itself, while what is computed meanwhile takes parts of several rows in turn.
struct Ahead {
  const uint8_t *const *row, *const *end;
  int64_t bytes, at;  // of a row; within it

  template <int64_t COUNT>
  FINIAL_INLINE void ask(Ahead& a) {  // COUNT bytes, in whole lines
    for (int64_t i = 0; i < COUNT && a.row < a.end; i += LINE) {
      prefetch(*a.row + a.at);
      a.at += LINE;
      if (a.at >= a.bytes) ++a.row, a.at = 0;
    }
  }
};

// Elements [d, d + STEP) of Q queries' dot products with W / Q keys; of the first n - d of them if PART.
template <class Row, int Q, bool PART, bool FETCH>
FINIAL_INLINE void dot_step(const float* q, int64_t stride, const uint8_t* const* keys, int64_t d, int64_t n,
                            Ahead& ahead, V (&acc)[W]) {
  constexpr int KEYS = W / Q;
  if (FETCH) Ahead::ask<Row::bytes(KEYS * STEP)>(ahead);
  V first[Q], second[Q];
#pragma GCC unroll 4
  for (int j = 0; j < Q; ++j) {
    first[j] = load(q + j * stride + d), second[j] = load(q + j * stride + d + W);
    keep_in_register(first[j]), keep_in_register(second[j]);
  }
#pragma GCC unroll 16
  for (int k = 0; k < KEYS; ++k) {
    V a, b;
    if (PART) Row::pair_n(keys[k], d, n - d, a, b);
    if (!PART) Row::pair(keys[k], d, a, b);
#pragma GCC unroll 4
    for (int j = 0; j < Q; ++j) acc[j * KEYS + k] = fma(first[j], a, acc[j * KEYS + k]);
#pragma GCC unroll 4
    for (int j = 0; j < Q; ++j) acc[j * KEYS + k] = fma(second[j], b, acc[j * KEYS + k]);
  }
}

// scores[j][k] = scale * q[j] . keys[k] for Q queries and W / Q keys.
template <class Row, int Q, bool FETCH>
void dots(const float* q, int64_t stride, const uint8_t* const* keys, int64_t n, V scale, float* scores) {
  constexpr int KEYS = W / Q;
  V acc[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) acc[i] = zero();
  Ahead ahead{keys + AHEAD, keys + AHEAD + KEYS, Row::bytes(n), 0};
  int64_t d = 0;
  for (; d + STEP <= n; d += STEP) dot_step<Row, Q, false, FETCH>(q, stride, keys, d, n, ahead, acc);
  if (d < n) dot_step<Row, Q, true, FETCH>(q, stride, keys, d, n, ahead, acc);
  float each[W];
  store(each, mul(sum_each(acc), scale));
  for (int j = 0; j < Q; ++j) std::memcpy(scores + j * CHUNK_LENGTH, each + j * KEYS, KEYS * sizeof(float));
}

// out[j][e] += sum over i in [from, to), ascending, of p[j][i] values[i][e], for PAIRS pairs of vectors from element d.
template <class Row, int Q, int PAIRS, bool PART, bool FETCH>
void weigh(const float* p, const uint8_t* const* values, int64_t from, int64_t to, int64_t d, int64_t n, Ahead& ahead,
           float* const* out) {
  V acc[Q][2 * PAIRS];
#pragma GCC unroll 4
  for (int j = 0; j < Q; ++j)
#pragma GCC unroll 8
    for (int x = 0; x < 2 * PAIRS; ++x) acc[j][x] = load(out[j] + d + x * W);
  for (int64_t i = from; i < to; ++i) {
    if (FETCH) Ahead::ask<Row::bytes(PAIRS * STEP)>(ahead);
    V weight[Q];
#pragma GCC unroll 4
    for (int j = 0; j < Q; ++j) weight[j] = set1(p[j * CHUNK_LENGTH + i]);
#pragma GCC unroll 4
    for (int x = 0; x < PAIRS; ++x) {
      V a, b;
      if (PART) Row::pair_n(values[i], d + x * STEP, n - d, a, b);
      if (!PART) Row::pair(values[i], d + x * STEP, a, b);
#pragma GCC unroll 4
      for (int j = 0; j < Q; ++j) {
        acc[j][2 * x] = fma(weight[j], a, acc[j][2 * x]);
        acc[j][2 * x + 1] = fma(weight[j], b, acc[j][2 * x + 1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < Q; ++j)
#pragma GCC unroll 8
    for (int x = 0; x < 2 * PAIRS; ++x) store(out[j] + d + x * W, acc[j][x]);
}

template <class Row, int Q, bool FETCH>
void weigh_rows(const float* p, const uint8_t* const* values, int64_t from, int64_t to, int64_t n, float* const* out) {
  if (from >= to) return;
  constexpr int PAIRS = Q == 4 ? SLICE / 2 : SLICE;
  Ahead ahead{values + from + AHEAD, values + to + AHEAD, Row::bytes(n), 0};
  int64_t d = 0;
  for (; d + PAIRS * STEP <= n; d += PAIRS * STEP)
    weigh<Row, Q, PAIRS, false, FETCH>(p, values, from, to, d, n, ahead, out);
  if (PAIRS > 2 && d + 2 * STEP <= n) {
    weigh<Row, Q, 2, false, FETCH>(p, values, from, to, d, n, ahead, out);
    d += 2 * STEP;
  }
  for (; d + STEP <= n; d += STEP) weigh<Row, Q, 1, false, FETCH>(p, values, from, to, d, n, ahead, out);
  if (d < n) weigh<Row, Q, 1, true, FETCH>(p, values, from, to, d, n, ahead, out);
}

// The part of each query's span that lies in [from, to). What the queries have in common is taken together.
template <class Row, int Q, bool FETCH>
void weigh_spans(const float* p, const uint8_t* const* values, const Span* spans, int64_t from, int64_t to, int64_t n,
                 float* const* out) {
  Span each[Q];
  int64_t low = from, high = to;
  for (int j = 0; j < Q; ++j) {
    each[j] = {spans[j].from > from ? spans[j].from : from, spans[j].to < to ? spans[j].to : to};
    low = each[j].from > low ? each[j].from : low;
    high = each[j].to < high ? each[j].to : high;
  }
  const bool common = low < high;
  for (int j = 0; j < Q; ++j)
    weigh_rows<Row, 1, false>(p + j * CHUNK_LENGTH, values, each[j].from, common ? low : each[j].to, n, out + j);
  if (!common) return;
  weigh_rows<Row, Q, FETCH>(p, values, low, high, n, out);
  for (int j = 0; j < Q; ++j) weigh_rows<Row, 1, false>(p + j * CHUNK_LENGTH, values, high, each[j].to, n, out + j);
}

// Scores of [from, to), whole vectors, to exp(score - best); those outside the span become 0.
Softmax soften(float* scores, const Span& span, int64_t from, int64_t to) {
  for (int64_t i = from; i < span.from; ++i) scores[i] = -HUGE_VALF;
  for (int64_t i = span.to; i < to; ++i) scores[i] = -HUGE_VALF;
  V top = load(scores + from);
  for (int64_t i = from + W; i < to; i += W) top = max(top, load(scores + i));
  const float best = largest(top);
  V weights = zero();
  for (int64_t i = from; i < to; i += W) {
    const V p = exp(sub(load(scores + i), set1(best)));
    store(scores + i, p);
    weights = add(weights, p);
  }
  return {best, sum(weights)};
}

template <class Row>
void finish(const Softmax& s, float* sums, int64_t n, float* out) {
  const V weight = set1(s.weight);
  for (int64_t d = 0; d < n; d += STEP) {
    Row::restore(sums + d);
    for (int64_t e = d; e < n && e < d + STEP; e += W) {
      const V y = div(load(sums + e), weight);
      n - e < W ? store_n(out + e, y, n - e) : store(out + e, y);
    }
  }
}

void clear(float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += W) store(p + i, zero());
}

// Where the keys of positions [from, to) of a piece's sequence lie, and the values unless null.
void locate(const Attention& a, const AttentionPiece& piece, int64_t from, int64_t to, const uint8_t** keys,
            const uint8_t** values) {
  const int32_t* pages = a.pages + a.sequence[piece.row] * a.pages_per_sequence;
  const int64_t row_bytes = a.cache.row_bytes();
  int64_t page = from / a.cache.page_size, at = from % a.cache.page_size;
  for (; from < to; ++page, at = 0) {
    const uint8_t* key = a.cache.keys(pages[page], piece.head) + at * row_bytes;
    const uint8_t* value = a.cache.values(pages[page], piece.head) + at * row_bytes;
    for (; at < a.cache.page_size && from < to; ++at, ++from, key += row_bytes, value += row_bytes) {
      *keys++ = key;
      if (values != nullptr) *values++ = value;
    }
  }
}

// Keys and values of chunk positions [from, to), in the order in which they are read: AHEAD beyond the last key come
// the first values, beyond the last value the next chunk's first keys. So entry i + AHEAD is what to fetch at entry i.
// The keys that fill up a vector before from and after to are any that may be read.
void locate_chunk(const Attention& a, const AttentionPiece& piece, int64_t base, int64_t from, int64_t to, int64_t next,
                  const uint8_t** keys, const uint8_t** values) {
  locate(a, piece, base + from, base + to, keys + from, values + from);
  locate(a, piece, base + to, base + to + next, values + to, nullptr);
  for (int64_t i = to + next; i < to + AHEAD; ++i) values[i] = values[to - 1];
  const int64_t stop = (to + W - 1) / W * W + AHEAD;
  for (int64_t i = to; i < stop; ++i) keys[i] = values[from + i - to < to + AHEAD ? from + i - to : to + AHEAD - 1];
  for (int64_t i = from; i % W != 0; --i) keys[i - 1] = keys[from];
}

template <class Row, int Q, bool FETCH>
void score_block(const float* q, int64_t stride, const uint8_t* const* keys, int64_t from, int64_t to, int64_t n,
                 V scale, float* scores) {
  for (int64_t i = from; i < to; i += W / Q) dots<Row, Q, FETCH>(q, stride, keys + i, n, scale, scores + i);
}

template <int Q>
struct Count {
  static constexpr int value = Q;
};

// f(j, how many) for the queries QUERIES at a time, then two, then one.
template <class F>
void by_count(int64_t queries, const F& f) {
  int64_t j = 0;
  for (; j + QUERIES <= queries; j += QUERIES) f(j, Count<QUERIES>());
  if (QUERIES > 2 && j + 2 <= queries) {
    f(j, Count<2>());
    j += 2;
  }
  if (j < queries) f(j, Count<1>());
}

template <class Row>
void piece_of(const Attention& a, const AttentionPiece& piece, float* partial, float* scratch) {
  const int64_t n = a.cache.head_dim, stride = padded(n), queries = piece.rows * a.group;
  const uint8_t** keys = reinterpret_cast<const uint8_t**>(scratch);             // [CHUNK_LENGTH + AHEAD]
  const uint8_t** values = keys + CHUNK_LENGTH + AHEAD;                          // [CHUNK_LENGTH + AHEAD]
  float* q = scratch + POINTERS;                                                 // [queries, stride]
  float* sums = q + queries * stride;                                            // [queries, stride]
  float* added = sums + queries * stride;                                        // [queries, stride]
  float* scores = added + queries * stride;                                      // [queries, CHUNK_LENGTH]
  Softmax* state = reinterpret_cast<Softmax*>(scores + queries * CHUNK_LENGTH);  // [queries]
  Softmax* fresh = state + queries;                                              // [queries]
  Span* spans = reinterpret_cast<Span*>(fresh + queries);                        // [queries]
  float** targets = reinterpret_cast<float**>(spans + queries);                  // [queries]
  for (int64_t j = 0; j < queries; ++j) {
    const float* from = a.q + place(a, piece, j);
    float* to = q + j * stride;
    clear(to + stride - STEP, STEP);
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
    for (int64_t d = 0; d < stride; d += STEP) Row::arrange(to + d);
    state[j] = {0, 0};
  }
  int64_t final = 0;  // the last position that any row sees
  for (int64_t r = piece.row; r < piece.row + piece.rows; ++r) final = a.positions[r] > final ? a.positions[r] : final;
  const V scale = set1(a.scale);
  for (int64_t chunk = piece.begin; chunk < piece.end; ++chunk) {
    const int64_t base = chunk * CHUNK_LENGTH;
    int64_t from = CHUNK_LENGTH, to = 0;
    for (int64_t j = 0; j < queries; ++j) {
      spans[j] = span_of(a, piece.row + j / a.group, base);
      if (spans[j].to == 0) continue;
      from = spans[j].from < from ? spans[j].from : from;
      to = spans[j].to > to ? spans[j].to : to;
    }
    float* left = partial == nullptr ? nullptr : partial + (chunk - piece.begin) * queries * (stride + STEP);
    for (int64_t j = 0; j < queries; ++j) {
      targets[j] = left != nullptr ? left + j * (stride + STEP) : (state[j].weight == 0 ? sums : added) + j * stride;
      clear(targets[j], stride);
      fresh[j] = {0, 0};
    }
    if (from < to) {
      int64_t next = 0;
      if (to == CHUNK_LENGTH && chunk + 1 < piece.end) next = final - base - CHUNK_LENGTH + 1;
      locate_chunk(a, piece, base, from, to, next < AHEAD ? next : AHEAD, keys, values);
      for (int64_t i = from; chunk == piece.begin && i < to && i < from + AHEAD; ++i)
        for (int64_t at = 0; at < a.cache.row_bytes(); at += LINE) prefetch(keys[i] + at);
      const int64_t start = from / W * W, stop = (to + W - 1) / W * W;
      for (int64_t block = start; block < stop; block += BLOCK) {
        const int64_t end = block + BLOCK < stop ? block + BLOCK : stop;
        by_count(queries, [&](int64_t j, auto count) {
          constexpr int Q = decltype(count)::value;
          float* to = scores + j * CHUNK_LENGTH;
          if (j == 0) score_block<Row, Q, true>(q, stride, keys, block, end, n, scale, to);
          if (j != 0) score_block<Row, Q, false>(q + j * stride, stride, keys, block, end, n, scale, to);
        });
      }
      for (int64_t j = 0; j < queries; ++j)
        if (spans[j].from < spans[j].to) fresh[j] = soften(scores + j * CHUNK_LENGTH, spans[j], start, stop);
      for (int64_t block = from; block < to; block += BLOCK) {
        const int64_t end = block + BLOCK < to ? block + BLOCK : to;
        by_count(queries, [&](int64_t j, auto count) {
          constexpr int Q = decltype(count)::value;
          const float* p = scores + j * CHUNK_LENGTH;
          if (j == 0) weigh_spans<Row, Q, true>(p, values, spans, block, end, n, targets);
          if (j != 0) weigh_spans<Row, Q, false>(p, values, spans + j, block, end, n, targets + j);
        });
      }
    }
    for (int64_t j = 0; j < queries; ++j) {
      if (left != nullptr)
        std::memcpy(targets[j] + stride, &fresh[j], sizeof(Softmax));
      else if (state[j].weight == 0)
        state[j] = fresh[j];
      else
        merge(state[j], sums + j * stride, fresh[j], targets[j], stride);
    }
  }
  if (partial != nullptr) return;
  for (int64_t j = 0; j < queries; ++j) finish<Row>(state[j], sums + j * stride, n, a.out + place(a, piece, j));
}

template <class Row>
void merge_of(const Attention& a, const AttentionPiece& piece, const float* partial, float* scratch) {
  const int64_t n = a.cache.head_dim, stride = padded(n), queries = piece.rows * a.group;
  for (int64_t j = 0; j < queries; ++j) {
    Softmax state{0, 0};
    const float* chunk = partial + j * (stride + STEP);
    for (int64_t c = piece.begin; c < piece.end; ++c, chunk += queries * (stride + STEP)) {
      Softmax more;
      std::memcpy(&more, chunk + stride, sizeof more);
      merge(state, scratch, more, chunk, stride);
    }
    finish<Row>(state, scratch, n, a.out + place(a, piece, j));
  }
}

}  // namespace

// From attention_bf16.cpp; nothing where bf16 lies in no panels.
int64_t attention_bf16_scratch(int64_t head_dim, int64_t queries);
int64_t attention_bf16_partial(int64_t head_dim);
void attention_bf16(const Attention&, const AttentionPiece&, float* partial, float* scratch);
void attention_bf16_merge(const Attention&, const AttentionPiece&, const float* partial, float* scratch);

#if defined(FINIAL_BF16_PANELS)
constexpr bool IN_BLOCKS = true;
#else
constexpr bool IN_BLOCKS = false;
#endif
#if defined(FINIAL_PACKS_BF16)
constexpr Rounding ROUNDS_TO = Rounding::BF16;
#else
constexpr Rounding ROUNDS_TO = Rounding::None;
#endif

bool attention_in_blocks(CacheType type) { return IN_BLOCKS && type == CacheType::BF16; }

Rounding attention_rounding(CacheType type) { return attention_in_blocks(type) ? ROUNDS_TO : Rounding::None; }

int64_t attention_queries(CacheType type) {
#if defined(FINIAL_TILES)
  constexpr int64_t MANY = 128;
#else
  constexpr int64_t MANY = 96;
#endif
  return attention_in_blocks(type) ? MANY : 32;
}

int64_t attention_scratch(CacheType type, int64_t head_dim, int64_t queries) {
  if (attention_in_blocks(type)) return attention_bf16_scratch(head_dim, queries);
  constexpr int64_t FLOATS = sizeof(float);
  constexpr int64_t BYTES = sizeof(Span) + sizeof(float*) + 2 * sizeof(Softmax);
  return POINTERS + queries * (3 * padded(head_dim) + CHUNK_LENGTH + BYTES / FLOATS);
}

int64_t attention_partial(CacheType type, int64_t head_dim) {
  return attention_in_blocks(type) ? attention_bf16_partial(head_dim) : padded(head_dim) + STEP;
}

void attention(const Attention& a, const AttentionPiece& piece, float* partial, float* scratch) {
  if (a.cache.type == CacheType::F32) return piece_of<RowF32>(a, piece, partial, scratch);
  if (a.cache.type == CacheType::Q8_0) return piece_of<RowQ8_0>(a, piece, partial, scratch);
#if defined(FINIAL_BF16_PANELS)
  attention_bf16(a, piece, partial, scratch);
#else
  piece_of<RowBF16>(a, piece, partial, scratch);
#endif
}

void attention_merge(const Attention& a, const AttentionPiece& piece, const float* partial, float* scratch) {
  if (a.cache.type == CacheType::F32) return merge_of<RowF32>(a, piece, partial, scratch);
  if (a.cache.type == CacheType::Q8_0) return merge_of<RowQ8_0>(a, piece, partial, scratch);
#if defined(FINIAL_BF16_PANELS)
  attention_bf16_merge(a, piece, partial, scratch);
#else
  merge_of<RowBF16>(a, piece, partial, scratch);
#endif
}

}  // namespace finial::FINIAL_ISA
