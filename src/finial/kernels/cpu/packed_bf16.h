// bf16 panels: how a tile of rounded rows meets one, how rows are rounded and matrices packed. Included by packed.cpp.
#pragma once

#include "panels.h"

#if defined(FINIAL_PACKS_BF16)

namespace finial::FINIAL_ISA {

namespace {

// c [M, PANEL] = a panel times a tile's rows. Meanwhile it asks for `ahead`, a little every AT_ONCE pairs.
template <int M>
void tile_bf16(const uint8_t* FINIAL_RESTRICT w, const uint8_t* FINIAL_RESTRICT x, int64_t n_in,
               float* FINIAL_RESTRICT c, Soon ahead) {
  V acc[M][PANEL_VECTORS];
  for (int r = 0; r < M; ++r)
    for (int v = 0; v < PANEL_VECTORS; ++v) acc[r][v] = zero();
  const auto pair = [&] {
    I weight[PANEL_VECTORS];
    if (M >= 6) prefetch(w + AHEAD / 2, PANEL * 4);
    for (int v = 0; v < PANEL_VECTORS; ++v) weight[v] = load_i(w + v * W * 4);
    for (int r = 0; r < M; ++r) {
      const I two = broadcast(x + 4 * r);
      for (int v = 0; v < PANEL_VECTORS; ++v) acc[r][v] = dot_bf16(acc[r][v], weight[v], two);
    }
    w += PANEL * 4, x += 4 * M;
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

using TileBF16 = void (*)(const uint8_t*, const uint8_t*, int64_t, float*, Soon);
constexpr TileBF16 TILES_BF16[TILE + 1] = {nullptr,       tile_bf16<1>,  tile_bf16<2>, tile_bf16<3>, tile_bf16<4>,
                                           tile_bf16<5>,  tile_bf16<6>,  tile_bf16<7>, tile_bf16<8>, tile_bf16<9>,
                                           tile_bf16<10>, tile_bf16<11>, tile_bf16<12>};

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

// 16 pairs of 16 rows, `row_bytes` apart, turned so that a pair's rows are neighbours, PANEL pairs apart.
FINIAL_INLINE void turn_16(const uint8_t* from, int64_t row_bytes, uint8_t* to) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) {
    a[i] = _mm512_loadu_si512(from + i * row_bytes);
    _mm_prefetch(reinterpret_cast<const char*>(from + i * row_bytes + 256), _MM_HINT_T0);
  }
  for (int i = 0; i < 16; i += 2)
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  for (int i = 0; i < 16; i += 4)  // a[i + q]: of four rows, pairs q, 4 + q, 8 + q, 12 + q
    for (int h = 0; h < 2; ++h) {
      a[i + 2 * h] = _mm512_unpacklo_epi64(b[i + h], b[i + h + 2]);
      a[i + 2 * h + 1] = _mm512_unpackhi_epi64(b[i + h], b[i + h + 2]);
    }
  for (int q = 0; q < 4; ++q) {
    const __m512i x = _mm512_shuffle_i32x4(a[q], a[4 + q], 0x44), y = _mm512_shuffle_i32x4(a[q], a[4 + q], 0xee),
                  z = _mm512_shuffle_i32x4(a[8 + q], a[12 + q], 0x44),
                  w = _mm512_shuffle_i32x4(a[8 + q], a[12 + q], 0xee);
    const __m512i turned[4] = {_mm512_shuffle_i32x4(x, z, 0x88), _mm512_shuffle_i32x4(x, z, 0xdd),
                               _mm512_shuffle_i32x4(y, w, 0x88), _mm512_shuffle_i32x4(y, w, 0xdd)};
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + (4 * i + q) * PANEL * 4, turned[i]);
  }
}

void pack_bf16(const Linear& l, uint8_t* out, int64_t first) {
  constexpr int64_t STEP = 16;  // pairs: a cache line of each row
  const int64_t whole = l.n_in / 2;
  const uint8_t* rows = l.weight + first * l.row_bytes;
  for (int64_t k = 0; k < whole; k += STEP) {
    const int64_t count = whole - k < STEP ? whole - k : STEP;
    for (int64_t o = 0; o < PANEL && first + o < l.n_out; ++o) {
      const uint8_t* from = rows + o * l.row_bytes + k * 4;
      uint8_t* to = out + (k * PANEL + o) * 4;
      if (count == STEP && first + o + 16 <= l.n_out && o + 16 <= PANEL) {
        turn_16(from, l.row_bytes, to);
        o += 15;
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
