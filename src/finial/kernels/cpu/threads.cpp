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
  struct alignas(64) Signal {
    std::atomic<uint64_t> barrier{0};
  };
  struct alignas(64) Passed {
    uint64_t barriers = 0;
  };

  std::vector<std::thread> workers;
  const std::function<void(int)>* job = nullptr;
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable wake;
  alignas(64) std::atomic<uint64_t> jobs{0};  // how many were given out
  alignas(64) std::atomic<int> sleeping{0};
  std::unique_ptr<Signal[]> signals;  // [threads, rounds]: the last barrier at which another thread called this one
  std::unique_ptr<Passed[]> passed;   // [threads]
  int rounds = 0;

  explicit Team(int threads) {
    while (1 << rounds < threads) ++rounds;
    signals = std::make_unique<Signal[]>(static_cast<size_t>(threads * rounds));
    passed = std::make_unique<Passed[]>(static_cast<size_t>(threads));
  }

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
  team_ = std::make_unique<Team>(threads_);
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
          barrier(index);
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
  barrier(0);
}

// In round r every thread calls the one 2^r further on and waits for its own call, so that after the last round each
// has heard, through others, of all (Hensgen, Finkel and Manber, "Two algorithms for barrier synchronization", 1988). A
// call is one line that goes from one core to another; a counter would go from core to core for each that arrives.
void Pool::barrier(int thread, Run* next) {
  if (threads_ == 1) return;
  Team& team = *team_;
  const uint64_t number = ++team.passed[static_cast<size_t>(thread)].barriers;
  for (int round = 0; round < team.rounds; ++round) {
    const int other = (thread + (1 << round)) % threads_;
    team.signals[static_cast<size_t>(other * team.rounds + round)].barrier.store(number, std::memory_order_release);
    const std::atomic<uint64_t>& own = team.signals[static_cast<size_t>(thread * team.rounds + round)].barrier;
    for (int spins = 0; own.load(std::memory_order_acquire) < number; ++spins) {
      if (next != nullptr && next->begin < next->end)
        fetch(*next);
      else if (spins < SPINS_BEFORE_YIELD)
        relax();
      else
        std::this_thread::yield();
    }
  }
}

}  // namespace finial
