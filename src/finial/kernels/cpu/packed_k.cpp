// Products of int8 activations with packed q4_k, q5_k and q6_k weights (layouts: packed_k.h).
//
// With d and m a block's f16 factors, s and t a group's six-bit (q6_k: int8) ones, x = a q the rounded activations:
//   q4_k, q5_k  acc = fma(float(sum_32 level q), (d s) a, acc), acc = fma(m t, -a sum_32 q, acc) for each group of 32
//   q6_k        acc = fma(s0 sum_16 (level - 32) q + s1 sum_16 (level - 32) q, d a, acc) for each two groups of 16
// Sums of levels and d s are exact, and so is what q6_k takes from its two groups (below 2^24): what is rounded is two
// steps a group, so an output is off by at most (n_in / 16 + 4) 2^-24 sum_k |x| (|d s level| + |m t|) against exact
// arithmetic on the rounded activations (for q6_k with |level - 32| and without t). The order is one at any number of
// rows.
//
// One row of AVX-512, instructions for a block of 256 inputs of 32 outputs: 128 multiplying, 192 (q4_k), 320 (q5_k),
// 288 (q6_k) to take levels out of their bytes, some 200 for factors and ends of groups; 4608, 5632, 6720 bytes.
// Measured on one core of EPYC Genoa, 1024 inputs and outputs: one row 39 (q4_k), 35 (q5_k) and 48 (q6_k) GB/s from the
// second-level cache; 512 rows 340, 334 and 305 of 473 GFLOP/s, where a group's levels stay in registers while rows
// pass by in pairs: beside a row's 16 multiplications of bytes 4 of floats want the same units (q6_k 6), which makes 80
// (73) % the most. Asking for the panel early changes nothing there (4 rows, 15 GB/s both ways), and much on EPYC Turin
// (panels.h).
//
// With AVX2's sixteen registers two to four rows take a vector of outputs at a time: four vectors of levels stay in
// registers while rows pass by, where otherwise a group's 32 lie in memory. GB/s on one core of an AMD EPYC (Zen 3),
// and before, in turn, medians: from the second-level cache q4_k 2 rows 11.1 (7.1), 3 rows 10.9 (8.9), 4 rows 6.5
// (5.2); q5_k 9.8 (6.4), 11.9 (9.0), 5.3 (4.4); q6_k 12.1 (9.3), 10.4 (7.9), 9.0 (7.9); from memory with two threads
// that read 26 to 29 q4_k 17.0 (12.0), 12.9 (10.2), 9.2 (7.7), q6_k 17.4 (15.9), 14.4 (12.8), 9.8 (9.1). One row of
// q4_k is 15 % slower so, and many 10 %. On a Zen 4 with AVX2 alone, from memory, one row of q5_k, which is done so,
// takes 0.79 to 0.93 of the time (1.04 from the second-level cache), of q6_k 1.16 to 1.21, of q4_k 0.91 to 0.99.
#include "packed_k.h"

#include "int8_scales.h"
#include "packed_k_levels.h"
#include "packed_k_tiles.h"

namespace finial::FINIAL_ISA {

#if !defined(FINIAL_PACKS_INT8)

void pack_k(const Linear&, uint8_t*, int64_t) {}
void tiles_k(const Linear&, const uint8_t*, const Product&, const Target&, float*) {}

#else

namespace {

template <class K, int HALF>
FINIAL_INLINE void half_sums(const I (&w)[NV][4], const Int8Block& x, I (&sums)[NV]) {
  I quad[4];
  for (int j = 0; j < 4; ++j) quad[j] = broadcast(x.q + 16 * HALF + 4 * j);
  for (int v = 0; v < NV; ++v) sums[v] = dot_four<K::LEVEL_BITS>(sums[v], w[v], quad);
}

// One row; nothing but registers between its groups.
template <class K, int ODD>
FINIAL_INLINE void add_group(const uint8_t* pair, const typename K::Factors& f, int group, const Int8Block& x,
                             V (&acc)[NV]) {
  I low[NV], high[NV], w[NV][4];
  for (int v = 0; v < NV; ++v) K::template start<Multiplied>(x, low[v], high[v]);
  for (int v = 0; v < NV; ++v) K::template quads<ODD, 0>(pair, v, w[v]);
  half_sums<K, 0>(w, x, low);
  for (int v = 0; v < NV; ++v) K::template quads<ODD, 1>(pair, v, w[v]);
  half_sums<K, 1>(w, x, high);
  for (int v = 0; v < NV; ++v) {
    V scale, second;
    K::template of_group<ODD>(f, pair, group, v, scale, second);
    const Multiplied::Row row{set1(x.scale)};
    const V product = mul(K::scaled(f.d[v], scale), row.scale);
    acc[v] = K::template add<Multiplied>(row, low[v], high[v], scale, second, product, x, acc[v]);
  }
}

// Part i of n of what is asked for with a block: as much as the block, head included.
template <class K>
FINIAL_INLINE void stream_part(const Asked& ask, const uint8_t* w, int i, int n) {
  constexpr int LINES = K::BYTES / 64;
  stream(ask, w + LINES * i / n * 64, (LINES * (i + 1) / n - LINES * i / n) * 64);
}

constexpr Enough ENOUGH_K{2, 8192};

// c [PANEL] = a panel times one row.
template <class K, bool ASKS>
void one_k(const uint8_t* FINIAL_RESTRICT w, const Int8Block* FINIAL_RESTRICT x, int64_t blocks,
           float* FINIAL_RESTRICT c) {
  const Asked ask = asks(1, ENOUGH_K);
  V acc[NV];
  for (V& a : acc) a = zero();
  for (int64_t b = 0; b < blocks; ++b, w += K::BYTES) {
    typename K::Factors f;
    K::load(w, f);
    for (int p = 0; p < GROUPS / 2; ++p, x += 2) {
      const uint8_t* pair = w + K::HEAD + p * K::PAIR;
      if (ASKS) stream_part<K>(ask, w, p, GROUPS / 2);
      keep_near(x + 3), keep_near(x + 4);
      add_group<K, 0>(pair, f, 2 * p, x[0], acc);
      add_group<K, 1>(pair, f, 2 * p + 1, x[1], acc);
    }
  }
  for (int v = 0; v < NV; ++v) store(c + v * W, acc[v]);
}

#if defined(FINIAL_AVX2)

// Half a group of N rows `x` with a vector of outputs, whose levels are w.
template <class K, int HALF, int N>
FINIAL_INLINE void add_half_group(const I (&w)[4], const Int8Block*& x, I (&sums)[N]) {
#pragma GCC unroll 4
  for (int r = 0; r < N; ++r) {
    I quad[4];
    for (int j = 0; j < 4; ++j) quad[j] = broadcast(x[r].q + 16 * HALF + 4 * j);
    sums[r] = dot_four<K::LEVEL_BITS>(sums[r], w, quad);
    keep_in_register(sums[r]);
    load_afresh(x);
  }
}

// A group of N rows with a vector of outputs: four levels at a time in registers, which rows pass by.
template <class K, int ODD, int N>
FINIAL_INLINE void add_few(const uint8_t*& pair, const typename K::Factors& f, int group, int v, const Int8Block*& x,
                           float* c) {
  I low[N], high[N], w[4];
  for (int r = 0; r < N; ++r) K::template start<Multiplied>(x[r], low[r], high[r]);
  K::template quads<ODD, 0>(pair, v, w);
  for (I& q : w) keep_in_register(q);
  add_half_group<K, 0, N>(w, x, low);
  K::template quads<ODD, 1>(pair, v, w);
  for (I& q : w) keep_in_register(q);
  add_half_group<K, 1, N>(w, x, high);
  V scale, second;
  K::template of_group<ODD>(f, pair, group, v, scale, second);
  const V scaled = K::scaled(f.d[v], scale);
#pragma GCC unroll 4
  for (int r = 0; r < N; ++r) {
    float* y = c + r * PANEL + v * W;
    const Multiplied::Row row{set1(x[r].scale)};
    store(y, K::template add<Multiplied>(row, low[r], high[r], scale, second, mul(scaled, row.scale), x[r], load(y)));
  }
  load_afresh(pair);
}

// c [N, PANEL] = a panel times up to 4 rows. A function of its own: inlined, GCC has too few registers for it.
template <class K, int N>
FINIAL_APART void few_k(const uint8_t* FINIAL_RESTRICT w, const Int8Block* FINIAL_RESTRICT x, int64_t blocks,
                        float* FINIAL_RESTRICT c) {
  const Asked ask = asks(N, ENOUGH_K);
  for (int64_t i = 0; i < N * PANEL; i += W) store(c + i, zero());
  for (int64_t b = 0; b < blocks; ++b, w += K::BYTES) {
    typename K::Factors f;
    K::load(w, f);
    for (int p = 0; p < GROUPS / 2; ++p, x += 2 * N) {
      const uint8_t* pair = w + K::HEAD + p * K::PAIR;
      const Int8Block *even = x, *odd = x + N;
      stream_part<K>(ask, w, p, GROUPS / 2);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        add_few<K, 0, N>(pair, f, 2 * p, v, even, c);
        add_few<K, 1, N>(pair, f, 2 * p + 1, v, odd, c);
      }
    }
  }
}

#endif

// Levels and factors of a group of 32 inputs of a panel, which many rows meet.
template <class K>
struct Levels32 {
  I w[2][NV][4];
  V scale[NV], second[NV];
};

template <class K, int ODD>
FINIAL_INLINE void take(const uint8_t* pair, const typename K::Factors& f, int group, Levels32<K>& g) {
  for (int v = 0; v < NV; ++v) {
    K::template quads<ODD, 0>(pair, v, g.w[0][v]);
    K::template quads<ODD, 1>(pair, v, g.w[1][v]);
    K::template of_group<ODD>(f, pair, group, v, g.scale[v], g.second[v]);
  }
}

// N rows with it: more sums are under way than one row has.
template <class K, int N, class Scale>
FINIAL_INLINE void add_rows(const Levels32<K>& g, const Scale& scales, const Int8Block* x, float* c) {
  I low[N][NV], high[N][NV];
  for (int r = 0; r < N; ++r) {
    for (int v = 0; v < NV; ++v) K::template start<Scale>(x[r], low[r][v], high[r][v]);
    half_sums<K, 0>(g.w[0], x[r], low[r]);
    half_sums<K, 1>(g.w[1], x[r], high[r]);
  }
  for (int r = 0; r < N; ++r) {
    const typename Scale::Row row = Scale::row(scales, x[r]);
    for (int v = 0; v < NV; ++v) {
      float* at = c + r * PANEL + v * W;
      const V product = Scale::product(scales, row, v);
      store(at, K::template add<Scale>(row, low[r][v], high[r][v], g.scale[v], g.second[v], product, x[r], load(at)));
    }
  }
}

// Levels are taken out of a pair of groups a thousand cycles after each other, so the processor's own prefetching has
// forgotten the panel: what lies a pair further on is asked for, a group's share of it with the tiles of its rows.
template <class K, int ODD, class Scale>
FINIAL_APART void meet_group(const uint8_t* w, const typename K::Factors& f, int group, const Rows& rows, int64_t block,
                             float* FINIAL_RESTRICT c) {
  const uint8_t* pair = w + K::HEAD + group / 2 * K::PAIR;
  Levels32<K> g;
  take<K, ODD>(pair, f, group, g);
  V scaled[NV];
  for (int v = 0; v < NV; ++v) scaled[v] = K::scaled(f.d[v], g.scale[v]);
  const Scale made(scaled);
  const typename Scale::Held scales = made;
  const int64_t share = K::BYTES / GROUPS, ahead = (share + 64 * rows.tiles) / (64 * rows.tiles) * 64;
  const uint8_t* next = pair + K::PAIR + ODD * share;
  const Asked ask = rows.rows <= TILE ? asks(rows.rows, ENOUGH_K) : Asked{Ask::Nothing, 0};
  const bool few = ask.how != Ask::Nothing;
  stream_part<K>(ask, w, group, GROUPS);
  for (int64_t i = 0; i < rows.tiles; ++i) {
    if (!few) prefetch(next + i * ahead, ahead);
    const Int8Block *x = rows.x[i] + block * rows.count[i], *end = x + rows.count[i];
    for (; x + 2 <= end; x += 2, c += 2 * PANEL) add_rows<K, 2>(g, scales, x, c);
    if (x < end) add_rows<K, 1>(g, scales, x, c), c += PANEL;
  }
}

// A block of a panel with rows.
template <class K, class Scale>
void meet_block(const uint8_t* w, const typename K::Factors& f, const Rows& rows, int64_t block,
                float* FINIAL_RESTRICT c) {
  for (int i = 0; i < GROUPS; i += 2) {
    meet_group<K, 0, Scale>(w, f, i, rows, GROUPS * block + i, c);
    meet_group<K, 1, Scale>(w, f, i + 1, rows, GROUPS * block + i + 1, c);
  }
}

template <class K>
void tiles_of(const uint8_t* FINIAL_RESTRICT w, const Product& p, int64_t n_in, const Target& target,
              float* FINIAL_RESTRICT c) {
  const Rows taken = rows_of(p.x, p.rows, p.begin, p.end, n_in / 32);
  const int64_t blocks = n_in / 256;
#if defined(FINIAL_AVX2)
  if constexpr (K::LEVEL_BITS == 5)
    if (taken.rows == 1) return few_k<K, 1>(w, taken.x[0], blocks, c);
#endif
  if (taken.rows == 1)
    return (asks(1, ENOUGH_K).how == Ask::Nothing ? one_k<K, false> : one_k<K, true>)(w, taken.x[0], blocks, c);
#if defined(FINIAL_AVX2)  // more rows, or these as the last of many, meet a group's levels in memory
  if (p.rows == 2) return few_k<K, 2>(w, taken.x[0], blocks, c);
  if (p.rows == 3) return few_k<K, 3>(w, taken.x[0], blocks, c);
  if (p.rows == 4) return few_k<K, 4>(w, taken.x[0], blocks, c);
#endif
  for (int64_t i = 0; i < taken.rows * PANEL; i += W) store(c + i, zero());
  for (int64_t b = 0; b < blocks; ++b, w += K::BYTES) {
    if (p.rows > TILE) expect(target, taken.rows * b / blocks, taken.rows * (b + 1) / blocks);
    typename K::Factors f;
    K::load(w, f);
#if defined(FINIAL_INT8_TABLE)
    if (taken.rows >= TABLE_ROWS) {
      meet_block<K, Table>(w, f, taken, b, c);
      continue;
    }
#endif
    meet_block<K, Multiplied>(w, f, taken, b, c);
  }
}

// --- packing --------------------------------------------------------------------------------------------------------

FINIAL_INLINE uint32_t word_of(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

// Four planes of six-bit levels, four levels of each, into three; `at` says where plane k goes.
template <class F>
FINIAL_INLINE void put_six(const uint32_t (&plane)[4], F at) {
  for (int k = 0; k < 3; ++k) {
    const uint32_t word = plane[k] | ((plane[3] >> (2 * k)) & 0x03030303u) << 6;
    at(k, word);
  }
}

// The factors of a q4_k or q5_k block (quants.py, _k_scales), output o of a panel. A word is four groups.
void put_head(const uint8_t* from, int64_t o, uint8_t* out) {
  std::memcpy(out + 2 * o, from, 2);
  std::memcpy(out + PANEL * 2 + 2 * o, from + 2, 2);
  const uint32_t first = word_of(from + 4), second = word_of(from + 8), third = word_of(from + 12);
  const uint32_t low = 0x0F0F0F0Fu, high = 0x30303030u, six = low | high;
  put_six(
      {first & six, (third & low) | ((first >> 2) & high), second & six, ((third >> 4) & low) | ((second >> 2) & high)},
      [&](int k, uint32_t word) {
        for (int t = 0; t < 4; ++t) out[PANEL * 4 + k * QUAD + t * PANEL + o] = static_cast<uint8_t>(word >> (8 * t));
      });
}

FINIAL_INLINE void put_nibbles(const uint8_t* from, int64_t o, uint8_t* out, int64_t pair_bytes) {
  for (int p = 0; p < 4; ++p)
    for (int j = 0; j < 8; ++j) std::memcpy(out + p * pair_bytes + j * QUAD + o * 4, from + p * 32 + j * 4, 4);
}

void put_q4_k(const uint8_t* from, int64_t o, uint8_t* out) {
  put_head(from, o, out);
  put_nibbles(from + 16, o, out + Q4K::HEAD, Q4K::PAIR);
}

void put_q5_k(const uint8_t* from, int64_t o, uint8_t* out) {
  put_head(from, o, out);
  put_nibbles(from + 48, o, out + Q5K::HEAD + 2 * QUAD, Q5K::PAIR);
  for (int group = 0; group < GROUPS; ++group) {  // bit `group` of byte i is that of input i
    uint32_t bits = 0;
    for (int j = 0; j < 8; ++j) bits |= ((word_of(from + 16 + 4 * j) >> group) & 0x01010101u) << j;
    std::memcpy(out + Q5K::HEAD + group / 2 * Q5K::PAIR + group % 2 * QUAD + o * 4, &bits, 4);
  }
}

void put_q6_k(const uint8_t* from, int64_t o, uint8_t* out) {
  std::memcpy(out + 2 * o, from + 208, 2);
  for (int group = 0; group < GROUPS; ++group) {
    const uint8_t *low = from + group / 4 * 64 + group % 2 * 32, *high = from + 128 + group / 4 * 32;
    const int nibble = group % 4 < 2 ? 0 : 4, pair = 2 * (group % 4);
    uint8_t* to = out + Q6K::HEAD + group * Q6K::GROUP;
    to[o] = from[192 + 2 * group], to[PANEL + o] = from[193 + 2 * group];
    to += PANEL * 2 + o * 4;
    for (int half = 0; half < 2; ++half, to += 3 * QUAD) {
      uint32_t plane[4];
      for (int j = 0; j < 4; ++j)
        plane[j] = ((word_of(low + 16 * half + 4 * j) >> nibble) & 0x0F0F0F0Fu) |
                   ((word_of(high + 16 * half + 4 * j) >> pair) & 0x03030303u) << 4;
      put_six(plane, [&](int k, uint32_t word) { std::memcpy(to + k * QUAD, &word, 4); });
    }
  }
}

void put_panel(const Linear& l, uint8_t* out, int64_t first, void (*put)(const uint8_t*, int64_t, uint8_t*)) {
  const int64_t block = FORMATS[static_cast<int>(l.format)].block_bytes;
  for (int64_t b = 0; b < l.n_in / 256; ++b, out += block * PANEL)
    for (int64_t o = 0; o < PANEL && first + o < l.n_out; ++o)
      put(l.weight + (first + o) * l.row_bytes + b * block, o, out);
}

}  // namespace

#if defined(FINIAL_TILES)
void multiply_k(const Product& p, int64_t begin, int64_t end) {
  if (p.first->format == Format::Q4_K) multiply_tiles<ByGroups<Q4K>>(p, begin, end);
  if (p.first->format == Format::Q5_K) multiply_tiles<ByGroups<Q5K>>(p, begin, end);
}
#endif

void pack_k(const Linear& l, uint8_t* out, int64_t first) {
  if (l.format == Format::Q4_K) put_panel(l, out, first, put_q4_k);
  if (l.format == Format::Q5_K) put_panel(l, out, first, put_q5_k);
  if (l.format == Format::Q6_K) put_panel(l, out, first, put_q6_k);
}

void tiles_k(const Linear& l, const uint8_t* w, const Product& p, const Target& target, float* c) {
  if (l.format == Format::Q4_K) tiles_of<Q4K>(w, p, l.n_in, target, c);
  if (l.format == Format::Q5_K) tiles_of<Q5K>(w, p, l.n_in, target, c);
  if (l.format == Format::Q6_K) tiles_of<Q6K>(w, p, l.n_in, target, c);
}

#endif

}  // namespace finial::FINIAL_ISA
