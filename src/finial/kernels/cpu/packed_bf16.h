// How a tile of rows meets a bf16 panel with the 32 registers of AVX-512, and how rows are rounded to bf16 where it
// multiplies pairs of them; elsewhere they stay float32 (packed_f32.h). Included by packed.cpp.
//
// In float32 a pair of inputs of 12 rows is 48 fma, and 4 instructions that make floats of a panel's on the same two
// ports: 92 % of the peak at most. Measured on one core of Ice Lake, 204 to 210 GFLOP/s of fma alone: 179 from the
// first-level cache, 512 rows 158 to 162; a panel made float32 first is no faster (181), turns of 32 to 128 pairs in
// which all tiles meet a part of the panel are slower by a tenth.
#pragma once

#include "panels.h"

#if defined(FINIAL_AVX512) && !defined(FINIAL_TILES)

namespace finial::FINIAL_ISA {

namespace {

constexpr Enough ENOUGH_BF16{6, 6144};
// Measured on Zen 4, Zen 5 and Ice Lake (float32): one row of bf16 keeps its stream by itself, one of float32 does not;
// from six on those want to be asked for too, and twelve, mostly one of many tiles, nothing of a panel that is there.
#if defined(FINIAL_PACKS_BF16)
constexpr bool asks_for_panel(int rows) { return rows > 1; }
constexpr bool asks_for_rows(int) { return false; }
#else
constexpr bool asks_for_panel(int rows) { return rows < TILE; }
constexpr bool asks_for_rows(int rows) { return rows >= 6; }
#endif
constexpr int64_t ROWS_AHEAD = 1536;

// c [M, PANEL] = a panel times a tile's rows. Meanwhile it asks for `ahead`, a little every AT_ONCE pairs.
template <int M>
void tile_bf16(const uint8_t* FINIAL_RESTRICT w, const Two* FINIAL_RESTRICT x, int64_t n_in, float* FINIAL_RESTRICT c,
               Soon ahead) {
  V acc[M][PANEL_VECTORS];
  for (int r = 0; r < M; ++r)
    for (int v = 0; v < PANEL_VECTORS; ++v) acc[r][v] = zero();
  const Asked ask = asks(M, ENOUGH_BF16);
  const auto pair = [&] {
    if (asks_for_panel(M)) stream(ask, w, PANEL * 4);
    if (asks_for_rows(M)) prefetch(reinterpret_cast<const uint8_t*>(x) + ROWS_AHEAD, sizeof(Two) * M);
    add_pair(w, x, 1, acc);
    w += PANEL * 4, x += M;
  };
  int64_t k = 0;
  if constexpr (M >= 6) {
    constexpr int64_t AT_ONCE = 8;
    const int64_t turns = (n_in + 1) / 2 / AT_ONCE, lines = (ahead.end - ahead.begin + 63) / 64;
    const int64_t some = turns > 0 ? (lines + turns - 1) / turns : 0;
    for (int64_t turn = 0; turn < turns; ++turn) {
      for (int64_t i = 0; i < some; ++i, ahead.begin += 64) __builtin_prefetch(ahead.begin, 0, 2);
      for (int i = 0; i < AT_ONCE; ++i) pair();
    }
    k = turns * 2 * AT_ONCE;
  }
  for (; k < n_in; k += 2) pair();
  for (int r = 0; r < M; ++r)
    for (int v = 0; v < PANEL_VECTORS; ++v) store(c + r * PANEL + v * W, acc[r][v]);
}

using TileBF16 = void (*)(const uint8_t*, const Two*, int64_t, float*, Soon);
constexpr TileBF16 TILES_BF16[TILE + 1] = {nullptr,       tile_bf16<1>,  tile_bf16<2>, tile_bf16<3>, tile_bf16<4>,
                                           tile_bf16<5>,  tile_bf16<6>,  tile_bf16<7>, tile_bf16<8>, tile_bf16<9>,
                                           tile_bf16<10>, tile_bf16<11>, tile_bf16<12>};
FINIAL_INLINE void meet_bf16(int64_t rows, const uint8_t* w, const uint8_t* x, int64_t n_in, float* c, Soon ahead) {
  TILES_BF16[rows](w, reinterpret_cast<const Two*>(x), n_in, c, ahead);
}

#if defined(FINIAL_PACKS_BF16)

// Row `row` of a tile from input `from` on.
void round_row_bf16(const float* x, int64_t n_in, int64_t from, int64_t row, int64_t rows, uint8_t* tile) {
  for (int64_t k = from; k < n_in; k += W) {
    const int64_t n = n_in - k < W ? n_in - k : W;
    uint32_t pairs[W / 2];
    store_bf16(reinterpret_cast<uint8_t*>(pairs), n == W ? load(x + k) : load_n(x + k, n));
    for (int64_t i = 0; i < (n + 1) / 2; ++i) std::memcpy(tile + ((k / 2 + i) * rows + row) * 4, &pairs[i], 4);
  }
}

void round_bf16(const float* x, int64_t n_in, int64_t rows, uint8_t* tile) {
  int64_t k = 0;
  if (rows == 1)
    for (; k + W <= n_in; k += W) store_bf16(tile + 2 * k, load(x + k));
  if (rows >= 4)
    for (; k + 2 * W <= n_in; k += 2 * W)
      for (int64_t row = 0; row < rows; row += 4) {
        const int64_t first = row + 4 <= rows ? row : rows - 4;
        const auto pairs = [&](int64_t i) {
          const float* from = x + (first + i) * n_in + k;
          return bf16_pairs(load(from), load(from + W));
        };
        store_four(reinterpret_cast<uint32_t*>(tile) + k / 2 * rows + first, rows, pairs(0), pairs(1), pairs(2),
                   pairs(3));
      }
  for (int64_t row = 0; row < rows; ++row) round_row_bf16(x + row * n_in, n_in, k, row, rows, tile);
}

#endif

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
