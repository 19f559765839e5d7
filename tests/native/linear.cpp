// linear: every format, odd sizes, 1 to 33 rows; a row's result the same in any company and on any number of threads.
#include <cmath>

#include "support.h"

namespace finial::test {

namespace {

Floats compute(const Machine& m, const Weight& w, const Floats& bias, const Floats& x, int64_t rows) {
  Program program(m.pool, m.kernels);
  const int n = program.dimension(), in = program.input(n, w.n_in), out = program.output(n, w.n_out);
  program.linear(out, in, w.linear(bias.empty() ? nullptr : bias.data()));
  Floats y(static_cast<size_t>(rows * w.n_out));
  program.run({rows}, {}, {array(x, rows)}, {array(y, rows)}, program.new_state(0, 1));
  return y;
}

void test_case(Report& report, const Kernels* kernels, Format format, int64_t n_out, int64_t n_in, bool biased,
               const std::vector<int64_t>& counts) {
  const std::string name = std::string(kernels->name) + " linear " + info(format).name + " " + std::to_string(n_in) +
                           " x " + std::to_string(n_out) + (biased ? " + bias" : "");
  const int64_t rows = counts.back();
  const Weight w(format, n_out, n_in, static_cast<uint64_t>(n_in * 1000 + n_out));
  Random random(static_cast<uint64_t>(n_in));
  const Floats x = random.normals(rows * n_in), bias = biased ? random.normals(n_out) : Floats();
  const Machine one{kernels, std::make_shared<Pool>(1)}, three{kernels, std::make_shared<Pool>(3)};
  const Floats whole = compute(one, w, bias, x, rows);
  Doubles expected, tolerance;
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t o = 0; o < n_out; ++o) {
      double sum = biased ? bias[static_cast<size_t>(o)] : 0, size = std::fabs(sum), terms = 0;
      for (int64_t k = 0; k < n_in; ++k) {
        double parts;
        const double a = x[static_cast<size_t>(t * n_in + k)], b = element(format, w.row(o), k, &parts);
        sum += a * b, size += std::fabs(a * b), terms += std::fabs(a) * parts;
      }
      expected.push_back(sum);
      tolerance.push_back(gamma(n_in + 2) * size + (exact(format) ? 0 : 4 * U * terms));
    }
  report.near(whole, expected, tolerance, name);
  for (int64_t count : counts) {
    const Floats first(x.begin(), x.begin() + count * n_in);
    const Floats y = compute(count % 2 == 0 ? one : three, w, bias, first, count);
    report.equal(y.data(), whole.data(), count * n_out, name + ": its first " + std::to_string(count) + " rows alone");
  }
}

}  // namespace

void test_linear(Report& report, const Kernels* kernels) {
  const std::vector<int64_t> few = {1, 2, 3, 5, 13, 16, 33};
  std::vector<int64_t> all;
  for (int64_t i = 1; i <= 33; ++i) all.push_back(i);
  for (int f = 0; f < static_cast<int>(Format::COUNT); ++f) {
    const Format format = static_cast<Format>(f);
    const int64_t block = info(format).block;
    if (!report.thorough) {
      test_case(report, kernels, format, 37, block == 1 ? 131 : block == 32 ? 96 : 256, true, {1, 2, 3, 5, 14});
      continue;
    }
    test_case(report, kernels, format, 67, block == 1 ? 259 : block == 32 ? 288 : 768, true, few);
    test_case(report, kernels, format, 33, block == 256 ? 512 : 160, false, all);
    test_case(report, kernels, format, 5, block == 1 ? 1001 : block == 32 ? 1056 : 1024, true, few);
    if (block == 1)
      for (int64_t n_in : {1, 2, 7, 15, 31, 63, 65, 127}) test_case(report, kernels, format, 3, n_in, true, few);
    if (block == 32)
      for (int64_t n_in : {32, 64, 96}) test_case(report, kernels, format, 1, n_in, true, few);
  }
}

}  // namespace finial::test
