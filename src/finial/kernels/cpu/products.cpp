// How threads share out the products of a step, and what they do about memory between them.
#include <algorithm>

#include "packed.h"
#include "step.h"

namespace finial {

namespace {

constexpr int64_t AHEAD = int64_t{256} << 10;  // of weights asked for by who waits: a part of a second-level cache

enum class For { Reading, Writing };
template <For WHAT = For::Reading>
void fetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, WHAT == For::Writing, 2);
#else
  (void)p;
#endif
}

}  // namespace

// The input of products as they take it: normalised, rounded, if who made it has not done so. Few rows: every thread
// makes its own, which is cheaper than to wait for another. `scratch` moves behind what this takes of it.
const uint8_t* Program::prepare(const Linears& p, const Step& step, int64_t rows, int thread, uint8_t*& scratch) {
  const int64_t width = buffers_[static_cast<size_t>(p.x)].width, bytes = rounded_bytes(p.rounding, width);
  const float* x = step.buffers[static_cast<size_t>(p.x)];
  if (p.rounding == Rounding::None && p.norm == nullptr) return reinterpret_cast<const uint8_t*>(x);
  const bool shared = rows > kernels_->blocking.tile;
  if (buffers_[static_cast<size_t>(p.x)].as != Rounding::None) return reinterpret_cast<const uint8_t*>(x);
  uint8_t* out = shared ? step.rounded[static_cast<int>(p.rounding)] : scratch;
  scratch += kernels_->blocking.tile * rounded(bytes, 64);
  float* normal = reinterpret_cast<float*>(scratch);
  scratch += rounded(kernels_->blocking.tile * width, LINE) * 4;
  const int64_t count = tiles(rows, kernels_->blocking);
  const Range part = shared ? share(count, thread, pool_->threads()) : Range{0, count};
  for (int64_t tile = part.begin; tile < part.end; ++tile) {
    const int64_t first = rows * tile / count, size = rows * (tile + 1) / count - first;
    const float* from = x + first * width;
    const auto ask = [&](int64_t r) {  // for a row of the next tile, which other threads may have written
      const float* soon = from + (size + r) * width;
      for (int64_t i = 0; tile + 1 < part.end && first + size + r < rows && i < width; i += LINE) fetch(soon + i);
    };
    if (p.norm != nullptr) {
      float* y = p.rounding == Rounding::None ? reinterpret_cast<float*>(out + first * bytes) : normal;
      for (int64_t r = 0; r < size; ++r) {
        ask(r);
        kernels_->rms_norm(from + r * width, p.norm, y + r * width, width, p.eps);
      }
      from = y;
    } else {
      for (int64_t r = 0; r < size; ++r) ask(r);
    }
    if (p.rounding != Rounding::None) kernels_->round(p.rounding, from, width, size, out + first * bytes);
  }
  if (shared) pool_->barrier(thread);
  return out;
}

// Units of a product for this thread: of its own share from the beginning, then of others' from their end. At once a
// part of what is left, so that it gets smaller towards the end, and never of two groups. False: nothing is left that
// may be taken. Taking waits for all that was loaded and stored, and memory stands still: few rows take three quarters
// (a step of q4_0 at 58 GB/s 0.985 of the time with halves; those read at 96.7 % of 35 GB/s, quarters at 94), many
// rows, where that is nothing beside a unit, one.
bool Program::take(const Instruction& i, int thread, const Taking& how, int& other, Range& got) {
  constexpr uint64_t UNIT = MOST_UNITS - 1;
  for (const int threads = pool_->threads(); other < threads; ++other) {
    std::atomic<uint64_t>& left = left_[static_cast<size_t>((thread + other) % threads)].range;
    for (uint64_t now = left.load(std::memory_order_relaxed);;) {
      const int64_t begin = static_cast<int64_t>(now >> 24 & UNIT), end = static_cast<int64_t>(now & UNIT);
      if ((now ^ number(i)) >> 48 != 0 || begin >= end) break;
      const int64_t within = other == 0 ? how.group - begin % how.group : (end - 1) % how.group + 1;
      const int64_t some = std::min({std::max((end - begin) * how.quarters / 4, how.least), within, end - begin});
      const uint64_t taken = static_cast<uint64_t>(some);
      if (!left.compare_exchange_weak(now, other == 0 ? now + (taken << 24) : now - taken, std::memory_order_relaxed))
        continue;
      got = other == 0 ? Range{begin, begin + some} : Range{end - some, end};
      return true;
    }
  }
  return false;
}

// Asks for what this thread writes into a blocked cache between the product at `i` and the next: a key is a line for
// each pair of its elements, last seen a step ago, for which writing would wait (3.1 us a layer of 8 heads of 128 at 58
// GB/s, now 1.5). Weights flow meanwhile.
void Program::expect_writes(const Instruction& i, const Step& step, int thread) const {
  constexpr int64_t LINE_BYTES = 64;
  const Instruction* const end = code_.data() + code_.size();
  for (const Instruction* then = &i + 1; then < end && then->op != Op::Linears; ++then) {
    if (then->op != Op::CacheWrite) continue;
    const Cache cache = step.state.cache(then->cache);
    if (!cache.blocked) continue;
    const int32_t* slots = step.input(then->ints[0]).data;
    const int64_t count = step.rows(buffers_[static_cast<size_t>(then->a)]) * cache.kv_heads;
    const Range part = share(count, thread, pool_->threads());
    for (int64_t h = part.begin; h < part.end; ++h) {
      const Cache::Blocked to = cache.blocked_at(slots[h / cache.kv_heads], h % cache.kv_heads);
      for (int64_t pair = 0; pair < cache.head_dim / 2; ++pair) fetch<For::Writing>(to.key + pair * CACHE_BLOCK * 4);
      for (int64_t at = 0; at < cache.head_dim * 4; at += LINE_BYTES) fetch<For::Writing>(to.value + at);
    }
  }
}

// Few rows: every thread has an equal part of the bytes of the weights, one contiguous run of each matrix.
void Program::multiply_few(const Instruction& i, const Step& step, int thread) {
  const Linears& p = linears_[static_cast<size_t>(i.linears)];
  const int64_t rows = step.rows(buffers_[static_cast<size_t>(p.x)]);
  uint8_t* scratch = reinterpret_cast<uint8_t*>(step.scratch + thread * step.scratch_stride);
  if (!i.barrier) announce(i, step, thread);
  const uint8_t* x = prepare(p, step, rows, thread, scratch);
  if (rows <= kernels_->blocking.tile) expect_writes(i, step, thread);
  int other = 0;
  for (Range units; take(i, thread, {MOST_UNITS, 3, rows > kernels_->blocking.tile ? 4 : 1}, other, units);)
    multiply_units(p, step, x, units.begin, units.end, scratch);
}

Program::Many Program::many(const Linears& p, int64_t rows) const {
  const Blocking& b = kernels_->blocking;
  const int64_t row = rounded_bytes(p.rounding, buffers_[static_cast<size_t>(p.x)].width), count = tiles(rows, b),
                most = std::clamp<int64_t>(b.group_bytes / (b.tile * row), 1, b.group),
                groups = (count + most - 1) / most;
  const int64_t all = p.edges.back(), several = (all * groups / MOST_UNITS + b.panels) / b.panels * b.panels;
  return {count, groups, several, (all + several - 1) / several};
}

// Many rows: every thread has groups of tiles, those that it rounded itself, which stay in its second-level cache while
// panels pass by. A unit is a panel for a group.
void Program::multiply_many(const Instruction& i, const Step& step, int thread) {
  const Linears& p = linears_[static_cast<size_t>(i.linears)];
  const int64_t rows = step.rows(buffers_[static_cast<size_t>(p.x)]);
  uint8_t* scratch = reinterpret_cast<uint8_t*>(step.scratch + thread * step.scratch_stride);
  const auto at = [&](int buffer) { return buffer < 0 ? nullptr : step.buffers[static_cast<size_t>(buffer)]; };
  const auto matrix = [&](int index) { return index < 0 ? nullptr : &weights_[static_cast<size_t>(index)]; };
  const auto [count, groups, several, together] = many(p, rows);
  const int64_t all = p.edges.back();
  if (!i.barrier) announce(i, step, thread);
  const uint8_t* x = prepare(p, step, rows, thread, scratch);
  int other = 0;
  for (Range units; take(i, thread, {together, 1, 1}, other, units);) {
    const int64_t group = units.begin / together, from = (units.begin - group * together) * several,
                  to = std::min((units.end - group * together) * several, all);
    int64_t before = 0;
    for (const Linears::Member& m : p.members) {
      const int64_t begin = std::max<int64_t>(from - before, 0), end = std::min(to - before, m.units);
      if (begin < end)
        kernels_->multiply({matrix(m.weight), matrix(m.second), x, at(m.add), at(m.out), rows, count * group / groups,
                            count * (group + 1) / groups, buffers_[static_cast<size_t>(m.out)].as},
                           begin, end);
      before += m.units;
    }
  }
}

// Units [begin, end) of products of few rows, counted over all members.
void Program::multiply_units(const Linears& p, const Step& step, const uint8_t* x, int64_t begin, int64_t end,
                             uint8_t* scratch) {
  const auto at = [&](int buffer) { return buffer < 0 ? nullptr : step.buffers[static_cast<size_t>(buffer)]; };
  const int64_t rows = step.rows(buffers_[static_cast<size_t>(p.x)]);
  for (const Linears::Member& m : p.members) {
    const finial::Linear& l = weights_[static_cast<size_t>(m.weight)];
    const int64_t from = std::max<int64_t>(begin, 0), to = std::min(end, m.units);
    begin -= m.units, end -= m.units;
    if (from >= to) continue;
    const float* add = at(m.add);
    if (p.rounding != Rounding::None) {
      const finial::Linear* second = m.second < 0 ? nullptr : &weights_[static_cast<size_t>(m.second)];
      const Rounding as = buffers_[static_cast<size_t>(m.out)].as;
      kernels_->multiply({&l, second, x, add, at(m.out), rows, 0, 1, as}, from, to);
      continue;
    }
    const int64_t first = from * LINE, last = std::min(to * LINE, l.n_out);
    kernels_->linear(l, reinterpret_cast<const float*>(x), at(m.out), rows, first, last,
                     reinterpret_cast<float*>(scratch));
    for (int64_t t = 0; t < rows && add != nullptr; ++t) {
      float* y = at(m.out) + t * l.n_out + first;
      kernels_->add(add + t * l.n_out + first, y, y, last - first);
    }
  }
}

// The barrier in front of an instruction. Between products of few rows memory would stand idle: who waits asks for the
// beginning of its share of the next one.
void Program::wait(size_t at, const Step& step, int thread, Run& next) {
  if (at == 0 || code_[at - 1].op == Op::Linears) {
    next = {nullptr, nullptr};
    const size_t ahead = ahead_[at];
    if (ahead < code_.size()) {
      const Linears& p = linears_[static_cast<size_t>(code_[ahead].linears)];
      if (step.rows(buffers_[static_cast<size_t>(p.x)]) <= kernels_->blocking.tile) next = share_of(p, thread);
    }
  }
  if (!code_[at].barrier) return;
  if (code_[at].op == Op::Linears || code_[at].op == Op::Attention) announce(code_[at], step, thread);
  pool_->barrier(thread, &next);
}

// The beginning of a thread's share of the weights.
Run Program::share_of(const Linears& p, int thread) const {
  int64_t begin = p.edges[static_cast<size_t>(thread)], end = p.edges[static_cast<size_t>(thread) + 1];
  for (const Linears::Member& m : p.members) {
    if (begin < m.units && begin < end) {
      const finial::Linear& l = weights_[static_cast<size_t>(m.weight)];
      const uint8_t* from = l.packed != nullptr ? l.packed + begin * l.stride : l.weight + begin * m.unit;
      return {from, from + std::min(AHEAD, (std::min(end, m.units) - begin) * m.unit)};
    }
    begin -= m.units, end -= m.units;
  }
  return {nullptr, nullptr};
}

uint64_t Program::number(const Instruction& i) const {
  return (steps_ * code_.size() + static_cast<uint64_t>(&i - code_.data())) << 48;
}

// From now on others may take units of this thread's share. Before the barrier in front of an instruction, if it has
// one: behind it anybody may look.
void Program::announce(const Instruction& i, const Step& step, int thread) {
  Range units;
  if (i.op == Op::Attention) {
    units = share(shares_[static_cast<size_t>(i.plan)].pieces(), thread, pool_->threads());
  } else {
    const Linears& p = linears_[static_cast<size_t>(i.linears)];
    const int64_t rows = step.rows(buffers_[static_cast<size_t>(p.x)]);
    units = {p.edges[static_cast<size_t>(thread)], p.edges[static_cast<size_t>(thread) + 1]};
    if (are_many(p, rows)) {
      const Many m = many(p, rows);
      units = share(m.groups * m.together, thread, pool_->threads());
    }
  }
  left_[static_cast<size_t>(thread)].range.store(
      number(i) | static_cast<uint64_t>(units.begin) << 24 | static_cast<uint64_t>(units.end),
      std::memory_order_relaxed);
}

}  // namespace finial
