// What a product makes of a panel's sums: their bias, a gate, an addition; or the next product's rounded rows. Included
// by packed.cpp and packed_k.cpp.
#pragma once

#include "panels.h"
#include "vector_exp.h"

#if defined(FINIAL_PACKS_INT8)

namespace finial::FINIAL_ISA {

// A tile's rows as the next product takes them (packed.cpp).
void round_tile(Rounding rounding, const float* x, int64_t n_in, int64_t rows, uint8_t* tile);

namespace {

FINIAL_INLINE V get(const float* p, int64_t n) { return n >= W ? load(p) : load_n(p, n); }
FINIAL_INLINE void put(float* p, V a, int64_t n) { n >= W ? store(p, a) : store_n(p, a, n); }

// Results of rows, `apart` floats from one row's sums to the next, to y [rows, stride]; `row` is the first one's number
// in what is added.
FINIAL_INLINE void finish_rows(const Product& p, int64_t panel, int64_t row, int64_t rows, const float* first,
                               const float* second, int64_t apart, float* y, int64_t stride) {
  const int64_t n_out = p.first->n_out, o = panel * PANEL, count = n_out - o < PANEL ? n_out - o : PANEL;
  const float *b = p.first->bias, *b2 = p.second != nullptr ? p.second->bias : nullptr;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < count; i += W) {
      const int64_t n = count - i;
      V a = load(first + r * apart + i);
      if (b != nullptr) a = add(a, get(b + o + i, n));
      if (p.second != nullptr) {
        V up = load(second + r * apart + i);
        if (b2 != nullptr) up = add(up, get(b2 + o + i, n));
        a = gated(a, up);
      }
      if (p.add != nullptr) a = add(get(p.add + (row + r) * n_out + o + i, n), a);
      put(y + r * stride + i, a, n);
    }
}

// A tile's sums, or of those rows [from, from + rows) where rounded rows are no neighbours' (Rounding::INT8, and BF16
// of tile registers), to where the product's results go.
void finish(const Product& p, int64_t panel, const Tile& tile, int64_t from, int64_t rows, const float* first,
            const float* second, int64_t apart = PANEL) {
  const int64_t row = tile.first + from, n_out = p.first->n_out;
  if (p.as == Rounding::None)
    return finish_rows(p, panel, row, rows, first, second, apart, p.y + row * n_out + panel * PANEL, n_out);
  alignas(64) float results[TILE * PANEL];
  finish_rows(p, panel, row, rows, first, second, apart, results, PANEL);
  const int64_t each = rounded_bytes(p.as, PANEL);
  uint8_t* y = reinterpret_cast<uint8_t*>(p.y) + tile.first * rounded_bytes(p.as, n_out);
  round_tile(p.as, results, PANEL, rows, y + (panel * tile.count + from) * each);
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
