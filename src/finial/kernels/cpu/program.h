// A graph lowered to a flat list of instructions over buffers, and the interpreter that runs it: one call per step.
//
// Python builds a program once (backends/cpu.py) and then only calls `run`. Shapes are [rows, width] throughout: the
// width is fixed when the program is built, the rows come with each step, one number per row dimension of the graph.
// Nothing that a step brings can make a kernel read or write outside its arrays: `run` checks it and throws
// std::invalid_argument naming the input. Weights are packed (packed.h) when they are declared, those that lie in a
// mapped file all together by `pack`, or used where they are: then whoever builds the program keeps them alive.
#pragma once

#include <atomic>
#include <future>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attention_plan.h"
#include "choose.h"
#include "kernels.h"
#include "memory.h"
#include "threads.h"

namespace finial {

// The keys and values of one layer: what a state value of the graph is made of.
struct CacheSpec {
  int64_t kv_heads, head_dim;
  CacheType type;
  bool in_blocks = false;  // whether the program's kernels take it so
  bool operator==(const CacheSpec& o) const {
    return kv_heads == o.kv_heads && head_dim == o.head_dim && type == o.type && in_blocks == o.in_blocks;
  }
};

// pages * page_size zeroed positions of each cache; memory is taken as it is written.
class State {
 public:
  State(std::vector<CacheSpec> specs, int64_t pages, int64_t page_size, Pool& pool);
  State(State&&) = default;
  State(const State&) = delete;
  void take();  // all of it from the system now; only before anything is written
  int64_t nbytes() const;
  const std::vector<CacheSpec>& specs() const { return specs_; }
  Cache cache(int index) const;
  int64_t pages, page_size;

 private:
  std::vector<CacheSpec> specs_;
  std::vector<Memory> memory_;
};

struct IntArray {  // an int32 input of a step, row-major
  const int32_t* data;
  std::vector<int64_t> shape;
};

struct FloatArray {  // a float32 input or output of a step
  float* data;
  int64_t rows, width;
};

enum class Op { RopeTable, Embed, Linears, RmsNorm, Rope, CacheWrite, Attention, SiluMul, Add, SelectRows };

// Products that share their input, which may be normalised first: done once, by each thread for itself when the rows
// are few, shared out otherwise.
struct Linears {
  struct Member {
    int out, weight, second = -1, add = -1;  // second: the output is silu(weight's) * second's; add: a buffer
    int64_t units = 0, unit = 0;             // panels, or lines of outputs, and the bytes of one
  };
  int x;
  const float* norm;  // [width of x] or null
  float eps;
  Rounding rounding;
  std::vector<Member> members;
  std::vector<int64_t> edges;  // [threads + 1]: in which unit, counted over all members, a thread's share begins
};
constexpr int64_t MOST_UNITS = int64_t{1} << 24;
constexpr int64_t LINE = 16;  // floats in a cache line: shares end on these, so that no line has two writers

// What is left of a thread's share of a product's units, or of attention's pieces, which others may take from its end:
// the number of the instruction, the first unit left and the one past the last.
struct alignas(64) Left {
  std::atomic<uint64_t> range{0};
};

// How threads share a buffer out: rows of `dimension` of `width` floats, each in `items` equal parts; 0: any way.
struct Split {
  int dimension = 0;
  int64_t width = 0, items = 0;
  bool operator==(const Split& o) const {
    return items > 0 && dimension == o.dimension && width == o.width && items == o.items;
  }
};

// How a step's tokens are chosen: of each row of one output, which stays in the program.
struct Sampling {
  int output;
  const Choice* choices;  // [rows]
  const double* draws;    // [rows]
  int32_t* tokens;        // [rows], written; FOR_HOST as `choose` gives it
  int64_t rows;
};

// What an instruction took since profiling began, on thread 0.
struct Timing {
  std::string what;   // operation and widths
  int64_t bytes = 0;  // of weights that a call reads
  int64_t calls = 0;
  double seconds = 0;  // its own work, waits inside it included
  double waiting = 0;  // at the barrier in front of it
};

struct Instruction {
  Op op;
  int out = -1, a = -1, b = -1;  // buffers
  int ints[4] = {-1, -1, -1, -1};
  int cache = -1;                 // index of a state's cache
  int table = -1;                 // index of a rope table, or of an attention's sequence map
  int plan = 0;                   // index of an attention's plan
  finial::Linear linear{};        // of embed
  int linears = -1;               // index of the products
  const float* vector = nullptr;  // norm weight [width], or inverse frequencies [width / 2]
  int64_t width = 0;              // of a norm's group, or head_dim
  int64_t group = 0, window = 0;
  float number = 0;      // eps, or scale
  bool barrier = false;  // wait for all threads first: this reads or overwrites what another may still be at
};

class Program {
 public:
  Program(std::shared_ptr<Pool> pool, const Kernels* kernels) : pool_(std::move(pool)), kernels_(kernels) {}
  ~Program() { abandoned_.store(true); }

  // Building. Indices returned are what later calls take; a shape that does not fit throws std::invalid_argument.
  int dimension();  // a number of rows that each step gives
  // The rows of a buffer, which one gated product makes and others read, all with matrices of this format, lie in it
  // rounded, as these want them.
  void keep_rounded(int buffer, Format format);
  int buffer(int dimension, int64_t width, int slot);             // slot: arena memory that buffers take turns in
  int input(int dimension, int64_t width);                        // an array given to `run`: only read
  int output(int dimension, int64_t width);                       // an array given to `run`: only written
  int int_input(std::string name);                                // given to `run`, in the order of declaration
  int cache(CacheSpec spec);                                      // one state of the graph
  void embed(int out, int tokens, const finial::Linear& weight);  // weight.n_in is the width, n_out the vocabulary
  void embed_packed(int out, int tokens, int weight);             // the same from a packed bf16, q8_0 or q4_0 `weight`
  // A matrix for `linears`. `mapped`: its bytes are a read-only file mapping, packed by `pack` and given back as they
  // are. `owner` is held while they are used.
  int weight(const finial::Linear& weight, bool mapped, std::shared_ptr<const void> owner) {
    return this->weight(weight, mapped, std::move(owner), {});
  }
  // Two matrices that a gated product reads side by side: their panels take turns, so that it reads one run. The first
  // is declared with room for one of its shape in format `second`, the second right behind it with the first's index.
  struct Beside {
    bool room = false;
    Format second = Format::F32;
    int first = -1;
  };
  int weight(const finial::Linear& weight, bool mapped, std::shared_ptr<const void> owner, const Beside& beside);
  // Begins to pack what is mapped, with the pool's threads, and returns; `new_state` and `run` wait for its end.
  // Weights that are declared later are packed by a later call, or by `run`.
  void pack();
  void linears(int x, const float* norm, int64_t norm_width, float eps, std::vector<Linears::Member> members);
  void rms_norm(int out, int x, const float* weight, int64_t width, float eps);
  // norm: null, or [head_dim], by which every head is normalised first.
  void rope(int out, int x, int positions, const float* frequencies, int64_t head_dim, float scale,
            const float* norm = nullptr, float eps = 0);
  void cache_write(int cache, int keys, int values, int slots);
  void attention(int out, int queries, int cache, int positions, int starts, int lengths, int pages, int64_t window,
                 float scale);
  void silu_mul(int out, int gate, int up);
  void add(int out, int a, int b);
  void select_rows(int out, int x, int rows);

  State new_state(int64_t pages, int64_t page_size);
  const std::vector<Instruction>& instructions() const { return code_; }
  const Kernels& kernels() const { return *kernels_; }
  size_t int_inputs() const { return int_names_.size(); }
  std::vector<FloatArray> no_outputs() const;  // what `run` takes for outputs of no rows

  // From now on each step notes what its instructions take, from zero; false ends that. A step costs some microseconds
  // more while it does.
  void profile(bool on);
  std::vector<Timing> timings();

  // One step. sizes: rows per dimension; ints, inputs and outputs in the order in which they were declared.
  void run(const std::vector<int64_t>& sizes, const std::vector<IntArray>& ints, const std::vector<FloatArray>& inputs,
           const std::vector<FloatArray>& outputs, const State& state) {
    run(sizes, ints, inputs, outputs, state, nullptr);
  }
  // The same, and the tokens chosen from an output; what `outputs` has for that one is not looked at.
  void run(const std::vector<int64_t>& sizes, const std::vector<IntArray>& ints, const std::vector<FloatArray>& inputs,
           const std::vector<FloatArray>& outputs, const State& state, const Sampling* sampling);

 private:
  struct Buffer {
    int dimension;
    int64_t width;
    int slot;      // -1: external
    int external;  // inputs count from 0, outputs too; -1: arena
    bool is_output;
    Rounding as = Rounding::None;  // how many rows lie in it: see `keep_rounded`
  };
  struct RopeTable {
    int positions, dimension;
    const float* frequencies;
    int64_t half;
    float scale;
  };
  struct SequenceMap {
    int positions, starts, lengths, pages, dimension;
    int64_t window;  // the widest of the attentions that use it; 0 is everything
  };
  struct PlanSpec {  // attentions that are shared out alike
    int map;
    int64_t window, group;
    CacheSpec cache;
  };
  enum class Limit { None, Constant, Slots, Rows };  // what an integer input must stay below
  struct Check {
    int input, dimension;  // one element for each row of this dimension
    Limit limit;
    int64_t value;  // the constant, or the dimension whose rows are counted
    bool operator==(const Check& o) const {
      return input == o.input && dimension == o.dimension && limit == o.limit && value == o.value;
    }
  };
  struct Step;  // what one run needs beside the program
  struct Source {
    finial::Linear matrix;
    uint8_t* out;
    bool mapped;
    std::shared_ptr<const void> owner;
  };

  using Touched = std::map<int, std::vector<Split>>;  // resource: how it was touched

  const Buffer& check(int buffer, const char* what) const;
  void demand(int input, int dimension, Limit limit, int64_t value, const char* what);
  void push(Instruction instruction, const std::vector<int>& reads, const std::vector<int>& writes, Split split = {});
  int resource(int buffer) const;
  void pointwise(Op op, int out, int a, int b);
  bool known(finial::Linear& made, bool mapped) const;
  uint8_t* room_for_panels(int64_t bytes);
  void place(finial::Linear& made, uint8_t* out, int64_t stride, bool mapped, std::shared_ptr<const void> owner);
  static void pack_all(const std::vector<Source>& sources, Pool& pool, const Kernels& kernels,
                       const std::atomic<bool>& abandoned);
  void finish_packing();
  void share_out(Linears& p) const;

  void check_step(const Step& step) const;
  void check_rows(const Step& step, int input, int dimension) const;
  void check_range(const Step& step, const Check& check) const;
  void check_sequences(const Step& step, const SequenceMap& map) const;
  void reserve(Step& step);
  bool begins_page(const Step& step) const;
  void take_pages(const Step& step, int thread);
  void wait(size_t at, const Step& step, int thread, Run& next);
  void execute(const Instruction& i, const Step& step, int thread);
  const Buffer& output_buffer(int output) const;
  float* own_output(const Step& step, const Buffer& b);
  void look(const Step& step, const Buffer& b, int thread);
  void choose_tokens(const Step& step, const Buffer& b, const Sampling& sampling);
  Run share_of(const Linears& p, int thread) const;
  // Products of many rows: a unit is `several` panels for one of `groups` of tiles, `together` of them for each group.
  struct Many {
    int64_t tiles, groups, several, together;
  };
  Many many(const Linears& p, int64_t rows) const;
  bool are_many(const Linears& p, int64_t rows) const {
    return rows > kernels_->blocking.tile && p.rounding != Rounding::None;
  }
  void announce(const Instruction& i, const Step& step, int thread);
  // Units of a group are taken apart from others, at once some quarters of what is left but at least so many.
  struct Taking {
    int64_t group, quarters, least;
  };
  bool take(const Instruction& i, int thread, const Taking& how, int& other, Range& got);
  uint64_t number(const Instruction& i) const;
  void multiply_units(const Linears& p, const Step& step, const uint8_t* x, int64_t begin, int64_t end,
                      uint8_t* scratch);
  void expect_writes(const Instruction& i, const Step& step, int thread) const;
  void multiply_few(const Instruction& i, const Step& step, int thread);
  void multiply_many(const Instruction& i, const Step& step, int thread);
  const uint8_t* prepare(const Linears& p, const Step& step, int64_t rows, int thread, uint8_t*& scratch);

  std::shared_ptr<Pool> pool_;
  const Kernels* kernels_;
  int dimensions_ = 0, inputs_ = 0, outputs_ = 0, slots_ = 0;
  std::vector<Buffer> buffers_;
  std::vector<std::string> int_names_;
  std::vector<CacheSpec> caches_;
  std::vector<RopeTable> tables_;
  std::vector<SequenceMap> maps_;
  std::vector<PlanSpec> plans_;
  std::vector<Check> checks_;
  std::vector<Instruction> code_;
  std::vector<Linears> linears_;
  std::vector<finial::Linear> weights_;
  std::vector<std::shared_ptr<const void>> owners_;
  std::vector<Memory> packed_;  // panels of weights, one after the other
  size_t packed_used_ = 0;      // of the last
  int roomy_ = -1;              // the matrix packed last with room for another
  Touched read_, written_;      // since the last barrier, while building

  std::mutex running_;
  Memory arena_, scratch_, partials_, rounded_;
  std::vector<AttentionPlan> shares_;  // [plans]: of this step
  std::vector<int32_t> sequence_;      // [maps][rows]: the sequence of a row
  std::unique_ptr<Left[]> left_;       // [threads]
  std::vector<size_t> ahead_;          // [instructions]: the next products from there on
  uint64_t steps_ = 0;
  Memory logits_;                 // of steps that choose tokens
  std::vector<int64_t> highest_;  // [threads][rows]: of each thread's part of a row
  ChoiceRoom room_;
  std::vector<Timing> timings_;  // [instructions] while profiling, else empty

  std::vector<Source> unpacked_, sources_;  // not begun; at work
  std::atomic<bool> abandoned_{false};
  std::future<void> packing_;  // the last member: who destroys a program waits for it before anything else goes
};

}  // namespace finial
