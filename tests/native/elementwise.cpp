// embed, rms_norm, rope, silu_mul, add, select_rows, exp, what caches keep; and every way in which weights are decoded.
#include <cmath>
#include <cstring>

#include "support.h"

namespace finial::test {

namespace {

void test_norm(Report& report, const Machine& m, int64_t rows, int64_t width, int64_t group, float scale) {
  Program program(m.pool, m.kernels);
  const int n = program.dimension(), in = program.input(n, width), out = program.output(n, width);
  Random random(7);
  Floats x = random.normals(rows * width), y(x.size());
  const Floats weight = random.normals(group);
  for (float& a : x) a *= scale;
  const float eps = 1e-6f;
  program.rms_norm(out, in, weight.data(), group, eps);
  program.run({rows}, {}, {array(x, rows)}, {array(y, rows)}, program.new_state(0, 1));
  Doubles expected, tolerance;
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t first = i / static_cast<size_t>(group) * static_cast<size_t>(group);
    double squares = 0;
    for (size_t k = first; k < first + static_cast<size_t>(group); ++k) squares += static_cast<double>(x[k]) * x[k];
    expected.push_back(x[i] / std::sqrt(squares / static_cast<double>(group) + eps) * weight[i - first]);
    // The sum's error is halved by the root; a quotient, a sum, a root, an inverse and two products follow.
    tolerance.push_back((gamma(group) + 8 * U) * std::fabs(expected.back()));
  }
  report.near(y, expected, tolerance,
              std::string(m.kernels->name) + " rms_norm " + std::to_string(rows) + " x " + std::to_string(width) +
                  " by " + std::to_string(group));
}

void test_rope(Report& report, const Machine& m, int64_t rows, int64_t heads, int64_t head_dim, float scale) {
  Program program(m.pool, m.kernels);
  const int64_t half = head_dim / 2, width = heads * head_dim;
  const int n = program.dimension(), in = program.input(n, width), out = program.output(n, width);
  Random random(9);
  const Floats x = random.normals(rows * width);
  Floats y(x.size()), frequencies;
  Ints positions;
  for (int64_t k = 0; k < half; ++k)
    frequencies.push_back(static_cast<float>(std::pow(10000.0, -static_cast<double>(k) / static_cast<double>(half))));
  for (int64_t t = 0; t < rows; ++t) positions.push_back(static_cast<int32_t>(random.next() % 40000));
  program.rope(out, in, program.int_input("positions"), frequencies.data(), head_dim, scale);
  program.run({rows}, {{positions.data(), {rows}}}, {array(x, rows)}, {array(y, rows)}, program.new_state(0, 1));
  Doubles expected(x.size()), tolerance(x.size());
  for (int64_t h = 0; h < rows * heads; ++h)
    for (int64_t k = 0; k < half; ++k) {
      const size_t one = static_cast<size_t>(h * head_dim + k), two = one + static_cast<size_t>(half);
      const float angle =
          static_cast<float>(positions[static_cast<size_t>(h / heads)]) * frequencies[static_cast<size_t>(k)];
      const double c = std::cos(static_cast<double>(angle)) * scale, s = std::sin(static_cast<double>(angle)) * scale;
      expected[one] = x[one] * c - x[two] * s, expected[two] = x[two] * c + x[one] * s;
      // cos and sin within an ulp (2 u), then three roundings.
      tolerance[one] = tolerance[two] = 6 * U * scale * (std::fabs(x[one]) + std::fabs(x[two]));
    }
  report.near(y, expected, tolerance, std::string(m.kernels->name) + " rope of head_dim " + std::to_string(head_dim));
}

void test_pointwise(Report& report, const Machine& m, int64_t rows, int64_t width, float scale) {
  const std::string name = std::string(m.kernels->name) + " silu_mul and add " + std::to_string(rows) + " x " +
                           std::to_string(width) + " by " + std::to_string(scale);
  Program program(m.pool, m.kernels);
  const int n = program.dimension(), a = program.input(n, width), b = program.input(n, width);
  program.silu_mul(program.output(n, width), a, b);
  program.add(program.output(n, width), a, b);
  Random random(11);
  Floats x = random.normals(rows * width), z = random.normals(rows * width), gated(x.size()), sum(x.size());
  for (float& value : x) value *= scale;
  program.run({rows}, {}, {array(x, rows), array(z, rows)}, {array(gated, rows), array(sum, rows)},
              program.new_state(0, 1));
  Doubles silu, total, tolerance, nothing;
  for (size_t i = 0; i < x.size(); ++i) {
    silu.push_back(x[i] / (1 + std::exp(-static_cast<double>(x[i]))) * z[i]);
    // exp within 1.1 ulp, a sum, a quotient, a product; precision ends below the smallest normal number.
    tolerance.push_back(8 * U * std::fabs(silu.back()) + 1e-37);
    total.push_back(x[i] + z[i]);
    nothing.push_back(0);
  }
  report.near(gated, silu, tolerance, name);
  report.near(sum, total, nothing, name);
}

void test_rows(Report& report, const Machine& m) {
  Program program(m.pool, m.kernels);
  const int n = program.dimension(), r = program.dimension(), in = program.input(n, 33), out = program.output(r, 33);
  program.select_rows(out, in, program.int_input("wanted"));
  const Floats x = Random(12).normals(7 * 33);
  const Ints wanted = {6, 0, 0, 3};
  Floats y(4 * 33);
  program.run({7, 4}, {{wanted.data(), {4}}}, {array(x, 7)}, {array(y, 4)}, program.new_state(0, 1));
  for (size_t i = 0; i < wanted.size(); ++i)
    report.equal(y.data() + i * 33, x.data() + wanted[i] * 33, 33, std::string(m.kernels->name) + " select_rows");
}

void test_exp(Report& report, const Kernels* kernels) {
  Floats x = {INFINITY, -INFINITY, NAN, 89, 1e38f, -1e38f, -105, 88.73f, 0};
  const double limits[] = {INFINITY, 0, NAN, INFINITY, INFINITY, 0, 0, INFINITY, 1};
  const size_t special = x.size(), count = report.thorough ? 100003 : 5003;
  for (size_t i = 0; i < count; ++i) x.push_back(-104 + static_cast<float>(i) * (192.7f / static_cast<float>(count)));
  Floats y(x.size());
  kernels->exp(x.data(), y.data(), static_cast<int64_t>(x.size()));
  bool right = true;
  for (size_t i = 0; i < special; ++i) right &= std::isnan(limits[i]) ? std::isnan(y[i]) : y[i] == limits[i];
  report.expect(right, std::string(kernels->name) + " exp at its limits");
  double worst = 0;
  for (size_t i = special; i < x.size(); ++i) {
    const double expected = std::exp(static_cast<double>(x[i]));
    const double ulp = std::ldexp(1.0, std::max(std::ilogb(static_cast<float>(expected)), -126) - 23);
    worst = std::max(worst, std::fabs(y[i] - expected) / ulp);
  }
  report.expect(worst < 1.1, std::string(kernels->name) + " exp: off by " + std::to_string(worst) + " ulp");
}

// What a cache is written from: ties, subnormals, limits.
void test_store(Report& report, const Kernels* kernels) {
  Floats x;
  for (uint32_t upper = 0; upper < 1 << 16; upper += report.thorough ? 1 : 7)
    for (uint32_t lower : {0x0000u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      const uint32_t bits = upper << 16 | lower;
      float value;
      std::memcpy(&value, &bits, 4);
      x.push_back(value);
    }
  std::vector<uint8_t> out(x.size() * 2);
  kernels->store(CacheType::BF16, x.data(), out.data(), static_cast<int64_t>(x.size()));
  const Doubles rounded = cached(CacheType::BF16, x.data(), static_cast<int64_t>(x.size()));
  bool right = true;
  for (size_t i = 0; i < x.size(); ++i) {
    const double got = element(Format::BF16, out.data(), static_cast<int64_t>(i));
    if (std::isnan(x[i]))
      right &= std::isnan(got);
    else
      right &= got == static_cast<float>(rounded[i]) && std::signbit(got) == std::signbit(x[i]);
  }
  report.expect(right, std::string(kernels->name) + " store to bf16");

  Random random(13);
  Floats y = random.normals(32 * 40);
  for (size_t i = 0; i < y.size(); ++i) {
    const size_t block = i / 32;
    if (block < 8) y[i] = i % 32 == 0 ? 127.0f : std::nearbyint(y[i] * 40) / 2;  // integers and halves: ties
    if (block >= 8 && block < 32) y[i] *= std::ldexp(1.0f, static_cast<int>(block) * 2 - 50);
    if (block == 32) y[i] = 0;
    if (block == 33) y[i] *= 1e-38f;
  }
  std::vector<uint8_t> blocks(34 * 40);
  kernels->store(CacheType::Q8_0, y.data(), blocks.data(), static_cast<int64_t>(y.size()));
  const Doubles expected = cached(CacheType::Q8_0, y.data(), static_cast<int64_t>(y.size()));
  right = true;
  for (size_t i = 0; i < y.size(); ++i)
    right &= element(Format::Q8_0, blocks.data(), static_cast<int64_t>(i)) == expected[i];
  report.expect(right, std::string(kernels->name) + " store to q8_0");
}

}  // namespace

void test_decode(Report& report, const Kernels* kernels) {
  const Machine m{kernels, std::make_shared<Pool>(2)};
  for (int f = 0; f < static_cast<int>(Format::COUNT); ++f) {
    const Format format = static_cast<Format>(f);
    const int64_t width = info(format).block == 1 ? 131 : info(format).block == 32 ? 160 : 512;
    const Weight table(format, 9, width, 5);
    const Ints tokens = {8, 0, 3, 3, 5};
    Program program(m.pool, m.kernels);
    const int n = program.dimension(), out = program.output(n, width);
    program.embed(out, program.int_input("tokens"), table.linear());
    Floats y(tokens.size() * static_cast<size_t>(width));
    program.run({5}, {{tokens.data(), {5}}}, {}, {array(y, 5)}, program.new_state(0, 1));
    Doubles expected, tolerance;
    for (int32_t token : tokens)
      for (int64_t i = 0; i < width; ++i) {
        double size;
        expected.push_back(element(format, table.row(token), i, &size));
        tolerance.push_back(exact(format) ? 0 : 4 * U * size);
      }
    report.near(y, expected, tolerance, std::string(kernels->name) + " embed " + info(format).name);
    if (kernels->rounding(format) == Rounding::None || info(format).block > 32) continue;
    Program packed(m.pool, m.kernels);
    const int rows = packed.dimension(), made = packed.output(rows, width);
    packed.embed_packed(made, packed.int_input("tokens"), packed.weight(table.linear(), false, nullptr));
    Floats z(y.size());
    packed.run({5}, {{tokens.data(), {5}}}, {}, {array(z, 5)}, packed.new_state(0, 1));
    report.equal(y.data(), z.data(), static_cast<int64_t>(y.size()),
                 std::string(kernels->name) + " embed from panels, " + info(format).name);
  }
  // Every pattern of sixteen bits.
  std::vector<uint8_t> patterns(2 << 16);
  for (size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<uint8_t>(i % 2 == 0 ? i / 2 : i / 2 >> 8);
  for (Format format : {Format::F16, Format::BF16}) {
    Floats y(1 << 16);
    kernels->decode(format, patterns.data(), 1 << 16, y.data());
    bool right = true;
    for (size_t i = 0; i < y.size(); ++i) {
      const double expected = element(format, patterns.data(), static_cast<int64_t>(i));
      right &=
          std::isnan(expected) ? std::isnan(y[i]) : y[i] == expected && std::signbit(y[i]) == std::signbit(expected);
    }
    report.expect(right, std::string(kernels->name) + " every pattern of " + info(format).name);
  }
}

void test_elementwise(Report& report, const Kernels* kernels) {
  const Machine m{kernels, std::make_shared<Pool>(2)};
  test_norm(report, m, 1, 64, 64, 1);
  test_norm(report, m, 3, 256, 64, 1e-3f);
  test_norm(report, m, 2, 33, 33, 1e4f);
  test_norm(report, m, 5, 1000, 1000, 1);
  test_norm(report, m, 1, 1, 1, 1);
  for (int64_t head_dim : {2, 6, 64, 80, 96, 128, 256}) test_rope(report, m, 5, 3, head_dim, 1.25f);
  for (int64_t width : {1, 2, 3, 7, 31, 100, 257}) test_pointwise(report, m, 3, width, 1);
  for (float scale : {1e-6f, 1e3f, 1e30f}) test_pointwise(report, m, 4, 65, scale);
  test_rows(report, m);
  test_store(report, kernels);
  test_exp(report, kernels);
}

}  // namespace finial::test
