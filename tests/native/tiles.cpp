// What tiles.h says of tile registers, in words that other processors run too, against the registers themselves: the
// same bits, for numbers of every size. On a processor without them there is nothing to compare.
#include <cmath>
#include <cstring>
#include <limits>

#include "support.h"

namespace finial::test {

namespace {

// Products of rows of every size with weights of every size; NaN is NaN, whatever its bits.
Floats products(const Kernels* kernels, Format format, int64_t rows, int64_t n_in, int64_t n_out, bool wild) {
  const Weight w(format, n_out, n_in, 11);
  std::vector<uint8_t> bytes(static_cast<size_t>(n_out * w.linear().row_bytes));
  std::memcpy(bytes.data(), w.row(0), bytes.size());
  Random random(12);
  Floats x = random.normals(rows * n_in);
  if (wild) {
    for (float& a : x) a = std::ldexp(a, static_cast<int>(random.next() % 250) - 125);
    x[5] = std::numeric_limits<float>::infinity();
    if (rows > 1) x[static_cast<size_t>(n_in + 3)] = NAN;
    if (format == Format::BF16)
      for (size_t i = 1; i < bytes.size(); i += 2)  // any exponent but that of infinity
        bytes[i] = static_cast<uint8_t>(random.next() % 127 | (random.next() & 128));
  }
  Program program(std::make_shared<Pool>(2), kernels);
  const int n = program.dimension(), in = program.input(n, n_in), out = program.output(n, n_out);
  Linear l = w.linear();
  l.weight = bytes.data();
  program.linears(in, nullptr, 0, 0, {{out, program.weight(l, false, nullptr)}});
  Floats y(static_cast<size_t>(rows * n_out));
  program.run({rows}, {}, {array(x, rows)}, {array(y, rows)}, program.new_state(0, 1));
  for (float& a : y)
    if (std::isnan(a)) a = NAN;
  return y;
}

}  // namespace

void test_tiles(Report& report, const Kernels* registers, const Kernels* emulated) {
  for (Format format : {Format::BF16, Format::Q8_0, Format::Q4_0})
    for (int64_t rows : {1, 7, 16, 50})
      for (bool wild : {false, true}) {
        const int64_t n_in = format == Format::BF16 ? 331 : 352;
        const Floats a = products(registers, format, rows, n_in, 45, wild),
                     b = products(emulated, format, rows, n_in, 45, wild);
        int64_t finite = 0;
        for (float y : a) finite += std::isfinite(y);
        const std::string name = std::string("tile registers: ") + info(format).name + ", " + std::to_string(rows) +
                                 " rows" + (wild ? " of every size" : "");
        report.equal(a.data(), b.data(), rows * 45, name);
        report.expect(finite > 0 || wild, name + ": nothing is finite");
      }
}

}  // namespace finial::test
