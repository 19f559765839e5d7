// Products of many rows on tensor cores: out[r, o] = x[r, :] · weight[o, :], x in bf16, sums in float32.
//
// Reference: backends/reference.py linear, silu_mul, add.  x is rounded to bf16 by the kernel that makes it; weights of
// other formats than bf16 become bf16 on their way to shared memory (fp8's channel scale stays float32).
// Tiles of BM x BN, 64 deep, in a ring of STAGES in shared memory; rows of 128 bytes whose 16-byte chunks are permuted
// by the row number, so that ldmatrix meets no bank twice.  The first weights are asked for before the wait for x. With
// SPLIT > 1 blocks share the depth, and the last one of a tile adds their sums in order.
#pragma once
#include "formats.cuh"

struct GemmArgs {
  const u8 *weight, *scales;
  const float* bias;
  const u16* x;      // bf16 [rows, x_stride], zero beyond K
  const float* add;  // [rows, add_stride]
  void* out;         // float or bf16 [rows, out_stride]
  float* parts;      // [SPLIT, rows, OUT]
  u32* tickets;      // [tiles], zero between launches
  i32 x_stride, add_stride, out_stride, rows;
};

// Format, K, OUT, BM, BN, WM, WN (tile of a warp), STAGES, SPLIT, BIAS, ADD, GATED, HALF (result in bf16).
template <class C>
struct Gemm {
  using F = typename C::Format;
  static constexpr int BM = C::BM, BN = C::BN, WM = C::WM, WN = C::WN, STAGES = C::STAGES, BK = 64;
  static constexpr int WARPS_N = BN / WN, THREADS = BM / WM * WARPS_N * 32;
  static constexpr int KP = round_up(C::K, 64), DEPTH = KP / BK, SHARE = ceil_div(DEPTH, C::SPLIT);
  static constexpr int ROW_BYTES = KP / F::UNIT * 16, SCALE_BYTES = F::CHANNELS ? 4 : KP / 32 * 2;
  static constexpr int STAGE_BYTES = (BM + BN) * 128;
  static constexpr bool COPIES = F::UNIT == 8 && C::RAW;  // bf16: as it is
  static constexpr int UNITS = BN * BK / F::UNIT, PER = ceil_div(UNITS, THREADS);
  using Raw = typename F::Raw;

  FINIAL_DEVICE static u8* chunk_at(u8* tile, int row, int chunk) {
    return tile + row * 128 + ((chunk ^ (row & 7)) * 16);
  }

  FINIAL_DEVICE static void copy_x(u8* tile, const GemmArgs& a, int row0, int depth) {
#pragma unroll
    for (int i = threadIdx.x; i < BM * 8; i += THREADS) {
      const int row = i / 8, chunk = i % 8;
      const bool valid = row0 + row < a.rows;
      ptx::copy_async(chunk_at(tile, row, chunk),
                      a.x + (u64)(valid ? row0 + row : 0) * a.x_stride + depth * BK + chunk * 8, valid);
    }
  }
  FINIAL_DEVICE static void copy_weight(u8* tile, const GemmArgs& a, int column0, int depth) {
#pragma unroll
    for (int i = threadIdx.x; i < BN * 8; i += THREADS) {
      const int row = i / 8, chunk = i % 8;
      const bool valid = column0 + row < C::OUT;
      ptx::copy_async(chunk_at(tile, row, chunk),
                      a.weight + (u64)(valid ? column0 + row : 0) * ROW_BYTES + (depth * 8 + chunk) * 16, valid);
    }
  }
  FINIAL_DEVICE static void load_weight(Raw raw[PER], const GemmArgs& a, int column0, int depth) {
#pragma unroll
    for (int n = 0; n < PER; n++) {
      const int i = n * THREADS + threadIdx.x;
      if (i < UNITS) {
        const int row = i / (BK / F::UNIT), unit = i % (BK / F::UNIT);
        const int o = column0 + row < C::OUT ? column0 + row : C::OUT - 1;  // such columns are not written
        raw[n] = F::load(a.weight + (u64)o * ROW_BYTES, a.scales + (u64)o * SCALE_BYTES, depth * (BK / F::UNIT) + unit);
      }
    }
  }
  FINIAL_DEVICE static void store_weight(u8* tile, const Raw raw[PER]) {
#pragma unroll
    for (int n = 0; n < PER; n++) {
      const int i = n * THREADS + threadIdx.x;
      if (i < UNITS) {
        const int row = i / (BK / F::UNIT), first = i % (BK / F::UNIT) * F::UNIT;
        const float scale = F::scale(raw[n]);
#pragma unroll
        for (int p = 0; p < F::UNIT / 4; p++) {
          float w[4];
          F::plane(raw[n], p, w);
          const int e = first + 4 * p;
          u32* to = (u32*)(chunk_at(tile, row, e / 8) + e % 8 * 2);
          to[0] = ptx::pack_bf16(w[0] * scale, w[1] * scale);
          to[1] = ptx::pack_bf16(w[2] * scale, w[3] * scale);
        }
      }
    }
  }

  FINIAL_DEVICE static void run(const GemmArgs& a) {
    FINIAL_DYNAMIC_SHARED(memory);
    __shared__ u32 ticket;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row0 = blockIdx.y * BM, column0 = blockIdx.x * BN;
    const int first = blockIdx.z * SHARE, last = first + SHARE < DEPTH ? first + SHARE : DEPTH;
    const int m0 = warp / WARPS_N * WM, n0 = warp % WARPS_N * WN;
    ptx::allow_next();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
      if (first + s < last) {
        u8* tile = memory + s * STAGE_BYTES + BM * 128;
        if (COPIES) {
          copy_weight(tile, a, column0, first + s);
        } else {
          Raw raw[PER];
          load_weight(raw, a, column0, first + s);
          store_weight(tile, raw);
        }
      }
    }
    ptx::wait_previous();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
      if (first + s < last) copy_x(memory + s * STAGE_BYTES, a, row0, first + s);
      ptx::copy_commit();
    }
    float sums[WM / 16][WN / 8][4];
#pragma unroll
    for (int i = 0; i < WM / 16; i++)
#pragma unroll
      for (int j = 0; j < WN / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[i][j][e] = 0.0f;

    for (int depth = first; depth < last; depth++) {
      ptx::copy_wait<STAGES - 2>();
      ptx::sync_block();
      const int next = depth + STAGES - 1, slot = (next - first) % STAGES;
      u8* next_tile = memory + slot * STAGE_BYTES;
      Raw raw[PER];
      if (next < last) {
        copy_x(next_tile, a, row0, next);
        if (COPIES)
          copy_weight(next_tile + BM * 128, a, column0, next);
        else
          load_weight(raw, a, column0, next);
      }
      ptx::copy_commit();
      u8* x_tile = memory + (depth - first) % STAGES * STAGE_BYTES;
      u8* w_tile = x_tile + BM * 128;
#pragma unroll
      for (int k = 0; k < BK / 16; k++) {
        u32 left[WM / 16][4], right[WN / 16][4];
#pragma unroll
        for (int i = 0; i < WM / 16; i++)
          ptx::load_matrix_x4(left[i], chunk_at(x_tile, m0 + i * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
        for (int j = 0; j < WN / 16; j++)
          ptx::load_matrix_x4(right[j], chunk_at(w_tile, n0 + j * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < WM / 16; i++)
#pragma unroll
          for (int j = 0; j < WN / 8; j++) ptx::mma_bf16(sums[i][j], left[i], &right[j / 2][j % 2 * 2]);
      }
      if (!COPIES && next < last) store_weight(next_tile + BM * 128, raw);
    }
    ptx::copy_wait<0>();
    if (C::SPLIT > 1) {
      const u64 plane = (u64)a.rows * C::OUT;
      each(a, row0 + m0, column0 + n0, sums, [&](int row, int column, float* pair) {
        float* to = a.parts + blockIdx.z * plane + (u64)row * C::OUT + column;
        to[0] = pair[0];
        if (column + 1 < C::OUT) to[1] = pair[1];
      });
      ptx::fence_device();
      ptx::sync_block();
      u32* counter = a.tickets + blockIdx.y * gridDim.x + blockIdx.x;
      if (threadIdx.x == 0) ticket = ptx::atomic_add(counter, 1);
      ptx::sync_block();
      if (ticket != C::SPLIT - 1) return;
      ptx::fence_device();
      if (threadIdx.x == 0) *counter = 0;
      each(a, row0 + m0, column0 + n0, sums, [&](int row, int column, float* pair) {
        pair[0] = pair[1] = 0.0f;
        for (int s = 0; s < C::SPLIT; s++) {
          const float* from = a.parts + s * plane + (u64)row * C::OUT + column;
          pair[0] += ptx::load_shared_by_all(from);
          if (column + 1 < C::OUT) pair[1] += ptx::load_shared_by_all(from + 1);
        }
      });
    }
    each(a, row0 + m0, column0 + n0, sums, [&](int row, int column, float* pair) {
      float v[2] = {pair[0], pair[1]};
#pragma unroll
      for (int e = 0; e < 2; e++) {
        if (column + e >= C::OUT) continue;
        if (F::CHANNELS) v[e] *= ((const float*)a.scales)[column + e];
        if (C::BIAS) v[e] += a.bias[column + e];
      }
      if (C::GATED) {
        put(a, row, column / 2, silu(v[0]) * v[1]);
      } else {
        put(a, row, column, v[0]);
        if (column + 1 < C::OUT) put(a, row, column + 1, v[1]);
      }
    });
  }

  FINIAL_DEVICE static void put(const GemmArgs& a, int row, int column, float v) {
    if (C::ADD) v += ptx::load_shared_by_all(a.add + (u64)row * a.add_stride + column);
    const u64 to = (u64)row * a.out_stride + column;
    if (C::HALF)
      ((u16*)a.out)[to] = to_bf16(v);
    else
      ((float*)a.out)[to] = v;
  }

  // Calls do(row, column, pair) for each pair of neighbouring sums of this thread that lies inside.
  template <class Do>
  FINIAL_DEVICE static void each(const GemmArgs& a, int row0, int column0, float sums[WM / 16][WN / 8][4], Do action) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < WM / 16; i++)
#pragma unroll
      for (int j = 0; j < WN / 8; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int row = row0 + i * 16 + half * 8 + g, column = column0 + j * 8 + 2 * t;
          if (row < a.rows && column < C::OUT) action(row, column, &sums[i][j][2 * half]);
        }
  }
};

template <class C>
FINIAL_DEVICE void gemm(const GemmArgs& a) {
  Gemm<C>::run(a);
}
