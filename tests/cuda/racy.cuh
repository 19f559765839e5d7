// Kernels with and without a barrier that they need: what the twin's sanitizer run must tell apart.
#pragma once
#include "base.cuh"

struct PointwiseArgs {
  const float *a, *b;
  float* out;
  const i32* pick;
  i32 a_stride, b_stride, out_stride, width;
};

template <class C>
FINIAL_DEVICE void racy(const PointwiseArgs& p) {
  __shared__ float shared[64];
  shared[threadIdx.x] = p.a[threadIdx.x];
  if (C::SAFE) ptx::sync_block();
  p.out[threadIdx.x] = shared[63 - threadIdx.x];
}
