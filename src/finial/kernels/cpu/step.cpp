// A step before it runs: what it brings is checked against the program and the cache, its memory is reserved.
#include "step.h"

#include <algorithm>
#include <string>

#include "packed.h"

namespace finial {

void Program::check_rows(const Step& step, int input, int dimension) const {
  const IntArray& a = step.input(input);
  const int64_t expected = step.sizes[static_cast<size_t>(dimension)];
  if (a.shape.size() != 1 || a.shape[0] != expected)
    reject("step input " + int_names_[static_cast<size_t>(input)] + " has " +
           std::to_string(a.shape.empty() ? 0 : a.shape[0]) + " elements, expected " + std::to_string(expected));
}

void Program::check_range(const Step& step, const Check& check) const {
  int64_t limit = check.value;
  if (check.limit == Limit::Slots) limit = step.state.pages * step.state.page_size;
  if (check.limit == Limit::Rows) limit = step.sizes[static_cast<size_t>(check.value)];
  const IntArray& a = step.input(check.input);
  for (int64_t i = 0; i < a.shape[0]; ++i)
    if (a.data[i] < 0 || a.data[i] >= limit)
      reject("step input " + int_names_[static_cast<size_t>(check.input)] + " holds " + std::to_string(a.data[i]) +
             " at index " + std::to_string(i) + ", expected 0 to " + std::to_string(limit - 1));
}

// Every position that a row attends to must lie on a page of the cache.
void Program::check_sequences(const Step& step, const SequenceMap& map) const {
  const auto name = [&](int input) { return "step input " + int_names_[static_cast<size_t>(input)]; };
  const IntArray &positions = step.input(map.positions), &starts = step.input(map.starts),
                 &lengths = step.input(map.lengths), &pages = step.input(map.pages);
  check_rows(step, map.positions, map.dimension);
  const int64_t rows = positions.shape[0], page_size = step.state.page_size;
  if (lengths.shape.size() != 1) reject(name(map.lengths) + " must have one axis");
  const int64_t count = lengths.shape[0];
  if (starts.shape.size() != 1 || starts.shape[0] != count + 1 || starts.data[0] != 0 || starts.data[count] != rows)
    reject(name(map.starts) + " must hold " + std::to_string(count + 1) + " row numbers from 0 to " +
           std::to_string(rows));
  if (pages.shape.size() != 2 || pages.shape[0] != count)
    reject(name(map.pages) + " must have one row for each of " + std::to_string(count) + " sequences");
  for (int64_t b = 0; b < count; ++b) {
    const int64_t from = starts.data[b], to = starts.data[b + 1], length = lengths.data[b];
    if (to < from || to > rows) reject(name(map.starts) + " must not decrease: sequence " + std::to_string(b));
    if (length < 0 || length > pages.shape[1] * page_size)
      reject(name(map.lengths) + " holds " + std::to_string(length) + " for sequence " + std::to_string(b) +
             ", its pages hold 0 to " + std::to_string(pages.shape[1] * page_size));
    int64_t low = length, high = -1;
    for (int64_t t = from; t < to; ++t) {
      const int64_t p = positions.data[t];
      if (p < 0 || p >= length)
        reject(name(map.positions) + " holds " + std::to_string(p) + " in row " + std::to_string(t) +
               ", expected 0 to " + std::to_string(length - 1));
      low = p < low ? p : low;
      high = p > high ? p : high;
    }
    if (from == to) continue;
    low = map.window == 0 || low < map.window ? 0 : low - map.window + 1;
    for (int64_t p = low / page_size; p <= high / page_size; ++p) {
      const int64_t page = pages.data[b * pages.shape[1] + p];
      if (page < 0 || page >= step.state.pages)
        reject(name(map.pages) + " holds " + std::to_string(page) + " for sequence " + std::to_string(b) +
               ", expected 0 to " + std::to_string(step.state.pages - 1));
    }
  }
}

void Program::check_step(const Step& step) const {
  for (const Check& check : checks_) {
    check_rows(step, check.input, check.dimension);
    if (check.limit != Limit::None) check_range(step, check);
  }
  for (const SequenceMap& map : maps_) check_sequences(step, map);
}

// Places every buffer, rope table and scratch area; memory is kept from step to step and only grows.
void Program::reserve(Step& step) {
  std::vector<int64_t> slots(static_cast<size_t>(slots_), 0);
  for (const Buffer& b : buffers_)
    if (b.slot >= 0) {
      int64_t& size = slots[static_cast<size_t>(b.slot)];
      const int64_t wanted = rounded(step.rows(b) * b.width, LINE);
      size = wanted > size ? wanted : size;
    }
  int64_t total = 0;
  std::vector<int64_t> offsets, table_offsets;
  for (int64_t size : slots) offsets.push_back(total), total += size;
  for (const RopeTable& t : tables_) {
    table_offsets.push_back(total);
    total += rounded(2 * step.sizes[static_cast<size_t>(t.dimension)] * t.half, LINE);
  }
  total += rounded(SPARE_BYTES, 4 * LINE) / 4;
  const size_t bytes = static_cast<size_t>(total) * sizeof(float);
  if (arena_.size() < bytes) {
    arena_ = Memory();
    arena_ = Memory(bytes, Pages::Huge);
  }
  for (size_t i = 0; i < buffers_.size(); ++i)
    if (buffers_[i].slot >= 0) step.buffers[i] = arena_.floats() + offsets[static_cast<size_t>(buffers_[i].slot)];
  for (int64_t offset : table_offsets) step.tables.push_back(arena_.floats() + offset);

  shares_.resize(plans_.size());
  int64_t partials = 0;
  for (size_t i = 0; i < plans_.size(); ++i) {
    const PlanSpec& p = plans_[i];
    const SequenceMap& m = maps_[static_cast<size_t>(p.map)];
    const IntArray& starts = step.input(m.starts);
    shares_[i].build(step.input(m.positions).data, starts.data, starts.shape[0] - 1, p.window, p.group,
                     p.cache.kv_heads, kernels_->attention_partial(p.cache.type, p.cache.head_dim), pool_->threads(),
                     kernels_->attention_queries(p.cache.type));
    if (shares_[i].pieces() >= MOST_UNITS)
      reject("a step has " + std::to_string(shares_[i].pieces()) + " pieces of attention, expected fewer than " +
             std::to_string(MOST_UNITS) + ": give it fewer rows");
    partials = shares_[i].partial_floats() > partials ? shares_[i].partial_floats() : partials;
  }
  if (partials_.size() < static_cast<size_t>(partials) * sizeof(float)) {
    partials_ = Memory();
    partials_ = Memory(static_cast<size_t>(partials) * sizeof(float), Pages::Huge);
  }

  const int64_t tile = kernels_->blocking.tile;
  int64_t shared[ROUNDINGS] = {};
  for (const Instruction& i : code_) {
    int64_t wanted = 0;
    if (i.op == Op::Linears) {
      const Linears& p = linears_[static_cast<size_t>(i.linears)];
      const Buffer& x = buffers_[static_cast<size_t>(p.x)];
      const int64_t rows = step.rows(x), row = rounded(rounded_bytes(p.rounding, x.width), 64);
      for (const Linears::Member& m : p.members)
        if (p.rounding == Rounding::None)
          wanted = std::max(wanted, kernels_->linear_scratch(weights_[static_cast<size_t>(m.weight)], rows));
      wanted += tile * row / 4 + rounded(tile * x.width, LINE);
      int64_t& whole = shared[static_cast<int>(p.rounding)];
      if (rows > tile) whole = std::max(whole, rows * row + SPARE_BYTES);
    }
    if (i.op == Op::Attention) {
      const CacheSpec& cache = plans_[static_cast<size_t>(i.plan)].cache;
      wanted = kernels_->attention_scratch(cache.type, cache.head_dim,
                                           shares_[static_cast<size_t>(i.plan)].tile_rows() * i.group);
    }
    if (rounded(wanted, LINE) > step.scratch_stride) step.scratch_stride = rounded(wanted, LINE);
  }
  const size_t scratch = static_cast<size_t>(step.scratch_stride * pool_->threads()) * sizeof(float);
  if (scratch_.size() < scratch) {
    scratch_ = Memory();
    scratch_ = Memory(scratch, Pages::Small);
  }
  step.scratch = scratch_.floats();
  size_t together = 0;
  for (int64_t bytes : shared) together += static_cast<size_t>(bytes);
  if (rounded_.size() < together) {
    rounded_ = Memory();
    rounded_ = Memory(together, Pages::Huge);
  }
  int64_t from = 0;
  for (int i = 0; i < ROUNDINGS; from += shared[i], ++i) step.rounded[i] = rounded_.data() + from;

  int64_t rows = 0;
  for (const SequenceMap& m : maps_) rows += step.sizes[static_cast<size_t>(m.dimension)];
  sequence_.resize(static_cast<size_t>(rows));
  int32_t* at = sequence_.data();
  for (const SequenceMap& m : maps_) {
    step.sequences.push_back(at);
    const IntArray& starts = step.input(m.starts);
    for (int64_t b = 0; b + 1 < starts.shape[0]; ++b)
      for (int64_t t = starts.data[b]; t < starts.data[b + 1]; ++t) *at++ = static_cast<int32_t>(b);
  }
  ++steps_;
  if (left_ == nullptr) left_ = std::make_unique<Left[]>(static_cast<size_t>(pool_->threads()));
  if (ahead_.size() != code_.size()) {
    ahead_.resize(code_.size());
    size_t next = code_.size();
    for (size_t i = code_.size(); i-- > 0; ahead_[i] = next)
      if (code_[i].op == Op::Linears) next = i;
  }
}

// Whether a page of the cache begins with this step, whose memory the system may not have given yet.
bool Program::begins_page(const Step& step) const {
  int seen = -1;
  for (const Instruction& i : code_) {
    if (i.op != Op::CacheWrite || i.ints[0] == seen) continue;
    seen = i.ints[0];
    const IntArray& slots = step.input(seen);
    for (int64_t row = 0; row < slots.shape[0]; ++row)
      if (slots.data[row] % step.state.page_size == 0) return true;
  }
  return false;
}

// Takes the memory of such pages before anything is written, every thread for caches of its own: two threads that meet
// in a large page would both clear one, and one of them for nothing.
void Program::take_pages(const Step& step, int thread) {
  int number = 0;
  for (const Instruction& i : code_) {
    if (i.op != Op::CacheWrite || number++ % pool_->threads() != thread) continue;
    const Cache cache = step.state.cache(i.cache);
    const IntArray& slots = step.input(i.ints[0]);
    for (int64_t row = 0; row < slots.shape[0]; ++row) {
      if (slots.data[row] % cache.page_size != 0) continue;
      for (uint8_t* at : {cache.keys(slots.data[row] / cache.page_size, 0),
                          cache.values(slots.data[row] / cache.page_size, cache.kv_heads - 1)}) {
        volatile uint8_t* byte = at;
        *byte = *byte;
      }
    }
  }
  pool_->barrier(thread);
}

}  // namespace finial
