// Packed weights: a matrix rearranged once into the order in which products read it.
//
// A panel is PANEL outputs over all of n_in; panels follow each other, the last one filled up with zeros, or take turns
// with those of the matrix that theirs gates (Linear::stride). Within it:
//   bf16  [n_in / 2][PANEL][2]: a pair of inputs of 32 outputs is 128 bytes; zeros up to a multiple of 32 inputs
//   q8_0  [n_in / 32] blocks of 1088 bytes: f16 scales [PANEL], then bytes [8][PANEL][4], four inputs each
//   q4_0  [n_in / 32] blocks of  576 bytes: f16 scales [PANEL], then bytes [4][PANEL][4], low nibbles inputs 4j..4j+3,
//         high nibbles inputs 16+4j..16+4j+3, as in the file
//   q4_k, q5_k, q6_k: see packed_k.h
// so a packed matrix is as large as the stored one, and a thread reads its share as one contiguous run.
//
// Activations are rounded to what the multiplying instruction takes, once for all products that share them:
//   f32   not at all; [pair of inputs][row of the tile][2]
//   bf16  nearest even; likewise, or for tile registers [32 inputs][row of the tile][32], zeros behind the last input
//   int8  blocks of 32 inputs, nearest even; the scale is absmax / 127 rounded up to five significant bits, so that its
//         product with an f16 is exact; from 2^110 on an input counts as infinite; [block][row of the tile] of
//         Int8Block
// in tiles of at most Blocking::tile rows, as even as possible: tile i of n holds rows [rows i / n, rows (i + 1) / n).
#pragma once

#include "kernels.h"

namespace finial {

struct Int8Block {
  int8_t q[32];
  float scale;
  int32_t offset;     // -8 sum(q): what a nibble's bias of 8 adds, taken back
  int32_t offset_q8;  // -128 sum(q): the same for packed bytes of q8_0, where they are biased
  int32_t first;      // -8 sum(q) of the first 16
  float minimum;      // -scale sum(q): what a weight's minimum of -1 adds
  float magic;        // 1.5 2^(23 + e), e the exponent of the scale: n added to its bits is it + n 2^e, |n| < 2^22
};

// Behind rounded rows: tile registers take as many rows of every tile as the largest one has, of int8 up to a register.
constexpr int64_t SPARE_BYTES = 1024;

inline int64_t tiles(int64_t rows, const Blocking& b) { return (rows + b.tile - 1) / b.tile; }
inline int64_t panels(const Linear& l) { return (l.n_out + PANEL - 1) / PANEL; }

// Bytes of a row of rounded activations.
inline int64_t rounded_bytes(Rounding rounding, int64_t n_in) {
  switch (rounding) {
    case Rounding::BF16:
      return (n_in + 31) / 32 * 64;
    case Rounding::INT8:
      return n_in / 32 * static_cast<int64_t>(sizeof(Int8Block));
    case Rounding::F32:
      return (n_in + 1) / 2 * 8;
    case Rounding::None:
      break;
  }
  return n_in * 4;
}

// Bytes of a panel; the formats that no kernel packs give nothing.
inline int64_t panel_bytes(Format format, int64_t n_in) {
  switch (format) {
    case Format::BF16:
      return (n_in + 31) / 32 * PANEL * 64;
    case Format::Q8_0:
      return n_in / 32 * PANEL * 34;
    case Format::Q4_0:
      return n_in / 32 * PANEL * 18;
    case Format::Q4_K:
      return n_in / 256 * PANEL * 144;
    case Format::Q5_K:
      return n_in / 256 * PANEL * 176;
    case Format::Q6_K:
      return n_in / 256 * PANEL * 210;
    default:
      return 0;
  }
}

}  // namespace finial
