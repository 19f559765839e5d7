// The CPU twin of a GPU: blocks, threads, shared memory, shuffles and PTX functions in C++, for the kernels' own
// sources.
//
// A CUDA thread is a fiber that is switched by hand wherever threads of a block or a warp meet (twin_fibers.h); blocks
// run one after another in a shuffled order, those of a cooperative launch at once, each an OS thread that starts late
// at random.  With FINIAL_TWIN_THREADS a CUDA thread is an OS thread (twin_threads.h), so that ThreadSanitizer sees
// every access between two meetings.  PTX is in twin_ptx.h and twin_sync.h.
//
// Here are launches, and every header of the standard library, which tests/cuda_twin.py compiles beforehand.
// Knows no kernel; base.cuh includes it under FINIAL_TWIN.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define FINIAL_DEVICE inline
#ifdef FINIAL_TWIN_THREADS
#define __shared__ static  // one block at a time; kernels of cooperative launches have dynamic shared memory alone
#else
#define __shared__ static thread_local
#endif

#include "twin_block.h"
#ifdef FINIAL_TWIN_THREADS
#include "twin_threads.h"
#else
#include "twin_fibers.h"
#endif
#include "twin_ptx.h"
#include "twin_sync.h"

namespace twin {

inline void launch_block(Body body, const void* args, Dim3 grid, u32 threads, u32 i, u8* dynamic, size_t shared,
                         std::mt19937& random) {
  const int warps = ((int)threads + WARP - 1) / WARP;
  Block block;
  block.index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
  block.grid = grid, block.size = {threads, 1, 1};
  block.meeting.expected = (int)threads;
  block.warps.reset(new Warp[warps]);
  for (int w = 0; w < warps; w++) block.warps[w].meeting.expected = std::min(WARP, (int)threads - w * WARP);
  block.random.seed((u32)random());
  std::memset(dynamic, 0xff, shared + 128);  // NaN: nothing may count on what shared memory holds
  block.dynamic = (u8*)(((u64)dynamic + 127) & ~(u64)127);
  run_block(block, body, args, random);
}
inline std::vector<u32> shuffled(Dim3 grid, std::mt19937& random) {
  std::vector<u32> order((size_t)grid.x * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); i++) order[i] = (u32)i;
  std::shuffle(order.begin(), order.end(), random);
  return order;
}
inline void launch(Body body, const void* args, Dim3 grid, u32 threads, size_t shared, u32 seed) {
  std::mt19937 random(seed);
  std::unique_ptr<u8[]> dynamic(new u8[shared + 128]);
  for (u32 i : shuffled(grid, random)) launch_block(body, args, grid, threads, i, dynamic.get(), shared, random);
}
// All blocks at once.  Each starts up to 2 ms late.
inline void launch_together(Body body, const void* args, Dim3 grid, u32 threads, size_t shared, u32 seed) {
  std::mt19937 random(seed);
  std::vector<std::thread> blocks;
  for (u32 i : shuffled(grid, random)) {
    const u32 own = (u32)random(), late = random() % 4 ? 0 : (u32)random() % 2000;
    blocks.emplace_back([=] {
      std::mt19937 of_block(own);
      std::unique_ptr<u8[]> dynamic(new u8[shared + 128]);
      std::this_thread::sleep_for(std::chrono::microseconds(late));
      launch_block(body, args, grid, threads, i, dynamic.get(), shared, of_block);
    });
  }
  for (auto& block : blocks) block.join();
}

}  // namespace twin

#define threadIdx (twin::current->thread)
#define blockIdx (twin::current->block->index)
#define blockDim (twin::current->block->size)
#define gridDim (twin::current->block->grid)

#define FINIAL_KERNEL(name, threads, blocks, Args, body)                                                            \
  static void name##_body(const void* args) { body(*static_cast<const Args*>(args)); }                              \
  extern "C" __attribute__((visibility("default"))) void name(u32 x, u32 y, u32 z, u32 count, u64 shared, u32 seed, \
                                                              const void* args) {                                   \
    if (count != (threads)) std::abort();                                                                           \
    twin::launch(name##_body, args, {x, y, z}, count, shared, seed);                                                \
  }
// Of a launch whose blocks wait for each other.
#define FINIAL_COOPERATIVE(name, threads, blocks, Args, body)                                                       \
  static void name##_body(const void* args) { body(*static_cast<const Args*>(args)); }                              \
  extern "C" __attribute__((visibility("default"))) void name(u32 x, u32 y, u32 z, u32 count, u64 shared, u32 seed, \
                                                              const void* args) {                                   \
    if (count != (threads)) std::abort();                                                                           \
    twin::launch_together(name##_body, args, {x, y, z}, count, shared, seed);                                       \
  }
#define FINIAL_DYNAMIC_SHARED(name) u8* const name = twin::current->block->dynamic
