// First experiments of the persistent kernel: what memory, barriers and hand-offs of this GPU can do.
// Compiled for sm_90a; each kernel measures one thing, see probe.py.
#pragma once
#include "base.cuh"

struct ProbeArgs {
  const u8* data;
  u32* counters;
  float* out;
  u64 bytes;
  i32 rounds, blocks, variant, padding;
};

__device__ __forceinline__ u32 smem(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Read bandwidth: one producer warp streams a block's own stretch through a ring by cp.async.bulk, consumers add it up.
template <class C>
__device__ __forceinline__ void ring(const ProbeArgs& a) {
  FINIAL_DYNAMIC_SHARED(memory);
  constexpr int SLOT = C::SLOT, SLOTS = C::SLOTS;
  u64* full = (u64*)memory;
  u64* empty = full + SLOTS;
  u8* slots = memory + 1024;
  const int warp = threadIdx.x / 32, consumers = blockDim.x / 32 - 1;
  if (threadIdx.x == 0)
    for (int s = 0; s < SLOTS; s++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(smem(full + s)));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem(empty + s)), "r"(consumers));
    }
  __syncthreads();
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  const u64 share = a.bytes / gridDim.x / SLOT * SLOT;
  const u8* from = a.data + share * blockIdx.x;
  const int total = (int)(share / SLOT) * a.rounds, per_round = (int)(share / SLOT);
  auto wait = [](u64* barrier, int parity) {
    u32 done = 0;
    for (long long spin = 0; !done && spin < 100000000ll; spin++)
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(done)
                   : "r"(smem(barrier)), "r"(parity)
                   : "memory");
  };
  if (warp == consumers) {
    if (threadIdx.x % 32 == 0)
      for (int i = 0; i < total; i++) {
        const int s = i % SLOTS;
        if (i >= SLOTS) wait(empty + s, (i / SLOTS - 1) & 1);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem(full + s)), "r"(SLOT)
                     : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         smem(slots + s * SLOT)),
                     "l"(from + (u64)(i % per_round) * SLOT), "r"(SLOT), "r"(smem(full + s))
                     : "memory");
      }
  } else {
    float sum = 0.0f;
    for (int i = 0; i < total; i++) {
      const int s = i % SLOTS;
      wait(full + s, (i / SLOTS) & 1);
      for (int at = threadIdx.x * 16; at < SLOT; at += consumers * 512) {
        const Vec4 v = *(const Vec4*)(slots + s * SLOT + at);
        sum += bf16_low(v.x) + bf16_high(v.y) + bf16_low(v.z) + bf16_high(v.w);
      }
      __syncwarp();
      if (threadIdx.x % 32 == 0)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem(empty + s)) : "memory");
    }
    a.out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  }
}

// Read bandwidth the plain way: 16-byte loads, C::DEEP of them in flight a thread.
template <class C>
__device__ __forceinline__ void plain_read(const ProbeArgs& a) {
  const u64 vectors = a.bytes / 16, stride = (u64)gridDim.x * blockDim.x;
  float sum = 0.0f;
  for (int round = 0; round < a.rounds; round++)
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i + (C::DEEP - 1) * stride < vectors;
         i += C::DEEP * stride) {
      Vec4 v[C::DEEP];
#pragma unroll
      for (int d = 0; d < C::DEEP; d++) v[d] = ptx::load_stream(a.data + (i + d * stride) * 16);
#pragma unroll
      for (int d = 0; d < C::DEEP; d++) sum += bf16_low(v[d].x) + bf16_high(v[d].w);
    }
  a.out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Hand-offs between all blocks, a.rounds of them: 0 one counter; 1 one counter, polled by every warp's lane; 2 a
// counter for each group of 8 blocks and one above; 3 a flag for each block, polled by the threads of all; 4 value and
// epoch in 64 bits.
template <class C>
__device__ __forceinline__ void hand_off(const ProbeArgs& a) {
  const int blocks = gridDim.x;
  float value = 1.0f;
  auto poll = [](const u32* p, u32 at_least) {
    u32 v = 0;
    for (long long spin = 0; v < at_least && spin < 20000000ll; spin++)
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  };
  auto add = [](u32* p) {
    u32 old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(old) : "l"(p) : "memory");
    return old;
  };
  for (int round = 0; round < a.rounds; round++) {
    const u32 goal = (u32)(round + 1);
    if (C::VARIANT <= 1) {
      __syncthreads();
      if (threadIdx.x == 0) add(a.counters);
      if (C::VARIANT == 0 ? threadIdx.x == 0 : threadIdx.x % 32 == 0) poll(a.counters, goal * blocks);
      if (C::VARIANT == 0) __syncthreads();
      __syncwarp();
    } else if (C::VARIANT == 2) {
      __syncthreads();
      if (threadIdx.x == 0) {
        const int group = blockIdx.x / 8, members = blocks - group * 8 < 8 ? blocks - group * 8 : 8;
        if (add(a.counters + 32 * (group + 1)) == goal * members - 1) add(a.counters);
        poll(a.counters, goal * ((blocks + 7) / 8));
      }
      __syncthreads();
    } else if (C::VARIANT == 3) {
      __syncthreads();
      if (threadIdx.x == 0)
        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(a.counters + blockIdx.x), "r"(goal) : "memory");
      if ((int)threadIdx.x < blocks) poll(a.counters + threadIdx.x, goal);
      __syncthreads();
    } else {
      u64* cells = (u64*)a.counters;
      if (threadIdx.x == 0) {
        const u64 cell = (u64)goal << 32 | ptx::as_bits(value);
        asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(cells + (round & 1) * 1024 + blockIdx.x), "l"(cell)
                     : "memory");
      }
      if ((int)threadIdx.x < blocks) {
        u64 cell = 0;
        for (long long spin = 0; (u32)(cell >> 32) < goal && spin < 20000000ll; spin++)
          asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];"
                       : "=l"(cell)
                       : "l"(cells + (round & 1) * 1024 + threadIdx.x)
                       : "memory");
        value = ptx::as_float((u32)cell);
      }
      __syncthreads();
    }
  }
  if (threadIdx.x == 0) a.out[blockIdx.x] = value;
}

// Float reductions into 4 KB that all blocks share: 1 float, 2 or 4 of them an instruction.
template <class C>
__device__ __forceinline__ void reductions(const ProbeArgs& a) {
  float* to = a.out + threadIdx.x * C::WIDE % 1024;
  for (int round = 0; round < a.rounds; round++) {
    if (C::WIDE == 1) asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to), "f"(1.0f) : "memory");
    if (C::WIDE == 2) asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %1};" ::"l"(to), "f"(1.0f) : "memory");
    if (C::WIDE == 4)
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(to), "f"(1.0f) : "memory");
  }
}

// The edge between two dependent kernels: nothing but the wait.
template <class C>
__device__ __forceinline__ void edge(const ProbeArgs& a) {
  if (C::EARLY) ptx::allow_next();
  ptx::wait_previous();
  if (threadIdx.x == 0 && a.rounds < 0) a.out[blockIdx.x] = 1.0f;
}
