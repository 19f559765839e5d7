// linear: y[t, o] = sum_k x[t, k] w[o, k] + bias[o], weights in any format, float32 activations and accumulation.
//
// Shapes: x [rows, n_in], w [n_out, n_in], y [rows, n_out]. Reference: backends/reference.py `linear`. Weights enter
// exactly as quants.py decodes them; what differs is the order of the sum: W * ACC partial sums of n_in / (W * ACC)
// terms each. Tolerance per output: (n_in / (W * ACC) + log2(W * ACC) + 1) * 2^-24 * sum_k |x w|.
// That order is the same in every path below, so a row's result is bit-equal at any number of rows.
//
// One row: n_out * row_bytes from memory for 2 n_out n_in flops: bound by memory. One weight row at a time per thread,
// because several interleaved streams halve the bandwidth of the machines measured.
// Many rows: a panel of weight rows is decoded once into the second-level cache and multiplied in blocks of WIDE weight
// rows x 3 activation rows: 4 x 3 takes 7 loads for 12 FMAs; AVX2's 2 x 3, both accumulators at once, 5 for 6. Dot
// products like these reach 36 to 41 % of the fma peak (AVX2, Zen 3): what matters most is packed instead (packed.h).
#include "weights.h"

namespace finial::FINIAL_ISA {

namespace {

constexpr int ROUND = W * ACC;          // elements that one round over the accumulators takes
constexpr int64_t FEW_ROWS = 16;        // up to here a panel should stay in the first-level cache
constexpr int64_t SMALL_PANEL = 4096;   // floats: half of a 32 KiB first-level cache
constexpr int64_t LARGE_PANEL = 65536;  // floats: a quarter of a 1 MiB second-level cache

FINIAL_INLINE float total(const V (&acc)[ACC]) {
  V s[ACC];
  for (int i = 0; i < ACC; ++i) s[i] = acc[i];
  for (int width = ACC / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] = add(s[i], s[i + width]);
  return sum(s[0]);
}

// The last n < CHUNK elements of a row: both operands as floats, zero beyond n in vectors that are touched.
FINIAL_INLINE void tail(const float* w, const float* x, int64_t n, V (&acc)[ACC]) {
  for (int i = 0; n > 0; ++i, n -= W) {
    const bool whole = n >= W;
    const V a = whole ? load(w + i * W) : load_n(w + i * W, n), b = whole ? load(x + i * W) : load_n(x + i * W, n);
    for (int j = 0; j < ACC; ++j)
      if (j == i % ACC) acc[j] = fma(a, b, acc[j]);
  }
}

template <class Load>
void matvec(const Linear& l, const float* FINIAL_RESTRICT x, float* FINIAL_RESTRICT y, int64_t begin, int64_t end) {
  const int64_t chunks = l.n_in / CHUNK, rest = l.n_in % CHUNK;
  for (int64_t o = begin; o < end; ++o) {
    const uint8_t* p = l.weight + o * l.row_bytes;
    const float* at = x;
    V acc[ACC];
    for (V& a : acc) a = zero();
    for (int64_t c = 0; c < chunks; ++c, p += Load::CHUNK_BYTES, at += CHUNK) {
      V w[VECTORS];
      Load::chunk(p, w);
      for (int i = 0; i < VECTORS; ++i) acc[i % ACC] = fma(w[i], load(at + i * W), acc[i % ACC]);
    }
    if (rest > 0) {
      float w[CHUNK];
      decode(l.format, p, rest, w);
      tail(w, at, rest, acc);
    }
    y[o] = total(acc) + (l.bias != nullptr ? l.bias[o] : 0.0f);
  }
}

template <class Load>
void decode_chunks(Format format, const uint8_t* p, int64_t n, float* out) {
  for (; n >= CHUNK; n -= CHUNK, p += Load::CHUNK_BYTES, out += CHUNK) {
    V w[VECTORS];
    Load::chunk(p, w);
    for (int i = 0; i < VECTORS; ++i) store(out + i * W, w[i]);
  }
  if (n > 0) decode(format, p, n, out);
}

void decode_fast(Format format, const uint8_t* p, int64_t n, float* out) {
  switch (format) {
    case Format::F16:
      return decode_chunks<LoadF16>(format, p, n, out);
    case Format::BF16:
      return decode_chunks<LoadBF16>(format, p, n, out);
    case Format::Q8_0:
      return decode_chunks<LoadQ8_0>(format, p, n, out);
    case Format::Q4_0:
      return decode_chunks<LoadQ4_0>(format, p, n, out);
    default:
      return decode(format, p, n, out);
  }
}

// NW weight rows (n_in floats apart) times NX activation rows; y rows are n_out apart. Takes PASS accumulators of each
// product at a time, so that NW * NX * PASS of them, NX activations and a weight fit the registers.
template <int NW, int NX>
void block(const Linear& l, const float* FINIAL_RESTRICT w, const float* FINIAL_RESTRICT x, float* FINIAL_RESTRICT y,
           int64_t o) {
  const int64_t n = l.n_in, whole = n / ROUND * ROUND;
  V acc[NW][NX][ACC];
  for (int pass = 0; pass < ACC; pass += PASS) {
    V part[NW][NX][PASS];
    for (int i = 0; i < NW; ++i)
      for (int j = 0; j < NX; ++j)
        for (V& a : part[i][j]) a = zero();
    for (int64_t k = pass * W; k < whole; k += ROUND) {
      for (int r = 0; r < PASS; ++r) {
        V row[NX];
        for (int j = 0; j < NX; ++j) row[j] = load(x + j * n + k + r * W);
        for (int i = 0; i < NW; ++i) {
          V weight = load(w + i * n + k + r * W);
          keep_in_register(weight);
          for (int j = 0; j < NX; ++j) part[i][j][r] = fma(weight, row[j], part[i][j][r]);
        }
      }
    }
    for (int i = 0; i < NW; ++i)
      for (int j = 0; j < NX; ++j)
        for (int r = 0; r < PASS; ++r) acc[i][j][pass + r] = part[i][j][r];
  }
  for (int i = 0; i < NW; ++i) {
    for (int j = 0; j < NX; ++j) {
      if (whole < n) tail(w + i * n + whole, x + j * n + whole, n - whole, acc[i][j]);
      y[j * l.n_out + o + i] = total(acc[i][j]) + (l.bias != nullptr ? l.bias[o + i] : 0.0f);
    }
  }
}

template <int NX>
void panel(const Linear& l, const float* w, int64_t count, const float* x, float* y, int64_t o) {
  int64_t i = 0;
  for (; i + WIDE <= count; i += WIDE) block<WIDE, NX>(l, w + i * l.n_in, x, y, o + i);
  for (; i < count; ++i) block<1, NX>(l, w + i * l.n_in, x, y, o + i);
}

int64_t panel_rows(const Linear& l, int64_t rows) {
  const int64_t fits = (rows <= FEW_ROWS ? SMALL_PANEL : LARGE_PANEL) / l.n_in;
  return fits < 4 ? 4 : fits / 4 * 4;
}

void matmul(const Linear& l, const float* x, float* y, int64_t rows, int64_t begin, int64_t end, float* scratch) {
  const int64_t step = panel_rows(l, rows);
  for (int64_t o = begin; o < end; o += step) {
    const int64_t count = end - o < step ? end - o : step;
    for (int64_t i = 0; i < count; ++i)
      decode_fast(l.format, l.weight + (o + i) * l.row_bytes, l.n_in, scratch + i * l.n_in);
    int64_t t = 0;
    for (; t + 3 <= rows; t += 3) panel<3>(l, scratch, count, x + t * l.n_in, y + t * l.n_out, o);
    if (rows - t == 2) panel<2>(l, scratch, count, x + t * l.n_in, y + t * l.n_out, o);
    if (rows - t == 1) panel<1>(l, scratch, count, x + t * l.n_in, y + t * l.n_out, o);
  }
}

}  // namespace

int64_t linear_scratch(const Linear& l, int64_t rows) { return panel_rows(l, rows) * l.n_in; }

void linear(const Linear& l, const float* x, float* y, int64_t rows, int64_t begin, int64_t end, float* scratch) {
  if (rows == 1) {
    switch (l.format) {
      case Format::F32:
        return matvec<LoadF32>(l, x, y, begin, end);
      case Format::F16:
        return matvec<LoadF16>(l, x, y, begin, end);
      case Format::BF16:
        return matvec<LoadBF16>(l, x, y, begin, end);
      case Format::Q8_0:
        return matvec<LoadQ8_0>(l, x, y, begin, end);
      case Format::Q4_0:
        return matvec<LoadQ4_0>(l, x, y, begin, end);
      default:
        break;
    }
  }
  matmul(l, x, y, rows, begin, end, scratch);
}

}  // namespace finial::FINIAL_ISA
