// What a block's weight scales become with the scale of a row of rounded activations: the factor of the block's sums.
// Included by packed_int8_quads.h and packed_k.cpp.
//
// The product of both is exact (Int8Block), so any way to it gives the same bits. Where AMD's processors multiply bytes
// they multiply floats too: two of some 20 cycles of a block and row. Additions and powers of two run beside them and
// cost nothing. So, for many rows: a row's scale has five significant bits and is 2^e (1 + a / 4 + b / 16); kept are
// the weights' scales times each 1 + a / 4 and times each b / 16, which takes additions and 16 stores a block, and a
// row adds two of them and scales by 2^e. GFLOP/s of 512 rows on one core of EPYC Genoa, 1024 inputs and outputs, of
// 473 that the instruction alone reaches: so, and multiplied by each row (q8_0 and q4_0: with a table of all sixteen
// products, twice the stores)
//   q8_0 385, 379   q4_0 384, 377   q4_k 340, 318   q5_k 334, 310   q6_k 305, 289
// 24 rows of q4_0 369, 360; of eight 345, 360: fewer than DIGITS_ROWS multiply. Not run on EPYC Turin yet.
#pragma once

#include "panels.h"

// Where additions of floats cost nothing beside multiplications of bytes.
#if defined(FINIAL_ISA_avx512)
#define FINIAL_INT8_DIGITS 1
#endif

#if defined(FINIAL_PACKS_INT8)

namespace finial::FINIAL_ISA {

namespace {

// Multiplied for each row.
struct Multiplied {
  using Held = Multiplied;  // in registers
  struct Row {
    V scale;
  };
  V scale[PANEL_VECTORS];

  explicit Multiplied(const V (&scales)[PANEL_VECTORS]) {
    for (int v = 0; v < PANEL_VECTORS; ++v) scale[v] = scales[v];
  }
  FINIAL_INLINE Row row(const Multiplied&, const Int8Block& x) { return {set1(x.scale)}; }
  FINIAL_INLINE V product(const Multiplied& s, const Row& row, int v) { return mul(s.scale[v], row.scale); }
};

#if defined(FINIAL_INT8_DIGITS)

constexpr int64_t DIGITS_ROWS = 24;

// Added up for each row.
struct Digits {
  using Held = const Digits&;
  struct Row {
    const float *first, *second;
    V power;
  };
  alignas(64) float first[4 * PANEL], second[4 * PANEL];  // [digit][output]

  explicit Digits(const V (&scale)[PANEL_VECTORS]) {
    for (int v = 0; v < PANEL_VECTORS; ++v) {
      const V one = scale[v], quarter = scale_by_power(one, set1(-2)), half = add(quarter, quarter);
      const V sixteenth = scale_by_power(one, set1(-4)), eighth = add(sixteenth, sixteenth);
      float *a = first + v * W, *b = second + v * W;
      store(a, one), store(a + PANEL, add(one, quarter));
      store(a + 2 * PANEL, add(one, half)), store(a + 3 * PANEL, add(add(one, half), quarter));
      store(b, zero()), store(b + PANEL, sixteenth);
      store(b + 2 * PANEL, eighth), store(b + 3 * PANEL, add(eighth, sixteenth));
    }
  }
  FINIAL_INLINE Row row(const Digits& d, const Int8Block& x) {
    uint32_t bits;
    std::memcpy(&bits, &x.scale, 4);
    return {d.first + (bits >> 21 & 3) * PANEL, d.second + (bits >> 19 & 3) * PANEL, exponent(set1(x.scale))};
  }
  FINIAL_INLINE V product(const Digits&, const Row& row, int v) {
    return scale_by_power(add(load(row.first + v * W), load(row.second + v * W)), row.power);
  }
};

#endif

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
