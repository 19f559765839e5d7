// The machine's read bandwidth: what a decode step is measured against.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "memory.h"

namespace finial {

// A buffer that threads read, each its own contiguous part with the widest loads, in large pages where the system
// grants them.
class BandwidthProbe {
 public:
  // Takes the memory. Throws std::runtime_error for no thread or fewer than 16 KiB, std::bad_alloc.
  BandwidthProbe(int threads, int64_t bytes);

  // 1e9 bytes per second: the fastest of as many passes as fit into `seconds` (0 to 600; at least 3).
  double gb_s(double seconds);

 private:
  int threads_;
  int64_t count_;  // floats
  Memory buffer_;
};

// GFLOP/s (1e9) that the multiply-add instruction for inputs rounded like this reaches on registers: the fastest of
// several passes. Throws std::invalid_argument where the instruction set in use has none.
double peak_flops(int threads, Rounding kind, double seconds);

}  // namespace finial
