// The twin's blocks: what threads of one share, what a lane has of its own, and how lanes of a warp exchange values.
// How the threads take turns is twin_fibers.h's or twin_threads.h's.  For twin.h.
#pragma once

namespace twin {

constexpr int WARP = 32;
struct Dim3 {
  u32 x, y, z;
};

struct Meeting {  // a barrier that can be used again
  int expected = 0, arrived = 0;
  u32 generation = 0;
#ifdef FINIAL_TWIN_THREADS
  std::mutex mutex;
  std::condition_variable changed;
#endif
};

struct alignas(64) Slot {
  u8 bytes[64];
};

struct Warp {
  Meeting meeting;
  Slot slots[2][WARP];
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Pending {  // what a barrier in shared memory still waits for: bytes of a bulk copy, or a lane's own copies
  u64* barrier;
  void* to;
  const void* from;
  u32 bytes;
  std::vector<Copy> copies;
};

struct Block {
  Dim3 index, grid, size;
  Meeting meeting;
  Meeting named[16];
  std::unique_ptr<Warp[]> warps;
  u8* dynamic;
  std::vector<Pending> pending;
  std::minstd_rand random;
#ifdef FINIAL_TWIN_THREADS
  std::mutex mutex;
  std::vector<std::thread> copiers;
#endif
};

struct Lane {
  Block* block = nullptr;
  Dim3 thread{};
  int linear = 0;
  u32 exchanges = 0;
  bool done = false, idle = false;
  const Meeting* waiting = nullptr;
  u32 generation = 0;
  std::vector<std::vector<Copy>> groups{1};
#ifndef FINIAL_TWIN_THREADS
  std::unique_ptr<u8[]> stack;
#if defined(__x86_64__)
  void* pointer = nullptr;
#else
  ucontext_t context{};
#endif
#endif
  Warp& warp() { return block->warps[linear / WARP]; }
  int id() const { return linear % WARP; }
};

inline thread_local Lane* current = nullptr;
typedef void (*Body)(const void*);

inline void meet(Meeting& m);  // comes back when all have come

// Every lane gives a value and sees those of its warp.  Two sets of slots in turn, so one meeting is enough.
template <class T>
const Slot* exchange(const T& value) {
  static_assert(sizeof(T) <= sizeof(Slot), "slot");
  Lane& lane = *current;
  Slot* slots = lane.warp().slots[lane.exchanges++ & 1];
  std::memcpy(slots[lane.id()].bytes, &value, sizeof(T));
  meet(lane.warp().meeting);
  return slots;
}
template <class T>
T get(const Slot& slot) {
  T value;
  std::memcpy(&value, slot.bytes, sizeof(T));
  return value;
}

}  // namespace twin
