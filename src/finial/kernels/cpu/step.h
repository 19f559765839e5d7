// What one run of a program needs beside the program. For step.cpp, run.cpp and products.cpp.
#pragma once

#include <stdexcept>
#include <string>

#include "program.h"

namespace finial {

[[noreturn]] inline void reject(const std::string& message) { throw std::invalid_argument(message); }

inline int64_t rounded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

struct Program::Step {
  const std::vector<int64_t>& sizes;
  const std::vector<IntArray>& ints;
  const State& state;
  std::vector<float*> buffers;       // by buffer
  std::vector<float*> tables;        // by rope table: cos [rows, half], then sin
  uint8_t* rounded[ROUNDINGS] = {};  // rows shared by all threads
  float* scratch = nullptr;
  int64_t scratch_stride = 0;             // floats per thread
  std::vector<const int32_t*> sequences;  // by sequence map

  int64_t rows(const Buffer& b) const { return sizes[static_cast<size_t>(b.dimension)]; }
  const IntArray& input(int index) const { return ints[static_cast<size_t>(index)]; }
};

}  // namespace finial
