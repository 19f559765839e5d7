// What the kernels of packed weights share, whatever their format (layouts: packed.h).
#pragma once

#include "packed.h"
#include "pairs.h"

namespace finial::FINIAL_ISA {

constexpr int PANEL_VECTORS = static_cast<int>(PANEL) / W;

#if defined(FINIAL_TILES)
constexpr int64_t TILE = 16;   // rows of a tile register
constexpr int64_t GROUP = 32;  // a panel's results, 64 KiB
constexpr int64_t GROUP_BYTES = int64_t{1280} << 10;
constexpr int64_t STRIP = 2;  // panels that share a register of int8 rows
#else
constexpr int64_t TILE = 12;   // 24 accumulators of the 32 registers
constexpr int64_t GROUP = 14;  // a panel's results, at most 21 KiB, stay in the first-level cache
constexpr int64_t GROUP_BYTES = int64_t{640} << 10;
constexpr int64_t STRIP = 1;
#endif
constexpr Blocking BLOCKING{TILE, GROUP, GROUP_BYTES, STRIP};

// Rounded rows of one tile: tile i of `tiles(rows)` lies `first` rows behind the first one, `count` rows of it.
struct Tile {
  int64_t first, count;
};
FINIAL_INLINE Tile tile_of(int64_t rows, int64_t i) {
  const int64_t n = tiles(rows, BLOCKING), first = rows * i / n;
  return {first, rows * (i + 1) / n - first};
}

// Rounded rows that meet a panel, tile after tile; a block's rows of a tile are neighbours.
struct Rows {
  const Int8Block* x[GROUP];  // block 0 of each tile
  int64_t count[GROUP];       // rows of each
  int64_t tiles, rows;
};

// Tiles [begin, end) of `rows` rounded rows at x.
FINIAL_INLINE Rows rows_of(const uint8_t* x, int64_t rows, int64_t begin, int64_t end, int64_t blocks) {
  Rows taken;
  taken.tiles = end - begin, taken.rows = 0;
  for (int64_t i = begin; i < end; ++i) {
    const Tile t = tile_of(rows, i);
    taken.x[i - begin] = reinterpret_cast<const Int8Block*>(x) + t.first * blocks;
    taken.count[i - begin] = t.count;
    taken.rows += t.count;
  }
  return taken;
}

// Few rows leave their panel to be read once: the processor's own prefetching comes too late when arithmetic fills its
// window, so every block asks for what lies this much further on.
constexpr int64_t AHEAD = 4096;
FINIAL_INLINE void prefetch(const uint8_t* p, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
#else
  (void)p, (void)bytes;
#endif
}

// With AVX-512 few rows, and one but for bf16 pairs, ask with every block for as much further on instead: always 2
// AHEAD, or if they are so many as to be much arithmetic, how far depending on the format. GB/s of two threads that
// read 88 (EPYC Turin: always, near): one row of q4_0 83 instead of 75, four rows of q8_0 75 instead of 30, of q4_k 59
// instead of 42. That read 64 (EPYC Genoa: from enough rows on, far): one row of q4_k 62, but 41 if it asks near and 48
// far; eight rows of q8_0 41 instead of 27, four of q4_k 38 instead of 32, eight of bf16 52 instead of 42. That
// read 26.5 (Ice Lake: always, near): one row of any format 26, 24 to 25 if it asks far and 23 to 25 not at all. With
// AVX2 there, where one row asks if the processor always gains from it: 25 to 27 instead of 20 to 24.
//
// Zen 3, with AVX2 (always, far, but only 1280 bytes on): its prefetching begins anew with every 4 KiB, and what is
// asked for early begins it early; further on it is one more stream. Shares of what two threads read beside it, 25 to
// 32 GB/s, not asked for, and 1, 1.25, 2 and 8 KB on: bf16 81, 91, 92, 85, 82 %; q8_0 79, 84, 82, 85, 80; q4_0 70, 82,
// 87, 85, 81; q4_k 68, 76, 77, 78, 78. One thread, 17 to 20 GB/s: 77, 88, 88, 82 %; 73, 78, 76, 76; 70, 86, 89, 92; 64,
// 72, 76, 80. Into the first-level cache likewise or a little less.
struct Enough {
  int64_t rows, distance;
};
#if (defined(FINIAL_AVX512) || defined(FINIAL_AVX2)) && defined(__GNUC__)
constexpr bool ASKING = true;
#else
constexpr bool ASKING = false;
#endif
struct Asked {
  Ask how;
  int64_t distance;
};
FINIAL_INLINE Asked asks(int64_t rows, const Enough& enough) {
  if (ASKING && asking.always) return {asking.how, asking.distance};
  if (ASKING && W >= 16 && rows >= enough.rows) return {asking.how, enough.distance};
  return {Ask::Nothing, 0};
}
FINIAL_INLINE void stream(const Asked& ask, const uint8_t* w, int64_t bytes) {
#if defined(__GNUC__)
  if (!ASKING) return;
  if (ask.how == Ask::Near)
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(w + ask.distance + i, 0, 3);
  if (ask.how == Ask::Far)
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(w + ask.distance + i, 0, 2);
#else
  (void)ask, (void)w, (void)bytes;
#endif
}

// One row meets a panel after the other, and a panel of 2048 inputs pushes the row out of the first-level cache: a
// block that comes soon is asked for, six ahead, three where blocks take longer (K-quants). Shares of what 1024 inputs
// reach (EPYC Genoa, one thread, 31 GB/s; before, and with a row that always lies there): q4_0 2048 inputs 95 % (90,
// 96), 3072 98 (90, 98); q4_k 2048 81 (77, 92). Asked for twice as early it helps half as much.
FINIAL_INLINE void keep_near(const Int8Block* soon) {
#if defined(__GNUC__)
  __builtin_prefetch(soon);
#else
  (void)soon;
#endif
}

// Memory that is read soon and asked for meanwhile.
struct Soon {
  const uint8_t *begin, *end;
};

// Where the results of a panel will go, rows `stride` apart, or null: asked for while they are computed, for a matrix
// of results is too large for the second-level cache and each line of it is written once.
struct Target {
  const float* y;
  int64_t stride;
};
FINIAL_INLINE void expect(const Target& t, int64_t begin, int64_t end) {
#if defined(__GNUC__)
  for (int64_t r = begin; r < end && t.y != nullptr; ++r)
    for (int64_t i = 0; i < PANEL; i += 16) __builtin_prefetch(t.y + r * t.stride + i, 1);
#else
  (void)t, (void)begin, (void)end;
#endif
}

}  // namespace finial::FINIAL_ISA
