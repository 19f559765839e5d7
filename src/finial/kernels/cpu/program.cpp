// Building a program: every shape is checked here, once, so that the interpreter need not.
#include "program.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "packed.h"

namespace finial {

namespace {

constexpr int READ_ONLY = -1;
constexpr int PARTIALS = -2;  // what attention leaves between threads: one memory for all
constexpr int ROUNDED = -3;   // less its kind: rounded inputs of products that threads share

// Bytes of each cache that are taken when it is made: one large page, whose zeroing the first token would wait for.
constexpr size_t FIRST_POSITIONS = size_t{2} << 20;

// Bytes of panels that a thread packs at a time: several large pages, because two threads that touch one for the first
// time together both have it zeroed.
constexpr int64_t PACKED_AT_ONCE = int64_t{8} << 20;

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

State::State(std::vector<CacheSpec> specs, int64_t pages, int64_t page_size, Pool& pool)
    : pages(pages), page_size(page_size), specs_(std::move(specs)) {
  require(pages >= 0 && page_size >= 1 && pages <= INT32_MAX / page_size,
          "a cache of " + std::to_string(pages) + " pages of " + std::to_string(page_size) +
              " positions: expected at least 0 and 1, and fewer than 2^31 positions in all");
  for (const CacheSpec& s : specs_) {
    const int64_t row = cache_row_bytes(s.type, s.head_dim);
    memory_.emplace_back(static_cast<size_t>(pages * page_size * 2 * s.kv_heads * row), Pages::Huge);
  }
  std::atomic<size_t> next{0};
  pool.run([&](int) {
    for (size_t i; (i = next.fetch_add(1)) < memory_.size();) memory_[i].take(FIRST_POSITIONS);
  });
}

void State::take() {
  for (Memory& m : memory_) m.take(m.size());
}

int64_t State::nbytes() const {
  size_t total = 0;
  for (const Memory& m : memory_) total += m.size();
  return static_cast<int64_t>(total);
}

Cache State::cache(int index) const {
  const CacheSpec& s = specs_[static_cast<size_t>(index)];
  const bool blocked = s.in_blocks && page_size % CACHE_BLOCK == 0 && s.head_dim % 16 == 0;
  return Cache(memory_[static_cast<size_t>(index)].data(), s.type, blocked, pages, page_size, s.kv_heads, s.head_dim);
}

int Program::dimension() { return dimensions_++; }

int Program::buffer(int dimension, int64_t width, int slot) {
  require(dimension >= 0 && dimension < dimensions_ && width >= 1 && slot >= 0 && slot <= slots_,
          "buffer: dimension, width or slot out of range");
  if (slot == slots_) ++slots_;
  buffers_.push_back({dimension, width, slot, -1, false});
  return static_cast<int>(buffers_.size()) - 1;
}

void Program::keep_rounded(int buffer, Format format) {
  const Buffer& b = check(buffer, "keep_rounded");
  const Rounding as = kernels_->rounding(format);
  require(b.slot >= 0 && as != Rounding::None && b.width % PANEL == 0 && rounded_bytes(as, b.width) <= 4 * b.width,
          "keep_rounded: a buffer of the arena, of whole panels, for packed weights");
  buffers_[static_cast<size_t>(buffer)].as = as;
}

int Program::input(int dimension, int64_t width) {
  require(dimension >= 0 && dimension < dimensions_ && width >= 1, "input: dimension or width out of range");
  buffers_.push_back({dimension, width, -1, inputs_++, false});
  return static_cast<int>(buffers_.size()) - 1;
}

int Program::output(int dimension, int64_t width) {
  require(dimension >= 0 && dimension < dimensions_ && width >= 1, "output: dimension or width out of range");
  buffers_.push_back({dimension, width, -1, outputs_++, true});
  return static_cast<int>(buffers_.size()) - 1;
}

int Program::int_input(std::string name) {
  int_names_.push_back(std::move(name));
  return static_cast<int>(int_names_.size()) - 1;
}

int Program::cache(CacheSpec spec) {
  require(spec.kv_heads >= 1 && spec.head_dim >= 1, "cache: kv_heads and head_dim must be at least 1");
  require(spec.type != CacheType::Q8_0 || spec.head_dim % 32 == 0,
          "cache: q8_0 takes a head_dim of whole blocks of 32");
  spec.in_blocks = kernels_->attention_in_blocks(spec.type);
  caches_.push_back(spec);
  return static_cast<int>(caches_.size()) - 1;
}

const Program::Buffer& Program::check(int buffer, const char* what) const {
  require(buffer >= 0 && buffer < static_cast<int>(buffers_.size()), std::string(what) + ": no such buffer");
  return buffers_[static_cast<size_t>(buffer)];
}

// Notes that an integer input must have a row's element each, within a limit; the same demand is made once.
void Program::demand(int input, int dimension, Limit limit, int64_t value, const char* what) {
  require(input >= 0 && input < static_cast<int>(int_names_.size()), std::string(what) + ": no such integer input");
  const Check check{input, dimension, limit, value};
  for (const Check& known : checks_)
    if (known == check) return;
  checks_.push_back(check);
}

// What two instructions can meet in: 4 n is arena slot n, 4 n + 1 output n, 4 n + 2 cache n, 4 n + 3 rope table n.
// Inputs are never written, so nobody waits for them.
int Program::resource(int buffer) const {
  const Buffer& b = buffers_[static_cast<size_t>(buffer)];
  return b.slot >= 0 ? 4 * b.slot : b.is_output ? 4 * b.external + 1 : READ_ONLY;
}

void Program::push(Instruction instruction, const std::vector<int>& reads, const std::vector<int>& writes,
                   Split split) {
  for (int w : writes) require(w != READ_ONLY, "an input of the program cannot be written");
  for (int r : reads)
    for (int w : writes) require(r != w, "an instruction's output must not share memory with its input");
  // No wait where each thread goes on with the very part that it had.
  const auto meets = [split](const Touched& touched, int resource) {
    const auto found = touched.find(resource);
    return found != touched.end() && !std::all_of(found->second.begin(), found->second.end(),
                                                  [split](const Split& other) { return other == split; });
  };
  for (int r : reads) instruction.barrier |= meets(written_, r);
  for (int w : writes) instruction.barrier |= meets(written_, w) || meets(read_, w);
  if (instruction.barrier) read_.clear(), written_.clear();
  for (int r : reads) read_[r].push_back(split);
  for (int w : writes) written_[w].push_back(split);
  code_.push_back(instruction);
}

void Program::embed(int out, int tokens, const finial::Linear& weight) {
  const Buffer& y = check(out, "embed");
  require(y.width == weight.n_in, "embed: the output is as wide as a row of the weight");
  demand(tokens, y.dimension, Limit::Constant, weight.n_out, "embed");
  Instruction i{Op::Embed};
  i.out = out, i.ints[0] = tokens, i.linear = weight;
  push(i, {}, {resource(out)});
}

void Program::embed_packed(int out, int tokens, int weight) {
  require(weight >= 0 && weight < static_cast<int>(weights_.size()), "embed: no such weight");
  const finial::Linear& table = weights_[static_cast<size_t>(weight)];
  require(table.packed != nullptr &&
              (table.format == Format::BF16 || table.format == Format::Q8_0 || table.format == Format::Q4_0),
          "embed: only packed bf16, q8_0 and q4_0 are read as rows");
  embed(out, tokens, table);
}

// The panels that a mapped matrix was packed into before; without a map, other memory may lie there by now.
bool Program::known(finial::Linear& made, bool mapped) const {
  for (const finial::Linear& other : weights_)
    if (mapped && other.packed != nullptr && other.weight == made.weight && other.format == made.format &&
        other.n_in == made.n_in && other.n_out == made.n_out)
      made.packed = other.packed, made.stride = other.stride;
  return made.packed != nullptr;
}

uint8_t* Program::room_for_panels(int64_t bytes) {
  const size_t size = static_cast<size_t>(bytes);
  constexpr size_t CHUNK = size_t{64} << 20;  // address space: memory is taken as it is written
  if (packed_.empty() || packed_.back().size() - packed_used_ < size) {
    packed_.emplace_back(std::max(size, CHUNK), Pages::Huge);
    packed_used_ = 0;
  }
  uint8_t* out = packed_.back().data() + packed_used_;
  packed_used_ += (size + 63) / 64 * 64;
  return out;
}

// The sources' matrices in panels: all threads take piece after piece, in the order in which the panels lie, so that
// nobody waits at the end of a matrix.
void Program::pack_all(const std::vector<Source>& sources, Pool& pool, const Kernels& kernels,
                       const std::atomic<bool>& abandoned) {
  struct Piece {
    const Source* source;
    int64_t begin, end;  // panels
  };
  std::vector<Piece> pieces;
  for (const Source& s : sources) {
    const int64_t count = panels(s.matrix), step = std::max<int64_t>(1, PACKED_AT_ONCE / s.matrix.stride);
    for (int64_t begin = 0; begin < count; begin += step) pieces.push_back({&s, begin, std::min(begin + step, count)});
  }
  std::atomic<size_t> next{0};
  pool.run([&](int) {
    for (size_t i; (i = next.fetch_add(1)) < pieces.size() && !abandoned.load();) {
      const Source& s = *pieces[i].source;
      kernels.pack(s.matrix, s.out, pieces[i].begin, pieces[i].end);
      const int64_t first = pieces[i].begin * PANEL, last = std::min(pieces[i].end * PANEL, s.matrix.n_out),
                    row = s.matrix.row_bytes;
      if (s.mapped) give_back(s.matrix.weight + first * row, static_cast<size_t>((last - first) * row));
    }
  });
}

// Where a matrix's panels will be; they are made now unless it is mapped.
void Program::place(finial::Linear& made, uint8_t* out, int64_t stride, bool mapped,
                    std::shared_ptr<const void> owner) {
  made.stride = stride;
  Source source{made, out, mapped, std::move(owner)};
  if (mapped)
    unpacked_.push_back(std::move(source));
  else
    pack_all({std::move(source)}, *pool_, *kernels_, abandoned_);
  made.packed = out;
}

void Program::pack() {
  finish_packing();
  sources_ = std::move(unpacked_);
  unpacked_.clear();
  if (!sources_.empty())
    packing_ = std::async(std::launch::async, [this] { pack_all(sources_, *pool_, *kernels_, abandoned_); });
}

void Program::finish_packing() {
  if (packing_.valid()) packing_.get();
  sources_.clear();
}

State Program::new_state(int64_t pages, int64_t page_size) {
  {
    std::lock_guard<std::mutex> lock(running_);
    finish_packing();
  }
  return State(caches_, pages, page_size, *pool_);
}

int Program::weight(const finial::Linear& weight, bool mapped, std::shared_ptr<const void> owner,
                    const Beside& beside) {
  finial::Linear made = weight;
  const int index = static_cast<int>(weights_.size());
  if (kernels_->rounding(made.format) == Rounding::None) {
    owners_.push_back(std::move(owner));
  } else if (!known(made, mapped)) {
    const int64_t bytes = panel_bytes(made.format, made.n_in);
    const bool follows = beside.first >= 0 && beside.first == roomy_ && made.n_out == weights_.back().n_out &&
                         weights_.back().stride == panel_bytes(weights_.back().format, weights_.back().n_in) + bytes;
    if (follows) {
      const finial::Linear& first = weights_.back();
      place(made, const_cast<uint8_t*>(first.packed) + first.stride - bytes, first.stride, mapped, std::move(owner));
    } else {
      const int64_t room = beside.room ? panel_bytes(beside.second, made.n_in) : 0;
      uint8_t* out = room_for_panels((bytes + room) * panels(made));
      place(made, out, bytes + room, mapped, std::move(owner));
      if (room > 0) roomy_ = index;
    }
  }
  weights_.push_back(made);
  return index;
}

void Program::linears(int x, const float* norm, int64_t norm_width, float eps, std::vector<Linears::Member> members) {
  const Buffer& in = check(x, "linear");
  require(!members.empty() && (norm == nullptr || norm_width == in.width),
          "linear: at least one product; a norm as wide as the input");
  require(in.as == Rounding::None || norm == nullptr, "linear: rounded rows are not normalised");
  const auto matrix = [&](int weight, const Buffer& y) -> const finial::Linear& {
    require(weight >= 0 && weight < static_cast<int>(weights_.size()), "linear: no such weight");
    const finial::Linear& w = weights_[static_cast<size_t>(weight)];
    require(in.width == w.n_in && y.width == w.n_out && in.dimension == y.dimension,
            "linear: x [N, in], weight [out, in] and the output [N, out] do not fit");
    return w;
  };
  std::vector<int> reads{resource(x)}, writes;
  const Rounding rounding = kernels_->rounding(matrix(members[0].weight, check(members[0].out, "linear")).format);
  for (const Linears::Member& m : members) {
    const Buffer& y = check(m.out, "linear");
    require(y.as == Rounding::None || (rounding != Rounding::None && m.add < 0),
            "linear: results are rounded where weights are packed and nothing is added");
    require(kernels_->rounding(matrix(m.weight, y).format) == rounding, "linear: one rounding of the input for all");
    for (int w : writes) require(w != resource(m.out), "linear: each product has an output of its own");
    writes.push_back(resource(m.out));
    if (m.second >= 0)
      require(rounding != Rounding::None && kernels_->rounding(matrix(m.second, y).format) == rounding,
              "linear: a gated product wants packed weights");
    if (m.add >= 0) {
      const Buffer& add = check(m.add, "linear");
      require(add.width == y.width && add.dimension == y.dimension, "linear: what is added is as large as the output");
      reads.push_back(resource(m.add));
    }
  }
  require(in.as == Rounding::None || in.as == rounding, "linear: the input is rounded for other products");
  // The rounded rows of one kind have one place, when they are shared.
  if ((rounding != Rounding::None && in.as == Rounding::None) || norm != nullptr)
    writes.push_back(ROUNDED - static_cast<int>(rounding));
  linears_.push_back({x, norm, eps, rounding, std::move(members), {}});
  share_out(linears_.back());
  Instruction i{Op::Linears};
  i.linears = static_cast<int>(linears_.size()) - 1;
  push(i, reads, writes);
}

// The units in which the shares of threads begin: equal parts of the bytes.
void Program::share_out(Linears& p) const {
  const int threads = pool_->threads();
  const bool packed = p.rounding != Rounding::None;
  const auto matrix = [&](int index) -> const finial::Linear& { return weights_[static_cast<size_t>(index)]; };
  int64_t total = 0, before = 0;
  for (Linears::Member& m : p.members) {
    const finial::Linear& l = matrix(m.weight);
    m.units = packed ? panels(l) : (l.n_out + LINE - 1) / LINE;
    m.unit = packed ? panel_bytes(l.format, l.n_in) : LINE * l.row_bytes;
    if (m.second >= 0) m.unit += panel_bytes(matrix(m.second).format, l.n_in);
    total += m.units * m.unit;
  }
  p.edges.assign(static_cast<size_t>(threads) + 1, 0);
  for (const Linears::Member& m : p.members) {
    for (int t = 1; t <= threads; ++t) {
      const int64_t byte = total / threads * t + total % threads * t / threads;
      p.edges[static_cast<size_t>(t)] +=
          t == threads ? m.units : std::clamp<int64_t>((byte - before + m.unit / 2) / m.unit, 0, m.units);
    }
    before += m.units * m.unit;
  }
  require(p.edges.back() < MOST_UNITS, "linear: too many outputs");
}

void Program::rms_norm(int out, int x, const float* weight, int64_t width, float eps) {
  const Buffer &y = check(out, "rms_norm"), &in = check(x, "rms_norm");
  require(in.width == y.width && in.dimension == y.dimension && width >= 1 && in.width % width == 0,
          "rms_norm: x [N, D], weight [W] with D % W == 0 and the output [N, D] do not fit");
  Instruction i{Op::RmsNorm};
  i.out = out, i.a = x, i.vector = weight, i.width = width, i.number = eps;
  push(i, {resource(x)}, {resource(out)}, {in.dimension, in.width, in.width / width});
}

void Program::rope(int out, int x, int positions, const float* frequencies, int64_t head_dim, float scale,
                   const float* norm, float eps) {
  const Buffer &y = check(out, "rope"), &in = check(x, "rope");
  require(in.width == y.width && in.dimension == y.dimension && head_dim >= 2 && head_dim % 2 == 0 &&
              in.width % head_dim == 0,
          "rope: x [N, heads * head_dim] with an even head_dim and the output do not fit");
  demand(positions, in.dimension, Limit::None, 0, "rope");
  int table = 0;  // cos and sin of a step's positions are made once for all layers
  for (; table < static_cast<int>(tables_.size()); ++table) {
    const RopeTable& t = tables_[static_cast<size_t>(table)];
    if (t.positions == positions && t.dimension == in.dimension && t.frequencies == frequencies &&
        t.half == head_dim / 2 && t.scale == scale)
      break;
  }
  if (table == static_cast<int>(tables_.size())) {
    tables_.push_back({positions, in.dimension, frequencies, head_dim / 2, scale});
    Instruction make{Op::RopeTable};
    make.ints[0] = positions, make.table = table;
    push(make, {}, {4 * table + 3});
  }
  Instruction i{Op::Rope};
  i.out = out, i.a = x, i.ints[0] = positions, i.table = table, i.width = head_dim, i.vector = norm, i.number = eps;
  push(i, {resource(x), 4 * table + 3}, {resource(out)}, {in.dimension, in.width, in.width / head_dim});
}

void Program::cache_write(int cache, int keys, int values, int slots) {
  require(cache >= 0 && cache < static_cast<int>(caches_.size()), "cache_write: no such cache");
  const CacheSpec& spec = caches_[static_cast<size_t>(cache)];
  const Buffer &k = check(keys, "cache_write"), &v = check(values, "cache_write");
  require(k.width == spec.kv_heads * spec.head_dim && v.width == k.width && v.dimension == k.dimension,
          "cache_write: keys and values [T, kv_heads * head_dim] do not fit the cache");
  demand(slots, k.dimension, Limit::Slots, 0, "cache_write");
  Instruction i{Op::CacheWrite};
  i.a = keys, i.b = values, i.ints[0] = slots, i.cache = cache;
  push(i, {resource(keys), resource(values)}, {4 * cache + 2}, {k.dimension, k.width, spec.kv_heads});
}

void Program::attention(int out, int queries, int cache, int positions, int starts, int lengths, int pages,
                        int64_t window, float scale) {
  for (int input : {positions, starts, lengths, pages})
    require(input >= 0 && input < static_cast<int>(int_names_.size()), "attention: no such integer input");
  require(cache >= 0 && cache < static_cast<int>(caches_.size()), "attention: no such cache");
  const CacheSpec& spec = caches_[static_cast<size_t>(cache)];
  const Buffer &y = check(out, "attention"), &q = check(queries, "attention");
  const int64_t kv = spec.kv_heads * spec.head_dim;
  require(
      q.width == y.width && q.dimension == y.dimension && q.width % kv == 0 && window >= 0,
      "attention: queries [T, heads * head_dim], heads a multiple of kv_heads, and the output do not fit the cache");
  int map = 0;
  for (; map < static_cast<int>(maps_.size()); ++map) {
    const SequenceMap& m = maps_[static_cast<size_t>(map)];
    if (m.positions == positions && m.starts == starts && m.lengths == lengths && m.pages == pages &&
        m.dimension == q.dimension)
      break;
  }
  if (map == static_cast<int>(maps_.size())) maps_.push_back({positions, starts, lengths, pages, q.dimension, window});
  SequenceMap& m = maps_[static_cast<size_t>(map)];
  m.window = m.window == 0 || window == 0 ? 0 : (m.window > window ? m.window : window);
  Instruction i{Op::Attention};
  i.out = out, i.a = queries, i.cache = cache, i.table = map, i.window = window, i.number = scale;
  i.ints[0] = positions, i.ints[1] = starts, i.ints[2] = lengths, i.ints[3] = pages;
  i.group = q.width / kv;
  for (; i.plan < static_cast<int>(plans_.size()); ++i.plan) {
    const PlanSpec& p = plans_[static_cast<size_t>(i.plan)];
    if (p.map == map && p.window == window && p.group == i.group && p.cache == spec) break;
  }
  if (i.plan == static_cast<int>(plans_.size())) plans_.push_back({map, window, i.group, spec});
  push(i, {resource(queries), 4 * cache + 2}, {resource(out), PARTIALS});
}

void Program::pointwise(Op op, int out, int a, int b) {
  const Buffer &y = check(out, "pointwise"), &x = check(a, "pointwise"), &z = check(b, "pointwise");
  require(x.width == z.width && x.dimension == z.dimension && y.width == x.width && y.dimension == x.dimension,
          "silu_mul and add: both inputs and the output must have one shape");
  Instruction i{op};
  i.out = out, i.a = a, i.b = b;
  push(i, {resource(a), resource(b)}, {resource(out)});
}

void Program::silu_mul(int out, int gate, int up) { pointwise(Op::SiluMul, out, gate, up); }
void Program::add(int out, int a, int b) { pointwise(Op::Add, out, a, b); }

void Program::select_rows(int out, int x, int rows) {
  const Buffer &y = check(out, "select_rows"), &in = check(x, "select_rows");
  require(y.width == in.width, "select_rows: x [T, D] and the output [R, D] do not fit");
  demand(rows, y.dimension, Limit::Rows, in.dimension, "select_rows");
  Instruction i{Op::SelectRows};
  i.out = out, i.a = x, i.ints[0] = rows;
  push(i, {resource(x)}, {resource(out)});
}

}  // namespace finial
