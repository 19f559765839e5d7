// What a block's weight scales become with the scale of a row of rounded activations: the factor of the block's sums.
// Included by packed_int8_quads.h and packed_k.cpp.
//
// The product of both is exact (Int8Block), so any way to it gives the same bits. Where AMD's processors multiply bytes
// they multiply floats too: two of some 20 operations of a block and row. Additions run beside them and cost nothing.
// So, for many rows: a row's scale has five significant bits and is 2^e (1 + i / 16); the weights' scales times each
// 1 + i / 16 are kept in a table, and 2^e comes with the sum's conversion: a sum of integers that begins with the bits
// of 1.5 2^(23 + e) is a float, less that the sum times 2^e, exactly.
//
// GFLOP/s of 256 rows on one core of EPYC Turin, 1024 inputs, 4096 outputs and 2048 inputs, 1024 outputs, of 1,100 that
// the instruction alone reaches: so 823 and 832 in q8_0, multiplied by each row 769 and 816; added up of two tables of
// four for each row, as was best on EPYC Genoa, 746 and 792, that with these conversions 782 and 785: what counts there
// is loads. Making a table takes 32 stores a block: 32 rows do not pay for it, fewer than TABLE_ROWS multiply. On EPYC
// Genoa, 512 rows of 1024 inputs, of 473: a table with conversions by instruction 379, multiplied about as much, two
// tables of four 385; this has not run there yet.
#pragma once

#include "panels.h"

// Where additions of floats cost nothing beside multiplications of bytes.
#if defined(FINIAL_ISA_avx512)
#define FINIAL_INT8_TABLE 1
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
  FINIAL_INLINE I start(const Int8Block&) { return start_q4(0); }
  FINIAL_INLINE Row row(const Multiplied&, const Int8Block& x) { return {set1(x.scale)}; }
  FINIAL_INLINE V floats(const Row&, I sum) { return to_floats(sum); }
  FINIAL_INLINE V product(const Multiplied& s, const Row& row, int v) { return mul(s.scale[v], row.scale); }
};

#if defined(FINIAL_INT8_TABLE)

constexpr int64_t TABLE_ROWS = 48;

// Looked up for each row.
struct Table {
  using Held = const Table&;
  struct Row {
    const float* products;
    V magic;
  };
  alignas(64) float products[16 * PANEL];  // [sixteenths of a scale above 1][output]

  explicit Table(const V (&scale)[PANEL_VECTORS]) {
    for (int v = 0; v < PANEL_VECTORS; ++v) {
      const V sixteenth = scale_by_power(scale[v], set1(-4));
      V product = scale[v];
      for (int i = 0; i < 16; ++i, product = add(product, sixteenth)) store(products + i * PANEL + v * W, product);
    }
  }
  FINIAL_INLINE I start(const Int8Block& x) { return broadcast(&x.magic); }
  FINIAL_INLINE Row row(const Table& t, const Int8Block& x) {
    uint32_t bits;
    std::memcpy(&bits, &x.scale, 4);
    return {t.products + (bits >> 19 & 15) * PANEL, set1(x.magic)};
  }
  FINIAL_INLINE V floats(const Row& row, I sum) { return sub(of_bits(sum), row.magic); }
  FINIAL_INLINE V product(const Table&, const Row& row, int v) { return load(row.products + v * W); }
};

#endif

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
