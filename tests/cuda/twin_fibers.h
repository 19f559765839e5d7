// A block's threads as fibers of one OS thread, in a shuffled order, switched by hand where they meet.  For twin.h.
#pragma once

#include "twin_block.h"

namespace twin {

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

}  // namespace twin
