#include "bandwidth.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace finial {

namespace {

constexpr int64_t UNIT = 1024;  // floats: a page, so that no two threads touch one

}  // namespace

BandwidthProbe::BandwidthProbe(int threads, int64_t bytes)
    : threads_(threads), count_(bytes / static_cast<int64_t>(sizeof(float))) {
  if (threads < 1 || count_ < 4096)
    throw std::runtime_error("BandwidthProbe: threads must be at least 1, bytes at least 16384");
  buffer_ = Memory(static_cast<size_t>(count_) * sizeof(float), Pages::Huge);
  Pool(threads).run([&](int thread) {  // written by the thread that reads it: the page lands on its memory node
    const Range part = share(count_, thread, threads_, UNIT);
    std::memset(buffer_.floats() + part.begin, 1, static_cast<size_t>(part.end - part.begin) * sizeof(float));
  });
}

double BandwidthProbe::gb_s(double seconds) {
  if (!(seconds >= 0) || seconds > 600) throw std::runtime_error("BandwidthProbe.gb_s: seconds must be 0 to 600");
  const Kernels* kernels = find_kernels("");
  Pool pool(threads_);
  std::vector<float> sums(static_cast<size_t>(threads_) * 16);
  using Clock = std::chrono::steady_clock;
  const Clock::time_point first = Clock::now();
  double best = 1e300;
  for (int pass = 0; pass < 3 || std::chrono::duration<double>(Clock::now() - first).count() < seconds; ++pass) {
    const Clock::time_point start = Clock::now();
    pool.run([&](int thread) {
      const Range part = share(count_, thread, threads_, UNIT);
      sums[static_cast<size_t>(thread) * 16] += kernels->read(buffer_.floats() + part.begin, part.end - part.begin);
    });
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return static_cast<double>(count_) * sizeof(float) / best / 1e9;
}

double peak_flops(int threads, Rounding kind, double seconds) {
  if (threads < 1 || !(seconds >= 0) || seconds > 600)
    throw std::invalid_argument("peak_flops: threads must be at least 1, seconds 0 to 600");
  const Kernels* kernels = find_kernels("");
  float sink = 0;
  const int64_t once = kernels->peak(kind, 1, &sink);
  if (once == 0) throw std::invalid_argument("peak_flops: this instruction set multiplies nothing of that kind");
  Pool pool(threads);
  const int64_t rounds = std::max<int64_t>(1, 20'000'000 / once);
  using Clock = std::chrono::steady_clock;
  const Clock::time_point first = Clock::now();
  double best = 1e300;
  for (int pass = 0; pass < 3 || std::chrono::duration<double>(Clock::now() - first).count() < seconds; ++pass) {
    const Clock::time_point start = Clock::now();
    pool.run([&](int) {
      float ignored = 0;
      kernels->peak(kind, rounds, &ignored);
    });
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return static_cast<double>(once * rounds * threads) / best / 1e9;
}

}  // namespace finial
