// Products of rounded activations with packed weights (layouts: packed.h).
//
// y[t, o] = sum_k x[t, k] w[o, k] + bias[o], then + add[t, o], or silu(first) * second. Each output has one chain of
// sums with k ascending, at any number of rows, so a row's result is bit-equal in any company:
//   bf16  acc = acc + w[k] x[k] + w[k + 1] x[k + 1], one instruction for a pair
//   int8  acc = fma(float(sum of a block, exact in int32), scale(w) scale(x), acc), block after block
// Against exact arithmetic on the rounded activations an output is off by at most (n_in + 2) 2^-24 sum_k |x w|;
// rounding itself adds 2^-8 |x| per activation for bf16, absmax / 254 of its block for int8 (and an ulp of the scale).
//
// Few rows: n_out row_bytes from memory, one contiguous stream per thread; 2 n_out n_in flops a row stay below what the
// stream leaves time for up to about 8 rows. Many rows: a panel (32 outputs, n_in 1024: 64 KiB in bf16) stays in the
// second-level cache while all rows pass by in tiles of TILE. bf16: 2 loads of weights and 12 broadcasts for 24
// multiplying instructions. int8: weights of a block stay in registers, 8 multiplying instructions of 11 in all.
// Measured on 2 cores of EPYC Genoa, bf16, Qwen3-0.6B's shape, against read_bandwidth and peak_flops of the same run: a
// decode step at depth 32 reads 96 to 97 % of the bandwidth at its best (77 to 88 % median beside other work); 512 rows
// of one thread reach 228 of 236 GFLOP/s in bf16, 359 of 473 in int8 (q8_0 and q4_0 alike).
#include "packed.h"

#include "packed_k.h"
#include "vector_exp.h"
#include "weights.h"

namespace finial::FINIAL_ISA {

Rounding rounding(Format format) {
#if defined(FINIAL_PACKS_BF16)
  if (format == Format::BF16) return Rounding::BF16;
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
  for (T& a : acc) a = start;
  for (int64_t i = 0; i < rounds * 64; ++i)
    for (T& a : acc) a = step(a);
  T all = acc[0];
  for (int i = 1; i < CHAINS; ++i) all = together(all, acc[i]);
  return all;
}

}  // namespace

int64_t peak(Rounding kind, int64_t rounds, float* sink) {
  const int64_t steps = rounds * 64 * CHAINS;
  V one = set1(*sink + 1.0f), half = set1(*sink + 0.5f);
#if defined(FINIAL_PACKS_BF16)
  if (kind == Rounding::BF16) {
    const V y = chains(rounds, zero(), [&](V a) { return dot_bf16(a, load_i(&one), load_i(&half)); }, add);
    *sink = sum(y);
    return steps * W * 4;
  }
#endif
#if defined(FINIAL_PACKS_INT8)
  if (kind == Rounding::INT8) {
    const I x = load_i(&one), y = load_i(&half);
    const I s = chains(rounds, x, [&](I a) { return dot_q4(a, x, y); }, add_i);
    *sink = sum(to_floats(s));
    return steps * W * 8;
  }
#endif
  if (kind != Rounding::None) return 0;
  const V y = chains(rounds, zero(), [&](V a) { return fma(a, half, one); }, add);
  *sink = sum(y);
  return steps * W * 2;
}

#if !defined(FINIAL_PACKS_INT8)

void pack(const Linear&, uint8_t*, int64_t, int64_t) {}
void round_row(Rounding, const float*, int64_t, int64_t, int64_t, uint8_t*) {}
void multiply(const Product&, int64_t, int64_t) {}

#else

namespace {

constexpr int NV = static_cast<int>(PANEL) / W;  // vectors of a panel's outputs

struct Q8 {
  static constexpr int WORDS = 8;  // 4-byte groups of an output's block
  static constexpr int BLOCK = 32 * 34;
  FINIAL_INLINE void load(const uint8_t* p, I (&w)[8][NV]) {
    for (int j = 0; j < 8; ++j)
      for (int v = 0; v < NV; ++v) w[j][v] = load_i(p + (j * NV + v) * W * 4);
  }
  FINIAL_INLINE I start(int32_t offset) { return start_q8(offset); }
  FINIAL_INLINE I dot(I acc, I w, I x) { return dot_q8(acc, w, x); }
};

struct Q4 {
  static constexpr int WORDS = 4;
  static constexpr int BLOCK = 32 * 18;
  FINIAL_INLINE void load(const uint8_t* p, I (&w)[8][NV]) {
    for (int j = 0; j < 4; ++j)
      for (int v = 0; v < NV; ++v) {
        const I both = load_i(p + (j * NV + v) * W * 4);
        w[j][v] = low_nibbles(both), w[j + 4][v] = high_nibbles(both);
      }
  }
  FINIAL_INLINE I start(int32_t offset) { return start_q4(offset); }
  FINIAL_INLINE I dot(I acc, I w, I x) { return dot_q4(acc, w, x); }
};

// One block of 32 inputs of a panel with one row.
template <class Q>
FINIAL_INLINE void add_block(const I (&w)[8][NV], const V (&scale)[NV], const Int8Block& x, V (&acc)[NV]) {
  I sums[NV];
  for (int v = 0; v < NV; ++v) sums[v] = Q::start(x.offset);
  for (int j = 0; j < 8; ++j) {
    const I quad = broadcast(x.q + 4 * j);
    for (int v = 0; v < NV; ++v) sums[v] = Q::dot(sums[v], w[j][v], quad);
  }
  const V s = set1(x.scale);
  for (int v = 0; v < NV; ++v) acc[v] = fma(to_floats(sums[v]), mul(scale[v], s), acc[v]);
}

// c [rows, PANEL] = a panel times a tile of int8 rows.
template <class Q>
void tile_int8(const uint8_t* FINIAL_RESTRICT w, const uint8_t* FINIAL_RESTRICT tile, int64_t n_in, int64_t rows,
               float* FINIAL_RESTRICT c) {
  const Int8Block* x = reinterpret_cast<const Int8Block*>(tile);
  const int64_t blocks = n_in / 32;
  if (rows == 1) {
    V acc[NV];
    for (V& a : acc) a = zero();
    for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK) {
      I weights[8][NV];
      V scale[NV];
      for (int v = 0; v < NV; ++v) scale[v] = load_f16(w + v * W * 2);
      Q::load(w + PANEL * 2, weights);
      add_block<Q>(weights, scale, x[b], acc);
    }
    for (int v = 0; v < NV; ++v) store(c + v * W, acc[v]);
    return;
  }
  for (int64_t i = 0; i < rows * PANEL; i += W) store(c + i, zero());
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK) {
    I weights[8][NV];
    V scale[NV];
    for (int v = 0; v < NV; ++v) scale[v] = load_f16(w + v * W * 2);
    Q::load(w + PANEL * 2, weights);
    for (int64_t r = 0; r < rows; ++r, ++x) {
      V acc[NV];
      for (int v = 0; v < NV; ++v) acc[v] = load(c + r * PANEL + v * W);
      add_block<Q>(weights, scale, *x, acc);
      for (int v = 0; v < NV; ++v) store(c + r * PANEL + v * W, acc[v]);
    }
  }
}

#if defined(FINIAL_PACKS_BF16)

constexpr int64_t AHEAD = 2048;

FINIAL_INLINE void prefetch(const uint8_t* p) {  // a pair of inputs of a panel: 128 bytes
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(p) + 64, _MM_HINT_T0);
}

template <int M>
void tile_bf16(const uint8_t* FINIAL_RESTRICT w, const uint8_t* FINIAL_RESTRICT x, int64_t n_in,
               float* FINIAL_RESTRICT c) {
  V acc[M][NV];
  for (int r = 0; r < M; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = zero();
  for (int64_t k = 0; k < n_in; k += 2, w += PANEL * 4, x += 4 * M) {
    I weight[NV];
    if (M >= 6) prefetch(w + AHEAD);  // the arithmetic fills the out-of-order window: memory would be asked too late
    for (int v = 0; v < NV; ++v) weight[v] = load_i(w + v * W * 4);
    for (int r = 0; r < M; ++r) {
      const I pair = broadcast(x + 4 * r);
      for (int v = 0; v < NV; ++v) acc[r][v] = dot_bf16(acc[r][v], weight[v], pair);
    }
  }
  for (int r = 0; r < M; ++r)
    for (int v = 0; v < NV; ++v) store(c + r * PANEL + v * W, acc[r][v]);
}

using TileBF16 = void (*)(const uint8_t*, const uint8_t*, int64_t, float*);
constexpr TileBF16 TILES_BF16[TILE + 1] = {nullptr,       tile_bf16<1>,  tile_bf16<2>, tile_bf16<3>, tile_bf16<4>,
                                           tile_bf16<5>,  tile_bf16<6>,  tile_bf16<7>, tile_bf16<8>, tile_bf16<9>,
                                           tile_bf16<10>, tile_bf16<11>, tile_bf16<12>};

void round_bf16(const float* x, int64_t n_in, int64_t row, int64_t rows, uint8_t* tile) {
  uint8_t* out = tile + 4 * row;
  int64_t k = 0;
  if (rows == 1) {
    for (; k + W <= n_in; k += W) store_bf16(out + 2 * k, load(x + k));
  } else {
    for (; k + W <= n_in; k += W) {
      uint32_t pairs[W / 2];
      store_bf16(reinterpret_cast<uint8_t*>(pairs), load(x + k));
      for (int i = 0; i < W / 2; ++i) std::memcpy(out + (k / 2 + i) * 4 * rows, &pairs[i], 4);
    }
  }
  if (k < n_in) {
    uint32_t pairs[W / 2];
    store_bf16(reinterpret_cast<uint8_t*>(pairs), load_n(x + k, n_in - k));
    for (int64_t i = 0; i < (n_in - k + 1) / 2; ++i) std::memcpy(out + (k / 2 + i) * 4 * rows, &pairs[i], 4);
  }
}

void pack_bf16(const Linear& l, uint8_t* out, int64_t first) {
  constexpr int64_t STEP = 16;  // pairs: a cache line of each row
  const int64_t whole = l.n_in / 2;
  for (int64_t k = 0; k < whole; k += STEP) {
    const int64_t count = whole - k < STEP ? whole - k : STEP;
    for (int64_t o = 0; o < PANEL && first + o < l.n_out; ++o) {
      const uint8_t* from = l.weight + (first + o) * l.row_bytes + k * 4;
      uint8_t* to = out + (k * PANEL + o) * 4;
      for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * PANEL * 4, from + i * 4, 4);
    }
  }
  if (l.n_in % 2 != 0)
    for (int64_t o = 0; o < PANEL && first + o < l.n_out; ++o)
      std::memcpy(out + (whole * PANEL + o) * 4, l.weight + (first + o) * l.row_bytes + whole * 4, 2);
}

#endif

void round_int8(const float* x, int64_t n_in, int64_t row, int64_t rows, uint8_t* tile) {
  Int8Block* out = reinterpret_cast<Int8Block*>(tile) + row;
  for (int64_t k = 0; k < n_in; k += 32, out += rows) {
    V top = zero(), poison = zero();
    for (int i = 0; i < 32; i += W) {
      const V a = load(x + k + i);
      top = max(top, absolute(a));
      poison = fma(a, zero(), poison);  // NaN where an activation is not finite: it must reach the result
    }
    const float most = largest(top);
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    // Below 127 / 2^128 the inverse overflows: such a block is zero to any result that matters.
    const V by = set1(inverse < 3e38f ? inverse : 0.0f);
    for (int i = 0; i < 32; i += W) store_i8(out->q + i, mul(load(x + k + i), by));
    out->scale = most / 127.0f + sum(poison);
    out->first = -8 * sum_i8(out->q);
    out->offset = out->first - 8 * sum_i8(out->q + 16);
    out->minimum = out->scale * 0.125f * static_cast<float>(out->offset);
  }
}

template <class Q>
void pack_blocks(const Linear& l, uint8_t* out, int64_t first, uint32_t flip) {
  for (int64_t b = 0; b < l.n_in / 32; ++b, out += Q::BLOCK) {
    for (int64_t o = 0; o < PANEL && first + o < l.n_out; ++o) {
      const uint8_t* from = l.weight + (first + o) * l.row_bytes + b * (2 + 4 * Q::WORDS);
      std::memcpy(out + 2 * o, from, 2);
      for (int j = 0; j < Q::WORDS; ++j) {
        uint32_t word;
        std::memcpy(&word, from + 2 + 4 * j, 4);
        word ^= flip;
        std::memcpy(out + PANEL * 2 + (j * PANEL + o) * 4, &word, 4);
      }
    }
  }
}

FINIAL_INLINE void tile(const Linear& l, int64_t panel, const uint8_t* x, int64_t rows, float* c) {
  const uint8_t* w = l.packed + panel * panel_bytes(l.format, l.n_in);
  switch (l.format) {
#if defined(FINIAL_PACKS_BF16)
    case Format::BF16:
      return TILES_BF16[rows](w, x, l.n_in, c);
#endif
    case Format::Q8_0:
      return tile_int8<Q8>(w, x, l.n_in, rows, c);
    case Format::Q4_0:
      return tile_int8<Q4>(w, x, l.n_in, rows, c);
    default:
      return tile_k(l.format, w, x, l.n_in, rows, c);
  }
}

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

void pack(const Linear& l, uint8_t* out, int64_t begin, int64_t end) {
  const int64_t bytes = panel_bytes(l.format, l.n_in);
  for (int64_t i = begin; i < end; ++i) {
    switch (l.format) {
#if defined(FINIAL_PACKS_BF16)
      case Format::BF16:
        pack_bf16(l, out + i * bytes, i * PANEL);
        break;
#endif
      case Format::Q8_0:
        pack_blocks<Q8>(l, out + i * bytes, i * PANEL, BIAS_Q8);
        break;
      case Format::Q4_0:
        pack_blocks<Q4>(l, out + i * bytes, i * PANEL, 0);
        break;
      default:
        pack_k(l, out + i * bytes, i * PANEL);
        break;
    }
  }
}

void round_row(Rounding rounding, const float* x, int64_t n_in, int64_t row, int64_t rows, uint8_t* tile) {
#if defined(FINIAL_PACKS_BF16)
  if (rounding == Rounding::BF16) return round_bf16(x, n_in, row, rows, tile);
#endif
  if (rounding == Rounding::INT8) round_int8(x, n_in, row, rows, tile);
}

void multiply(const Product& p, int64_t begin, int64_t end) {
  alignas(64) float first[TILE * PANEL], second[TILE * PANEL];
  const int64_t n = tiles(p.rows), bytes = rounded_bytes(rounding(p.first->format), p.first->n_in);
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = p.rows * i / n, rows = p.rows * (i + 1) / n - row;
      const uint8_t* x = p.x + row * bytes;
      tile(*p.first, panel, x, rows, first);
      if (p.second != nullptr) tile(*p.second, panel, x, rows, second);
      finish(p, panel, row, rows, first, second);
    }
  }
}

#endif

}  // namespace finial::FINIAL_ISA
