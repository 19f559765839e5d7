// A transformer's layer as one program: buffers that take turns, barriers, and the same bits on any number of threads
// and from several callers at once.
#include <algorithm>
#include <thread>

#include "support.h"

namespace finial::test {

namespace {

struct Layer {
  static constexpr int64_t WIDTH = 96, HEADS = 3, KV = 1, DIM = 32, INNER = 160, WORDS = 50, ROWS = 21;
  Weight table{Format::Q8_0, WORDS, WIDTH, 1}, q{Format::Q4_0, HEADS * DIM, WIDTH, 2},
      k{Format::Q4_0, KV * DIM, WIDTH, 3}, v{Format::Q8_0, KV * DIM, WIDTH, 4}, o{Format::F16, WIDTH, HEADS * DIM, 5},
      gate{Format::Q4_0, INNER, WIDTH, 6}, up{Format::Q8_0, INNER, WIDTH, 7}, down{Format::BF16, WIDTH, INNER, 8};
  Floats norm = Random(9).normals(WIDTH), frequencies = Floats(DIM / 2, 0.3f);
  Ints tokens, positions, slots, pages = {1, 0, 2};

  Layer() {
    for (int32_t t = 0; t < ROWS; ++t) {
      tokens.push_back(t * 7 % WORDS), positions.push_back(t);
      slots.push_back(pages[static_cast<size_t>(t / 8)] * 8 + t % 8);
    }
  }

  // Two layers over the same weights: the second one's buffers overwrite the first one's. `rows` of them a step.
  Floats compute(const Machine& m, int steps, int64_t rows = ROWS) const {
    Program p(m.pool, m.kernels);
    const int t = p.dimension(), ids = p.int_input("tokens"), at = p.int_input("positions"),
              begin = p.int_input("starts"), length = p.int_input("lengths"), page = p.int_input("pages"),
              slot = p.int_input("slots");
    int x = p.buffer(t, WIDTH, 0), free = 1;
    p.embed(x, ids, table.linear());
    for (int layer = 0; layer < 2; ++layer) {
      const int h = p.buffer(t, WIDTH, free), queries = p.buffer(t, HEADS * DIM, 2), keys = p.buffer(t, KV * DIM, 3),
                values = p.buffer(t, KV * DIM, 4), turned = p.buffer(t, HEADS * DIM, 5),
                turned_keys = p.buffer(t, KV * DIM, 6), seen = p.buffer(t, HEADS * DIM, 2),
                mixed = p.buffer(t, WIDTH, 5), y = p.buffer(t, WIDTH, 7), z = p.buffer(t, WIDTH, 2),
                a = p.buffer(t, INNER, 3), b = p.buffer(t, INNER, 4), c = p.buffer(t, INNER, 5),
                d = p.buffer(t, WIDTH, 6);
      p.rms_norm(h, x, norm.data(), WIDTH, 1e-6f);
      p.linears(h, nullptr, 0, 0, {{queries, weight(p, q)}, {keys, weight(p, k)}, {values, weight(p, v)}});
      p.rope(turned, queries, at, frequencies.data(), DIM, 1);
      p.rope(turned_keys, keys, at, frequencies.data(), DIM, 1);
      const int cache = p.cache({KV, DIM, layer == 0 ? CacheType::BF16 : CacheType::Q8_0});
      p.cache_write(cache, turned_keys, values, slot);
      p.attention(seen, turned, cache, at, begin, length, page, 0, 0.18f);
      linear(p, mixed, seen, o);
      p.add(y, x, mixed);
      p.rms_norm(z, y, norm.data(), WIDTH, 1e-6f);
      linear(p, a, z, gate);
      linear(p, b, z, up);
      p.silu_mul(c, a, b);
      linear(p, d, c, down);
      x = layer == 0 ? p.buffer(t, WIDTH, 0) : p.output(t, WIDTH);
      p.add(x, y, d);
    }
    Floats out(ROWS * WIDTH);
    const State state = p.new_state(3, 8);
    for (int i = 0; i < steps; ++i)
      for (int64_t from = 0; from < ROWS; from += rows) {
        const int64_t count = std::min(rows, ROWS - from);
        const Ints starts = {0, static_cast<int32_t>(count)}, lengths = {static_cast<int32_t>(from + count)};
        p.run({count},
              {{tokens.data() + from, {count}},
               {positions.data() + from, {count}},
               {starts.data(), {2}},
               {lengths.data(), {1}},
               {pages.data(), {1, 3}},
               {slots.data() + from, {count}}},
              {}, {{out.data() + from * WIDTH, count, WIDTH}}, state);
      }
    return out;
  }

  static int weight(Program& p, const Weight& w) { return p.weight(w.linear(), false, nullptr); }
  static void linear(Program& p, int out, int x, const Weight& w) {
    p.linears(x, nullptr, 0, 0, {{out, weight(p, w)}});
  }
};

}  // namespace

void test_layer(Report& report, const Kernels* kernels) {
  const Layer layer;
  const std::string name = std::string(kernels->name) + " layer";
  const Floats one = layer.compute({kernels, std::make_shared<Pool>(1)}, 1);
  const int64_t n = static_cast<int64_t>(one.size());
  const auto shared = std::make_shared<Pool>(3);
  for (const auto& pool : {std::make_shared<Pool>(2), shared, std::make_shared<Pool>(5)}) {
    const Floats other = layer.compute({kernels, pool}, 3);
    const std::string threads = " on " + std::to_string(pool->threads()) + " threads";
    report.equal(one.data(), other.data(), n, name + threads);
    const Floats few = layer.compute({kernels, pool}, 2, 5);
    report.equal(one.data(), few.data(), n, name + " in steps of 5 rows" + threads);
  }
  std::vector<Floats> results(3);
  std::vector<std::thread> callers;
  for (Floats& result : results) callers.emplace_back([&] { result = layer.compute({kernels, shared}, 5); });
  for (std::thread& caller : callers) caller.join();
  for (const Floats& result : results) report.equal(one.data(), result.data(), n, name + " from several callers");
}

}  // namespace finial::test
