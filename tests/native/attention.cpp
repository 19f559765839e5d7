// cache_write and attention: head_dim 64 to 256, groups of 1 to 8 heads, every cache type, windows; and the same bits
// however a sequence is chunked, wherever its pages lie, whatever shares its steps and however many threads there are.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "support.h"

namespace finial::test {

namespace {

struct Shape {
  int64_t group, kv_heads, head_dim;
  CacheType type;
  int64_t window;
  int64_t heads() const { return group * kv_heads; }
  float scale() const { return 1 / std::sqrt(static_cast<float>(head_dim)); }
};

// Rows of every sequence, by position: what is computed depends on these alone.
struct Sequences {
  std::vector<Floats> q, k, v;  // [sequence][length * width]
  std::vector<int64_t> lengths;

  Sequences(const Shape& s, std::vector<int64_t> lengths) : lengths(std::move(lengths)) {
    Random random(static_cast<uint64_t>(s.head_dim + s.group));
    for (int64_t n : this->lengths) {
      q.push_back(random.normals(n * s.heads() * s.head_dim));
      k.push_back(random.normals(n * s.kv_heads * s.head_dim));
      v.push_back(random.normals(n * s.kv_heads * s.head_dim));
      for (float& x : q.back()) x *= 2;
    }
  }
};

// How the rows come: steps[i][b] new rows of sequence b in step i.
struct Schedule {
  std::vector<std::vector<int64_t>> steps;
  int64_t page_size;
  int threads;
  bool poisoned = false;  // the cache's memory was used before: it is full of NaN
};

void append(Floats& to, const Floats& from, int64_t row, int64_t rows, int64_t width) {
  to.insert(to.end(), from.begin() + row * width, from.begin() + (row + rows) * width);
}

// Outputs of every row of every sequence, by position.
std::vector<Floats> compute(const Kernels* kernels, const Shape& s, const Sequences& in, const Schedule& schedule) {
  const int64_t wide = s.heads() * s.head_dim, narrow = s.kv_heads * s.head_dim, size = schedule.page_size;
  Program program(std::make_shared<Pool>(schedule.threads), kernels);
  const int t = program.dimension(), q = program.input(t, wide), k = program.input(t, narrow),
            v = program.input(t, narrow), out = program.output(t, wide);
  const int positions = program.int_input("positions"), starts = program.int_input("starts"),
            lengths = program.int_input("lengths"), pages = program.int_input("pages"),
            slots = program.int_input("slots");
  const int cache = program.cache({s.kv_heads, s.head_dim, s.type});
  program.cache_write(cache, k, v, slots);
  program.attention(out, q, cache, positions, starts, lengths, pages, s.window, s.scale());

  const int64_t count = static_cast<int64_t>(in.lengths.size());
  const int64_t longest = *std::max_element(in.lengths.begin(), in.lengths.end()), per = (longest + size - 1) / size;
  const State state = program.new_state(count * per, size);
  if (schedule.poisoned) std::memset(state.cache(0).data, 0xFF, static_cast<size_t>(state.nbytes()));
  const auto page = [&](int64_t b, int64_t i) { return (b * per + i) * 7 % (count * per); };  // dealt out of order
  const auto spread = [&](int64_t b, int64_t i) {
    return (count * per) % 7 == 0 ? count * per - 1 - b * per - i : page(b, i);
  };
  std::vector<int64_t> done(in.lengths.size());
  std::vector<Floats> result(in.lengths.size());
  for (const std::vector<int64_t>& step : schedule.steps) {
    Ints position, start = {0}, length, slot, table;
    Floats queries, keys, values;
    for (int64_t b = 0; b < count; ++b) {
      const size_t at = static_cast<size_t>(b);
      for (int64_t p = done[at]; p < done[at] + step[at]; ++p) {
        position.push_back(static_cast<int32_t>(p));
        slot.push_back(static_cast<int32_t>(spread(b, p / size) * size + p % size));
      }
      append(queries, in.q[at], done[at], step[at], wide);
      append(keys, in.k[at], done[at], step[at], narrow);
      append(values, in.v[at], done[at], step[at], narrow);
      done[at] += step[at];
      start.push_back(static_cast<int32_t>(position.size()));
      length.push_back(static_cast<int32_t>(done[at]));
      for (int64_t i = 0; i < per; ++i) table.push_back(i * size < done[at] ? static_cast<int32_t>(spread(b, i)) : -1);
    }
    const int64_t rows = static_cast<int64_t>(position.size());
    Floats y(queries.size());
    program.run({rows},
                {{position.data(), {rows}},
                 {start.data(), {count + 1}},
                 {length.data(), {count}},
                 {table.data(), {count, per}},
                 {slot.data(), {rows}}},
                {array(queries, rows), array(keys, rows), array(values, rows)}, {array(y, rows)}, state);
    for (int64_t b = 0; b < count; ++b)
      append(result[static_cast<size_t>(b)], y, start[static_cast<size_t>(b)], step[static_cast<size_t>(b)], wide);
  }
  return result;
}

// What a weight 2^x becomes, rounded to bf16, and how far that is off if x is off by `off`: nothing, or a step where a
// boundary between two values is as near as that.
double rounded_weight(double x, double off, double& doubt) {
  const double low = to_bf16(std::exp2(x - off)), high = to_bf16(std::exp2(x + off));
  doubt = high - low;
  return to_bf16(std::exp2(x));
}

// Scores in powers of two. With `rounding` queries and, chunk by chunk, weights are rounded as the kernels say.
void reference(const Shape& s, Rounding rounding, const Sequences& in, size_t b, Doubles& expected,
               Doubles& tolerance) {
  const int64_t n = in.lengths[b], dim = s.head_dim;
  const bool rounds = rounding == Rounding::BF16;
  const float log2_e = 1.44269504f, scale = s.scale() * log2_e;
  std::vector<Doubles> keys, values;
  for (int64_t p = 0; p < n * s.kv_heads; ++p) {
    keys.push_back(cached(s.type, in.k[b].data() + p * dim, dim));
    values.push_back(cached(s.type, in.v[b].data() + p * dim, dim));
  }
  for (int64_t row = 0; row < n; ++row)
    for (int64_t h = 0; h < s.heads(); ++h) {
      Doubles q;
      for (int64_t d = 0; d < dim; ++d) {
        const float x = in.q[b][static_cast<size_t>((row * s.heads() + h) * dim + d)];
        q.push_back(rounds ? to_bf16(x * scale) : x * (s.scale() * std::log2(std::exp(1.0))));
      }
      const int64_t first = s.window > 0 && row >= s.window ? row - s.window + 1 : 0;
      Doubles scores;
      double size = 0, largest = 0;
      for (int64_t p = first; p <= row; ++p) {
        const Doubles& key = keys[static_cast<size_t>(p * s.kv_heads + h / s.group)];
        double score = 0, terms = 0;
        for (size_t d = 0; d < q.size(); ++d) score += q[d] * key[d], terms += std::fabs(q[d] * key[d]);
        scores.push_back(score);
        size = std::max(size, terms), largest = std::max(largest, std::fabs(score));
      }
      // A score is off by `off`, so a weight by that much relatively, above and below the fraction; exp and merging
      // of chunks add a few ulp, the weighted sum gamma of its length. Powers of two that will be rounded are within
      // 2^-18 only.
      const double off = gamma(dim + 2) * size + 4 * U * largest;
      const double relative =
          2 * off + 2 * gamma(static_cast<int64_t>(scores.size()) + 8) + 16 * U + (rounds ? 2 * U * largest : 0);
      const double highest = *std::max_element(scores.begin(), scores.end());
      double sum = 0, unsure = 0;
      Doubles weights(scores.size()), doubts(scores.size());
      for (size_t i = 0; i < scores.size();) {
        const size_t chunk = static_cast<size_t>((first + static_cast<int64_t>(i)) / ATTENTION_CHUNK);
        size_t end = i;
        while (end < scores.size() &&
               static_cast<size_t>((first + static_cast<int64_t>(end)) / ATTENTION_CHUNK) == chunk)
          ++end;
        const double best =
            *std::max_element(scores.begin() + static_cast<int64_t>(i), scores.begin() + static_cast<int64_t>(end));
        for (; i < end; ++i) {
          weights[i] = std::exp2(scores[i] - highest);
          if (rounds) {
            const double share = std::exp2(best - highest);
            weights[i] = share * rounded_weight(scores[i] - best, 2 * off + std::ldexp(1.5, -18), doubts[i]);
            doubts[i] *= share;
          }
          sum += weights[i], unsure += doubts[i];
        }
      }
      for (int64_t d = 0; d < dim; ++d) {
        double y = 0, magnitude = 0, doubt = 0, extreme = 0;
        for (size_t i = 0; i < scores.size(); ++i) {
          const size_t p =
              (static_cast<size_t>(first) + i) * static_cast<size_t>(s.kv_heads) + static_cast<size_t>(h / s.group);
          const double value = values[p][static_cast<size_t>(d)];
          y += weights[i] / sum * value, magnitude += weights[i] / sum * std::fabs(value);
          doubt += doubts[i] / sum * std::fabs(value), extreme = std::max(extreme, std::fabs(value));
        }
        expected.push_back(y);
        tolerance.push_back(relative * magnitude + 1.1 * (doubt + unsure / sum * extreme));
      }
    }
}

// Steps of `chunk` rows of every sequence that has some left, `stagger` of them later for each next sequence.
Schedule schedule(const std::vector<int64_t>& lengths, int64_t chunk, int64_t page_size, int threads,
                  bool poisoned = false) {
  Schedule out{{}, page_size, threads, poisoned};
  std::vector<int64_t> left = lengths;
  while (*std::max_element(left.begin(), left.end()) > 0) {
    std::vector<int64_t> step;
    for (int64_t& n : left) step.push_back(std::min(n, chunk)), n -= step.back();
    out.steps.push_back(step);
  }
  return out;
}

void test_case(Report& report, const Kernels* kernels, const Shape& s, const std::vector<int64_t>& lengths,
               const std::vector<Schedule>& schedules) {
  const char* types[] = {"f32", "bf16", "q8_0"};
  const std::string name = std::string(kernels->name) + " attention " + std::to_string(s.heads()) + "/" +
                           std::to_string(s.kv_heads) + " heads of " + std::to_string(s.head_dim) + " " +
                           types[static_cast<int>(s.type)] + " window " + std::to_string(s.window) + " length " +
                           std::to_string(lengths[0]);
  const Sequences in(s, lengths);
  const std::vector<Floats> first = compute(kernels, s, in, schedules[0]);
  for (size_t b = 0; b < lengths.size(); ++b) {
    Doubles expected, tolerance;
    reference(s, kernels->attention_rounding(s.type), in, b, expected, tolerance);
    report.near(first[b], expected, tolerance, name);
  }
  for (size_t i = 1; i < schedules.size(); ++i) {
    const std::vector<Floats> other = compute(kernels, s, in, schedules[i]);
    for (size_t b = 0; b < lengths.size(); ++b)
      report.equal(first[b].data(), other[b].data(), static_cast<int64_t>(first[b].size()),
                   name + ": pages of " + std::to_string(schedules[i].page_size) + ", " +
                       std::to_string(schedules[i].threads) + " threads, " + std::to_string(schedules[i].steps[0][0]) +
                       " rows in the first step" + (schedules[i].poisoned ? ", poisoned" : ""));
  }
  // What comes later reaches no row, whatever it is.
  Sequences other = in;
  const int64_t last = lengths[0] - 1, wide = s.kv_heads * s.head_dim;
  for (int64_t i = last * wide; i < lengths[0] * wide; ++i)
    other.k[0][static_cast<size_t>(i)] = NAN, other.v[0][static_cast<size_t>(i)] = i % 2 == 0 ? NAN : INFINITY;
  const std::vector<Floats> unharmed = compute(kernels, s, other, schedules[0]);
  report.equal(first[0].data(), unharmed[0].data(), last * s.heads() * s.head_dim, name + ": a later NaN");
  report.expect(std::isnan(unharmed[0].back()), name + ": a NaN of its own");
}

}  // namespace

void test_attention(Report& report, const Kernels* kernels) {
  const CacheType types[] = {CacheType::F32, CacheType::BF16, CacheType::Q8_0};
  int at = 0;
  for (int64_t group = 1; group <= 8; ++group)
    for (int64_t head_dim : {64, 80, 96, 128, 256}) {
      if (!report.thorough && (group * 5 + head_dim / 16) % 4 != 0) continue;
      CacheType type = types[at++ % 3];
      if (head_dim == 80 && type == CacheType::Q8_0) type = CacheType::BF16;
      const std::vector<int64_t> lengths = {33, 1 + group};
      std::vector<Schedule> schedules = {schedule(lengths, 33, 16, 1), schedule(lengths, 1 + group, 5, 3),
                                         schedule(lengths, 7, 32, 2)};
      schedules.back().poisoned = true;
      if (report.thorough) schedules.push_back(schedule(lengths, 1, 1, 2));
      test_case(report, kernels, {group, 1 + group % 2, head_dim, type, group % 3 == 0 ? 7 : 0}, lengths, schedules);
    }
  for (int64_t head_dim : {2, 6, 20, 40}) {
    const CacheType type = types[head_dim / 2 % 2];
    test_case(report, kernels, {2, 1, head_dim, type, 0}, {9}, {schedule({9}, 9, 4, 1), schedule({9}, 2, 1, 2)});
  }
  // Several chunks of positions, which threads share.
  const std::vector<int64_t> lengths = {report.thorough ? 600 : 270, 257, 3};
  for (CacheType type : types)
    for (int64_t window : {0, 100, 301}) {
      if (!report.thorough && window != (type == CacheType::BF16 ? 0 : 100)) continue;
      test_case(report, kernels, {3, 2, 32, type, window}, lengths,
                {schedule(lengths, 256, 64, 1), schedule(lengths, 100, 7, 3, true), schedule(lengths, 255, 256, 2),
                 schedule(lengths, 300, 32, 2, true), schedule(lengths, 11, 64, 3, true)});
    }
}

}  // namespace finial::test
