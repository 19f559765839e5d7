// float32 rows, and how a tile of them meets a bf16 panel with the sixteen registers of AVX2 (with AVX-512: as pairs of
// bf16 do, packed_bf16.h). Included by packed.cpp.
//
// A pair of inputs of a panel is 128 bytes, which shifts and masks make floats of; then one fma for each row, input and
// vector of outputs. Up to ROWS rows meet half a panel: 12 accumulators, more than the 8 that hide the latency of an
// fma, two registers of weights and one of a row (add_halves of pairs.h), and for 24 fma 12 broadcasts, 4 loads and 4
// instructions that make floats, which have units of their own on Zen 3. Turns of PAIRS pairs keep a panel's and a
// tile's part in the first-level cache: with 128 pairs 12 rows ran at 68 instead of 88 GFLOP/s.
// Measured on one core of an AMD EPYC (Zen 3), of 104 GFLOP/s of fma alone, best of many, weights in the second-level
// cache: 12 rows 95, 6 rows 94, 4 and 8 rows 85 (8 accumulators; before, in turn, 87, 73, 85), 168 rows of 3072 inputs
// 91 (82); one row reads 46 GB/s there. Three rows of a whole panel, 12 accumulators too, spill: 64 instead of 71.
//
// Three rows and more have the panel's part pass by two to four times, and each pass asks for as much of what comes
// next: when the first asked for all, memory was idle during the others. GB/s from memory, two threads that read 34 to
// 36 and 58 to 61 (an EPYC (Zen 4) with AVX2 alone), before and now, in turn, medians: 3 rows 16.7 and 25.0, 4 rows
// 16.4 and 23.8, 6 rows 13.4 and 18.6, 8 rows 9.6 and 12.2, 12 rows 7.8 and 9.5, 16 rows 6.5 and 7.5, 24 rows 5.2 and
// 6.6. Not kept: eight rows of one vector (4 to 8 % slower), a panel's part in float32 for all tiles (12 rows 19 %, 168
// rows 2 % slower).
#pragma once

#include "panels.h"

#if defined(FINIAL_PACKS_F32)

namespace finial::FINIAL_ISA {

namespace {

#if !defined(FINIAL_AVX512)

constexpr int64_t PAIRS = 64;  // of inputs at a time: 8 KiB of a panel, 6 of a tile
constexpr int ROWS = 6;

// Few rows have a whole panel's accumulators.
constexpr int vectors_with(int rows) { return rows <= 2 ? PANEL_VECTORS : PANEL_VECTORS / 2; }

// c [M of a tile's rows, PANEL] += `pairs` pairs of a panel times rows `stride` pairs apart; = where they are the
// first. One or two rows, which the panel passes once, ask for what lies further on. More are passed twice: where ASKS,
// a line is asked for with every pair of each pass, the first at `soon`, `step` bytes apart.
template <int M, bool ASKS>
void add_pairs(const uint8_t* FINIAL_RESTRICT w, const Two* FINIAL_RESTRICT x, int64_t stride, int64_t pairs,
               bool first, const uint8_t* soon, int64_t step, float* FINIAL_RESTRICT c) {
  constexpr int N = vectors_with(M);
  const Asked ask = asks(M, {TILE + 1, 0});
  for (int v = 0; v < PANEL_VECTORS; v += N) {
    const uint8_t* from = w + v * W * 4;
    const Two* at = x;
    V acc[M][N];
#pragma GCC unroll 6
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) acc[r][i] = first ? zero() : load(c + r * PANEL + (v + i) * W);
    for (int64_t k = 0; k < pairs; ++k, from += PANEL * 4, at += stride) {
      if (ASKS && N == PANEL_VECTORS) stream(ask, from, PANEL * 4);
      if (ASKS && N < PANEL_VECTORS) stream({Ask::Far, 0}, soon, 64), soon += step;
      add_pair(from, at, 1, acc);
    }
#pragma GCC unroll 6
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) store(c + r * PANEL + (v + i) * W, acc[r][i]);
  }
}

using AddPairs = void (*)(const uint8_t*, const Two*, int64_t, int64_t, bool, const uint8_t*, int64_t, float*);
template <bool ASKS>
constexpr AddPairs ADD_PAIRS[ROWS + 1] = {nullptr,
                                          add_pairs<1, ASKS>,
                                          add_pairs<2, ASKS>,
                                          add_pairs<3, ASKS>,
                                          add_pairs<4, ASKS>,
                                          add_pairs<5, ASKS>,
                                          add_pairs<6, ASKS>};

constexpr int64_t AT_ONCE = 1024;  // bytes that are asked for in one go at most

// c [rows, PANEL] = a panel times a tile's rows. Meanwhile it asks for `ahead`, a part with each turn, or, where that
// is nothing, for the panel's part of the next turn: evenly over the turn's passes, or memory would be idle during the
// others, but for parts so small that they may be asked for at once.
void meet_bf16(int64_t rows, const uint8_t* w, const uint8_t* x, int64_t n_in, float* c, Soon ahead) {
  const int64_t pairs = (n_in + 1) / 2, groups = (rows + ROWS - 1) / ROWS;
  const int64_t part = ((ahead.end - ahead.begin) * PAIRS / pairs + 64) / 64 * 64;
  const Two* at = reinterpret_cast<const Two*>(x);
  for (int64_t k = 0; k < pairs; k += PAIRS, w += PAIRS * PANEL * 4) {
    const int64_t count = pairs - k < PAIRS ? pairs - k : PAIRS;
    const bool other = ahead.begin < ahead.end;
    const uint8_t* soon = other ? ahead.begin : w + PAIRS * PANEL * 4;
    const int64_t bytes = other ? part : count * PANEL * 4, step = bytes / (2 * groups * count);
    const bool evenly = bytes > AT_ONCE;
    if (other) ahead.begin += part;
    if (!evenly) prefetch(soon, bytes);
    const AddPairs* add = evenly ? ADD_PAIRS<true> : ADD_PAIRS<false>;
    for (int64_t g = 0; g < groups; ++g, soon += 2 * step * count) {
      const int64_t row = rows * g / groups, some = rows * (g + 1) / groups - row;
      add[some](w, at + k * rows + row, rows, count, k == 0, soon, step, c + row * PANEL);
    }
  }
}

#endif

void arrange_rows(const float* x, int64_t n_in, int64_t rows, uint8_t* tile) {
  float* to = reinterpret_cast<float*>(tile);
  if (rows == 1) {
    std::memcpy(to, x, static_cast<size_t>(n_in) * sizeof(float));
    if (n_in % 2 != 0) to[n_in] = 0;
    return;
  }
  int64_t k = 0;
  if (rows >= 4)
    for (; k + W <= n_in; k += W, to += W * rows)
      for (int64_t row = 0; row < rows; row += 4) {
        const int64_t first = row + 4 <= rows ? row : rows - 4;
        const float* from = x + first * n_in + k;
        store_four(to + first * 2, rows, load(from), load(from + n_in), load(from + 2 * n_in), load(from + 3 * n_in));
      }
  for (; k + 2 <= n_in; k += 2)
    for (int64_t r = 0; r < rows; ++r, to += 2) std::memcpy(to, x + r * n_in + k, 2 * sizeof(float));
  if (n_in % 2 != 0)
    for (int64_t r = 0; r < rows; ++r, to += 2) to[0] = x[r * n_in + n_in - 1], to[1] = 0;
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
