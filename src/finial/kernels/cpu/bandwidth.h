// The machine's read bandwidth: what a decode step is measured against.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace finial {

// Fastest of as many passes as fit into `seconds` (at least 3) over a buffer of `bytes`, each thread reading its own
// contiguous part with the widest loads, large pages where the system grants them. In 1e9 bytes per second.
double read_bandwidth(int threads, int64_t bytes, double seconds);

// GFLOP/s (1e9) that the multiply-add instruction for inputs rounded like this reaches on registers: the fastest of
// several passes. Throws std::invalid_argument where the instruction set in use has none.
double peak_flops(int threads, Rounding kind, double seconds);

}  // namespace finial
