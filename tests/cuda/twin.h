// The CPU twin of a GPU: blocks, threads, shared memory, shuffles and PTX functions in C++, for the kernels' own
// sources.
//
// A CUDA thread is a fiber that is switched by hand wherever threads of a block or a warp meet; blocks run one after
// another in a shuffled order, those of a cooperative launch at once, each an OS thread that starts late at random.
// With FINIAL_TWIN_THREADS a CUDA thread is an OS thread, so that ThreadSanitizer sees every access between two
// meetings.  Asynchronous copies happen as late as they may, at the wait that needs them; bulk copies by a throw of the
// dice at once or so late, or each in an OS thread of its own.
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

#ifdef FINIAL_TWIN_THREADS
inline void delay() {  // other interleavings than the machine's own
  static thread_local std::minstd_rand random{(u32)std::hash<std::thread::id>()(std::this_thread::get_id())};
  if (random() % 64 == 0) std::this_thread::yield();
}
inline void meet(Meeting& m) {
  delay();
  std::unique_lock<std::mutex> lock(m.mutex);
  const u32 generation = m.generation;
  if (++m.arrived == m.expected) {
    m.arrived = 0;
    m.generation++;
    m.changed.notify_all();
  } else {
    m.changed.wait(lock, [&] { return m.generation != generation; });
  }
}
inline void leave(Meeting& m) {
  std::unique_lock<std::mutex> lock(m.mutex);
  m.expected--;
  if (m.expected > 0 && m.arrived == m.expected) {
    m.arrived = 0;
    m.generation++;
    m.changed.notify_all();
  }
}
// OS threads that run the threads of one block after another: making them anew takes most of a sanitizer's time.
struct Pool {
  struct Worker {
    std::mutex mutex;
    std::condition_variable changed;
    const std::function<void()>* work = nullptr;
    bool ending = false;
    std::thread thread;
  };
  std::vector<std::unique_ptr<Worker>> workers;
  std::mutex mutex;
  std::condition_variable finished;
  int left = 0;

  void run(const std::vector<std::function<void()>>& tasks) {
    while (workers.size() < tasks.size()) {
      workers.emplace_back(new Worker);
      Worker* worker = workers.back().get();
      worker->thread = std::thread([this, worker] { serve(*worker); });
    }
    left = (int)tasks.size();
    for (size_t i = 0; i < tasks.size(); i++) {
      std::unique_lock<std::mutex> lock(workers[i]->mutex);
      workers[i]->work = &tasks[i];
      workers[i]->changed.notify_one();
    }
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [&] { return left == 0; });
  }
  void serve(Worker& worker) {
    for (;;) {
      const std::function<void()>* work;
      {
        std::unique_lock<std::mutex> lock(worker.mutex);
        worker.changed.wait(lock, [&] { return worker.work || worker.ending; });
        if (worker.ending) return;
        work = worker.work, worker.work = nullptr;
      }
      (*work)();
      std::unique_lock<std::mutex> lock(mutex);
      if (--left == 0) finished.notify_one();
    }
  }
  ~Pool() {
    for (auto& worker : workers) {
      {
        std::unique_lock<std::mutex> lock(worker->mutex);
        worker->ending = true;
        worker->changed.notify_one();
      }
      worker->thread.join();
    }
  }
};
inline thread_local Pool pool;  // of whoever launches, so that blocks at once have threads of their own

inline void run_block(Block& block, Body body, const void* args, std::mt19937&) {
  const int count = (int)(block.size.x * block.size.y * block.size.z);
  std::vector<std::function<void()>> tasks;
  for (int i = 0; i < count; i++)
    tasks.push_back([&block, body, args, i] {
      Lane lane;
      lane.block = &block, lane.linear = i, lane.thread = {(u32)i, 0, 0};
      current = &lane;
      body(args);
      leave(lane.warp().meeting);
      leave(block.meeting);
    });
  pool.run(tasks);
  for (auto& copier : block.copiers) copier.join();
}
inline void pause() { std::this_thread::sleep_for(std::chrono::microseconds(20)); }
#else
struct Scheduler {
#if defined(__x86_64__)
  void* pointer = nullptr;
#else
  ucontext_t context{};
#endif
  Body body = nullptr;
  const void* args = nullptr;
  std::vector<Lane> lanes;
};
inline thread_local Scheduler scheduler;
constexpr size_t STACK = 96 << 10;

#if defined(__x86_64__)
extern "C" void finial_twin_switch(void** save, void* load);
__asm__(
    ".text\n.local finial_twin_switch\n.type finial_twin_switch,@function\nfinial_twin_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
inline void to_scheduler(Lane& lane) { finial_twin_switch(&lane.pointer, scheduler.pointer); }
inline void to_lane(Lane& lane) { finial_twin_switch(&scheduler.pointer, lane.pointer); }
#else
inline void to_scheduler(Lane& lane) { swapcontext(&lane.context, &scheduler.context); }
inline void to_lane(Lane& lane) { swapcontext(&scheduler.context, &lane.context); }
#endif

inline void meet(Meeting& m) {
  const u32 generation = m.generation;
  if (++m.arrived == m.expected) {
    m.arrived = 0;
    m.generation++;
    return;
  }
  Lane& lane = *current;
  lane.waiting = &m, lane.generation = generation;
  to_scheduler(lane);
}
inline void leave(Meeting& m) {
  m.expected--;
  if (m.expected > 0 && m.arrived == m.expected) m.arrived = 0, m.generation++;
}
inline void pause() {  // of a thread that looks for something again and again
  Lane& lane = *current;
  lane.idle = true;
  to_scheduler(lane);
}
inline void begin() {
  scheduler.body(scheduler.args);
  Lane& lane = *current;
  leave(lane.warp().meeting);
  leave(lane.block->meeting);
  lane.done = true;
  to_scheduler(lane);
  std::abort();
}
inline void run_block(Block& block, Body body, const void* args, std::mt19937& random) {
  const int count = (int)(block.size.x * block.size.y * block.size.z);
  auto& lanes = scheduler.lanes;
  if ((int)lanes.size() < count) lanes.resize(count);
  scheduler.body = body, scheduler.args = args;
  std::vector<int> order(count);
  for (int i = 0; i < count; i++) {
    Lane& lane = lanes[i];
    order[i] = i;
    lane.block = &block, lane.linear = i, lane.thread = {(u32)i, 0, 0};
    lane.exchanges = 0, lane.done = false, lane.waiting = nullptr;
    lane.groups.assign(1, {});
    if (!lane.stack) lane.stack.reset(new u8[STACK]);
#if defined(__x86_64__)
    u64* top = (u64*)(((u64)(lane.stack.get() + STACK) & ~(u64)15) - 16);
    top[0] = (u64)&begin;  // `ret` goes there with the stack as after a call
    lane.pointer = top - 6;
#else
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get(), lane.context.uc_stack.ss_size = STACK;
    makecontext(&lane.context, (void (*)())&begin, 0);
#endif
  }
  std::shuffle(order.begin(), order.end(), random);
  int left = count, idle = 0;
  while (left > 0) {
    bool moved = false, busy = false;
    for (int i : order) {
      Lane& lane = lanes[i];
      if (lane.done || (lane.waiting && lane.waiting->generation == lane.generation)) continue;
      lane.waiting = nullptr, lane.idle = false;
      current = &lane;
      to_lane(lane);
      moved = true, busy |= !lane.idle;
      left -= lane.done;
    }
    idle = busy ? 0 : idle + 1;  // all that it has are waiting for another block
    if (idle > 64)
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    else if (idle > 0)
      std::this_thread::yield();
    if (!moved) {
      std::fprintf(stderr, "twin: the threads of block %u %u %u wait for each other\n", block.index.x, block.index.y,
                   block.index.z);
      std::abort();
    }
  }
}
#endif

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

namespace ptx {

template <class T>
T load_aligned(const void* p) {
  if ((u64)p % sizeof(T)) {
    std::fprintf(stderr, "twin: a load of %zu bytes at %p\n", sizeof(T), p);
    std::abort();
  }
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}
inline Vec4 load_stream(const void* p) { return load_aligned<Vec4>(p); }
inline u16 load_stream_half(const void* p) { return load_aligned<u16>(p); }
inline float load_shared_by_all(const float* p) { return *p; }
inline Vec4 load_cached(const void* p) { return load_aligned<Vec4>(p); }
inline void store_host(u64* p, u64 v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline void prefetch_l2(const void*) {}
inline void allow_next() {}
inline void wait_previous() {}

template <class T>
T shuffle_any(T v, int from) {
  return twin::get<T>(twin::exchange(v)[from & 31]);
}
inline float shuffle_xor(float v, int mask) { return shuffle_any(v, twin::current->id() ^ mask); }
inline u32 shuffle_xor(u32 v, int mask) { return shuffle_any(v, twin::current->id() ^ mask); }
inline u64 shuffle_xor(u64 v, int mask) { return shuffle_any(v, twin::current->id() ^ mask); }
inline float shuffle(float v, int lane) { return shuffle_any(v, lane); }
inline void sync_block() { twin::meet(twin::current->block->meeting); }
inline void sync_warp() { twin::meet(twin::current->warp().meeting); }
inline void fence_device() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline u32 atomic_add(u32* p, u32 v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline u64 atomic_add(u64* p, u64 v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }
inline void sin_cos_pi(float x, float* s, float* c) {
  *s = (float)std::sin(M_PI * (double)x), *c = (float)std::cos(M_PI * (double)x);
}
inline float as_float(u32 x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
inline u32 as_bits(float x) {
  u32 b;
  std::memcpy(&b, &x, 4);
  return b;
}
inline float from_half(u32 bits) {
  const u32 sign = (bits & 0x8000) << 16, e = bits >> 10 & 31, m = bits & 1023;
  if (e == 0) return as_float(sign | as_bits((float)m * 0x1p-24f));
  return as_float(sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13);
}
inline u32 to_half(float x) {
  const u32 sign = as_bits(x) >> 16 & 0x8000;
  const float a = std::fabs(x);
  if (!(a < 65520.0f)) return sign | (a != a ? 0x7e00u : 0x7c00u);
  if (a < 0x1p-14f) return sign | (u32)std::nearbyint(a * 0x1p24f);
  u32 bits = as_bits(a);
  bits += 0xfffu + (bits >> 13 & 1);
  return sign | ((bits >> 13) - (112u << 10));
}
inline u32 bf16_bits(float x) {
  const u32 bits = as_bits(x);
  if (x != x) return bits >> 16 | 0x40;
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline u32 permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = (u64)b << 32 | a;
  u32 v = 0;
  for (int i = 0; i < 4; i++) v |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return v;
}

struct Fragments {
  u32 a[4], b[2];
};
inline void mma_bf16(float d[4], const u32 a[4], const u32 b[2]) {
  Fragments own;
  std::memcpy(own.a, a, 16), std::memcpy(own.b, b, 8);
  const twin::Slot* slots = twin::exchange(own);
  const int g = twin::current->id() / 4, t = twin::current->id() % 4;
  auto half = [](u32 pair, int which) { return as_float(which ? pair & 0xffff0000u : pair << 16); };
  for (int i = 0; i < 4; i++) {
    const int row = i / 2, column = 2 * t + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      const int lane = k % 8 / 2;
      const auto left = twin::get<Fragments>(slots[g * 4 + lane]);
      const auto right = twin::get<Fragments>(slots[column * 4 + lane]);
      sum += half(left.a[row + k / 8 * 2], k % 2) * half(right.b[k / 8], k % 2);
    }
    d[i] += sum;
  }
}
inline void mma_bf16_short(float d[4], const u32 a[2], u32 b) {
  Fragments own = {{a[0], a[1], 0, 0}, {b, 0}};
  const twin::Slot* slots = twin::exchange(own);
  const int g = twin::current->id() / 4, t = twin::current->id() % 4;
  auto half = [](u32 pair, int which) { return as_float(which ? pair & 0xffff0000u : pair << 16); };
  for (int i = 0; i < 4; i++) {
    float sum = 0;
    for (int k = 0; k < 8; k++)
      sum += half(twin::get<Fragments>(slots[g * 4 + k / 2]).a[i / 2], k % 2) *
             half(twin::get<Fragments>(slots[(2 * t + i % 2) * 4 + k / 2]).b[0], k % 2);
    d[i] += sum;
  }
}
inline void load_matrix(u32 r[4], const void* row, bool transposed) {
  const twin::Slot* slots = twin::exchange((u64)row);
  const int g = twin::current->id() / 4, t = twin::current->id() % 4;
  for (int m = 0; m < 4; m++) {
    u32 pair[2];
    for (int i = 0; i < 2; i++) {
      const int at = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
      const u64 base = twin::get<u64>(slots[m * 8 + at]);
      if (base % 16) std::abort();
      pair[i] = ((const u16*)base)[column];
    }
    r[m] = pair[0] | pair[1] << 16;
  }
}
inline void load_matrix_x4(u32 r[4], const void* row) { load_matrix(r, row, false); }
inline void load_matrix_x4_transposed(u32 r[4], const void* row) { load_matrix(r, row, true); }

inline void copy_async(void* shared, const void* global, bool valid) {
  twin::current->groups.back().push_back({shared, global, valid});
}
inline void copy_commit() { twin::current->groups.emplace_back(); }
template <int PENDING>
void copy_wait() {
  auto& groups = twin::current->groups;  // the last is the open one
  while ((int)groups.size() - 1 > PENDING) {
    for (const auto& copy : groups.front())
      if (copy.valid)
        *(Vec4*)copy.to = load_aligned<Vec4>(copy.from);
      else
        *(Vec4*)copy.to = Vec4{0, 0, 0, 0};
    groups.erase(groups.begin());
  }
}

// --- between blocks
// ---------------------------------------------------------------------------------------------------

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

// --- within a block
// ---------------------------------------------------------------------------------------------------

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
inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  auto half = [](u32 pair, int which) { return as_float(which ? pair & 0xffff0000u : pair << 16); };
  return pack_bf16(std::fma(half(a, 0), half(b, 0), half(c, 0)), std::fma(half(a, 1), half(b, 1), half(c, 1)));
}

}  // namespace ptx
