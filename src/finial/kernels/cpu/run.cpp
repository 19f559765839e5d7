// Running a program: every thread walks the instructions and takes its share of each. A barrier stands only where the
// builder found that one instruction needs another's result. Before it, step.cpp checks what the step brings and
// reserves memory; tokens may be chosen after it.
#include <chrono>
#include <cmath>
#include <cstring>
#include <string>

#include "step.h"

namespace finial {

namespace {

using Clock = std::chrono::steady_clock;

}  // namespace

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
    kernels_->rest();
    if (chosen != nullptr) {
      pool_->barrier(thread);
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
    if (i.op == Op::Rope && i.vector != nullptr) t.what = "norm + rope";
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
      if (are_many(p, rows))
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
      for (int64_t h = part.begin; h < part.end; ++h) {
        const float* x = at(i.a) + h * i.width;
        float* y = at(i.out) + h * i.width;
        if (i.vector != nullptr) {
          kernels_->rms_norm(x, i.vector, y, i.width, i.number);
          x = y;
        }
        kernels_->rope(x, cos + h / heads * half, sin + h / heads * half, y, i.width);
      }
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
      finial::Attention a{at(i.a),
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
      AttentionPlan& plan = shares_[static_cast<size_t>(i.plan)];
      float* scratch = step.scratch + thread * step.scratch_stride;
      if (!i.barrier) announce(i, step, thread);
      const Range own = share(plan.pieces(), thread, threads);
      int other = 0;
      for (Range got; take(i, thread, {1, 4, 1}, other, got);) {
        const AttentionPlan::Share& piece = plan.piece(got.begin);
        a.next = other == 0 && got.end < own.end ? &plan.piece(got.end).piece : nullptr;
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
