// The plain operations, one row or element at a time; what no other kernel took in.  Reference: backends/reference.py.
#pragma once
#include "cache.cuh"
#include "reduce.cuh"

// A head's rotation: cos and sin of position · frequency, times scale.  Angles up to 2^31 are reduced in double
// precision, because sinf's own reduction of large arguments needs a stack frame.
FINIAL_DEVICE void rotation(int position, float frequency, float scale, float* cosine, float* sine) {
  const float angle = (float)position * frequency;
  const double halves = (double)angle * 0.3183098861837907;  // in units of pi
  const double whole = (double)(long long)(halves * 0.5 + (halves < 0 ? -0.5 : 0.5)) * 2.0;
  float s, c;
  ptx::sin_cos_pi((float)(halves - whole), &s, &c);
  *cosine = c * scale, *sine = s * scale;
}

struct EmbedArgs {
  const u8 *weight, *scales;
  const i32* tokens;  // [rows]
  float* out;         // [rows, out_stride]
  i32 out_stride, padding;
};
// Format, K.  One block a row.
template <class C>
FINIAL_DEVICE void embed(const EmbedArgs& a) {
  using F = typename C::Format;
  constexpr int KP = round_up(C::K, 64);
  ptx::allow_next();
  ptx::wait_previous();
  const int row = blockIdx.x, token = a.tokens[row];
  const u8* weight = a.weight + (u64)token * (KP / F::UNIT * 16);
  const u8* scales = a.scales + (u64)token * (F::CHANNELS ? 4 : KP / 32 * 2);
  for (int plane = threadIdx.x; plane < ceil_div(C::K, 4); plane += blockDim.x) {
    float w[4];
    const auto raw = F::load(weight, scales, plane * 4 / F::UNIT);
    F::plane(raw, plane % (F::UNIT / 4), w);
    const float scale = F::CHANNELS ? *(const float*)scales : F::scale(raw);
    for (int i = 0; i < 4; i++)
      if (plane * 4 + i < C::K) a.out[(u64)row * a.out_stride + plane * 4 + i] = w[i] * scale;
  }
}

struct NormArgs {
  const float *x, *weight;
  void* out;
  const i32* pick;
  i32 x_stride, out_stride;
  float eps;
  i32 rows, groups, padding;  // groups of W values in a row
};
// W, PICK, NORM (else a copy), HALF: the result in bf16; THREADS.  One warp a group; grid.x covers rows · groups.
template <class C>
FINIAL_DEVICE void norm(const NormArgs& a) {
  ptx::allow_next();
  ptx::wait_previous();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int at = blockIdx.x * (C::THREADS / 32) + warp, row = at / a.groups, group = at % a.groups;
  if (row >= a.rows) return;
  const float* x = a.x + (u64)(C::PICK ? a.pick[row] : row) * a.x_stride + group * C::W;
  float squares = 0.0f;
  if (C::NORM) {
    for (int i = lane; i < C::W; i += 32) {
      const float v = ptx::load_shared_by_all(x + i);
      squares += v * v;
    }
    squares = warp_sum(squares);
  }
  const float inverse = C::NORM ? ptx::reciprocal_root(squares / (float)C::W + a.eps) : 1.0f;
  // A single group in bf16 goes to tensor cores, which read whole steps of 64.
  for (int i = lane; i < (C::HALF && a.groups == 1 ? round_up(C::W, 64) : C::W); i += 32) {
    float v = 0.0f;
    if (i < C::W) v = ptx::load_shared_by_all(x + i) * inverse * (C::NORM ? a.weight[i] : 1.0f);
    const u64 to = (u64)row * a.out_stride + group * C::W + i;
    if (C::HALF)
      ((u16*)a.out)[to] = to_bf16(v);
    else
      ((float*)a.out)[to] = v;
  }
}

struct RopeArgs {
  const float *x, *frequencies;
  const i32* positions;
  float* out;
  i32 x_stride, out_stride, width;  // width: heads · D
  float scale;
};
// D.  One block a row.
template <class C>
FINIAL_DEVICE void rope(const RopeArgs& a) {
  ptx::allow_next();
  ptx::wait_previous();
  const int row = blockIdx.x, position = a.positions[row];
  for (int pair = threadIdx.x; pair < a.width / 2; pair += blockDim.x) {
    const int i = pair % (C::D / 2), low = pair / (C::D / 2) * C::D + i;
    float c, s;
    rotation(position, a.frequencies[i], a.scale, &c, &s);
    const float* x = a.x + (u64)row * a.x_stride;
    const float first = ptx::load_shared_by_all(x + low), second = ptx::load_shared_by_all(x + low + C::D / 2);
    float* out = a.out + (u64)row * a.out_stride;
    out[low] = first * c - second * s, out[low + C::D / 2] = second * c + first * s;
  }
}

struct CacheWriteArgs {
  const float *keys, *values;
  const i32* slots;  // -1: a row that does not exist
  u8* cache;
  i32 stride, padding;
};
// Cache, D, HEADS.  Grid (rows, HEADS), two warps: one for the key, one for the value.
template <class C>
FINIAL_DEVICE void cache_write(const CacheWriteArgs& a) {
  ptx::allow_next();
  ptx::wait_previous();
  __shared__ float row_values[2][C::D];
  const int row = blockIdx.x, head = blockIdx.y, which = threadIdx.x / 32, slot = a.slots[row];
  const float* from = (which ? a.values : a.keys) + (u64)row * a.stride + head * C::D;
  for (int i = threadIdx.x % 32; i < C::D; i += 32) row_values[which][i] = ptx::load_shared_by_all(from + i);
  ptx::sync_warp();
  if (slot < 0) return;
  C::Cache::store(a.cache + cache_at(slot, which, head, C::HEADS, C::Cache::ROW_BYTES), row_values[which]);
}

struct PointwiseArgs {
  const float *a, *b;
  float* out;
  const i32* pick;
  i32 a_stride, b_stride, out_stride, width;
};
// OP: 0 add, 1 silu_mul, 2 select_rows.  One block a row.
template <class C>
FINIAL_DEVICE void pointwise(const PointwiseArgs& p) {
  ptx::allow_next();
  ptx::wait_previous();
  const int row = blockIdx.x, from = C::OP == 2 ? p.pick[row] : row;
  for (int i = threadIdx.x; i < p.width; i += blockDim.x) {
    float v = ptx::load_shared_by_all(p.a + (u64)from * p.a_stride + i);
    const float other = C::OP == 2 ? 0.0f : ptx::load_shared_by_all(p.b + (u64)row * p.b_stride + i);
    if (C::OP == 0) v += other;
    if (C::OP == 1) v = silu(v) * other;
    p.out[(u64)row * p.out_stride + i] = v;
  }
}
