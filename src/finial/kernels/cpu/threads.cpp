#include "threads.h"

#include <chrono>

#include "topology.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace finial {

namespace {

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  __asm__ volatile("yield");
#endif
}

void fetch(Run& run) {
  constexpr int64_t AT_ONCE = 256;
#if defined(__GNUC__)
  for (int64_t i = 0; i < AT_ONCE; i += 64) __builtin_prefetch(run.begin + i, 0, 2);
#endif
  run.begin += AT_ONCE;
}

long long process_id() {
#if defined(_WIN32)
  return _getpid();
#else
  return getpid();
#endif
}

void pin(int cpu) {
#if defined(__linux__)
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  pthread_setaffinity_np(pthread_self(), sizeof one, &one);  // refused by some sandboxes; then it runs unpinned
#else
  (void)cpu;
#endif
}

// A wait longer than this many pauses means that another thread lost its core: give it the chance to get one back.
constexpr int SPINS_BEFORE_YIELD = 4000;
// A generation loop comes back within a fraction of a millisecond; sleeping and waking costs tens of microseconds.
constexpr auto SPIN_BETWEEN_JOBS = std::chrono::microseconds(500);

}  // namespace

struct Pool::Team {
  std::vector<std::thread> workers;
  const std::function<void(int)>* job = nullptr;
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable wake;
  alignas(64) std::atomic<uint64_t> jobs{0};  // how many were given out
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<uint64_t> phase{0};
  alignas(64) std::atomic<int> sleeping{0};

  void wait_for_job(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + SPIN_BETWEEN_JOBS;
    for (int spins = 0; jobs.load(std::memory_order_acquire) == seen; ++spins) {
      if (spins % 64 != 63 || std::chrono::steady_clock::now() < until) {
        relax();
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex);
      sleeping.fetch_add(1);
      wake.wait(lock, [&] { return jobs.load() != seen; });
      sleeping.fetch_sub(1);
    }
  }

  void give(const std::function<void(int)>* next) {
    job = next;
    jobs.fetch_add(1);  // sequentially consistent with `sleeping`: a worker is seen asleep or sees the new count
    if (sleeping.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
    }
  }
};

Pool::Pool(int threads) : threads_(threads > 0 ? threads : topology().physical) {}

void Pool::start() {
  if (team_ && process_ == process_id()) return;
  (void)team_.release();  // of the parent process: its threads are not in this one, so nothing of it may be touched
  team_ = std::make_unique<Team>();
  process_ = process_id();
  Team* team = team_.get();
  const std::vector<int> cpus = topology().cpus;
  const bool pinned = static_cast<int>(cpus.size()) >= threads_;
  try {
    for (int index = 1; index < threads_; ++index) {
      const int cpu = pinned ? cpus[static_cast<size_t>(index)] : -1;
      team->workers.emplace_back([this, team, index, cpu] {
        if (cpu >= 0) pin(cpu);
        for (uint64_t seen = 0;; ++seen) {
          team->wait_for_job(seen);
          if (team->stop.load()) return;
          (*team->job)(index);
          barrier();
        }
      });
    }
  } catch (...) {
    end();
    throw;
  }
}

void Pool::end() {
  team_->stop.store(true);
  team_->give(nullptr);
  for (std::thread& worker : team_->workers) worker.join();
  team_.reset();
}

Pool::~Pool() {
  if (!team_) return;
  if (process_ == process_id())
    end();
  else
    (void)team_.release();
}

void Pool::run(const std::function<void(int)>& job) {
  std::lock_guard<std::mutex> lock(turn_);
  if (threads_ == 1) {
    job(0);
    return;
  }
  start();
  team_->give(&job);
  job(0);
  barrier();
}

void Pool::barrier(Run* next) {
  if (threads_ == 1) return;
  Team& team = *team_;
  const uint64_t phase = team.phase.load(std::memory_order_acquire);
  if (team.arrived.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    team.arrived.store(0, std::memory_order_relaxed);
    team.phase.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; team.phase.load(std::memory_order_acquire) == phase; ++spins) {
    if (next != nullptr && next->begin < next->end)
      fetch(*next);
    else if (spins < SPINS_BEFORE_YIELD)
      relax();
    else
      std::this_thread::yield();
  }
}

}  // namespace finial
