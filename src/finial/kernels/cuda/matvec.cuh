// Products of a few rows: out[r, o] = x[r, :] · weight[o, :], with what comes before and after it.
//
// Reference: backends/reference.py rms_norm, linear, silu_mul, add, select_rows, in that order.  Sums in float32.
// Each warp takes NR rows of the weight at a time; a lane reads 16 bytes of each, 32 lanes side by side.  The first
// loads are issued before the wait for the kernel before, so that memory never idles at the edge between two kernels.
// x goes through shared memory in chunks of K, as planes of four floats so that no two lanes meet in a bank; the norm's
// scale is one factor on the finished sums, whose squares are summed on the way.
#pragma once
#include "formats.cuh"
#include "reduce.cuh"

struct MatvecArgs {
  const u8* weight;   // [OUT, KP / UNIT * 16]; gated: rows gate 0, up 0, gate 1, up 1, …
  const u8* scales;   // f16 [OUT, KP / 32] or float [OUT]
  const float* bias;  // [OUT]
  const float* norm;  // [K]
  const float* x;     // [rows, x_stride]
  const i32* pick;    // [rows], row r is x[pick[r]]
  const float* add;   // [rows, add_stride]
  float* out;         // [rows, out_stride]
  i32 x_stride, add_stride, out_stride, padding;
};

// Format, K, OUT, R rows at a time (grid.y tiles of them), NR weight rows a warp, WARPS; SHARED bytes for
// x, LOADS in flight; NORM, EPS, BIAS, ADD, GATED, PICK.
template <class C>
struct Matvec {
  using F = typename C::Format;
  static constexpr int KP = round_up(C::K, 64), R = C::R, NR = C::NR, UNIT = F::UNIT;
  static constexpr int ROW_BYTES = KP / UNIT * 16, SCALE_BYTES = F::CHANNELS ? 4 : KP / 32 * 2;
  static constexpr int UNITS = KP / UNIT, STEPS = ceil_div(UNITS, 32);
  FINIAL_DEVICE static constexpr int least(int a, int b) { return a < b ? a : b; }
  FINIAL_DEVICE static constexpr int most(int a, int b) { return a > b ? a : b; }
  // S loads of each row are in registers at once; a chunk of x in shared memory feeds BATCHES of them.
  static constexpr int S = most(1, least(least(STEPS, C::LOADS / NR), C::SHARED / (R * UNIT * 128)));
  static constexpr int BATCHES = most(1, least(ceil_div(STEPS, S), C::SHARED / (R * UNIT * 128 * S)));
  static constexpr int CHUNK_UNITS = BATCHES * S * 32, CHUNK = CHUNK_UNITS * UNIT, CHUNKS = ceil_div(STEPS, BATCHES* S);
  static constexpr int TILES = ceil_div(C::OUT, C::WARPS* NR);
  static_assert(NR * R <= 32, "sums of one warp");
  using Raw = typename F::Raw;

  FINIAL_DEVICE static void load(Raw raw[NR][S], const MatvecArgs& a, int row, int batch) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < S; s++) {
      int unit = (batch * S + s) * 32 + lane;
      unit = unit < UNITS ? unit : UNITS - 1;  // x is zero beyond, so what is read does not count
#pragma unroll
      for (int n = 0; n < NR; n++) {
        const int o = row + n < C::OUT ? row + n : C::OUT - 1;
        raw[n][s] = F::load(a.weight + (u64)o * ROW_BYTES, a.scales + (u64)o * SCALE_BYTES, unit);
      }
    }
  }

  FINIAL_DEVICE static void stage(float* shared, const MatvecArgs& a, int first, int chunk, float squares[R]) {
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int row = C::PICK ? a.pick[first + r] : first + r;
      const float* x = a.x + (u64)row * a.x_stride;
#pragma unroll 4
      for (int i = threadIdx.x; i < CHUNK; i += C::WARPS * 32) {
        const int k = chunk * CHUNK + i;
        float v = 0.0f;
        if (k < C::K) {
          v = ptx::load_shared_by_all(x + k);
          if (C::NORM) squares[r] += v * v, v *= a.norm[k];
        }
        shared[((r * (UNIT / 4) + i % UNIT / 4) * CHUNK_UNITS + i / UNIT) * 4 + i % 4] = v;
      }
    }
  }

  FINIAL_DEVICE static void multiply(float sums[R * NR], const Raw raw[NR][S], const float* shared, int batch) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < S; s++) {
      const int unit = (batch * S + s) * 32 + lane;
      float part[R * NR];
#pragma unroll
      for (int i = 0; i < R * NR; i++) part[i] = 0.0f;
#pragma unroll
      for (int p = 0; p < UNIT / 4; p++) {
        float w[NR][4];
#pragma unroll
        for (int n = 0; n < NR; n++) F::plane(raw[n][s], p, w[n]);
#pragma unroll
        for (int r = 0; r < R; r++) {
          const Float4 x = *(const Float4*)(shared + ((r * (UNIT / 4) + p) * CHUNK_UNITS + unit) * 4);
#pragma unroll
          for (int n = 0; n < NR; n++) {
            float& sum = F::BLOCKS ? part[r * NR + n] : sums[r * NR + n];
            sum += x.x * w[n][0], sum += x.y * w[n][1], sum += x.z * w[n][2], sum += x.w * w[n][3];
          }
        }
      }
      if (F::BLOCKS) {
#pragma unroll
        for (int n = 0; n < NR; n++) {
          const float scale = F::scale(raw[n][s]);
#pragma unroll
          for (int r = 0; r < R; r++) sums[r * NR + n] += part[r * NR + n] * scale;
        }
      }
    }
  }

  FINIAL_DEVICE static void run(const MatvecArgs& a) {
    FINIAL_DYNAMIC_SHARED(memory);
    __shared__ float warp_squares[C::WARPS][R];
    float* shared = (float*)memory;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.y * R;
    ptx::allow_next();
    Raw raw[NR][S];
    load(raw, a, (blockIdx.x * C::WARPS + warp) * NR, 0);
    ptx::wait_previous();
    float squares[R];
#pragma unroll
    for (int r = 0; r < R; r++) squares[r] = 0.0f;
    bool fresh = true;  // the first batch is in registers, the squares are not complete
    for (int tile = blockIdx.x; tile < TILES; tile += gridDim.x) {
      const int row = (tile * C::WARPS + warp) * NR;
      float sums[R * NR];
#pragma unroll
      for (int i = 0; i < R * NR; i++) sums[i] = 0.0f;
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        if (fresh || CHUNKS > 1) {
          if (!fresh || chunk > 0) ptx::sync_block();  // nobody reads the chunk before
          float ignored[R];
          stage(shared, a, first, chunk, fresh ? squares : ignored);
          ptx::sync_block();
        }
#pragma unroll 1
        for (int batch = 0; batch < BATCHES; batch++) {
          const int at = chunk * BATCHES + batch;
          if (BATCHES * CHUNKS * S > STEPS && at * S >= STEPS) break;
          if (!fresh || at > 0) load(raw, a, row, at);
          multiply(sums, raw, shared, batch);
        }
      }
      if (C::NORM && fresh) {
#pragma unroll
        for (int r = 0; r < R; r++) {
          const float total = warp_sum(squares[r]);
          if (lane == 0) warp_squares[warp][r] = total;
        }
        ptx::sync_block();
      }
      fresh = false;
      finish(a, warp_sums<R * NR>(sums), row, first, warp_squares);
    }
  }

  FINIAL_DEVICE static void finish(const MatvecArgs& a, float v, int row, int first, float (*warp_squares)[R]) {
    constexpr int SHIFT = 5 - log2_of(R * NR);
    const int lane = threadIdx.x % 32, index = lane >> SHIFT, r = index / NR, o = row + index % NR;
    if (C::NORM) {
      float total = 0.0f;
      for (int w = 0; w < C::WARPS; w++) total += warp_squares[w][r];
      v *= ptx::reciprocal_root(total / (float)C::K + C::EPS);
    }
    if (F::CHANNELS && o < C::OUT) v *= ((const float*)a.scales)[o];
    if (C::BIAS && o < C::OUT) v += a.bias[o];
    int column = o;
    bool writes = (lane & ((1 << SHIFT) - 1)) == 0 && o < C::OUT;
    if (C::GATED) {
      const float up = ptx::shuffle_xor(v, 1 << SHIFT);
      v = silu(v) * up;
      column = o / 2;
      writes = writes && o % 2 == 0;
    }
    if (!writes) return;
    if (C::ADD) v += ptx::load_shared_by_all(a.add + (u64)(first + r) * a.add_stride + column);
    a.out[(u64)(first + r) * a.out_stride + column] = v;
  }
};

template <class C>
FINIAL_DEVICE void matvec(const MatvecArgs& a) {
  Matvec<C>::run(a);
}
