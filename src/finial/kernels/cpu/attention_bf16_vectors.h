// A tile of queries of attention over a bf16 cache, in vectors: taken to pairs, their scores, and what their weights
// make of the values. For attention_bf16.cpp.
#pragma once

#include "attention_bf16_products.h"

#if defined(FINIAL_BF16_PANELS) && !defined(FINIAL_TILES)

namespace finial::FINIAL_ISA {

namespace {

// The next tile's queries are asked for.
void expect_queries(const Attention& a, const AttentionPiece& piece, const Tile& tile) {
  const int64_t count = tile.end - tile.begin, queries = piece.rows * a.group;
  for (int64_t j = tile.end; j < least(tile.end + count, queries); ++j)
    for (int64_t d = 0; d < a.cache.head_dim; d += W) prefetch_line<3>(a.q + place(a, piece, j) + d);
}

#if defined(FINIAL_PACKS_BF16)

// A tile's queries, scaled and rounded.
void take_queries(const Attention& a, const AttentionPiece& piece, const Tile& tile, const Room& room) {
  const int64_t n = a.cache.head_dim, count = tile.end - tile.begin;
  const V scale = set1(a.scale * LOG2_E);
  expect_queries(a, piece, tile);
  Two* to = room.q + tile.begin * room.pairs;
  int64_t d = 0;
  const auto pairs = [&](int64_t m) {
    const float* from = a.q + place(a, piece, tile.begin + m) + d;
    return bf16_pairs(mul(load(from), scale), mul(load(from + W), scale));
  };
  for (; count >= 4 && d + 2 * W <= n; d += 2 * W, to += W * count)
    for (int64_t m = 0; m < count; m += 4) {
      const int64_t at = least(m, count - 4);
      store_four(to + at, count, pairs(at), pairs(at + 1), pairs(at + 2), pairs(at + 3));
    }
  for (; count == 1 && d + 2 * W <= n; d += 2 * W, to += W) store_i(to, pairs(0));
  for (; count == 2 && d + 2 * W <= n; d += 2 * W, to += 2 * W) store_two(to, pairs(0), pairs(1));
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

#else

// A tile's queries, scaled.
void take_queries(const Attention& a, const AttentionPiece& piece, const Tile& tile, const Room& room) {
  const int64_t n = a.cache.head_dim, count = tile.end - tile.begin;
  const V scale = set1(a.scale * LOG2_E);
  expect_queries(a, piece, tile);
  Two* to = room.q + tile.begin * room.pairs;
  const auto query = [&](int64_t m) { return a.q + place(a, piece, tile.begin + m); };
  int64_t d = 0;
  for (; count >= 4 && d + W <= n; d += W, to += W / 2 * count)
    for (int64_t m = 0; m < count; m += 4) {
      const int64_t at = least(m, count - 4);
      const auto part = [&](int64_t i) { return mul(load(query(at + i) + d), scale); };
      store_four(&to[at].first, count, part(0), part(1), part(2), part(3));
    }
  for (; d < n; d += W, to += W / 2 * count)
    for (int64_t m = 0; m < count; ++m) {
      Two pairs[W / 2];
      store(&pairs[0].first, mul(n - d < W ? load_n(query(m) + d, n - d) : load(query(m) + d), scale));
      for (int64_t i = 0; i < W / 2 && 2 * i < n - d; ++i) to[i * count + m] = pairs[i];
    }
}

#endif

// The scores of a chunk's keys for a tile. The first of many asks meanwhile for the values, which all will read; few
// may ask for what they read next.
void score(const Room& room, const Tile& tile, bool first) {
  const int64_t count = tile.end - tile.begin;
  int64_t from = ATTENTION_CHUNK, to = 0;
  for (int64_t j = tile.begin; j < tile.end; ++j)
    if (room.spans[j].to > 0) from = least(from, room.spans[j].from), to = most(to, room.spans[j].to);
  for (int64_t b = from / CACHE_BLOCK; b * CACHE_BLOCK < to; ++b) {
    const bool far = wide(count, room.tiles);
    const Ask ask = !first ? Ask::Nothing : far ? Ask::Far : asks_after(room.keys, b, room.pairs);
    dots_for(ask)[count](room.keys[b], room.q + tile.begin * room.pairs, room.pairs,
                         room.scores + tile.begin * LINE + b * CACHE_BLOCK, far ? room.values[b] : room.keys[b + 1]);
  }
}

// A query's weights, which have taken the place of its scores.
const Two* weights_of(const Room& room, int64_t query) {
  return reinterpret_cast<const Two*>(room.scores + query * LINE);
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
      mix_span(weights_of(room, m), values, to - m, part(room.spans[m]), out + (m - tile.begin) * room.stride,
               room.stride, room.tiles, first);
    }
  };
  if (common.from >= common.to) return rows([](Span s) { return s; });
  rows([&](Span s) { return Span{s.from, common.from}; });
  mix_pairs(weights_of(room, tile.begin), values, tile.end - tile.begin, common.from / 2, common.to / 2, out,
            room.stride, room.tiles, first);
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
  const Two* weights = weights_of(room, tile.begin);
  Softmax *state = room.state + tile.begin, *fresh = room.fresh + tile.begin;
  int64_t whole = 0, merged = 0;  // queries that see all of the chunk, that have seen others
  for (int64_t m = 0; m < count; ++m) {
    const Span& span = room.spans[tile.begin + m];
    whole += span.from == 0 && span.to == ATTENTION_CHUNK, merged += state[m].weight != 0;
  }
  float* sums = left != nullptr ? left + tile.begin * room.stride : room.sums + tile.begin * room.stride;
  const bool run = values.blocks[BLOCKS - 1] == values.blocks[0] + (BLOCKS - 1) * PAIRS * values.width * 4;
  if (wide(count, room.tiles) && whole == count && (merged == 0 || (merged == count && run))) {
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

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
