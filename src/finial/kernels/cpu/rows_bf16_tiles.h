// Rows rounded to bf16 as tile registers take them: [32 inputs][row of the tile][32]. Included by packed.cpp.
#pragma once

#include "panels.h"

#if defined(FINIAL_TILES)

namespace finial::FINIAL_ISA {

namespace {

constexpr int64_t DEPTH = 32, DEPTH_BYTES = DEPTH / 2 * PANEL * 4, LINE_BYTES = 64;

void round_bf16(const float* x, int64_t n_in, int64_t rows, uint8_t* tile) {
  for (int64_t row = 0; row < rows; ++row, x += n_in) {
    uint8_t* to = tile + row * LINE_BYTES;
    int64_t k = 0;
    for (; k + DEPTH <= n_in; k += DEPTH, to += rows * LINE_BYTES)
      store_i(to, bf16_pairs(load(x + k), load(x + k + W)));
    if (k < n_in) {
      const int64_t n = n_in - k;
      store_i(to, bf16_pairs(n < W ? load_n(x + k, n) : load(x + k), n > W ? load_n(x + k + W, n - W) : zero()));
    }
  }
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
