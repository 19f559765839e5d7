// attention over a bf16 cache in blocks, where bf16 lies in panels (pairs.h). Where an instruction multiplies pairs of
// bf16, queries and attention weights are rounded to them; elsewhere (AVX2, AVX-512 without BF16) they stay float32.
//
// Reference: backends/reference.py `attention`. A score is q scale log2(e) times a key, so that a weight is 2^(score -
// its chunk's largest); sums are float32. Rounded: q scale log2(e) and each weight are bf16, and the weights' sum is
// that of the rounded ones. With u = 2^-8 a score is off by at most u sum_d |q k| |scale| beside the float32 rounding,
// a weight by u relatively. Subnormal queries, keys, weights and values count as zero then. In float32: head_dim 2^-24
// |scale| sum_d |q k| relative in the weights, and 2^-23 for the power; (number of keys) 2^-24 in the weighted sum.
//
// Order of operations, the same for a row whatever is computed beside it:
//   score     one chain over pairs of elements, d ascending; in tile registers as tiles.h says.
//   softmax   chunks of ATTENTION_CHUNK positions aligned to position 0: every score, their maximum, the weights; their
//             sum in lanes of (position / 2) % W, or of position % W in float32.
//   values    one chain over pairs of positions, ascending; in tile registers 32 positions at a time. What a row does
//             not see of them is masked in the values too (attention_bf16_tiles.h: where it has to be): the weight 0
//             does not make a NaN or an infinity vanish that another sequence left there.
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
// the softmax. On EPYC Turin few queries that ask for the next block, into the first-level cache, take 8 short
// sequences in 67 us a layer instead of 84 (one thread), and depth 1,024 in 102 instead of 109; on Zen 4 that costs a
// fifth at depth 1,024 (kernels.h, Asking).
// In float32 on Ice Lake, one thread, rows of the cache one after another before (python -m benchmarks.attention
// --threads 1): AVX2 at depth 1,024 12.3 and 11.4 GB/s (of 13.1), prompts of 512 57 and 49 % of the fma peak, of 2,048
// 65 and 55; AVX-512 12.8 GB/s of 14.2 where it asks near (11.6 far, 11.0 if only where blocks lie apart), prompts 52
// and 64 % of its peak.
// On Zen 3 with AVX2, where a value is four slices of registers, each slice asked for its own lines of the next block:
// every fourth pair of lines, which no prefetching of the processor follows. Now the slices of a block ask for the next
// one in order: depth 4,096 57 to 60 and now 64 to 70 % of one thread's 20 to 22 GB/s, two threads 58 and 63 % of 39
// (python -m benchmarks.attention --threads 1, or 2, the two builds in turn). Many queries' weighted sums kept AVX2's
// accumulators on the stack: prompts of 512 50 and now 70 % of the fma peak, of 2,048 53 and now 78 (--threads 1, the
// builds after each other); without them, scores alone take 81 % of their half.
#include <math.h>

#include <algorithm>

#include "attention_bf16_tiles.h"
#include "attention_bf16_vectors.h"
#include "softmax.h"
#include "turn.h"

namespace finial::FINIAL_ISA {

#if !defined(FINIAL_BF16_PANELS)

int64_t attention_bf16_scratch(int64_t, int64_t) { return 0; }
int64_t attention_bf16_partial(int64_t) { return 0; }
void store_blocked(const Cache&, const float*, const float*, const int32_t*, int64_t, int64_t) {}

#else

namespace {

constexpr float LN_2 = 0.693147181f;

// A query's largest score of a span; the rest of the blocks that it touches becomes as small as can be.
float highest(float* scores, const Span& span) {
  const Span all = blocks_of(span);
  for (int64_t i = all.from; i < span.from; ++i) scores[i] = -HUGE_VALF;
  for (int64_t i = span.to; i < all.to; ++i) scores[i] = -HUGE_VALF;
  V top = load(scores + all.from), second = load(scores + all.from + W);
  for (int64_t i = all.from + 2 * W; i < all.to; i += 2 * W)
    top = max(top, load(scores + i)), second = max(second, load(scores + i + W));
  return largest(max(top, second));
}

// Its scores of these blocks, to weights in pairs, in place; their sum.
float soften(float* scores, const Span& blocks, float best) {
  const V highest = set1(best);
  V sums = zero();
#if defined(FINIAL_PACKS_BF16)
  for (int64_t i = blocks.from; i < blocks.to; i += 2 * W) {
    V a = power_of_two(sub(load(scores + i), highest)), b = power_of_two(sub(load(scores + i + W), highest));
    store_bf16_pairs(scores + i / 2, a, b);  // behind what is still to be read
    sums = add(sums, add(a, b));
  }
#else
  for (int64_t i = blocks.from; i < blocks.to; i += W) {
    const V weight = power_of_two(sub(load(scores + i), highest));
    store(scores + i, weight);
    sums = add(sums, weight);
  }
#endif
  return sum(sums);
}

// A tile's scores to weights. Meanwhile it asks for where its results will go, if these are the last.
void weigh(const Attention& a, const AttentionPiece& piece, const Room& room, const Tile& tile, bool last) {
  for (int64_t j = tile.begin; j < tile.end; ++j) {
    room.fresh[j] = {0, 0};
    if (room.spans[j].to > 0) room.fresh[j].best = highest(room.scores + j * LINE, room.spans[j]);
  }
  for (int64_t j = tile.begin; j < tile.end; ++j) {
    const float* out = a.out + place(a, piece, j);
    for (int64_t d = 0; last && d < a.cache.head_dim; d += W) prefetch_to_write(out + d);
    if (room.spans[j].to == 0) continue;
    const float best = room.fresh[j].best;
    room.fresh[j] = {best * LN_2, soften(room.scores + j * LINE, blocks_of(room.spans[j]), best)};
  }
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
  const int64_t queries = piece.rows * a.group;
  Room room(a.cache.head_dim, queries, scratch);
  const int64_t tiles = room.tiles;
  for (int64_t t = 0; t < tiles; ++t) take_queries(a, piece, {queries * t / tiles, queries * (t + 1) / tiles}, room);
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

namespace {

// Rows that a prompt's keys and values are stored in at once: half a block.
constexpr int64_t RUN = 16;

// Whether the rows' slots follow each other within half a block.
bool is_run(const int32_t* slots) {
  bool run = slots[0] % RUN == 0;
  for (int32_t r = 1; r < RUN; ++r) run &= slots[r] == slots[0] + r;
  return run;
}

// One head of RUN rows, `row` floats apart: keys are turned, values go in pairs of positions.
void store_run(const float* keys, const float* values, int64_t row, int64_t n, uint8_t* k, uint8_t* v) {
  constexpr int64_t STEP = 32, LINE = 64;  // elements of a row at a time, and their bytes
  alignas(64) uint8_t pairs[RUN * LINE];
  for (int64_t d = 0; d < n; d += STEP) {
    for (int64_t r = 0; r < RUN; ++r)
      for (int64_t e = 0; e < STEP; e += W) store_bf16(pairs + r * LINE + e * 2, load(keys + r * row + d + e));
    for (int64_t i = 0; i < STEP / 2; i += TURN)
      for (int64_t r = 0; r < RUN; r += TURN)
        turn(pairs + r * LINE + i * 4, LINE, k + ((d / 2 + i) * CACHE_BLOCK + r) * 4);
  }
  for (int64_t r = 0; r < RUN; r += 2)
    for (int64_t d = 0; d < n; d += W) {
      const float* from = values + r * row + d;
      store_i(v + (r / 2 * n + d) * 4, bf16_words(load(from), load(from + row)));
    }
}

}  // namespace

void store_blocked(const Cache& cache, const float* keys, const float* values, const int32_t* slots, int64_t begin,
                   int64_t end) {
  const int64_t n = cache.head_dim, heads = cache.kv_heads;
  for (int64_t i = begin; i < end; ++i) {
    if (i % heads == 0 && i + RUN * heads <= end && n % 32 == 0 && is_run(slots + i / heads)) {
      for (int64_t head = 0; head < heads; ++head) {
        const Cache::Blocked to = cache.blocked_at(slots[i / heads], head);
        store_run(keys + (i + head) * n, values + (i + head) * n, heads * n, n, to.key, to.value);
      }
      i += RUN * heads - 1;
      continue;
    }
    const int64_t slot = slots[i / heads];
    auto [k, v] = cache.blocked_at(slot, i % heads);
    for (int64_t d = 0; d < n; d += W) {
      uint8_t words[2 * W];
      store_bf16(words, load(keys + i * n + d));
      for (int64_t w = 0; w < W / 2; ++w, k += CACHE_BLOCK * 4) std::memcpy(k, words + 4 * w, 4);
      const bool second = slot % cache.page_size % 2 != 0;  // the other half is another thread's
      store_bf16_halves(v + d * 4, load(values + i * n + d), second);
    }
  }
}

#endif

}  // namespace finial::FINIAL_ISA
