// Ground of all kernels: integer names, bf16 and f16 bits, and every PTX instruction behind a function.
//
// Compiled by NVRTC without any header of CUDA's own, and by g++ with FINIAL_TWIN, where tests/cuda/twin.h gives the
// same functions in C++.  A kernel uses no PTX but through these, so the very same kernel sources run on a CPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef int i32;

struct alignas(16) Vec4 {  // 16 bytes: one load of a thread
  u32 x, y, z, w;
};
struct alignas(16) Float4 {
  float x, y, z, w;
};

#ifdef FINIAL_TWIN
#include "twin.h"
#else

#define FINIAL_DEVICE __device__ __forceinline__

// One argument, a struct: the host packs one block of bytes per launch.
#define FINIAL_KERNEL(name, threads, blocks, Args, body) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args args) { body(args); }
// Of a launch whose blocks wait for each other: the host launches it as cooperative, so that all are resident.
#define FINIAL_COOPERATIVE(name, threads, blocks, Args, body) FINIAL_KERNEL(name, threads, blocks, Args, body)
#define FINIAL_DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]

namespace ptx {

// Weights: read once, so they need not stay in L1.  volatile keeps them where they are written, before a wait.
FINIAL_DEVICE Vec4 load_stream(const void* p) {
  Vec4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
FINIAL_DEVICE u16 load_stream_half(const void* p) {
  u16 v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
// What an earlier kernel wrote: from L2, as L1 may hold what was there before.
FINIAL_DEVICE float load_shared_by_all(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
FINIAL_DEVICE Vec4 load_cached(const void* p) {
  Vec4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
// To memory of the host, in one piece: whoever sees one half has the other.
FINIAL_DEVICE void store_host(u64* p, u64 v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
FINIAL_DEVICE u16 load_cached_half(const void* p) {
  u16 v;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
  return v;
}
FINIAL_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Programmatic dependent launch (PTX ISA, griddepcontrol): the next kernel may start; all earlier ones are complete.
FINIAL_DEVICE void allow_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
FINIAL_DEVICE void wait_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

FINIAL_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
FINIAL_DEVICE u32 shuffle_xor(u32 v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
FINIAL_DEVICE u64 shuffle_xor(u64 v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
FINIAL_DEVICE float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
FINIAL_DEVICE void sync_block() { __syncthreads(); }
FINIAL_DEVICE void sync_warp() { __syncwarp(); }
FINIAL_DEVICE void fence_device() { __threadfence(); }
FINIAL_DEVICE u32 atomic_add(u32* p, u32 v) { return atomicAdd(p, v); }
FINIAL_DEVICE u64 atomic_add(u64* p, u64 v) { return atomicAdd(p, v); }

FINIAL_DEVICE float exp2_fast(float x) {  // relative error 2^-22 (PTX ISA, ex2.approx)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FINIAL_DEVICE float reciprocal_root(float x) { return rsqrtf(x); }
FINIAL_DEVICE void sin_cos_pi(float x, float* s, float* c) { sincospif(x, s, c); }
FINIAL_DEVICE float as_float(u32 x) { return __uint_as_float(x); }
FINIAL_DEVICE u32 as_bits(float x) { return __float_as_uint(x); }
FINIAL_DEVICE float from_half(u32 bits) {
  float f;
  asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(f) : "r"(bits));
  return f;
}
FINIAL_DEVICE u32 to_half(float x) {
  u32 bits;
  asm("{ .reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h; }" : "=r"(bits) : "f"(x));
  return bits;
}
// Two floats to bf16, nearest even; the first in the low half.
FINIAL_DEVICE u32 pack_bf16(float low, float high) {
#if __CUDA_ARCH__ >= 800
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
#else
  u32 a = as_bits(low), b = as_bits(high);
  a += 0x7fffu + ((a >> 16) & 1), b += 0x7fffu + ((b >> 16) & 1);
  return (a >> 16) | (b & 0xffff0000u);
#endif
}
FINIAL_DEVICE u32 permute(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

// D = A·B + D, A 16x16 and B 16x8 in bf16, D in float32 (PTX ISA, mma.m16n8k16).
FINIAL_DEVICE void mma_bf16(float d[4], const u32 a[4], const u32 b[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();  // the host asks for no tensor-core kernel below 8.0
#endif
}
// The same with 8 of k: A 16x8, B 8x8 (PTX ISA, mma.m16n8k8).
FINIAL_DEVICE void mma_bf16_short(float d[4], const u32 a[2], u32 b) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b));
#else
  __trap();
#endif
}
FINIAL_DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
FINIAL_DEVICE void load_matrix_x4(u32 r[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
FINIAL_DEVICE void load_matrix_x4_transposed(u32 r[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// 16 bytes from global to shared memory without a register; nothing is read and zeros are written when not valid.
FINIAL_DEVICE void copy_async(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  Vec4 zero = {0, 0, 0, 0};
  *(Vec4*)shared = valid ? load_cached(global) : zero;
#endif
}
FINIAL_DEVICE void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int PENDING>
FINIAL_DEVICE void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// --- between blocks of one launch
// -------------------------------------------------------------------------------------
//
// Who wrote something calls a barrier of its block and lets one thread add with release; who needs it lets one thread
// look with acquire and calls a barrier: causality order goes through the block's barriers (PTX ISA, memory consistency
// model: barriers synchronise at cta scope, release and acquire patterns are cumulative), so no fence of the other
// threads is needed.  What other blocks wrote in this launch is read past L1 (.cg) all the same: no line that L1 took
// in before can then be met.

FINIAL_DEVICE u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
FINIAL_DEVICE void add_release(u32* p, u32 v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
FINIAL_DEVICE u32 add_acquire_release(u32* p, u32 v) {
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
// Four sums at once; they order nothing, and their order is that of arrival.
FINIAL_DEVICE void add_vector(float* p, Float4 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z),
               "f"(v.w)
               : "memory");
#else
  atomicAdd(p, v.x), atomicAdd(p + 1, v.y), atomicAdd(p + 2, v.z), atomicAdd(p + 3, v.w);
#endif
}
FINIAL_DEVICE void add_pair(float* p, float x, float y) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(x), "f"(y) : "memory");
#else
  atomicAdd(p, x), atomicAdd(p + 1, y);
#endif
}
// Words that the host may read or write meanwhile; alone, they order nothing.
FINIAL_DEVICE u32 load_volatile(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
FINIAL_DEVICE void store_volatile(u32* p, u32 v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
FINIAL_DEVICE bool replace_if(u32* p, u32 expected, u32 v) { return atomicCAS(p, expected, v) == expected; }
FINIAL_DEVICE Float4 load_float4(const float* p) {
  Float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
FINIAL_DEVICE u64 load_u64(const u64* p) {
  u64 v;
  asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
FINIAL_DEVICE i32 load_written(const i32* p) {
  i32 v;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
FINIAL_DEVICE u64 nanoseconds() {
  u64 v;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(v));
  return v;
}
FINIAL_DEVICE void pause() {}  // between two looks at another block's counter, which take a trip to L2 each

// --- between warps of one block
// ---------------------------------------------------------------------------------------

// A barrier of the first `threads` threads of a block, whole warps, that need not be converged.
template <int ID>
FINIAL_DEVICE void sync_some(int threads) {
  asm volatile("barrier.sync %0, %1;" ::"n"(ID), "r"(threads) : "memory");
}
FINIAL_DEVICE u32 load_block(const u32* p) { return *(const volatile u32*)p; }
FINIAL_DEVICE void store_block(u32* p, u32 v) { *(volatile u32*)p = v; }

// Barrier objects in shared memory (PTX ISA, mbarrier): arrivals and bytes, phases told apart by their parity.
FINIAL_DEVICE void barrier_init(u64* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
FINIAL_DEVICE void barrier_fence() {  // the copy engine, too, sees barriers as they were initialised
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
FINIAL_DEVICE void barrier_arrive(u64* barrier) {
#if __CUDA_ARCH__ >= 800
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
               : "memory");
#endif
}
// True when the phase of that parity is complete; from 9.0 the hardware lets the warp sleep for a while before it is
// not.
FINIAL_DEVICE bool barrier_test(u64* barrier, u32 parity) {
  u32 done = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
#elif __CUDA_ARCH__ >= 800
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  if (!done) __nanosleep(32);  // the scheduler's slots are for the warps that multiply
#endif
  return done;
}
// One arrival, and bytes that copies will bring before the phase is complete.
FINIAL_DEVICE void barrier_arrive_expecting(u64* barrier, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
// Read once in a step, and a step reads more than L2 holds: first to be evicted.
FINIAL_DEVICE void copy_bulk(void* shared, const void* global, u32 bytes, u64* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy; "
      "}" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}
// The barrier gets an arrival when the calling lane's copies so far are done.
FINIAL_DEVICE void copy_arrive(u64* barrier) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
FINIAL_DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 d = 0;
#if __CUDA_ARCH__ >= 800
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
  return d;
}

}  // namespace ptx
#endif

FINIAL_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
FINIAL_DEVICE constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
FINIAL_DEVICE constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

FINIAL_DEVICE float bf16_low(u32 pair) { return ptx::as_float(pair << 16); }
FINIAL_DEVICE float bf16_high(u32 pair) { return ptx::as_float(pair & 0xffff0000u); }
FINIAL_DEVICE float from_bf16(u16 bits) { return ptx::as_float((u32)bits << 16); }
FINIAL_DEVICE u16 to_bf16(float x) { return (u16)ptx::pack_bf16(x, 0.0f); }

// silu(x) = x / (1 + e^-x). e^-x is 2^t of t = -x log2(e), whose rounding, up to 2^-24 |t|, would be an error of the
// result as large: what it lost, and what log2(e) lost as a float, is put back. An e^-x of infinity or 0 stays so.
FINIAL_DEVICE float silu(float x) {
  constexpr float LOG2_E = 1.4426950408889634f, REST = 1.9259630e-8f, LN_2 = 0.6931471805599453f;
  const float near = x > 128.0f ? 128.0f : x < -128.0f ? -128.0f : x;
  const float lost = fmaf(-LOG2_E, near, LOG2_E * near) - REST * near;
  return x / (1.0f + ptx::exp2_fast(-LOG2_E * x) * (1.0f + LN_2 * lost));
}
