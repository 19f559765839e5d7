// The team of threads: every thread runs each job once, barriers hold, callers take turns, sleepers wake, a forked
// child has a team of its own.
#include <atomic>
#include <chrono>
#include <thread>

#include "support.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#define FINIAL_FORKS 1
#endif
#if defined(__SANITIZE_THREAD__)
#undef FINIAL_FORKS  // ThreadSanitizer does not follow a fork of several threads
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#undef FINIAL_FORKS
#endif
#endif

namespace finial::test {

namespace {

// Not atomic on purpose: the pool's own synchronisation has to make these visible, and ThreadSanitizer sees if it does.
bool runs(Pool& pool, int jobs) {
  std::vector<int> count(static_cast<size_t>(pool.threads()) * 16);
  for (int i = 0; i < jobs; ++i) pool.run([&](int thread) { ++count[static_cast<size_t>(thread) * 16]; });
  for (int thread = 0; thread < pool.threads(); ++thread)
    if (count[static_cast<size_t>(thread) * 16] != jobs) return false;
  return true;
}

bool barriers_hold(Pool& pool) {
  const size_t threads = static_cast<size_t>(pool.threads());
  std::vector<int> slots(threads), wrong(threads * 16);
  pool.run([&](int thread) {
    for (int phase = 0; phase < 50; ++phase) {
      slots[static_cast<size_t>(thread)] = phase + thread;
      pool.barrier(thread);
      for (size_t i = 0; i < threads; ++i)
        wrong[static_cast<size_t>(thread) * 16] += slots[i] != phase + static_cast<int>(i);
      pool.barrier(thread);
    }
  });
  for (int count : wrong)
    if (count != 0) return false;
  return true;
}

bool callers_take_turns(Pool& pool) {
  std::atomic<int> inside{0}, overlaps{0};
  int total = 0;  // guarded by the turns alone
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&] {
      for (int i = 0; i < 40; ++i)
        pool.run([&](int thread) {
          if (thread != 0) return;
          overlaps += inside.fetch_add(1) != 0;
          ++total;
          inside.fetch_sub(1);
        });
    });
  for (std::thread& caller : callers) caller.join();
  return total == 120 && overlaps == 0;
}

bool shares_cover() {
  for (int64_t count : {0, 1, 5, 16, 17, 1000})
    for (int threads = 1; threads <= 7; ++threads)
      for (int64_t unit : {1, 16}) {
        int64_t at = 0;
        for (int i = 0; i < threads; ++i) {
          const Range part = share(count, i, threads, unit);
          if (part.begin != at || part.end < part.begin) return false;
          at = part.end;
        }
        if (at != count) return false;
      }
  return true;
}

}  // namespace

void test_pool(Report& report) {
  for (int threads = 1; threads <= 5; ++threads) {
    const std::string name = "pool of " + std::to_string(threads) + ": ";
    Pool pool(threads);
    report.expect(runs(pool, 100), name + "each thread runs each job once");
    report.expect(barriers_hold(pool), name + "barriers");
    report.expect(callers_take_turns(pool), name + "callers take turns");
    for (int i = 0; i < 3; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));  // past the moment for which workers spin
      report.expect(runs(pool, 1), name + "sleepers wake");
    }
    const Pool unused(threads);
  }
  report.expect(shares_cover(), "shares cover every item once");
#if defined(FINIAL_FORKS)
  if (!report.thorough) return;  // qemu-user does not survive a fork of several threads
  Pool pool(3);
  report.expect(runs(pool, 1), "pool before a fork");
  const pid_t child = fork();
  if (child == 0) _exit(runs(pool, 3) ? 0 : 1);
  int status = -1;
  report.expect(child > 0 && waitpid(child, &status, 0) == child && status == 0, "pool in a forked child");
  report.expect(runs(pool, 3), "pool after a fork");
#endif
}

}  // namespace finial::test
