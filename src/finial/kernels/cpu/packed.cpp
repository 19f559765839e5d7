// Products of rounded activations with packed weights (layouts: packed.h).
//
// y[t, o] = sum_k x[t, k] w[o, k] + bias[o], then + add[t, o], or silu(first) * second. Each output has one chain of
// sums with k ascending, at any number of rows, so a row's result is bit-equal in any company:
//   bf16  acc = acc + w[k] x[k] + w[k + 1] x[k + 1], one instruction for a pair; with float32 rows two fma, k first; in
//         tile registers 32 inputs at a time, even and odd ones apart (tiles.h)
//   int8  acc = fma(float(sum of a block, exact in int32), scale(w) scale(x), acc), block after block
// Against exact arithmetic on the rounded activations an output is off by at most (n_in + 2) 2^-24 sum_k |x w|;
// rounding itself adds 2^-8 |x| per activation for bf16, absmax / 254 * 17/16 of its block for int8 (packed.h).
//
// Few rows: n_out row_bytes from memory, one contiguous stream per thread; 2 n_out n_in flops a row stay below what the
// stream leaves time for up to about 8 rows. Many rows: a group of tiles, whose rounded rows stay in the second-level
// cache, passes by panel after panel (32 outputs, n_in 1024: 64 KiB in bf16), which is read from there for all but the
// first tile; where results will go is asked for meanwhile. bf16: 2 loads of weights and 12 broadcasts for 24
// multiplying instructions. int8: weights of a block stay in registers, 16 multiplying instructions of 18 that share
// their two ports. What a decode step reads of the bandwidth is in docs/cpu.md. Measured on EPYC Genoa against
// peak_flops of the same run: 512 rows on one core, n_in x n_out, of 236 GFLOP/s in bf16 and 473 in int8:
//   1024 x 6144  bf16 222, q8_0 380, q4_0 384      1024 x 1024  bf16 228, q8_0 385, q4_0 386
//   3072 x 1024  bf16 229, q8_0 390, q4_0 390
// and rounding their rows takes 1.7 to 2.7 % (bf16) and 3.4 to 5 % (int8) of the time of 1024 outputs.
#include "packed.h"

#include "finish.h"
#include "packed_bf16.h"
#include "packed_bf16_tiles.h"
#include "packed_f32.h"
#include "packed_int8_pairs.h"
#include "packed_int8_quads.h"
#include "packed_int8_tiles.h"
#include "packed_k.h"
#include "panels_bf16.h"
#include "rows_bf16_tiles.h"

namespace finial::FINIAL_ISA {

Rounding rounding(Format format) {
#if defined(FINIAL_PACKS_BF16)
  if (format == Format::BF16) return Rounding::BF16;
#elif defined(FINIAL_PACKS_F32)
  if (format == Format::BF16) return Rounding::F32;
#endif
#if defined(FINIAL_PACKS_INT8)
  if (format == Format::Q8_0 || format == Format::Q4_0) return Rounding::INT8;
  if (format == Format::Q4_K || format == Format::Q5_K || format == Format::Q6_K) return Rounding::INT8;
#endif
  (void)format;
  return Rounding::None;
}

namespace {

constexpr int CHAINS = W == 16 ? 16 : 10;  // enough to hide the latency of a multiply-add, few enough for the registers

// 64 rounds over independent chains; `step` adds one product to one of them.
template <class T, class F>
FINIAL_INLINE T chains(int64_t rounds, T start, F step, T (*together)(T, T)) {
  T acc[CHAINS];
#pragma GCC unroll 16
  for (int c = 0; c < CHAINS; ++c) acc[c] = start;
  for (int64_t i = 0; i < rounds * 64; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; ++c) {
      T a = acc[c];
      keep_in_register(a);  // GCC copies sums to and fro otherwise
      acc[c] = step(a);
    }
  T all = acc[0];
#pragma GCC unroll 16
  for (int i = 1; i < CHAINS; ++i) all = together(all, acc[i]);
  return all;
}

#if defined(FINIAL_TILES)
int64_t peak_of_tiles(bool bf16, int64_t rounds) {
  const Tiles registers(TILE, 16);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  tile_zero<4>(), tile_zero<5>(), tile_zero<6>(), tile_zero<7>();
  for (int64_t i = 0; i < 16 * rounds; ++i) {
    if (bf16)
      tile_dot_bf16<0, 4, 6>(), tile_dot_bf16<1, 4, 7>(), tile_dot_bf16<2, 5, 6>(), tile_dot_bf16<3, 5, 7>();
    else
      tile_dot_int8<0, 4, 6>(), tile_dot_int8<1, 4, 7>(), tile_dot_int8<2, 5, 6>(), tile_dot_int8<3, 5, 7>();
  }
  release_tiles();
  return 16 * rounds * 4 * TILE * 16 * 16 * (bf16 ? 4 : 8);
}
#endif

}  // namespace

void rest() {
#if defined(FINIAL_TILES)
  release_tiles();
#endif
}

int64_t peak(Rounding kind, int64_t rounds, float* sink) {
#if defined(FINIAL_TILES)
  if (kind == Rounding::BF16 || kind == Rounding::INT8) return peak_of_tiles(kind == Rounding::BF16, rounds);
#endif
  const int64_t steps = rounds * 64 * CHAINS;
  V one = set1(*sink + 1.0f), half = set1(*sink + 0.5f);
#if defined(FINIAL_PACKS_BF16) && !defined(FINIAL_TILES)
  if (kind == Rounding::BF16) {
    const V y = chains(rounds, zero(), [&](V a) { return dot_bf16(a, load_i(&one), load_i(&half)); }, add);
    *sink = sum(y);
    return steps * W * 4;
  }
#endif
#if defined(FINIAL_PACKS_INT8) && !defined(FINIAL_TILES)
  if (kind == Rounding::INT8) {
    // Of the sum itself, or a product apart from its addition would be computed once for all rounds.
    const I x = load_i(&one);
#if defined(FINIAL_AVX2)
    const I s = chains(rounds, x, [&](I a) { return multiply_pairs(a, x, a); }, add_i);
#else
    const I s = chains(rounds, x, [&](I a) { return dot_q4(a, x, a); }, add_i);
#endif
    *sink = sum(to_floats(s));
    return steps * W * 8;
  }
#endif
  if (kind != Rounding::None && kind != Rounding::F32) return 0;
  const V y = chains(rounds, zero(), [&](V a) { return fma(a, half, one); }, add);
  *sink = sum(y);
  return steps * W * 2;
}

#if !defined(FINIAL_PACKS_INT8)

void pack(const Linear&, uint8_t*, int64_t, int64_t) {}
void unpack(const Linear&, int64_t, float*) {}
void round_tile(Rounding, const float*, int64_t, int64_t, uint8_t*) {}
void multiply(const Product&, int64_t, int64_t) {}

#else

void round_tile(Rounding rounding, const float* x, int64_t n_in, int64_t rows, uint8_t* tile) {
#if defined(FINIAL_PACKS_BF16)
  if (rounding == Rounding::BF16) return round_bf16(x, n_in, rows, tile);
#endif
#if defined(FINIAL_PACKS_F32)
  if (rounding == Rounding::F32) return arrange_rows(x, n_in, rows, tile);
#endif
  if (rounding == Rounding::INT8) round_int8(x, n_in, rows, tile);
}

namespace {

// c [rows of the product's tiles, PANEL] = panel `panel` of a matrix times them.
FINIAL_INLINE void meet(const Linear& l, int64_t panel, const Product& p, const Target& target, float* c) {
  const uint8_t* w = l.packed + panel * l.stride;
  switch (l.format) {
    case Format::Q8_0:
      return tiles_int8<Q8>(w, p.x, p.rows, p.begin, p.end, l.n_in / 32, target, c);
    case Format::Q4_0:
      return tiles_int8<Q4>(w, p.x, p.rows, p.begin, p.end, l.n_in / 32, target, c);
    default:
      return tiles_k(l, w, p, target, c);
  }
}

#if defined(FINIAL_BF16_PANELS) && !defined(FINIAL_TILES)

// Every tile of rows is finished as soon as it has met its panel, or both: its results leave while the next are
// computed.
void multiply_bf16(const Product& p, int64_t begin, int64_t end) {
  alignas(64) float first[TILE * PANEL], second[TILE * PANEL];
  const int64_t n_in = p.first->n_in, row = rounded_bytes(rounding(Format::BF16), n_in),
                panels = (p.first->n_out + PANEL - 1) / PANEL;
  const int64_t count = p.end - p.begin,
                bytes = p.second != nullptr ? p.first->stride : panel_bytes(Format::BF16, n_in);
  for (int64_t panel = begin; panel < end; ++panel) {
    const uint8_t* w = p.first->packed + panel * p.first->stride;
    const uint8_t* next = w + p.first->stride;
    const bool more = count > 1 && panel + 1 < panels;
    for (int64_t i = 0; i < count; ++i) {
      const Tile t = tile_of(p.rows, p.begin + i);
      const uint8_t* x = p.x + t.first * row;
      if (p.rows > TILE && p.as == Rounding::None)
        expect({p.y + t.first * p.first->n_out + panel * PANEL, p.first->n_out}, 0, t.count);
      const auto part = [&](int64_t at, int64_t of) {
        return more ? Soon{next + bytes * at / of / 64 * 64, next + bytes * (at + 1) / of / 64 * 64}
                    : Soon{nullptr, nullptr};
      };
      if (p.second == nullptr) {
        meet_bf16(t.count, w, x, n_in, first, part(i, count));
      } else {
        meet_bf16(t.count, w, x, n_in, first, part(2 * i, 2 * count));
        meet_bf16(t.count, p.second->packed + panel * p.second->stride, x, n_in, second, part(2 * i + 1, 2 * count));
      }
      finish(p, panel, t, 0, t.count, first, second);
    }
  }
}

#endif

}  // namespace

void pack(const Linear& l, uint8_t* out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    switch (l.format) {
#if defined(FINIAL_BF16_PANELS)
      case Format::BF16:
        pack_bf16(l, out + i * l.stride, i * PANEL);
        break;
#endif
      case Format::Q8_0:
        pack_blocks<Q8>(l, out + i * l.stride, i * PANEL, BIAS_Q8);
        break;
      case Format::Q4_0:
        pack_blocks<Q4>(l, out + i * l.stride, i * PANEL, 0);
        break;
      default:
        pack_k(l, out + i * l.stride, i * PANEL);
        break;
    }
  }
}

void unpack(const Linear& l, int64_t row, float* out) {
  const uint8_t* panel = l.packed + row / PANEL * l.stride;
  switch (l.format) {
#if defined(FINIAL_BF16_PANELS)
    case Format::BF16:
      return unpack_bf16(panel, row % PANEL, l.n_in, out);
#endif
    case Format::Q8_0:
      return unpack_blocks<Q8>(l.format, panel, row % PANEL, l.n_in, BIAS_Q8, out);
    case Format::Q4_0:
      return unpack_blocks<Q4>(l.format, panel, row % PANEL, l.n_in, 0, out);
    default:
      return;
  }
}

void multiply(const Product& p, int64_t begin, int64_t end) {
#if defined(FINIAL_BF16_PANELS)
  if (p.first->format == Format::BF16) return multiply_bf16(p, begin, end);
#endif
#if defined(FINIAL_TILES)
  const Format format = p.first->format;
  if (p.second == nullptr || p.second->format == format) {
    const auto from = [&](int64_t rows, Format one) { return p.rows >= rows && format == one; };
    if (from(ByBlocks<Q8>::FROM, Format::Q8_0)) return multiply_tiles<ByBlocks<Q8>>(p, begin, end);
    if (from(ByBlocks<Q4>::FROM, Format::Q4_0)) return multiply_tiles<ByBlocks<Q4>>(p, begin, end);
    if (from(K_TILES, Format::Q4_K) || from(K_TILES, Format::Q5_K)) return multiply_k(p, begin, end);
  }
#endif
  alignas(64) float first[GROUP * TILE * PANEL], second[GROUP * TILE * PANEL];
  const int64_t row = tile_of(p.rows, p.begin).first;
  for (int64_t panel = begin; panel < end; ++panel) {
    const Target target{p.as == Rounding::None ? p.y + row * p.first->n_out + panel * PANEL : nullptr, p.first->n_out};
    meet(*p.first, panel, p, target, first);
    if (p.second != nullptr) meet(*p.second, panel, p, target, second);
    for (int64_t i = p.begin; i < p.end; ++i) {
      const Tile t = tile_of(p.rows, i);
      finish(p, panel, t, 0, t.count, first + (t.first - row) * PANEL, second + (t.first - row) * PANEL);
    }
  }
}

#endif

}  // namespace finial::FINIAL_ISA
