// What a thread of attention over a bf16 cache has before it multiplies: its room in the scratch memory, its queries in
// pairs of bf16, and where a chunk's keys and values lie, rearranged if the cache has rows. For attention_bf16.cpp.
#pragma once

#include "attention_bf16_products.h"

#if defined(FINIAL_PACKS_BF16)

namespace finial::FINIAL_ISA {

namespace {

constexpr float LOG2_E = 1.44269504f;

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

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
