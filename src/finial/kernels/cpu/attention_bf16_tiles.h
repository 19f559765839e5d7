// A tile of queries of attention over a bf16 cache in tile registers: its scores, and what its weights make of the
// values. For attention_bf16.cpp.
//
// A cache's block is registers of weights as it lies there: 16 pairs of elements of 16 keys, 16 pairs of positions of
// 16 elements of values. Queries are [32 elements][query of the tile][32], and their weights become what a register of
// activations takes where their scores were. Up to 16 queries meet four registers of a block at once, up to 32 two:
// then four products go with two loads of each side.
//
// The values' sums of a chunk take 32 positions at a time; what a row does not see has the weight 0. That does not make
// a NaN or an infinity vanish, so blocks that not all see whole are copied without what nobody sees; where a number
// that is not finite is left, every query meets a copy of its own.
#pragma once

#include <math.h>

#include "attention_bf16_room.h"
#include "tiles.h"

#if defined(FINIAL_TILES)

namespace finial::FINIAL_ISA {

namespace {

constexpr int64_t HALF = 16;                        // queries of a register
constexpr int64_t KEY_STEP = 16 * CACHE_BLOCK * 4;  // bytes of 16 pairs of elements of a block's keys

int64_t registers_for(int64_t count) { return count < HALF ? count : HALF; }

// A tile's queries, scaled and rounded; the next one's are asked for.
void take_queries(const Attention& a, const AttentionPiece& piece, const Tile& tile, const Room& room) {
  const int64_t n = a.cache.head_dim, count = tile.end - tile.begin, queries = piece.rows * a.group;
  const V scale = set1(a.scale * LOG2_E);
  for (int64_t j = tile.begin; j < tile.end; ++j) {
    const float* from = a.q + place(a, piece, j);
    if (j + count < queries)
      for (int64_t d = 0; d < n; d += W) __builtin_prefetch(a.q + place(a, piece, j + count) + d);
    uint32_t* to = room.q + tile.begin * room.pairs + (j - tile.begin) * W;
    const auto part = [&](int64_t at) {
      return mul(at >= n ? zero() : n - at < W ? load_n(from + at, n - at) : load(from + at), scale);
    };
    for (int64_t d = 0; d < n; d += 2 * W, to += count * W) store_i(to, bf16_pairs(part(d), part(d + W)));
  }
}

// Memory that few queries read next. Their time is that of reading the cache, so they ask for it with each register of
// keys or values, as many lines as a register has, into the second-level cache. Left to the processor, which begins
// anew with every page, two threads read 22 of 30 GB/s.
struct Upcoming {
  const uint8_t *at = nullptr, *end = nullptr;

  void ask() {
    for (int64_t i = 0; i < HALF && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// scores [count, LINE] = queries times a block's keys, or the first half of them; q [steps][count][32]. `soon` and
// `then` are asked for.
void dots(const uint8_t* keys, bool whole, const uint8_t* q, int64_t count, int64_t steps, Upcoming soon, Upcoming then,
          float* scores) {
  const bool two = count > HALF;
  tile_zero<0>(), tile_zero<1>();
  if (two) tile_zero<2>(), tile_zero<3>();
  for (int64_t i = 0; i < steps; ++i, keys += KEY_STEP, q += count * 64) {
    tile_load<4>(q, 64);
    soon.ask(), then.ask();
    tile_load<6>(keys, CACHE_BLOCK * 4);
    tile_dot_bf16<0, 4, 6>();
    soon.ask(), then.ask();
    if (whole) {
      tile_load<7>(keys + 64, CACHE_BLOCK * 4);
      tile_dot_bf16<1, 4, 7>();
    }
    if (two) {
      tile_load<5>(q + HALF * 64, 64);
      tile_dot_bf16<2, 5, 6>();
      tile_dot_bf16<3, 5, 7>();
    }
  }
  tile_store<0>(scores, LINE * 4), tile_store<1>(scores + W, LINE * 4);
  if (two) tile_store<2>(scores + HALF * LINE, LINE * 4), tile_store<3>(scores + HALF * LINE + W, LINE * 4);
}

// What any of a tile's queries sees of a chunk, and what all of them see.
struct Sight {
  Span any{ATTENTION_CHUNK, 0}, all{0, ATTENTION_CHUNK};

  Sight(const Span* spans, int64_t count) {
    for (int64_t m = 0; m < count; ++m) {
      all = {most(all.from, spans[m].from), least(all.to, spans[m].to)};
      if (spans[m].to > 0) any = {least(any.from, spans[m].from), most(any.to, spans[m].to)};
    }
  }
  bool whole(int64_t block) const { return all.from <= block * CACHE_BLOCK && (block + 1) * CACHE_BLOCK <= all.to; }
  int64_t begin() const { return any.from / CACHE_BLOCK; }  // blocks that any sees
  int64_t end() const { return (any.to + CACHE_BLOCK - 1) / CACHE_BLOCK; }
};

// What is read of a block, if there is one.
Upcoming keys_of(const uint8_t* block, const Room& room) {
  return block == nullptr ? Upcoming{} : Upcoming{block, block + room.pairs * CACHE_BLOCK * 4};
}
Upcoming values_of(int64_t block, const Sight& sight, const Room& room) {
  const int64_t seen = least(PAIRS, (sight.any.to - block * CACHE_BLOCK + 1) / 2);
  return {room.values[block], room.values[block] + seen * room.width * 4};
}

// The scores of a chunk's keys for a tile. The first of many asks meanwhile for the values, which all will read.
void score(const Room& room, const Tile& tile, bool first) {
  const int64_t count = tile.end - tile.begin;
  const Sight sight(room.spans + tile.begin, count);
  const Tiles registers(registers_for(count), 16);
  const uint8_t* q = reinterpret_cast<const uint8_t*>(room.q + tile.begin * room.pairs);
  for (int64_t b = sight.begin(), end = sight.end(); b < end; ++b) {
    if (first && count > HALF)
      for (int64_t i = 0; i < room.pairs * CACHE_BLOCK * 4; i += 64) prefetch(room.values[b] + i);
    Upcoming soon, then;
    if (count <= HALF && b + 1 < end) soon = keys_of(room.keys[b + 1], room);
    if (count <= HALF && b + 1 == end) {  // what is copied is read before all others
      soon = values_of(sight.begin(), sight, room);
      if (!sight.whole(b) && b > sight.begin()) then = values_of(b, sight, room);
    }
    const bool whole = count > HALF || sight.any.to - b * CACHE_BLOCK > CACHE_BLOCK / 2;
    dots(room.keys[b], whole, q, count, room.pairs / 16, soon, then, room.scores + tile.begin * LINE + b * CACHE_BLOCK);
  }
}

// A block's values, zero but for positions [from, to) of it, to `out`. Whether all of these are finite.
bool copy_values(const uint8_t* values, int64_t width, int64_t from, int64_t to, uint8_t* out) {
  const I exponent = _mm512_set1_epi16(0x7F80);
  __mmask32 infinite = 0;
  for (int64_t i = 0; i < PAIRS; ++i, values += width * 4, out += width * 4) {
    const bool even = from <= 2 * i && 2 * i < to, odd = from <= 2 * i + 1 && 2 * i + 1 < to;
    if (!even && !odd) {
      for (int64_t d = 0; d < width * 4; d += 64) store_i(out + d, _mm512_setzero_si512());
      continue;
    }
    const I seen = _mm512_set1_epi32(static_cast<int>((even ? 0x0000FFFFu : 0) | (odd ? 0xFFFF0000u : 0)));
    for (int64_t d = 0; d < width * 4; d += 64) {
      const I pairs = _mm512_and_si512(load_i(values + d), seen);
      infinite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(pairs, exponent), exponent);
      store_i(out + d, pairs);
    }
  }
  return infinite == 0;
}

// out [count, stride] = weights [count][bf16, LINE floats from one query to the next] times the values of blocks
// [begin, end), for more than HALF queries: block after block for 32 elements.
void mix_many(const float* weights, const uint8_t* const* blocks, int64_t begin, int64_t end, int64_t width, float* out,
              int64_t stride) {
  for (int64_t d = 0; d < width; d += 2 * W) {
    const bool whole = width - d > W;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t b = begin; b < end; ++b) {
      const uint8_t* value = blocks[b] + d * 4;
      const float* weight = weights + b * CACHE_BLOCK / 2;
      tile_load<4>(weight, LINE * 4);
      tile_load<6>(value, width * 4);
      tile_dot_bf16<0, 4, 6>();
      tile_load<5>(weight + HALF * LINE, LINE * 4);
      tile_dot_bf16<2, 5, 6>();
      if (!whole) continue;
      tile_load<7>(value + 64, width * 4);
      tile_dot_bf16<1, 4, 7>();
      tile_dot_bf16<3, 5, 7>();
    }
    float* to = out + d;
    tile_store<0>(to, stride * 4), tile_store<2>(to + HALF * stride, stride * 4);
    if (whole) tile_store<1>(to + W, stride * 4), tile_store<3>(to + HALF * stride + W, stride * 4);
  }
}

// The same for up to HALF queries: all elements block after block, in the order in which they lie; sums wait in memory.
void mix_few(const float* weights, const uint8_t* const* blocks, const Upcoming* after, int64_t begin, int64_t end,
             int64_t width, float* out, int64_t stride) {
  for (int64_t b = begin; b < end; ++b) {
    const uint8_t* value = blocks[b];
    Upcoming soon = after[b];
    tile_load<4>(weights + b * CACHE_BLOCK / 2, LINE * 4);
    for (int64_t d = 0; d < width; d += W, value += 64) {
      soon.ask();
      b == begin ? tile_zero<0>() : tile_load<0>(out + d, stride * 4);
      tile_load<6>(value, width * 4);
      tile_dot_bf16<0, 4, 6>();
      tile_store<0>(out + d, stride * 4);
    }
  }
}

// The values of a chunk for queries [from, from + count) of a piece, to out. False: where a query does not see a number
// that is not finite, others do.
bool mix_seen(const Room& room, int64_t from, int64_t count, float* out) {
  const Sight sight(room.spans + from, count);
  const int64_t begin = sight.begin(), end = sight.end();
  const uint8_t* blocks[BLOCKS];
  for (int64_t b = begin; b < end; ++b) {
    blocks[b] = room.values[b];
    if (sight.whole(b)) continue;
    uint8_t* copy = room.value_copies + b * CACHE_BLOCK * room.width * 2;
    const int64_t base = b * CACHE_BLOCK;
    const bool finite = copy_values(blocks[b], room.width, sight.any.from - base, sight.any.to - base, copy);
    if (!finite && count > 1) return false;
    blocks[b] = copy;
  }
  const Tiles registers(registers_for(count), 16);
  const float* weights = room.scores + from * LINE;
  if (count > HALF) {
    mix_many(weights, blocks, begin, end, room.width, out, room.stride);
    return true;
  }
  Upcoming after[BLOCKS], next = keys_of(room.next, room);
  for (int64_t b = begin; b < end; ++b) {
    if (b + 1 < end && blocks[b + 1] == room.values[b + 1])
      after[b] = values_of(b + 1, sight, room);
    else
      after[b] = next, next = {};
  }
  mix_few(weights, blocks, after, begin, end, room.width, out, room.stride);
  return true;
}

// The values of a chunk for a tile, joined to what the chunks before gave, or left to be merged.
void gather(const Room& room, const Tile& tile, int64_t, bool, float* left) {
  const int64_t count = tile.end - tile.begin;
  const Sight sight(room.spans + tile.begin, count);
  for (int64_t j = tile.begin; j < tile.end; ++j) {  // blocks that others see
    uint16_t* weights = reinterpret_cast<uint16_t*>(room.scores + j * LINE);
    const Span own = blocks_of(room.spans[j]), all = blocks_of(sight.any);
    const auto clear = [&](int64_t begin, int64_t end) {
      if (begin < end) std::memset(weights + begin, 0, static_cast<size_t>(end - begin) * 2);
    };
    if (room.spans[j].to == 0) {
      clear(all.from, all.to);
    } else {
      clear(all.from, own.from);
      clear(own.to, all.to);
    }
  }
  if (sight.any.to > 0 && !mix_seen(room, tile.begin, count, room.added))
    for (int64_t m = 0; m < count; ++m)
      if (room.spans[tile.begin + m].to > 0) mix_seen(room, tile.begin + m, 1, room.added + m * room.stride);
  for (int64_t m = 0; m < count; ++m) {
    const int64_t j = tile.begin + m;
    const float* added = room.added + m * room.stride;
    if (left == nullptr) {
      merge(room.state[j], room.sums + j * room.stride, room.fresh[j], added, room.width);
      continue;
    }
    float* to = left + j * room.stride;
    std::memcpy(to, added, static_cast<size_t>(room.width) * sizeof(float));
    std::memcpy(to + room.width, &room.fresh[j], sizeof(Softmax));
  }
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
