// What a thread of attention over a bf16 cache has before it multiplies: its room in the scratch memory, its queries in
// pairs, and where a chunk's keys and values lie, rearranged if the cache has rows. For attention_bf16.cpp.
#pragma once

#include "pairs.h"
#include "softmax.h"

#if defined(FINIAL_BF16_PANELS)

namespace finial::FINIAL_ISA {

namespace {

constexpr float LOG2_E = 1.44269504f;
constexpr int64_t BLOCKS = ATTENTION_CHUNK / CACHE_BLOCK;
constexpr int64_t PAIRS = CACHE_BLOCK / 2;     // pairs of positions of a block
constexpr int64_t LINE = ATTENTION_CHUNK + W;  // floats of a query's scores: lines of a tile fall into sets apart
constexpr int64_t LINE_PAIRS = LINE * 4 / static_cast<int64_t>(sizeof(Two));  // from its weights to the next one's
#if defined(FINIAL_TILES)
constexpr int64_t MOST = 32;        // queries that meet a block of keys at once
constexpr int64_t SPARE = 31;       // rows that are computed beside them, and not used
constexpr int64_t PAIRS_UNIT = 16;  // pairs of elements that a product takes
#else
constexpr int64_t MOST = W >= 16 ? 12 : 4, SPARE = 0, PAIRS_UNIT = 1;
#endif

int64_t padded(int64_t n) { return (n + W - 1) / W * W; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <int LEVEL>
FINIAL_INLINE void prefetch_line(const void* p) {  // 3: into the first-level cache, 2: the second
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, LEVEL);
#else
  (void)p;
#endif
}
FINIAL_INLINE void prefetch(const uint8_t* p) { prefetch_line<2>(p); }
FINIAL_INLINE void prefetch_to_write(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 1);
#else
  (void)p;
#endif
}

// What a thread needs beside the cache, for pieces of `queries`.
struct Room {
  int64_t pairs, width, stride, tiles;
  float *scores, *sums, *added;        // [queries, LINE], [queries, stride], [queries, stride]; SPARE more of some
  uint8_t *key_blocks, *value_blocks;  // a chunk, rearranged
  uint8_t* value_copies;               // a chunk's, or what queries see of it; for tiles
  Two* q;                              // tiles of queries in pairs
  const uint8_t **keys, **values;      // [BLOCKS + 1]: a chunk's, and what is read after each
  const uint8_t* next;                 // the keys that are read after the chunk, or null; for tiles
  Softmax *state, *fresh;              // [queries]
  Span* spans;                         // [queries]

  static int64_t bytes(int64_t head_dim, int64_t queries) {
    const int64_t pairs = pairs_of(head_dim), two = sizeof(Two);
    const int64_t each = 4 * LINE + 8 * (padded(head_dim) + W) + two * pairs + 8;
    return (queries + SPARE) * (each + static_cast<int64_t>(2 * sizeof(Softmax) + sizeof(Span))) +
           ATTENTION_CHUNK * (4 * pairs + (SPARE > 0 ? 4 : 2) * padded(head_dim)) + 64 +
           2 * (BLOCKS + 1) * static_cast<int64_t>(sizeof(const uint8_t*));
  }

  static int64_t pairs_of(int64_t head_dim) { return (head_dim + 2 * PAIRS_UNIT - 1) / (2 * PAIRS_UNIT) * PAIRS_UNIT; }

  Room(int64_t head_dim, int64_t queries, float* scratch) {
    tiles = (queries + MOST - 1) / MOST, pairs = pairs_of(head_dim), width = padded(head_dim), stride = width + W;
    scores = scratch;
    sums = scores + (queries + SPARE) * LINE;
    added = sums + queries * stride;
    key_blocks = reinterpret_cast<uint8_t*>(added + (queries + SPARE) * stride);
    value_blocks = key_blocks + ATTENTION_CHUNK * pairs * 4;
    value_copies = value_blocks + ATTENTION_CHUNK * width * 2;
    q = reinterpret_cast<Two*>(value_copies + (SPARE > 0 ? ATTENTION_CHUNK * width * 2 : 0));
    keys = reinterpret_cast<const uint8_t**>(q + ((queries + SPARE) * pairs + 1) / 2 * 2);
    values = keys + BLOCKS + 1;
    state = reinterpret_cast<Softmax*>(values + BLOCKS + 1);
    fresh = state + queries;
    spans = reinterpret_cast<Span*>(fresh + queries);
  }
};

// The blocks that a span touches, as positions.
Span blocks_of(const Span& span) {
  return {span.from / CACHE_BLOCK * CACHE_BLOCK, (span.to + CACHE_BLOCK - 1) / CACHE_BLOCK * CACHE_BLOCK};
}

struct Tile {  // queries of a piece
  int64_t begin, end;
};

// Where the first keys of a piece over a blocked cache lie.
const uint8_t* first_keys(const Attention& a, const AttentionPiece& piece) {
  const int64_t chunk = piece.begin * ATTENTION_CHUNK, seen = a.window > 0 ? a.positions[piece.row] - a.window + 1 : 0,
                at = most(chunk, seen) / CACHE_BLOCK * CACHE_BLOCK, size = a.cache.page_size;
  const int32_t page = a.pages[a.sequence[piece.row] * a.pages_per_sequence + at / size];
  return a.cache.keys(page, piece.head) + at % size * a.cache.row_bytes();
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
      if (2 * room.pairs > n) {  // what a product takes beyond the last element must be zero
        uint8_t* keys = room.key_blocks + b * CACHE_BLOCK * room.pairs * 4;
        std::memcpy(keys, room.keys[b], static_cast<size_t>(CACHE_BLOCK * n * 2));
        std::memset(keys + CACHE_BLOCK * n * 2, 0, static_cast<size_t>(CACHE_BLOCK * (2 * room.pairs - n) * 2));
        room.keys[b] = keys;
      }
    }
    const int64_t next = base + ATTENTION_CHUNK, last = (high + CACHE_BLOCK - 1) / CACHE_BLOCK;
    room.keys[last] = room.values[low / CACHE_BLOCK];
    room.next = more                ? cache.keys(pages[next / size], piece.head) + next % size * row
                : a.next != nullptr ? first_keys(a, *a.next)
                                    : nullptr;
    room.values[last] = more ? room.next : room.values[last - 1];
    return;
  }
  room.next = nullptr;
  for (int64_t b = 0; b <= BLOCKS; ++b) {
    room.keys[b] = room.key_blocks + b * CACHE_BLOCK * room.pairs * 4;
    room.values[b] = room.value_blocks + b * PAIRS * room.width * 4;
  }
  for (int64_t i = low; i < high; ++i) {
    const int64_t page = pages[(base + i) / size], offset = (base + i) % size * row;
    const uint8_t *key = cache.keys(page, piece.head) + offset, *value = cache.values(page, piece.head) + offset;
    uint8_t* k = room.key_blocks + (i / CACHE_BLOCK * room.pairs * CACHE_BLOCK + i % CACHE_BLOCK) * 4;
    for (int64_t d = 0; d < 2 * room.pairs; d += 2, k += CACHE_BLOCK * 4) {
      uint32_t pair = 0;
      if (d < n) std::memcpy(&pair, key + 2 * d, n - d > 1 ? 4 : 2);
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
