// int8 rows times q8_0 and q4_0 panels, where an instruction multiplies four bytes and sums them in 32 bits. Included
// by packed.cpp.
//
// A block of one row costs 16 multiplying instructions (at 16 lanes), and then for each vector of outputs a conversion,
// the product of both scales, and an fma. The product and the fma run where the multiplications do; the conversion, and
// additions of integers and floats, cost nothing beside them (EPYC Genoa, each measured beside dpbusd). So the product
// of the scales is worth avoiding: a row's scale has five significant bits, so per block of weights its product with
// sixteen values covers every row; the row's exponent is added to it as an integer. Both ways give the same bits: the
// product is exact. The table takes 2.3 % of the time of 168 rows, which pays from TABLE_ROWS rows on. Measured on one
// core of EPYC Genoa, 168 rows, 4096 inputs, weights in the second-level cache, against 473 GFLOP/s of the instruction
// alone: 83 %; the loop over rows alone 86 %, with 89 % as the most that blocks of 32 allow. EPYC Turin, which starts
// two of these instructions each cycle, does 512 rows at 73 to 77 % of 1,060 GFLOP/s, the loop alone at 86 %; with one
// chain a sum and without asking for rows 67 to 72 %. On Ice Lake all of a block's arithmetic shares two ports (24
// instructions a row, 67 % of them multiplications), and a broadcast or load of 64 bytes takes 0.9 cycles: what counts
// is to load less, so there scales stay in registers and are multiplied. One core does 168 rows at 395 of 825 GFLOP/s,
// 342 with tables; the loop alone 440, in hand-written assembly 490.
#pragma once

#include "packed_int8.h"
#include "packed_int8_tiles.h"

#if defined(FINIAL_PACKS_INT8) && !defined(FINIAL_AVX2)

// Where an addition of integers costs nothing beside multiplications of bytes.
#if defined(FINIAL_ISA_avx512)
#define FINIAL_INT8_TABLE 1
#endif

namespace finial::FINIAL_ISA {

namespace {

// The product of a block's weight scales with a row's: multiplied, or looked up.
struct Multiply {
  using Held = Multiply;  // in registers
  V scale[PANEL_VECTORS];
  struct Row {
    V scale;
  };
  FINIAL_INLINE bool covers(const Int8Block&) { return true; }
  FINIAL_INLINE Row row(const Int8Block& x) { return {set1(x.scale)}; }
  FINIAL_INLINE V product(const Multiply& s, const Row& row, int v) { return mul(s.scale[v], row.scale); }
};

// Chains in which an output's sum of a block runs, where there are registers for them: then four instructions wait for
// each other instead of eight.
constexpr int SPLIT = W == 16 ? 2 : 1;

// N rows with one block of 32 inputs of a panel: each output's sum of the block, exact, times both scales, added to c.
template <class Q, int N, class Scale>
FINIAL_INLINE void add_block(const I (&w)[8][PANEL_VECTORS], const Scale& scale, const Int8Block* x, float* c) {
  I sums[N][SPLIT][PANEL_VECTORS];
  for (int r = 0; r < N; ++r)
    for (int v = 0; v < PANEL_VECTORS; ++v)
      for (int s = 0; s < SPLIT; ++s) sums[r][s][v] = s == 0 ? Q::start(x[r]) : start_q4(0);
  for (int j = 0; j < 8; j += SPLIT)
    for (int r = 0; r < N; ++r)
      for (int s = 0; s < SPLIT; ++s) {
        const I quad = broadcast(x[r].q + 4 * (j + s));
        for (int v = 0; v < PANEL_VECTORS; ++v) sums[r][s][v] = Q::dot(sums[r][s][v], w[j + s][v], quad);
      }
  for (int r = 0; r < N; ++r)
    for (int s = 1; s < SPLIT; ++s)
      for (int v = 0; v < PANEL_VECTORS; ++v) sums[r][0][v] = add_i(sums[r][0][v], sums[r][s][v]);
  for (int r = 0; r < N; ++r) {
    const typename Scale::Row row = Scale::row(x[r]);
    for (int v = 0; v < PANEL_VECTORS; ++v) {
      float* at = c + r * PANEL + v * W;
      store(at, fma(to_floats(sums[r][0][v]), Scale::product(scale, row, v), load(at)));
    }
  }
}

#if defined(FINIAL_INT8_TABLE)

constexpr int64_t TABLE_ROWS = 48;
constexpr int FRACTION = 4;  // bits of a row's scale behind the leading one: Int8Block
constexpr int64_t LEVELS = 1 << FRACTION;

// [level][output]: the bits of scale * m less those of m, m = 1 + level / 16. Adding the bits of a row's scale, 2^e m,
// leaves those of scale * 2^e m, as long as neither exponent overflows.
struct Table {
  using Held = const Table&;
  struct Row {
    I scale;
    int64_t level;
  };
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
    return out;
  }
  FINIAL_INLINE I broadcast_scale(const Int8Block& x) {
#if defined(__GNUC__)  // else the compiler broadcasts it from the register that holds its bits, not from memory
    I out;
    __asm__("vpbroadcastd %1, %0" : "=v"(out) : "m"(x.scale));
    return out;
#else
    return broadcast(&x.scale);
#endif
  }
  // From 2^-100 to 2^100, where no f16 scale can make an exponent overflow.
  FINIAL_INLINE bool covers(const Int8Block& x) { return bits_of(x) - (27u << 23) < 200u << 23; }
  FINIAL_INLINE Row row(const Int8Block& x) {
    return {broadcast_scale(x), bits_of(x) >> (23 - FRACTION) & (LEVELS - 1)};
  }
  FINIAL_INLINE V product(const Table& t, const Row& row, int v) {
    const I m = _mm512_load_si512(t.bits + row.level * PANEL + v * W);
    return _mm512_castsi512_ps(_mm512_add_epi32(row.scale, m));
  }
};

#endif

constexpr Enough ENOUGH_INT8{4, 16384};

// c [PANEL] = a panel times one row.
template <class Q>
void one_int8(const uint8_t* FINIAL_RESTRICT w, const Int8Block* FINIAL_RESTRICT x, int64_t blocks,
              float* FINIAL_RESTRICT c) {
  const Asked ask = asks(1, ENOUGH_INT8);
  V acc[PANEL_VECTORS];
  for (V& a : acc) a = zero();
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK, ++x) {
    I weights[8][PANEL_VECTORS], sums[PANEL_VECTORS];
    V scale[PANEL_VECTORS];
    stream(ask, w, Q::BLOCK);
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

#if !defined(FINIAL_TILES)

template <class Q, int N>
FINIAL_RARE void add_rare(const uint8_t* p, const Multiply& scale, const Int8Block* x, float* c) {
  I w[8][PANEL_VECTORS];
  Q::load(p + PANEL * 2, w);
  add_block<Q, N>(w, scale, x, c);
}

// Block b of a panel, at p, with all rows: two at a time, so that more sums are under way than one row has. A function
// of its own, so that the weights stay in registers. Meanwhile the next block is asked for, a few lines with each tile:
// a block lasts so long that the processor's own prefetching has forgotten it. The next tile's rows are asked for too.
template <class Q, class Scale>
FINIAL_APART void add_rows(const uint8_t* FINIAL_RESTRICT p, const Scale& scale, const Multiply& otherwise,
                           const Rows& rows, int64_t b, float* FINIAL_RESTRICT c) {
  I w[8][PANEL_VECTORS];
  Q::load(p + PANEL * 2, w);
  const typename Scale::Held held = scale;
  const int64_t ahead = (Q::BLOCK + 64 * rows.tiles) / (64 * rows.tiles) * 64;
  for (int64_t i = 0; i < rows.tiles; ++i) {
    prefetch(p + Q::BLOCK + i * ahead, ahead);
    const int64_t count = rows.count[i];
    const Int8Block *x = rows.x[i] + b * count, *end = x + count;
    const int64_t then = i + 1 < rows.tiles ? i + 1 : 0;
    const uint8_t* next = reinterpret_cast<const uint8_t*>(rows.x[then] + (then > 0 ? b : b + 1) * rows.count[then]);
    for (; x + 2 <= end; x += 2, c += 2 * PANEL, next += 128) {
      prefetch(next, 128);
      if (Scale::covers(x[0]) && Scale::covers(x[1]))
        add_block<Q, 2>(w, held, x, c);
      else
        add_rare<Q, 2>(p, otherwise, x, c);
    }
    if (x < end) {
      if (Scale::covers(*x))
        add_block<Q, 1>(w, held, x, c);
      else
        add_rare<Q, 1>(p, otherwise, x, c);
      c += PANEL;
    }
  }
}

#endif

// c [rows, PANEL] = a panel times 2 to TILE rows. Without AVX-512, where their arithmetic takes about as long as
// reading the panel, it is asked for AHEAD bytes early, a few lines with each pair of rows.
template <class Q>
void few_int8(const uint8_t* FINIAL_RESTRICT w, const Int8Block* FINIAL_RESTRICT x, int64_t rows, int64_t blocks,
              float* FINIAL_RESTRICT c) {
#if defined(FINIAL_AVX512)
  constexpr int64_t share = 0;
#else
  const int64_t share = rows * 192 < Q::BLOCK ? 0 : (Q::BLOCK + 32 * rows - 1) / (32 * rows) * 64;  // for two rows
#endif
  const Asked ask = asks(rows, ENOUGH_INT8);
  for (int64_t i = 0; i < rows * PANEL; i += W) store(c + i, zero());
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK) {
    I weights[8][PANEL_VECTORS];
    Multiply product;
    for (int v = 0; v < PANEL_VECTORS; ++v) product.scale[v] = load_f16(w + v * W * 2);
    Q::load(w + PANEL * 2, weights);
    const uint8_t* next = w + AHEAD;
    stream(ask, w, Q::BLOCK);
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
  const Rows taken = rows_of(x, rows, begin, end, blocks);
  if (taken.rows == 1) return one_int8<Q>(w, taken.x[0], blocks, c);
  if (rows <= TILE) return few_int8<Q>(w, taken.x[0], taken.rows, blocks, c);
#if defined(FINIAL_TILES)
  (void)target;
  return meet_registers<Q>(w, taken, blocks, c);
#else
  for (int64_t i = 0; i < taken.rows * PANEL; i += W) store(c + i, zero());
  for (int64_t b = 0; b < blocks; ++b, w += Q::BLOCK) {
    Multiply product;
    for (int v = 0; v < PANEL_VECTORS; ++v) product.scale[v] = load_f16(w + v * W * 2);
    expect(target, taken.rows * b / blocks, taken.rows * (b + 1) / blocks);
#if defined(FINIAL_INT8_TABLE)
    Table table;
    if (taken.rows >= TABLE_ROWS && table.fill(product.scale)) {
      add_rows<Q>(w, table, product, taken, b, c);
      continue;
    }
#endif
    add_rows<Q>(w, product, product, taken, b, c);
  }
#endif
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
