// PTX by which threads wait for each other's memory, in C++: what blocks see of each other, barrier objects, and bulk
// copies, which come by a throw of the dice at once or as late as they may, or each in an OS thread.  For twin.h.
#pragma once

#include "twin_ptx.h"

namespace ptx {

// --- between blocks --------------------------------------------------------------------------------------------------

inline void random_delay() {  // before what another block sees: orders of events that a quiet machine never shows
#ifdef FINIAL_TWIN_THREADS
  twin::delay();
#else
  const u32 dice = (u32)twin::current->block->random();
  if (dice % 16 == 0) twin::pause();
  if (dice % 512 == 1) std::this_thread::sleep_for(std::chrono::microseconds(dice / 512 % 200));
#endif
}
inline u32 load_acquire(const u32* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void add_release(u32* p, u32 v) {
  random_delay();
  __atomic_fetch_add(p, v, __ATOMIC_RELEASE);
}
inline u32 add_acquire_release(u32* p, u32 v) {
  random_delay();
  return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
inline void add_float(float* p, float v) {
  u32* word = (u32*)p;
  u32 old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (
      !__atomic_compare_exchange_n(word, &old, as_bits(as_float(old) + v), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}
inline void add_vector(float* p, Float4 v) {
  add_float(p, v.x), add_float(p + 1, v.y), add_float(p + 2, v.z), add_float(p + 3, v.w);
}
inline void add_pair(float* p, float x, float y) { add_float(p, x), add_float(p + 1, y); }
inline u32 load_volatile(const u32* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline void store_volatile(u32* p, u32 v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
inline bool replace_if(u32* p, u32 expected, u32 v) {
  return __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
inline Float4 load_float4(const float* p) { return load_aligned<Float4>(p); }
inline i32 load_written(const i32* p) { return *p; }
inline u64 load_u64(const u64* p) { return load_aligned<u64>(p); }
inline u16 load_cached_half(const void* p) { return load_aligned<u16>(p); }
inline u64 nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return (u64)std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}
inline void pause() { twin::pause(); }

// --- within a block --------------------------------------------------------------------------------------------------

template <int ID>
void sync_some(int threads) {
  static_assert(ID > 0 && ID < 16, "0 is that of all threads");
  twin::Meeting& meeting = twin::current->block->named[ID];
#ifdef FINIAL_TWIN_THREADS
  {
    std::unique_lock<std::mutex> lock(meeting.mutex);
    meeting.expected = threads;
  }
#else
  meeting.expected = threads;
#endif
  twin::meet(meeting);
}
inline u32 load_block(const u32* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline void store_block(u32* p, u32 v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }

// A barrier object is a word: arrivals of a phase (12 bits), those that are pending (12), the phase (1), bytes (the
// upper 32, signed, as they may be done before they are expected).
inline void barrier_change(u64* barrier, int arrivals, int bytes) {
  u64 old = __atomic_load_n(barrier, __ATOMIC_RELAXED), changed;
  do {
    const u64 expected = old & 4095;
    int pending = (int)(old >> 12 & 4095) - arrivals;
    u64 phase = old >> 24 & 1;
    const int left = (int)(u32)(old >> 32) + bytes;
    if (pending < 0) {
      std::fprintf(stderr, "twin: more arrivals than a barrier expects\n");
      std::abort();
    }
    if (pending == 0 && left == 0) phase ^= 1, pending = (int)expected;
    changed = expected | (u64)pending << 12 | phase << 24 | (u64)(u32)left << 32;
  } while (!__atomic_compare_exchange_n(barrier, &old, changed, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
}
inline void barrier_init(u64* barrier, int count) {
  __atomic_store_n(barrier, (u64)count | (u64)count << 12, __ATOMIC_RELAXED);
}
inline void barrier_fence() {}
inline void barrier_arrive(u64* barrier) { barrier_change(barrier, 1, 0); }
inline void barrier_arrive_expecting(u64* barrier, u32 bytes) { barrier_change(barrier, 1, (int)bytes); }
inline void complete(const twin::Pending& pending) {
  if (pending.bytes) {
    std::memcpy(pending.to, pending.from, pending.bytes);
    barrier_change(pending.barrier, 0, -(int)pending.bytes);
  } else {
    for (const auto& copy : pending.copies) *(Vec4*)copy.to = load_aligned<Vec4>(copy.from);
    barrier_change(pending.barrier, 1, 0);
  }
}
inline void start(twin::Pending pending) {
  twin::Block* block = twin::current->block;
#ifdef FINIAL_TWIN_THREADS
  std::unique_lock<std::mutex> lock(block->mutex);
  block->copiers.emplace_back([pending] { complete(pending); });
#else
  if (block->random() % 2)
    complete(pending);
  else
    block->pending.push_back(std::move(pending));
#endif
}
// True when the phase of that parity is complete.
inline bool barrier_test(u64* barrier, u32 parity) {
  const u64 now = __atomic_load_n(barrier, __ATOMIC_ACQUIRE);
  if ((now >> 24 & 1) != parity) return true;
#ifndef FINIAL_TWIN_THREADS
  auto& pending = twin::current->block->pending;
  for (size_t i = 0; i < pending.size(); i++)
    if (pending[i].barrier == barrier && twin::current->block->random() % 2) {
      complete(pending[i]);
      pending.erase(pending.begin() + (long)i);
      break;
    }
#endif
  return false;
}
inline void copy_bulk(void* shared, const void* global, u32 bytes, u64* barrier) {
  if ((u64)shared % 16 || (u64)global % 16 || bytes % 16 || bytes == 0) {
    std::fprintf(stderr, "twin: a bulk copy of %u bytes from %p to %p\n", bytes, global, shared);
    std::abort();
  }
  start({barrier, shared, global, bytes, {}});
}
// The barrier gets an arrival when the calling lane's copies so far are done.
inline void copy_arrive(u64* barrier) {
  auto& groups = twin::current->groups;
  start({barrier, nullptr, nullptr, 0, std::move(groups.back())});
  groups.back().clear();
}

}  // namespace ptx
