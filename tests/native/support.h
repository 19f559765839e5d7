// What the op tests share: the report, random numbers, and the exact value of every weight format, element by element
// in double precision. Nothing here is shared with the kernels but the table of block sizes.
//
// With u = 2^-24 (rounding to float32) a sum of n products is off by at most gamma(n) * sum |a b|, whatever its order
// (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). All tolerances are made of that.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "program.h"

namespace finial::test {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Ints = std::vector<int32_t>;

constexpr double U = 1.0 / (1 << 24);
inline double gamma(int64_t n) { return static_cast<double>(n) * U / (1 - static_cast<double>(n) * U); }

// One instruction set on a pool of threads.
struct Machine {
  const Kernels* kernels;
  std::shared_ptr<Pool> pool;
};

// Counts checks; prints those that fail.
class Report {
 public:
  explicit Report(bool thorough) : thorough(thorough) {}
  void expect(bool right, const std::string& what);
  // |got - expected| <= tolerance for every element; NaN is never right.
  void near(const Floats& got, const Doubles& expected, const Doubles& tolerance, const std::string& what);
  void equal(const float* a, const float* b, int64_t n, const std::string& what);  // to the bit
  int64_t passed = 0, failed = 0;
  const bool thorough;  // false: one case of each kind, for emulators
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
  uint64_t next();
  double uniform() { return static_cast<double>(next() >> 11) / 9007199254740992.0; }  // [0, 1)
  float normal();
  Floats normals(int64_t n);

 private:
  uint64_t state_;
};

// x to the nearest number of `bits` significant bits, ties to even, subnormal below 2^least.
double rounded(double x, int bits, int least);
inline double to_bf16(double x) { return rounded(x, 8, -126); }
inline double to_f16(double x) { return rounded(x, 11, -14); }

// A row as a cache keeps it; q8_0 as quants.py encodes it.
Doubles cached(CacheType type, const float* x, int64_t n);

double half_value(const uint8_t* p);

// Element i of a row in any format, exactly; `size` gets the sum of the magnitudes of its terms.
double element(Format format, const uint8_t* row, int64_t i, double* size = nullptr);
// Decoding multiplies and adds at most three times; formats without a second term are exact.
bool exact(Format format);

// A random matrix whose bytes end where their allocation ends and begin at an odd address.
class Weight {
 public:
  Weight(Format format, int64_t n_out, int64_t n_in, uint64_t seed);
  Linear linear(const float* bias = nullptr) const;
  const uint8_t* row(int64_t o) const { return bytes_.data() + 1 + o * row_bytes_; }
  const Format format;
  const int64_t n_out, n_in;

 private:
  int64_t row_bytes_;
  std::vector<uint8_t> bytes_;
};

const FormatInfo& info(Format format);
FloatArray array(const Floats& data, int64_t rows);  // [rows, size / rows]; never written through when an input

void test_linear(Report& report, const Kernels* kernels);
void test_attention(Report& report, const Kernels* kernels);
void test_elementwise(Report& report, const Kernels* kernels);
void test_decode(Report& report, const Kernels* kernels);
void test_layer(Report& report, const Kernels* kernels);
void test_tiles(Report& report, const Kernels* registers, const Kernels* emulated);
void test_pool(Report& report);

}  // namespace finial::test
