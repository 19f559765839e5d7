// First experiments of the persistent kernel: what memory, barriers and hand-offs of this GPU can do.
// Compiled for sm_90a; each kernel measures one thing and checks what it can, see probe.py.
#pragma once
#include "base.cuh"

struct ProbeArgs {
  const u8* data;
  u32* counters;  // zero before each launch
  float* cells;   // one for each block
  float* out;
  u64 bytes;
  i32 rounds, padding;
};

#ifdef FINIAL_TWIN
#define FINIAL_CLUSTER(size, name, threads, blocks, Args, body) FINIAL_COOPERATIVE(name, threads, blocks, Args, body)
FINIAL_DEVICE float add_to(float* p) {
  u32 old = __atomic_load_n((u32*)p, __ATOMIC_RELAXED), now;
  do now = ptx::as_bits(ptx::as_float(old) + 1.0f);
  while (!__atomic_compare_exchange_n((u32*)p, &old, now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return 0;
}
template <int WIDE>
FINIAL_DEVICE void reduce(float* p) {
  for (int i = 0; i < WIDE; i++) add_to(p + i);
}
template <int SIZE>
FINIAL_DEVICE void sync_cluster(const ProbeArgs& a, int round) {
  ptx::sync_block();
  u32* counter = a.counters + blockIdx.x / SIZE;
  if (threadIdx.x == 0) {
    ptx::add_release(counter, 1);
    while (ptx::load_acquire(counter) < (u32)(SIZE * (round + 1))) ptx::pause();
  }
  ptx::sync_block();
}
FINIAL_DEVICE void store_release(u32* p, u32 v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
FINIAL_DEVICE void store_word(u64* p, u64 v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
#else
#define FINIAL_CLUSTER(size, name, threads, blocks, Args, body)                              \
  extern "C" __global__ void __cluster_dims__(size, 1, 1) __launch_bounds__(threads, blocks) \
      name(const __grid_constant__ Args args) {                                              \
    body(args);                                                                              \
  }
template <int WIDE>
FINIAL_DEVICE void reduce(float* p) {
  if (WIDE == 1) asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p), "f"(1.0f) : "memory");
  if (WIDE == 2) asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %1};" ::"l"(p), "f"(1.0f) : "memory");
  if (WIDE == 4)
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(p), "f"(1.0f) : "memory");
}
template <int SIZE>
FINIAL_DEVICE void sync_cluster(const ProbeArgs&, int) {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
FINIAL_DEVICE void store_release(u32* p, u32 v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
FINIAL_DEVICE void store_word(u64* p, u64 v) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
#endif

// Every wait has an end, so that a mistake costs a wrong figure and not the GPU.
FINIAL_DEVICE void poll(const u32* p, u32 at_least) {
  for (int spin = 0; ptx::load_acquire(p) < at_least && spin < 20000000; spin++) ptx::pause();
}
FINIAL_DEVICE void wait_for(u64* barrier, u32 parity) {
  for (int spin = 0; !ptx::barrier_test(barrier, parity) && spin < 20000000; spin++) ptx::pause();
}
// Bytes of the data are all 1: the sum of a word's is 4.
FINIAL_DEVICE float sum_of(const Vec4& v) {
  return (float)((v.x & 255u) + (v.y >> 8 & 255u) + (v.z >> 16 & 255u) + (v.w >> 24));
}

// Read bandwidth: one producer warp streams a block's own stretch through a ring by cp.async.bulk, consumers add it up.
template <class C>
FINIAL_DEVICE void ring(const ProbeArgs& a) {
  FINIAL_DYNAMIC_SHARED(memory);
  constexpr int SLOT = C::SLOT, SLOTS = C::SLOTS;
  u64* full = (u64*)memory;
  u64* empty = full + SLOTS;
  u8* slots = memory + 1024;
  const int warp = threadIdx.x / 32, consumers = blockDim.x / 32 - 1;
  if (threadIdx.x == 0) {
    for (int s = 0; s < SLOTS; s++) ptx::barrier_init(full + s, 1), ptx::barrier_init(empty + s, consumers);
    ptx::barrier_fence();
  }
  ptx::sync_block();
  const u64 share = a.bytes / gridDim.x / SLOT * SLOT;
  const u8* from = a.data + share * blockIdx.x;
  const int total = (int)(share / SLOT) * a.rounds, per_round = (int)(share / SLOT);
  if (warp == consumers) {
    if (threadIdx.x % 32 == 0)
      for (int i = 0; i < total; i++) {
        const int s = i % SLOTS;
        if (i >= SLOTS) wait_for(empty + s, (i / SLOTS - 1) & 1);
        ptx::barrier_arrive_expecting(full + s, SLOT);
        ptx::copy_bulk(slots + s * SLOT, from + (u64)(i % per_round) * SLOT, SLOT, full + s);
      }
  } else {
    float sum = 0.0f;
    for (int i = 0; i < total; i++) {
      const int s = i % SLOTS;
      wait_for(full + s, (i / SLOTS) & 1);
      for (int at = threadIdx.x * 16; at < SLOT; at += consumers * 512)
        sum += sum_of(*(const Vec4*)(slots + s * SLOT + at));
      ptx::sync_warp();
      if (threadIdx.x % 32 == 0) ptx::barrier_arrive(empty + s);
    }
    a.out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  }
}

// Read bandwidth the plain way: 16-byte loads, C::DEEP of them in flight a thread.
template <class C>
FINIAL_DEVICE void plain_read(const ProbeArgs& a) {
  const u64 vectors = a.bytes / 16, stride = (u64)gridDim.x * blockDim.x;
  float sum = 0.0f;
  for (int round = 0; round < a.rounds; round++)
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i + (C::DEEP - 1) * stride < vectors;
         i += C::DEEP * stride) {
      Vec4 v[C::DEEP];
#pragma unroll
      for (int d = 0; d < C::DEEP; d++) v[d] = ptx::load_stream(a.data + (i + d * stride) * 16);
#pragma unroll
      for (int d = 0; d < C::DEEP; d++) sum += sum_of(v[d]);
    }
  a.out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Attention without a split: the same bytes, past L1, by every block of a team.
template <class C>
FINIAL_DEVICE void team_read(const ProbeArgs& a) {
  constexpr int DEEP = 4;
  const u8* from = a.data + (u64)(blockIdx.x / C::TEAM) * (C::KB << 10);
  float sum = 0.0f;
  for (int round = 0; round < a.rounds; round++)
    for (int i = threadIdx.x * 16; i < C::KB << 10; i += DEEP * blockDim.x * 16) {
      Vec4 v[DEEP];
#pragma unroll
      for (int d = 0; d < DEEP; d++) v[d] = ptx::load_cached(from + i + d * blockDim.x * 16);
#pragma unroll
      for (int d = 0; d < DEEP; d++) sum += sum_of(v[d]);
    }
  a.out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Hand-offs between all blocks, a.rounds of them, each of one number from every block to its neighbour: 0 one counter;
// 1 one counter, polled by every warp's lane; 2 a counter for each group of 8 blocks and one above; 3 a flag for each
// block, polled by the threads of all; 4 value and epoch in 64 bits.  out: how many numbers were wrong, by block.
template <class C>
FINIAL_DEVICE void hand_off(const ProbeArgs& a) {
  const int blocks = gridDim.x, block = blockIdx.x, neighbour = (block + 1) % blocks;
  float wrong = 0.0f;
  for (int round = 0; round < a.rounds; round++) {
    const u32 goal = (u32)(round + 1);
    float* cells = a.cells + (round & 1) * 1024;  // two sets: nobody is more than one round ahead
    if (C::VARIANT < 4 && threadIdx.x == 0) cells[block] = (float)(block + round);
    if (C::VARIANT <= 1) {
      ptx::sync_block();
      if (threadIdx.x == 0) ptx::add_release(a.counters, 1);
      if (C::VARIANT == 0 ? threadIdx.x == 0 : threadIdx.x % 32 == 0) poll(a.counters, goal * blocks);
      if (C::VARIANT == 0) ptx::sync_block();
      ptx::sync_warp();
    } else if (C::VARIANT == 2) {
      ptx::sync_block();
      if (threadIdx.x == 0) {
        const int group = block / 8, members = blocks - group * 8 < 8 ? blocks - group * 8 : 8;
        if (ptx::add_acquire_release(a.counters + 32 * (group + 1), 1) == goal * members - 1)
          ptx::add_acquire_release(a.counters, 1);
        poll(a.counters, goal * ((blocks + 7) / 8));
      }
      ptx::sync_block();
    } else if (C::VARIANT == 3) {
      ptx::sync_block();
      if (threadIdx.x == 0) store_release(a.counters + block, goal);
      for (int i = threadIdx.x; i < blocks; i += blockDim.x) poll(a.counters + i, goal);
      ptx::sync_block();
    } else {
      u64* words = (u64*)a.counters + (round & 1) * 1024;
      const u64 word = (u64)goal << 32 | ptx::as_bits((float)(block + round));
      if (threadIdx.x == 0) store_word(words + block, word);
      for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
        u64 seen = 0;
        for (int spin = 0; (u32)(seen >> 32) < goal && spin < 20000000; spin++, ptx::pause())
          seen = ptx::load_u64(words + i);
        if (i == neighbour) wrong += ptx::as_float((u32)seen) != (float)(neighbour + round);
      }
      ptx::sync_block();
    }
    if (C::VARIANT < 4 && threadIdx.x == 0)
      wrong += ptx::load_shared_by_all(cells + neighbour) != (float)(neighbour + round);
  }
  if (C::VARIANT < 4 ? threadIdx.x == 0 : (int)threadIdx.x == neighbour % (int)blockDim.x) a.out[block] = wrong;
}

// Float reductions into 4 KB that all blocks share: 1 float, 2 or 4 of them an instruction.
template <class C>
FINIAL_DEVICE void reductions(const ProbeArgs& a) {
  float* to = a.cells + threadIdx.x * C::WIDE % 1024;
  for (int round = 0; round < a.rounds; round++) reduce<C::WIDE>(to);
}

// Barriers of a cluster of blocks, a.rounds of them, each after a number that the next block of the cluster reads.
template <class C>
FINIAL_DEVICE void cluster(const ProbeArgs& a) {
  const int block = blockIdx.x, neighbour = block / C::SIZE * C::SIZE + (block + 1) % C::SIZE;
  float wrong = 0.0f;
  for (int round = 0; round < a.rounds; round++) {
    float* cells = a.cells + (round & 1) * 1024;
    if (threadIdx.x == 0) cells[block] = (float)(block + round);
    sync_cluster<C::SIZE>(a, round);
    if (threadIdx.x == 0) wrong += ptx::load_shared_by_all(cells + neighbour) != (float)(neighbour + round);
  }
  if (threadIdx.x == 0) a.out[block] = wrong;
}

// The edge between two dependent kernels: nothing but the wait.
template <class C>
FINIAL_DEVICE void edge(const ProbeArgs& a) {
  if (C::EARLY) ptx::allow_next();
  ptx::wait_previous();
  if (threadIdx.x == 0 && a.rounds < 0) a.out[blockIdx.x] = 1.0f;
}
