// Packed K-quants: q4_k, q5_k and q6_k matrices, blocks of 256 inputs in int8 products.
//
// A panel is [n_in / 256] blocks, each as large as the file's blocks of 32 outputs:
//   q4_k  4608 bytes: head, then 4 pairs of groups of 32 inputs, each bytes [8][PANEL][4]: low nibbles are inputs
//         4j..4j+3 of the first group, high nibbles of the second
//   q5_k  5632 bytes: head, then 4 pairs, each bytes [2][PANEL][4], whose bit j is the fifth bit of inputs 4j..4j+3 of
//         the first and the second group, and the nibbles of q4_k
//   q6_k  6720 bytes: f16 d [PANEL], then 8 groups of 32 inputs: int8 scales [2][PANEL] and, for 16 inputs each, two
//         sets of six-bit levels [3][PANEL][4]
// head: f16 d and f16 dmin [PANEL] each, one set of six-bit levels [3][4][PANEL]: level t of plane 0 and 1 is the scale
// of group t and 4 + t, of plane 2 and 3 the minimum of these. A set of six-bit levels keeps four planes in three: the
// low six bits of a byte are planes 0, 1, 2; their top bits, lowest first, are plane 3.
//
// Everything lies in the order in which it is read: with q6_k's scales in front of the block, 512 bytes beside the
// levels, one thread read 13 GB/s from memory instead of 31 (of 32.5), because the prefetcher saw two streams.
#pragma once

#include "panels.h"

namespace finial::FINIAL_ISA {

// Outputs [first, first + PANEL) into their panel, which is zero.
void pack_k(const Linear& l, uint8_t* out, int64_t first);

// c [rows of the product's tiles, PANEL] = a panel times them.
void tiles_k(const Linear& l, const uint8_t* w, const Product& p, const Target& target, float* c);

#if defined(FINIAL_TILES)
// Panels [begin, end) of a product of q4_k or q5_k, or of two of them, with many rows: from K_TILES on this is faster
// than tiles_k (17 rows take 1.2 times as long, 24 rows 0.92, 512 rows 0.64).
constexpr int64_t K_TILES = 24;
void multiply_k(const Product& p, int64_t begin, int64_t end);
#endif

}  // namespace finial::FINIAL_ISA
