// bf16 matrices to panels (layout: packed.h) and back, a row at a time. Included by packed.cpp.
#pragma once

#include "panels.h"
#include "turn.h"

#if defined(FINIAL_BF16_PANELS)

namespace finial::FINIAL_ISA {

namespace {

void pack_bf16(const Linear& l, uint8_t* out, int64_t first) {
  constexpr int64_t STEP = 16;  // pairs: a cache line of each row
  const int64_t whole = l.n_in / 2;
  const uint8_t* rows = l.weight + first * l.row_bytes;
  for (int64_t k = 0; k < whole; k += STEP) {
    const int64_t count = whole - k < STEP ? whole - k : STEP;
    for (int64_t o = 0; o < PANEL && first + o < l.n_out; ++o) {
      const uint8_t* from = rows + o * l.row_bytes + k * 4;
      uint8_t* to = out + (k * PANEL + o) * 4;
      if (count == STEP && first + o + TURN <= l.n_out && o + TURN <= PANEL) {
        for (int64_t i = 0; i < STEP; i += TURN) {
          for (int64_t r = 0; r < TURN; ++r) prefetch(from + r * l.row_bytes + i * 4 + 256, 64);
          turn(from + i * 4, l.row_bytes, to + i * PANEL * 4);
        }
        o += TURN - 1;
        continue;
      }
      for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * PANEL * 4, from + i * 4, 4);
    }
  }
  if (l.n_in % 2 != 0)
    for (int64_t o = 0; o < PANEL && first + o < l.n_out; ++o)
      std::memcpy(out + (whole * PANEL + o) * 4, rows + o * l.row_bytes + whole * 4, 2);
}

void unpack_bf16(const uint8_t* panel, int64_t o, int64_t n_in, float* out) {
  for (int64_t k = 0; k < n_in; ++k) out[k] = bf16_to_float(panel + (k / 2 * PANEL + o) * 4 + k % 2 * 2);
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
