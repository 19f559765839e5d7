// A block's threads as OS threads, so that ThreadSanitizer sees every access between two meetings.  For twin.h.
#pragma once

#include "twin_block.h"

namespace twin {

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

}  // namespace twin
