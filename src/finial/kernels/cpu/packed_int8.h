// int8 rows times q8_0 and q4_0 panels: how rows are rounded, matrices packed, and blocks multiplied (layouts and
// arithmetic: packed.h, packed.cpp). Included by packed.cpp.
//
// A block of one row costs 16 multiplying instructions (at 16 lanes), and then for each vector of outputs a conversion,
// the product of both scales, and an fma. The product and the fma run where the multiplications do; the conversion, and
// additions of integers and floats, cost nothing beside them (EPYC Genoa, each measured beside dpbusd). So the product
// of the scales is worth avoiding: a row's scale has five significant bits, so per block of weights its product with
// sixteen values covers every row; the row's exponent is added to it as an integer. Both ways give the same bits: the
// product is exact. The table takes 2.3 % of the time of 168 rows, which pays from TABLE_ROWS rows on. Measured on one
// core of EPYC Genoa, 168 rows, 4096 inputs, weights in the second-level cache, against 473 GFLOP/s of the instruction
// alone: 83 %; the loop over rows alone 86 %, with 89 % as the most that blocks of 32 allow.
#pragma once

#include <math.h>

#include "panels.h"
#include "weights.h"

#if defined(FINIAL_PACKS_INT8)

namespace finial::FINIAL_ISA {

namespace {

struct Q8 {
  static constexpr int WORDS = 8;  // 4-byte groups of an output's block
  static constexpr int BLOCK = 32 * 34;
  static constexpr uint32_t ZERO = BIAS_Q8;  // four weights of 0 as they are packed
  FINIAL_INLINE void load(const uint8_t* p, I (&w)[8][PANEL_VECTORS]) {
    for (int j = 0; j < 8; ++j)
      for (int v = 0; v < PANEL_VECTORS; ++v) w[j][v] = load_i(p + (j * PANEL_VECTORS + v) * W * 4);
  }
  FINIAL_INLINE I start(const Int8Block& x) { return start_q8(x.offset_q8); }
  FINIAL_INLINE I dot(I acc, I w, I x) { return dot_q8(acc, w, x); }
};

struct Q4 {
  static constexpr int WORDS = 4;
  static constexpr int BLOCK = 32 * 18;
  static constexpr uint32_t ZERO = 0x88888888u;
  FINIAL_INLINE void load(const uint8_t* p, I (&w)[8][PANEL_VECTORS]) {
    for (int j = 0; j < 4; ++j)
      for (int v = 0; v < PANEL_VECTORS; ++v) {
        const I both = load_i(p + (j * PANEL_VECTORS + v) * W * 4);
        w[j][v] = low_nibbles(both), w[j + 4][v] = high_nibbles(both);
      }
  }
  FINIAL_INLINE I start(const Int8Block& x) { return start_q4(x.offset); }
  FINIAL_INLINE I dot(I acc, I w, I x) { return dot_q4(acc, w, x); }
};

// The product of a block's weight scales with a row's: multiplied, or looked up.
struct Multiply {
  const V (&scale)[PANEL_VECTORS];
  FINIAL_INLINE bool covers(const Int8Block&) { return true; }
  FINIAL_INLINE V product(const Multiply& s, const Int8Block& x, int v) { return mul(s.scale[v], set1(x.scale)); }
};

// N rows with one block of 32 inputs of a panel: each output's sum of the block, exact, times both scales, added to c.
template <class Q, int N, class Scale>
FINIAL_INLINE void add_block(const I (&w)[8][PANEL_VECTORS], const Scale& scale, const Int8Block* x, float* c) {
  I sums[N][PANEL_VECTORS];
  for (int r = 0; r < N; ++r)
    for (int v = 0; v < PANEL_VECTORS; ++v) sums[r][v] = Q::start(x[r]);
  for (int j = 0; j < 8; ++j)
    for (int r = 0; r < N; ++r) {
      const I quad = broadcast(x[r].q + 4 * j);
      for (int v = 0; v < PANEL_VECTORS; ++v) sums[r][v] = Q::dot(sums[r][v], w[j][v], quad);
    }
  for (int r = 0; r < N; ++r)
    for (int v = 0; v < PANEL_VECTORS; ++v) {
      float* at = c + r * PANEL + v * W;
      store(at, fma(to_floats(sums[r][v]), Scale::product(scale, x[r], v), load(at)));
    }
}

#if defined(FINIAL_ISA_avx512)

constexpr int64_t TABLE_ROWS = 48;
constexpr int FRACTION = 4;  // bits of a row's scale behind the leading one: Int8Block
constexpr int64_t LEVELS = 1 << FRACTION;

// [level][output]: the bits of scale * m less those of m, m = 1 + level / 16. Adding the bits of a row's scale, 2^e m,
// leaves those of scale * 2^e m, as long as neither exponent overflows.
struct Table {
  alignas(64) int32_t bits[LEVELS * PANEL];

  // False where a scale is infinite or NaN: then nothing of it holds.
  bool fill(const V (&scale)[PANEL_VECTORS]) {
    V w[PANEL_VECTORS];
    for (int v = 0; v < PANEL_VECTORS; ++v) {
      if (_mm512_fpclass_ps_mask(scale[v], 0x99) != 0) return false;  // quiet NaN, both infinities, signalling NaN
      const __mmask16 none = _mm512_cmp_ps_mask(scale[v], zero(), _CMP_EQ_OQ);
      w[v] = _mm512_mask_mov_ps(scale[v], none, set1(1));  // its weights are zeros: any scale is right
    }
    for (int32_t level = 0; level < LEVELS; ++level) {
      const I m = _mm512_set1_epi32(0x3F800000 | level << (23 - FRACTION));
      for (int v = 0; v < PANEL_VECTORS; ++v)
        _mm512_store_si512(bits + level * PANEL + v * W,
                           _mm512_sub_epi32(_mm512_castps_si512(mul(w[v], _mm512_castsi512_ps(m))), m));
    }
    return true;
  }

  FINIAL_INLINE uint32_t bits_of(const Int8Block& x) {
    uint32_t out;
    std::memcpy(&out, &x.scale, 4);
#if defined(__GNUC__)  // else the compiler broadcasts from this register, which costs two instructions, not from memory
    __asm__("" : "+r"(out));
#endif
    return out;
  }
  // From 2^-100 to 2^100, where no f16 scale can make an exponent overflow.
  FINIAL_INLINE bool covers(const Int8Block& x) { return bits_of(x) - (27u << 23) < 200u << 23; }
  FINIAL_INLINE V product(const Table& t, const Int8Block& x, int v) {
    uint32_t level = bits_of(x) >> (23 - FRACTION) & (LEVELS - 1);
    const I m = _mm512_load_si512(t.bits + level * PANEL + v * W);
    return _mm512_castsi512_ps(_mm512_add_epi32(broadcast(&x.scale), m));
  }
};

#endif

// c [PANEL] = a panel times one row.
template <class Q>
void one_int8(const uint8_t* FINIAL_RESTRICT w, const Int8Block* FINIAL_RESTRICT x, int64_t blocks,
              float* FINIAL_RESTRICT c) {
  V acc[PANEL_VECTORS];
  for (V& a : acc) a = zero();
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK, ++x) {
    I weights[8][PANEL_VECTORS], sums[PANEL_VECTORS];
    V scale[PANEL_VECTORS];
    for (int v = 0; v < PANEL_VECTORS; ++v) scale[v] = load_f16(w + v * W * 2);
    Q::load(w + PANEL * 2, weights);
    for (I& s : sums) s = Q::start(*x);
    for (int j = 0; j < 8; ++j) {
      const I quad = broadcast(x->q + 4 * j);
      for (int v = 0; v < PANEL_VECTORS; ++v) sums[v] = Q::dot(sums[v], weights[j][v], quad);
    }
    for (int v = 0; v < PANEL_VECTORS; ++v) acc[v] = fma(to_floats(sums[v]), mul(scale[v], set1(x->scale)), acc[v]);
  }
  for (int v = 0; v < PANEL_VECTORS; ++v) store(c + v * W, acc[v]);
}

// Rounded rows that meet a panel, tile after tile; a block's rows of a tile are neighbours.
struct Rows {
  const Int8Block* x[GROUP];  // block 0 of each tile
  int64_t count[GROUP];       // rows of each
  int64_t tiles, rows;
};

template <class Q, int N>
FINIAL_RARE void add_rare(const uint8_t* p, const Multiply& scale, const Int8Block* x, float* c) {
  I w[8][PANEL_VECTORS];
  Q::load(p + PANEL * 2, w);
  add_block<Q, N>(w, scale, x, c);
}

// Block b of a panel, at p, with all rows: two at a time, so that more sums are under way than one row has. A function
// of its own, so that the weights stay in registers. Meanwhile the next block is asked for, a few lines with each tile:
// a block lasts so long that the processor's own prefetching has forgotten it.
template <class Q, class Scale>
FINIAL_APART void add_rows(const uint8_t* FINIAL_RESTRICT p, const Scale& scale, const Multiply& otherwise,
                           const Rows& rows, int64_t b, float* FINIAL_RESTRICT c) {
  I w[8][PANEL_VECTORS];
  Q::load(p + PANEL * 2, w);
  const int64_t ahead = (Q::BLOCK + 64 * rows.tiles) / (64 * rows.tiles) * 64;
  for (int64_t i = 0; i < rows.tiles; ++i) {
    prefetch(p + Q::BLOCK + i * ahead, ahead);
    const int64_t count = rows.count[i];
    const Int8Block *x = rows.x[i] + b * count, *end = x + count;
    for (; x + 2 <= end; x += 2, c += 2 * PANEL) {
      if (Scale::covers(x[0]) && Scale::covers(x[1]))
        add_block<Q, 2>(w, scale, x, c);
      else
        add_rare<Q, 2>(p, otherwise, x, c);
    }
    if (x < end) {
      if (Scale::covers(*x))
        add_block<Q, 1>(w, scale, x, c);
      else
        add_rare<Q, 1>(p, otherwise, x, c);
      c += PANEL;
    }
  }
}

// c [rows, PANEL] = a panel times 2 to TILE rows. Where their arithmetic takes about as long as reading the panel, it
// is asked for AHEAD bytes early, a few lines with each pair of rows.
template <class Q>
void few_int8(const uint8_t* FINIAL_RESTRICT w, const Int8Block* FINIAL_RESTRICT x, int64_t rows, int64_t blocks,
              float* FINIAL_RESTRICT c) {
  const int64_t share = rows * 192 < Q::BLOCK ? 0 : (Q::BLOCK + 32 * rows - 1) / (32 * rows) * 64;  // for two rows
  for (int64_t i = 0; i < rows * PANEL; i += W) store(c + i, zero());
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK) {
    I weights[8][PANEL_VECTORS];
    V scale[PANEL_VECTORS];
    for (int v = 0; v < PANEL_VECTORS; ++v) scale[v] = load_f16(w + v * W * 2);
    const Multiply product{scale};
    Q::load(w + PANEL * 2, weights);
    const uint8_t* next = w + AHEAD;
    float* at = c;
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2, x += 2, at += 2 * PANEL, next += share) {
      prefetch(next, share);
      add_block<Q, 2>(weights, product, x, at);
    }
    if (r < rows) add_block<Q, 1>(weights, product, x++, at);
  }
}

// c [rows of the tiles, PANEL] = a panel times tiles [begin, end) of `rows` rounded rows at x.
template <class Q>
void tiles_int8(const uint8_t* FINIAL_RESTRICT w, const uint8_t* FINIAL_RESTRICT x, int64_t rows, int64_t begin,
                int64_t end, int64_t blocks, const Target& target, float* FINIAL_RESTRICT c) {
  Rows taken;
  taken.tiles = end - begin, taken.rows = 0;
  for (int64_t i = begin; i < end; ++i) {
    const Tile t = tile_of(rows, i);
    taken.x[i - begin] = reinterpret_cast<const Int8Block*>(x) + t.first * blocks;
    taken.count[i - begin] = t.count;
    taken.rows += t.count;
  }
  if (taken.rows == 1) return one_int8<Q>(w, taken.x[0], blocks, c);
  if (rows <= TILE) return few_int8<Q>(w, taken.x[0], taken.rows, blocks, c);
  for (int64_t i = 0; i < taken.rows * PANEL; i += W) store(c + i, zero());
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK) {
    V scale[PANEL_VECTORS];
    for (int v = 0; v < PANEL_VECTORS; ++v) scale[v] = load_f16(w + v * W * 2);
    const Multiply product{scale};
    expect(target, taken.rows * b / blocks, taken.rows * (b + 1) / blocks);
#if defined(FINIAL_ISA_avx512)
    Table table;
    if (taken.rows >= TABLE_ROWS && table.fill(scale)) {
      add_rows<Q>(w, table, product, taken, b, c);
      continue;
    }
#endif
    add_rows<Q>(w, product, product, taken, b, c);
  }
}

constexpr float LEAST = 7.9e-31f;       // about 2^-100: a block of this scale is zero to any result that matters
constexpr uint32_t DROPPED = 1u << 19;  // the bits of a float below five significant ones

// The scale of a block whose largest magnitude this is, as bits.
FINIAL_INLINE float scale_of(float most) {
  const float exact = most / 127.0f;
  uint32_t bits;
  std::memcpy(&bits, &exact, 4);
  bits = (bits + DROPPED - 1) & ~(DROPPED - 1);
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

FINIAL_INLINE void round_block(const float* x, Int8Block* out) {
  V top = zero(), poison = zero();
  for (int i = 0; i < 32; i += W) {
    const V a = load(x + i);
    top = max(top, absolute(a));
    poison = fma(a, zero(), poison);  // NaN where an activation is not finite: it must reach the result
  }
  const float scale = scale_of(largest(top));
  const V by = set1(scale >= LEAST ? 1.0f / scale : 0.0f);
  for (int i = 0; i < 32; i += W) store_i8(out->q + i, mul(load(x + i), by));
  out->scale = (scale >= LEAST ? scale : 1.0f) + sum(poison);
  out->first = -8 * sum_i8(out->q);
  out->offset = out->first - 8 * sum_i8(out->q + 16);
  out->offset_q8 = 16 * out->offset;
  out->minimum = out->scale * 0.125f * static_cast<float>(out->offset);
}

#if defined(FINIAL_ISA_avx512)

// Sixteen blocks, `step` apart at their destination: what is alike of each is done for all at once.
void round_blocks(const float* x, Int8Block* out, int64_t step) {
  const I magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  I tops[W], first[W], second[W];
  for (int i = 0; i < W; ++i)  // as integers, for NaN and infinity are the largest then
    tops[i] = _mm512_max_epi32(_mm512_and_si512(load_i(x + 32 * i), magnitude),
                               _mm512_and_si512(load_i(x + 32 * i + W), magnitude));
  const I top = reduce_each(tops, [](I a, I b) { return _mm512_max_epi32(a, b); });
  const I exact = _mm512_castps_si512(div(_mm512_castsi512_ps(top), set1(127)));
  const V rounded = _mm512_castsi512_ps(
      _mm512_andnot_si512(_mm512_set1_epi32(DROPPED - 1), _mm512_add_epi32(exact, _mm512_set1_epi32(DROPPED - 1))));
  const __mmask16 counts = _mm512_cmp_ps_mask(rounded, set1(LEAST), _CMP_GE_OQ);
  alignas(64) float scale[W], by[W], minimum[W];
  alignas(64) int32_t offsets[2][W];
  store(by, _mm512_maskz_div_ps(counts, set1(1), rounded));
  const __mmask16 finite = _mm512_cmplt_epi32_mask(top, _mm512_set1_epi32(0x7F800000));
  store(scale, _mm512_mask_mov_ps(set1(NAN), finite, _mm512_mask_mov_ps(set1(1), counts, rounded)));
  for (int i = 0; i < W; ++i) {
    const V factor = set1(by[i]);
    const I a = _mm512_cvtps_epi32(mul(load(x + 32 * i), factor));
    const I b = _mm512_cvtps_epi32(mul(load(x + 32 * i + W), factor));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out[i * step].q), _mm512_cvtsepi32_epi8(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out[i * step].q + W), _mm512_cvtsepi32_epi8(b));
    first[i] = a, second[i] = b;
  }
  const auto offset = [](I sum) { return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 3)); };
  const I half = offset(reduce_each(first, add_i)), whole = add_i(half, offset(reduce_each(second, add_i)));
  _mm512_store_si512(offsets[0], half);
  _mm512_store_si512(offsets[1], whole);
  store(minimum, mul(mul(load(scale), set1(0.125f)), to_floats(whole)));
  for (int i = 0; i < W; ++i) {
    Int8Block& block = out[i * step];
    block.scale = scale[i];
    block.offset = offsets[1][i];
    block.offset_q8 = 16 * offsets[1][i];
    block.first = offsets[0][i];
    block.minimum = minimum[i];
  }
}

#endif

void round_int8(const float* x, int64_t n_in, int64_t rows, uint8_t* tile) {
  for (int64_t row = 0; row < rows; ++row, x += n_in) {
    Int8Block* out = reinterpret_cast<Int8Block*>(tile) + row;
    int64_t k = 0;
#if defined(FINIAL_ISA_avx512)
    for (; k + 32 * W <= n_in; k += 32 * W) round_blocks(x + k, out + k / 32 * rows, rows);
#endif
    for (; k < n_in; k += 32) round_block(x + k, out + k / 32 * rows);
  }
}

template <class Q>
void pack_blocks(const Linear& l, uint8_t* out, int64_t first, uint32_t flip) {
  for (int64_t b = 0; b < l.n_in / 32; ++b, out += Q::BLOCK) {
    for (int64_t o = 0; o < PANEL && first + o < l.n_out; ++o) {
      const uint8_t* from = l.weight + (first + o) * l.row_bytes + b * (2 + 4 * Q::WORDS);
      uint16_t scale;
      std::memcpy(&scale, from, 2);
      std::memcpy(out + 2 * o, from, 2);
      for (int j = 0; j < Q::WORDS; ++j) {
        uint32_t word;
        std::memcpy(&word, from + 2 + 4 * j, 4);
        word = (scale & 0x7FFF) == 0 ? Q::ZERO : word ^ flip;  // Table takes any scale for 0
        std::memcpy(out + PANEL * 2 + (j * PANEL + o) * 4, &word, 4);
      }
    }
  }
}

template <class Q>
void unpack_blocks(Format format, const uint8_t* panel, int64_t o, int64_t n_in, uint32_t flip, float* out) {
  for (int64_t k = 0; k < n_in; k += 32, panel += Q::BLOCK) {
    uint8_t block[2 + 4 * Q::WORDS];
    std::memcpy(block, panel + 2 * o, 2);
    for (int j = 0; j < Q::WORDS; ++j) {
      uint32_t word;
      std::memcpy(&word, panel + PANEL * 2 + (j * PANEL + o) * 4, 4);
      word ^= flip;
      std::memcpy(block + 2 + 4 * j, &word, 4);
    }
    decode(format, block, 32, out + k);
  }
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
