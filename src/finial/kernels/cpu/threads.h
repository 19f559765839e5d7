// A persistent team of threads that run one function together, with a barrier between its phases.
//
// The caller is thread 0. Within a job the others spin; after it they spin for a moment, since the next step is usually
// near, and then sleep. Workers start with the first job and are started anew in a forked child, which inherits none.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace finial {

// Memory that will be read from its beginning on.
struct Run {
  const uint8_t *begin, *end;
};

class Pool {
 public:
  // threads <= 0: the physical cores that this process may use.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Runs job(thread) on every thread and returns when all have; one job at a time, others wait their turn. A job must
  // not throw. Throws std::system_error when the threads cannot be started.
  void run(const std::function<void(int)>& job);

  // Inside a job, on thread `thread`: none passes before all have arrived, and what was written before is visible
  // after. Who waits meanwhile asks for what it will read next.
  void barrier(int thread, Run* next = nullptr);

 private:
  struct Team;
  void start();
  void end();

  int threads_;
  std::mutex turn_;
  std::unique_ptr<Team> team_;
  long long process_ = 0;
};

// The items [begin, end) of `count` that thread `index` of `threads` takes: contiguous, in multiples of `unit`.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t count, int index, int threads, int64_t unit = 1) {
  const int64_t units = (count + unit - 1) / unit;
  const int64_t begin = units * index / threads * unit, end = units * (index + 1) / threads * unit;
  return {begin < count ? begin : count, end < count ? end : count};
}

}  // namespace finial
