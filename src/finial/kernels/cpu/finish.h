// What a product makes of a panel's sums: their bias, a gate, an addition. Included by packed.cpp.
#pragma once

#include "panels.h"
#include "vector_exp.h"

#if defined(FINIAL_PACKS_INT8)

namespace finial::FINIAL_ISA {

namespace {

FINIAL_INLINE V get(const float* p, int64_t n) { return n >= W ? load(p) : load_n(p, n); }
FINIAL_INLINE void put(float* p, V a, int64_t n) { n >= W ? store(p, a) : store_n(p, a, n); }

// c with its bias into the rows of y that the tile covers.
void finish(const Product& p, int64_t panel, int64_t row, int64_t rows, const float* first, const float* second) {
  const int64_t n_out = p.first->n_out, o = panel * PANEL, count = n_out - o < PANEL ? n_out - o : PANEL;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * n_out + o;
    for (int64_t i = 0; i < count; i += W) {
      const int64_t n = count - i;
      const float *b = p.first->bias, *b2 = p.second != nullptr ? p.second->bias : nullptr;
      V a = load(first + r * PANEL + i);
      if (b != nullptr) a = add(a, get(b + o + i, n));
      if (p.second != nullptr) {
        V up = load(second + r * PANEL + i);
        if (b2 != nullptr) up = add(up, get(b2 + o + i, n));
        a = gated(a, up);
      }
      if (p.add != nullptr) a = add(get(p.add + at + i, n), a);
      put(p.y + at + i, a, n);
    }
  }
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
