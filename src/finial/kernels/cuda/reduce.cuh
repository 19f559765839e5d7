// Sums over the lanes of a warp, in one fixed order.
#pragma once
#include "base.cuh"

template <class T>
FINIAL_DEVICE T warp_sum(T v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += ptx::shuffle_xor(v, offset);
  return v;
}

// Sums N values (a power of two, at most 32) over the warp with about N + 5 shuffles instead of 5 N: lanes give away
// the half of the values that their partner keeps.  Lane l returns the sum of value l >> (5 - log2 N).
template <int N>
FINIAL_DEVICE float warp_sums(float v[N]) {
  const int lane = threadIdx.x % 32;
  int count = N;
#pragma unroll
  for (int step = 0; step < 5; step++) {
    const int offset = 16 >> step;
    if (count > 1) {
      count /= 2;
      const bool upper = lane & offset;
#pragma unroll
      for (int i = 0; i < N / 2; i++) {
        if (i < count) {
          const float give = upper ? v[i] : v[i + count], keep = upper ? v[i + count] : v[i];
          v[i] = keep + ptx::shuffle_xor(give, offset);
        }
      }
    } else {
      v[0] += ptx::shuffle_xor(v[0], offset);
    }
  }
  return v[0];
}
