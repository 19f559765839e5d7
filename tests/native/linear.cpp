// linear: every format, odd sizes, 1 to 33 rows; a row's result the same in any company and on any number of threads.
#include <cmath>
#include <cstring>

#include "support.h"

namespace finial::test {

namespace {

Floats compute(const Machine& m, const Weight& w, const Floats& bias, const Floats& x, int64_t rows) {
  Program program(m.pool, m.kernels);
  const int n = program.dimension(), in = program.input(n, w.n_in), out = program.output(n, w.n_out);
  const int weight = program.weight(w.linear(bias.empty() ? nullptr : bias.data()), false, nullptr);
  program.linears(in, nullptr, 0, 0, {{out, weight}});
  Floats y(static_cast<size_t>(rows * w.n_out));
  program.run({rows}, {}, {array(x, rows)}, {array(y, rows)}, program.new_state(0, 1));
  return y;
}

// Activations as the instruction set takes them (packed.h).
Doubles taken(Rounding rounding, const Floats& x) {
  Doubles out(x.begin(), x.end());
  if (rounding == Rounding::BF16)
    for (double& a : out) a = to_bf16(a);
  if (rounding != Rounding::INT8) return out;
  for (size_t i = 0; i < x.size(); i += 32) {
    float most = 0;
    for (size_t j = i; j < i + 32; ++j) most = std::fmax(most, std::fabs(x[j]));
    int exponent;
    const float fraction = std::frexp(most / 127, &exponent);
    const float scale = most > 0 ? std::ldexp(std::ceil(fraction * 32) / 32, exponent) : 1;
    const float inverse = 1 / scale;
    for (size_t j = i; j < i + 32; ++j) out[j] = std::nearbyint(x[j] * inverse) * static_cast<double>(scale);
  }
  return out;
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
  const Doubles rounded = taken(kernels->rounding(format), x);
  Doubles expected, tolerance;
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t o = 0; o < n_out; ++o) {
      double sum = biased ? bias[static_cast<size_t>(o)] : 0, size = std::fabs(sum), terms = 0;
      for (int64_t k = 0; k < n_in; ++k) {
        double parts;
        const double a = rounded[static_cast<size_t>(t * n_in + k)], b = element(format, w.row(o), k, &parts);
        sum += a * b, size += std::fabs(a * b), terms += std::fabs(a) * parts;
      }
      expected.push_back(sum);
      if (info(format).block == 256 && kernels->rounding(format) != Rounding::None)
        tolerance.push_back(gamma(n_in / 16 + 4) * (terms + (biased ? std::fabs(bias[static_cast<size_t>(o)]) : 0)));
      else
        tolerance.push_back(gamma(n_in + 2) * size + (exact(format) ? 0 : 4 * U * terms));
    }
  report.near(whole, expected, tolerance, name);
  for (int64_t count : counts) {
    const Floats first(x.begin(), x.begin() + count * n_in);
    const Floats y = compute(count % 2 == 0 ? one : three, w, bias, first, count);
    report.equal(y.data(), whole.data(), count * n_out, name + ": its first " + std::to_string(count) + " rows alone");
  }
}

// Scales that no model has, but a file may, and rows that are nothing, huge or no number: in a batch as alone.
void test_unusual(Report& report, const Kernels* kernels, Format format) {
  constexpr int64_t OUT = 40, ROWS = 61;
  const int64_t IN = info(format).block == 256 ? 256 : 96, scale = format == Format::Q6_K ? 208 : 0;
  const Weight w(format, OUT, IN, 7);
  std::vector<uint8_t> bytes(static_cast<size_t>(OUT * w.linear().row_bytes));
  std::memcpy(bytes.data(), w.row(0), bytes.size());
  const uint16_t scales[] = {0x0000, 0x8000, 0x0001, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x8400};  // zeros to infinity, NaN
  for (size_t i = 0; i < 8; ++i)
    std::memcpy(bytes.data() + w.linear().row_bytes * static_cast<int64_t>(i < 4 ? i : i + 30) + scale, &scales[i], 2);
  Random random(9);
  Floats x = random.normals(ROWS * IN);
  for (int64_t i = 0; i < 32; ++i) {
    x[static_cast<size_t>(3 * IN + i)] = 0;
    x[static_cast<size_t>(4 * IN + i)] *= 1e-36f;
    x[static_cast<size_t>(5 * IN + i)] *= 1e33f;
    x[static_cast<size_t>(7 * IN + i)] *= 1e-42f;
    x[static_cast<size_t>(8 * IN + i)] *= 3e32f;
  }
  const float large = std::ldexp(1.0f, 110);  // as infinite as infinity (packed.h)
  x[9 * IN] = large, x[10 * IN + 33] = std::nextafter(large, 0.0f);
  x[12 * IN] = INFINITY, x[14 * IN + 40] = NAN, x[60 * IN] = -INFINITY;
  const auto product = [&](int64_t first, int64_t rows, int threads) {
    Program program(std::make_shared<Pool>(threads), kernels);
    const int n = program.dimension(), in = program.input(n, IN), out = program.output(n, OUT);
    Linear l = w.linear();
    l.weight = bytes.data();
    program.linears(in, nullptr, 0, 0, {{out, program.weight(l, false, nullptr)}});
    Floats y(static_cast<size_t>(rows * OUT)), part(x.begin() + first * IN, x.begin() + (first + rows) * IN);
    program.run({rows}, {}, {array(part, rows)}, {array(y, rows)}, program.new_state(0, 1));
    return y;
  };
  const Floats together = product(0, ROWS, 2);
  int64_t different = 0, numbers = 0;
  for (int64_t t = 0; t < ROWS; ++t) {
    const Floats alone = product(t, 1, 1);
    for (int64_t o = 0; o < OUT; ++o) {
      const float a = alone[static_cast<size_t>(o)], b = together[static_cast<size_t>(t * OUT + o)];
      different += std::isnan(a) ? !std::isnan(b) : std::memcmp(&a, &b, 4) != 0;
      numbers += std::isfinite(a);
    }
  }
  const std::string name = std::string(kernels->name) + " linear " + info(format).name + ", unusual numbers: ";
  report.expect(different == 0, name + std::to_string(different) + " differ in company");
  report.expect(numbers > OUT * ROWS / 2, name + std::to_string(numbers) + " finite");
  bool spread = true;
  for (int64_t t : {9, 12, 14, 60})
    for (int64_t o = 4; o < 34; ++o) spread &= std::isnan(together[static_cast<size_t>(t * OUT + o)]);
  report.expect(spread || kernels->rounding(format) != Rounding::INT8, name + "a row's NaN must reach its results");
  bool below = true;
  for (int64_t o = 4; o < 34; ++o) below &= !std::isnan(together[static_cast<size_t>(10 * OUT + o)]);
  report.expect(below, name + "what is just below 2^110 is a number");
}

// Products that share a normalised input, one of them gated by another, to one of them something added: the same bits
// as one operation after the other. The second weight of a K-quant and of q4_0 is of another format than the others;
// what is gated lies panel by panel beside what gates it.
void test_fused(Report& report, const Kernels* kernels, Format format, int64_t rows, int threads) {
  constexpr int64_t WIDE = 75, NARROW = 34;
  const bool k_quant = info(format).block == 256;
  const int64_t IN = k_quant ? 512 : 96;
  const bool packed = kernels->rounding(format) != Rounding::None;
  const Format other_format = format == Format::Q6_K || format == Format::Q4_0 ? Format::Q8_0
                              : k_quant                                        ? Format::Q6_K
                                                                               : format;
  const Weight w1(format, WIDE, IN, 1), w2(other_format, WIDE, IN, 2), w3(format, NARROW, IN, 3);
  Random random(4);
  const Floats x = random.normals(rows * IN), more = random.normals(rows * NARROW), norm = random.normals(IN),
               bias = random.normals(NARROW);
  Floats results[4] = {Floats(static_cast<size_t>(rows * WIDE)), Floats(static_cast<size_t>(rows * NARROW))};
  results[2] = results[0], results[3] = results[1];
  for (int fused = 0; fused < 2; ++fused) {
    Program p(std::make_shared<Pool>(fused == 0 ? 1 : threads), kernels);
    const int n = p.dimension(), in = p.input(n, IN), other = p.input(n, NARROW), out = p.output(n, WIDE),
              sum = p.output(n, NARROW), normal = p.buffer(n, IN, 0), a = p.buffer(n, WIDE, 1),
              b = p.buffer(n, WIDE, 2), c = p.buffer(n, NARROW, 3);
    const Program::Beside with_room{fused == 1, other_format, -1};
    const int first = p.weight(w1.linear(), false, nullptr, with_room),
              second = p.weight(w2.linear(), false, nullptr, {false, Format::F32, fused == 1 ? first : -1}),
              third = p.weight(w3.linear(bias.data()), false, nullptr);
    if (fused == 0) {
      p.rms_norm(normal, in, norm.data(), IN, 1e-6f);
      p.linears(normal, nullptr, 0, 0, {{a, first}});
      p.linears(normal, nullptr, 0, 0, {{b, second}});
      p.linears(normal, nullptr, 0, 0, {{c, third}});
      p.silu_mul(out, a, b);
      p.add(sum, other, c);
    } else if (packed) {
      p.linears(in, norm.data(), IN, 1e-6f, {{out, first, second}, {sum, third, -1, other}});
    } else {
      p.linears(in, norm.data(), IN, 1e-6f, {{a, first}, {b, second}, {sum, third, -1, other}});
      p.silu_mul(out, a, b);
    }
    const Floats *y = results + 2 * fused, *z = y + 1;
    p.run({rows}, {}, {array(x, rows), array(more, rows)}, {array(*y, rows), array(*z, rows)}, p.new_state(0, 1));
  }
  const std::string name = std::string(kernels->name) + " linear " + info(format).name + ": " + std::to_string(rows) +
                           " rows, " + std::to_string(threads) + " threads, fused ";
  report.equal(results[0].data(), results[2].data(), rows * WIDE, name + "norm and gate");
  report.equal(results[1].data(), results[3].data(), rows * NARROW, name + "norm and addition");
}

// A gated product that rounds its result for the one that reads it: the same bits as a result in float32, which that
// one rounds itself.
void test_kept_rounded(Report& report, const Kernels* kernels, Format format, int64_t rows, int threads) {
  if (kernels->rounding(format) == Rounding::None) return;
  const int64_t in = info(format).block == 256 ? 256 : 96, wide = info(format).block == 256 ? 512 : 160, narrow = 50;
  const Weight gate(format, wide, in, 1), up(format, wide, in, 2), down(format, narrow, wide, 3);
  Random random(5);
  const Floats x = random.normals(rows * in), more = random.normals(rows * narrow);
  Floats results[2];
  for (int kept = 0; kept < 2; ++kept) {
    Program p(std::make_shared<Pool>(threads), kernels);
    const int n = p.dimension(), a = p.input(n, in), other = p.input(n, narrow), y = p.output(n, narrow),
              middle = p.buffer(n, wide, 0);
    const int first = p.weight(gate.linear(), false, nullptr, {true, format, -1});
    const int second = p.weight(up.linear(), false, nullptr, {false, Format::F32, first});
    if (kept == 1) p.keep_rounded(middle, format);
    p.linears(a, nullptr, 0, 0, {{middle, first, second}});
    p.linears(middle, nullptr, 0, 0, {{y, p.weight(down.linear(), false, nullptr), -1, other}});
    results[kept] = Floats(static_cast<size_t>(rows * narrow));
    p.run({rows}, {}, {array(x, rows), array(more, rows)}, {array(results[kept], rows)}, p.new_state(0, 1));
  }
  report.equal(results[0].data(), results[1].data(), rows * narrow,
               std::string(kernels->name) + " linear " + info(format).name + ": " + std::to_string(rows) + " rows, " +
                   std::to_string(threads) + " threads, rounded by the product before");
}

}  // namespace

void test_linear(Report& report, const Kernels* kernels) {
  const std::vector<int64_t> few = {1, 2, 3, 5, 13, 16, 33};
  std::vector<int64_t> all;
  for (int64_t i = 1; i <= 33; ++i) all.push_back(i);
  for (Format format : {Format::F32, Format::BF16, Format::Q8_0, Format::Q4_0, Format::Q4_K, Format::Q6_K})
    for (int64_t rows : {1, 13, 33}) test_fused(report, kernels, format, rows, rows == 13 ? 1 : 3);
  for (Format format : {Format::BF16, Format::Q8_0, Format::Q4_0, Format::Q4_K})
    for (int64_t rows : {1, 5, 12, 17, 61, 200}) test_kept_rounded(report, kernels, format, rows, rows == 17 ? 1 : 3);
  for (Format format : {Format::BF16, Format::Q8_0, Format::Q4_0}) test_fused(report, kernels, format, 61, 2);
  for (Format format : {Format::Q8_0, Format::Q4_0, Format::Q4_K, Format::Q5_K, Format::Q6_K})
    test_unusual(report, kernels, format);
  // So many rows are several groups of tiles, some of which do not end with the largest of their tiles.
  for (Format format : {Format::BF16, Format::Q8_0, Format::Q4_0, Format::Q4_K})
    test_case(report, kernels, format, 34, info(format).block == 256 ? 256 : 64, false, {1, 171, 515});
  // So few inputs that what is done beside a product's steps (tile registers) is not done when they end.
  for (int64_t n_in : {32, 96}) test_case(report, kernels, Format::BF16, 300, n_in, true, {13, 16, 17, 32, 61});
  for (int f = 0; f < static_cast<int>(Format::COUNT); ++f) {
    const Format format = static_cast<Format>(f);
    const int64_t block = info(format).block;
    if (!report.thorough) {
      test_case(report, kernels, format, 37, block == 1 ? 131 : block == 32 ? 96 : 512, true, {1, 2, 3, 5, 14});
      continue;
    }
    test_case(report, kernels, format, 67, block == 1 ? 259 : block == 32 ? 288 : 768, true, few);
    test_case(report, kernels, format, 33, block == 256 ? 512 : 160, false, all);
    test_case(report, kernels, format, 5, block == 1 ? 1001 : block == 32 ? 1056 : 1024, true, few);
    if (block == 1)
      for (int64_t n_in : {1, 2, 7, 15, 31, 63, 65, 127}) test_case(report, kernels, format, 3, n_in, true, few);
    if (block == 32)
      for (int64_t n_in : {32, 64, 96}) test_case(report, kernels, format, 1, n_in, true, few);
    test_case(report, kernels, format, 40, block == 256 ? 256 : 96, true, {23, 24, 25, 84, 169, 180});
  }
}

}  // namespace finial::test
