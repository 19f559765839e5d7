// Running a program: checks what the step brings, reserves memory, then every thread walks the instructions and takes
// its share of each. A barrier stands only where the builder found that one instruction needs another's result.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "packed.h"
#include "step.h"

namespace finial {

namespace {

[[noreturn]] void reject(const std::string& message) { throw std::invalid_argument(message); }

using Clock = std::chrono::steady_clock;

}  // namespace

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
    partials = shares_[i].partial_floats() > partials ? shares_[i].partial_floats() : partials;
  }
  if (partials_.size() < static_cast<size_t>(partials) * sizeof(float)) {
    partials_ = Memory();
    partials_ = Memory(static_cast<size_t>(partials) * sizeof(float), Pages::Huge);
  }

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
      wanted += TILE * row / 4 + rounded(TILE * x.width, LINE);
      int64_t& whole = shared[static_cast<int>(p.rounding)];
      if (rows > TILE) whole = std::max(whole, rows * row);
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
  if (counters_ != code_.size()) {
    next_ = std::make_unique<std::atomic<int64_t>[]>(code_.size());
    counters_ = code_.size();
  }
  for (size_t i = 0; i < counters_; ++i) next_[i].store(0, std::memory_order_relaxed);
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
  pool_->barrier();
}

void Program::run(const std::vector<int64_t>& sizes, const std::vector<IntArray>& ints,
                  const std::vector<FloatArray>& inputs, const std::vector<FloatArray>& outputs, const State& state,
                  const Sampling* sampling) {
  if (static_cast<int>(sizes.size()) != dimensions_ || ints.size() != int_names_.size() ||
      static_cast<int>(inputs.size()) != inputs_ || static_cast<int>(outputs.size()) != outputs_)
    reject("run: the number of sizes, integer inputs, inputs or outputs is not the program's");
  if (!(state.specs() == caches_)) reject("run: the state was made for another program");
  for (int64_t size : sizes)
    if (size < 0) reject("run: a negative number of rows");
  std::lock_guard<std::mutex> lock(running_);
  if (!unpacked_.empty()) pack();
  finish_packing();
  Step step{sizes, ints, state, std::vector<float*>(buffers_.size()), {}, {}, nullptr, 0, {}};
  const Buffer* chosen = sampling == nullptr ? nullptr : &output_buffer(sampling->output);
  if (chosen != nullptr && step.rows(*chosen) != sampling->rows)
    reject("run: tokens of " + std::to_string(sampling->rows) + " rows are asked for, the output has " +
           std::to_string(step.rows(*chosen)));
  for (size_t i = 0; i < buffers_.size(); ++i) {
    const Buffer& b = buffers_[i];
    if (b.external < 0) continue;
    if (&b == chosen) {
      step.buffers[i] = own_output(step, b);
      continue;
    }
    const FloatArray& a = (b.is_output ? outputs : inputs)[static_cast<size_t>(b.external)];
    if (a.rows != step.rows(b) || a.width != b.width)
      reject(std::string(b.is_output ? "run: output " : "run: input ") + std::to_string(b.external) + " is [" +
             std::to_string(a.rows) + ", " + std::to_string(a.width) + "], expected [" + std::to_string(step.rows(b)) +
             ", " + std::to_string(b.width) + "]");
    step.buffers[i] = a.data;
  }
  check_step(step);
  reserve(step);
  const bool timed = !timings_.empty(), take = pool_->threads() > 1 && begins_page(step);
  pool_->run([&](int thread) {
    Run next{nullptr, nullptr};
    if (take) take_pages(step, thread);
    if (timed && thread == 0) {
      for (size_t at = 0; at < code_.size(); ++at) {
        const Clock::time_point start = Clock::now();
        wait(at, step, thread, next);
        const Clock::time_point begin = Clock::now();
        execute(code_[at], step, thread);
        Timing& t = timings_[at];
        t.calls += 1;
        t.waiting += std::chrono::duration<double>(begin - start).count();
        t.seconds += std::chrono::duration<double>(Clock::now() - begin).count();
      }
    } else {
      for (size_t at = 0; at < code_.size(); ++at) {
        wait(at, step, thread, next);
        execute(code_[at], step, thread);
      }
    }
    if (chosen != nullptr) {
      pool_->barrier();
      look(step, *chosen, thread);
    }
  });
  if (chosen != nullptr) choose_tokens(step, *chosen, *sampling);
}

// Room for an output that stays here.
float* Program::own_output(const Step& step, const Buffer& b) {
  const size_t bytes = static_cast<size_t>(step.rows(b) * b.width) * sizeof(float);
  if (logits_.size() < bytes) {
    logits_ = Memory();
    logits_ = Memory(bytes, Pages::Huge);
  }
  highest_.resize(static_cast<size_t>(step.rows(b) * pool_->threads()));
  return logits_.floats();
}

const Program::Buffer& Program::output_buffer(int output) const {
  for (const Buffer& b : buffers_)
    if (b.is_output && b.external == output) return b;
  reject("run: there is no output " + std::to_string(output));
}

std::vector<FloatArray> Program::no_outputs() const {
  std::vector<FloatArray> list;
  for (int i = 0; i < outputs_; ++i) list.push_back({nullptr, 0, output_buffer(i).width});
  return list;
}

// Each thread looks for the highest logit in the part of the rows that it is likely to have in its cache.
void Program::look(const Step& step, const Buffer& b, int thread) {
  const int threads = pool_->threads();
  const Range part = share(b.width, thread, threads, PANEL);
  for (int64_t row = 0; row < step.rows(b); ++row) {
    int64_t& found = highest_[static_cast<size_t>(row * threads + thread)];
    found = part.begin < part.end
                ? part.begin + kernels_->highest(logits_.floats() + row * b.width + part.begin, part.end - part.begin)
                : -1;
  }
}

void Program::choose_tokens(const Step& step, const Buffer& b, const Sampling& sampling) {
  const int threads = pool_->threads();
  for (int64_t row = 0; row < step.rows(b); ++row) {
    const float* logits = logits_.floats() + row * b.width;
    int64_t best = -1;
    for (int t = 0; t < threads; ++t) {
      const int64_t at = highest_[static_cast<size_t>(row * threads + t)];
      if (at >= 0 && (best < 0 || logits[at] > logits[best] || logits[at] != logits[at])) best = at;
      if (best >= 0 && logits[best] != logits[best]) break;
    }
    sampling.tokens[row] = choose(*kernels_, logits, b.width, best, sampling.choices[row], sampling.draws[row], room_);
  }
}

void Program::profile(bool on) {
  static const char* const NAMES[] = {"rope table",  "embed",     "linear",   "norm", "rope",
                                      "cache write", "attention", "silu mul", "add",  "select"};
  std::lock_guard<std::mutex> lock(running_);
  timings_.clear();
  for (const Instruction& i : code_) {
    if (!on) break;
    Timing t;
    t.what = NAMES[static_cast<int>(i.op)];
    if (i.op == Op::Linears) {
      const Linears& p = linears_[static_cast<size_t>(i.linears)];
      t.what =
          (p.norm != nullptr ? "norm + linear " : "linear ") + std::to_string(buffers_[static_cast<size_t>(p.x)].width);
      const char* sign = " > ";
      for (const Linears::Member& m : p.members) {
        const finial::Linear& l = weights_[static_cast<size_t>(m.weight)];
        t.bytes += l.n_out * l.row_bytes;
        t.what += sign + std::to_string(l.n_out);
        sign = ", ";
        if (m.second >= 0) {
          const finial::Linear& up = weights_[static_cast<size_t>(m.second)];
          t.bytes += up.n_out * up.row_bytes;
          t.what += " gated";
        }
        if (m.add >= 0) t.what += " + add";
      }
    }
    timings_.push_back(std::move(t));
  }
}

std::vector<Timing> Program::timings() {
  std::lock_guard<std::mutex> lock(running_);
  return timings_;
}

void Program::execute(const Instruction& i, const Step& step, int thread) {
  const int threads = pool_->threads();
  const auto at = [&](int buffer) { return step.buffers[static_cast<size_t>(buffer)]; };
  const auto spec = [&](int buffer) -> const Buffer& { return buffers_[static_cast<size_t>(buffer)]; };
  switch (i.op) {
    case Op::RopeTable: {
      const RopeTable& t = tables_[static_cast<size_t>(i.table)];
      const int64_t rows = step.sizes[static_cast<size_t>(t.dimension)];
      float* cos = step.tables[static_cast<size_t>(i.table)];
      float* sin = cos + rows * t.half;
      const Range part = share(rows, thread, threads);
      for (int64_t row = part.begin; row < part.end; ++row) {
        const float position = static_cast<float>(step.input(i.ints[0]).data[row]);
        for (int64_t k = 0; k < t.half; ++k) {
          const float angle = position * t.frequencies[k];
          cos[row * t.half + k] = std::cos(angle) * t.scale;
          sin[row * t.half + k] = std::sin(angle) * t.scale;
        }
      }
      break;
    }
    case Op::Embed: {
      const Range part = share(step.rows(spec(i.out)), thread, threads);
      for (int64_t row = part.begin; row < part.end && i.linear.packed != nullptr; ++row)
        kernels_->unpack(i.linear, step.input(i.ints[0]).data[row], at(i.out) + row * i.linear.n_in);
      for (int64_t row = part.begin; row < part.end && i.linear.packed == nullptr; ++row)
        kernels_->decode(i.linear.format, i.linear.weight + step.input(i.ints[0]).data[row] * i.linear.row_bytes,
                         i.linear.n_in, at(i.out) + row * i.linear.n_in);
      break;
    }
    case Op::Linears: {
      const Linears& p = linears_[static_cast<size_t>(i.linears)];
      const int64_t rows = step.rows(buffers_[static_cast<size_t>(p.x)]);
      if (rows == 0) break;
      if (rows > TILE && p.rounding != Rounding::None)
        multiply_many(i, step, thread);
      else
        multiply_few(i, step, thread);
    } break;
    case Op::RmsNorm: {
      const Range part = share(step.rows(spec(i.out)) * (spec(i.out).width / i.width), thread, threads);
      for (int64_t g = part.begin; g < part.end; ++g)
        kernels_->rms_norm(at(i.a) + g * i.width, i.vector, at(i.out) + g * i.width, i.width, i.number);
      break;
    }
    case Op::Rope: {
      const int64_t rows = step.rows(spec(i.out)), heads = spec(i.out).width / i.width, half = i.width / 2;
      const float* cos = step.tables[static_cast<size_t>(i.table)];
      const float* sin = cos + rows * half;
      const Range part = share(rows * heads, thread, threads);
      for (int64_t h = part.begin; h < part.end; ++h)
        kernels_->rope(at(i.a) + h * i.width, cos + h / heads * half, sin + h / heads * half, at(i.out) + h * i.width,
                       i.width);
      break;
    }
    case Op::CacheWrite: {
      const Cache cache = step.state.cache(i.cache);
      const Range part = share(step.rows(spec(i.a)) * cache.kv_heads, thread, threads);
      const int32_t* slots = step.input(i.ints[0]).data;
      if (cache.blocked) {
        kernels_->store_blocked(cache, at(i.a), at(i.b), slots, part.begin, part.end);
        break;
      }
      for (int64_t h = part.begin; h < part.end; ++h) {
        const int64_t slot = slots[h / cache.kv_heads], page = slot / cache.page_size, head = h % cache.kv_heads;
        const int64_t offset = slot % cache.page_size * cache.row_bytes();
        uint8_t *keys = cache.keys(page, head), *values = cache.values(page, head);
        kernels_->store(cache.type, at(i.a) + h * cache.head_dim, keys + offset, cache.head_dim);
        kernels_->store(cache.type, at(i.b) + h * cache.head_dim, values + offset, cache.head_dim);
      }
      break;
    }
    case Op::Attention: {
      const IntArray& pages = step.input(i.ints[3]);
      const finial::Attention a{at(i.a),
                                at(i.out),
                                step.state.cache(i.cache),
                                step.input(i.ints[0]).data,
                                step.sequences[static_cast<size_t>(i.table)],
                                pages.data,
                                pages.shape[1],
                                i.group,
                                i.window,
                                i.number};
      // Pieces cost as much as their sequence is long, so threads take them one by one.
      std::atomic<int64_t>& next = next_[static_cast<size_t>(&i - code_.data())];
      AttentionPlan& plan = shares_[static_cast<size_t>(i.plan)];
      float* scratch = step.scratch + thread * step.scratch_stride;
      for (int64_t at; (at = next.fetch_add(1, std::memory_order_relaxed)) < plan.pieces();) {
        const AttentionPlan::Share& piece = plan.piece(at);
        kernels_->attention(a, piece.piece, piece.whole < 0 ? nullptr : partials_.floats() + piece.partial, scratch);
        if (piece.whole >= 0 && plan.last_of(piece.whole)) {
          const AttentionPlan::Share& whole = plan.whole(piece.whole);
          kernels_->attention_merge(a, whole.piece, partials_.floats() + whole.partial, scratch);
        }
      }
      break;
    }
    case Op::SiluMul:
    case Op::Add: {
      const Range part = share(step.rows(spec(i.out)) * spec(i.out).width, thread, threads, LINE);
      const auto kernel = i.op == Op::Add ? kernels_->add : kernels_->silu_mul;
      kernel(at(i.a) + part.begin, at(i.b) + part.begin, at(i.out) + part.begin, part.end - part.begin);
      break;
    }
    case Op::SelectRows: {
      const int64_t width = spec(i.out).width;
      const Range part = share(step.rows(spec(i.out)), thread, threads);
      for (int64_t row = part.begin; row < part.end; ++row)
        std::memcpy(at(i.out) + row * width, at(i.a) + step.input(i.ints[0]).data[row] * width,
                    static_cast<size_t>(width) * sizeof(float));
      break;
    }
  }
}

}  // namespace finial
