// finial._native: what Python sees of the CPU backend.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "ahead.h"
#include "bandwidth.h"
#include "isa.h"
#include "kernels.h"
#include "program.h"
#include "topology.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace finial;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<const double, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Format format_of(const std::string& name) {
  for (int i = 0; i < static_cast<int>(Format::COUNT); ++i)
    if (name == FORMATS[i].name) return static_cast<Format>(i);
  throw std::invalid_argument("unknown weight format " + name);
}

// A weight matrix [n_out, n_in] over its bytes, which must be exactly that long.
Linear weight_of(const Bytes& data, const std::string& format, int64_t n_out, int64_t n_in) {
  const Format kind = format_of(format);
  const FormatInfo& info = FORMATS[static_cast<int>(kind)];
  if (n_out < 1 || n_in < 1 || n_in % info.block != 0)
    throw std::invalid_argument("a " + format + " weight cannot be [" + std::to_string(n_out) + ", " +
                                std::to_string(n_in) + "]");
  const int64_t row_bytes = n_in / info.block * info.block_bytes;
  if (static_cast<int64_t>(data.size()) / row_bytes != n_out || static_cast<int64_t>(data.size()) % row_bytes != 0)
    throw std::invalid_argument("a " + format + " weight [" + std::to_string(n_out) + ", " + std::to_string(n_in) +
                                "] is " + std::to_string(n_out * row_bytes) + " bytes, got " +
                                std::to_string(data.size()));
  return {data.data(), nullptr, n_in, n_out, row_bytes, kind, nullptr};
}

CacheType cache_type(const std::string& dtype) {
  if (dtype == "f32") return CacheType::F32;
  if (dtype == "bf16") return CacheType::BF16;
  if (dtype == "q8_0") return CacheType::Q8_0;
  throw std::invalid_argument("a cache is f32, bf16 or q8_0, not " + dtype);
}

std::shared_ptr<Program> make_program(std::shared_ptr<Pool> pool, const std::string& isa) {
  return std::make_shared<Program>(std::move(pool), find_kernels(isa.c_str()));
}

std::vector<IntArray> integers_of(const std::vector<Ints>& ints) {
  std::vector<IntArray> integers;
  for (const Ints& a : ints) {
    IntArray array{a.data(), {}};
    for (size_t axis = 0; axis < a.ndim(); ++axis) array.shape.push_back(static_cast<int64_t>(a.shape(axis)));
    integers.push_back(std::move(array));
  }
  return integers;
}

std::vector<FloatArray> inputs_of(const std::vector<Rows>& inputs) {
  std::vector<FloatArray> read;
  for (const Rows& a : inputs)  // the builder refuses an input of the program as an instruction's output
    read.push_back({const_cast<float*>(a.data()), static_cast<int64_t>(a.shape(0)), static_cast<int64_t>(a.shape(1))});
  return read;
}

void run(Program& program, const std::vector<int64_t>& sizes, const std::vector<Ints>& ints,
         const std::vector<Rows>& inputs, const std::vector<Out>& outputs, const State& state) {
  const std::vector<IntArray> integers = integers_of(ints);
  const std::vector<FloatArray> read = inputs_of(inputs);
  std::vector<FloatArray> written;
  for (const Out& a : outputs)
    written.push_back({a.data(), static_cast<int64_t>(a.shape(0)), static_cast<int64_t>(a.shape(1))});
  nb::gil_scoped_release release;
  program.run(sizes, integers, read, written, state);
}

Choice choice_of(const std::array<double, 4>& draw) {
  return {draw[0], static_cast<int64_t>(draw[1]), draw[2], draw[3]};
}

std::vector<int32_t> sample(Program& program, const std::vector<int64_t>& sizes, const std::vector<Ints>& ints,
                            const std::vector<Rows>& inputs, const State& state, int output,
                            const std::vector<std::array<double, 4>>& choices, const std::vector<double>& draws) {
  if (choices.size() != draws.size()) throw std::invalid_argument("sample: a random number for each choice");
  const std::vector<IntArray> integers = integers_of(ints);
  const std::vector<FloatArray> read = inputs_of(inputs);
  std::vector<Choice> list;
  for (const auto& choice : choices) list.push_back(choice_of(choice));
  std::vector<int32_t> tokens(list.size());
  nb::gil_scoped_release release;
  const Sampling sampling{output, list.data(), draws.data(), tokens.data(), static_cast<int64_t>(tokens.size())};
  program.run(sizes, integers, read, program.no_outputs(), state, &sampling);
  return tokens;
}

using RowOfRun = std::tuple<std::array<double, 4>, std::vector<int32_t>, int32_t, int32_t, int32_t>;

std::shared_ptr<Ahead> make_ahead(std::shared_ptr<Program> program, const std::array<int, 7>& roles,
                                  const std::vector<bool>& per_row, int output, const std::vector<RowOfRun>& rows,
                                  const Doubles& draws, const Ints& pages) {
  std::vector<Ahead::Row> list;
  for (const auto& [choice, stops, token, position, left] : rows)
    list.push_back({choice_of(choice), stops, token, position, left});
  const Ahead::Roles r{roles[0], roles[1], roles[2], roles[3], roles[4], roles[5], roles[6]};
  return std::make_shared<Ahead>(std::move(program), r, per_row, output, std::move(list),
                                 std::vector<double>(draws.data(), draws.data() + draws.size()),
                                 std::vector<int32_t>(pages.data(), pages.data() + pages.size()));
}

int weight(Program& program, const Bytes& data, const std::string& format, int64_t n_out, int64_t n_in,
           const std::optional<Vector>& bias, bool mapped, const std::string& room, int first) {
  Linear linear = weight_of(data, format, n_out, n_in);
  if (bias && static_cast<int64_t>(bias->size()) != n_out)
    throw std::invalid_argument("linear: the bias must have one element for each output");
  if (bias) linear.bias = bias->data();
  Program::Beside beside;
  if (!room.empty()) beside.room = true, beside.second = format_of(room);
  beside.first = first;
  return program.weight(linear, mapped, std::make_shared<Bytes>(data), beside);
}

void bind_program(nb::module_& m) {
  nb::class_<Pool>(m, "Pool", "A team of threads that programs share. threads = 0: the physical cores available.")
      .def(nb::init<int>(), "threads"_a = 0)
      .def_prop_ro("threads", &Pool::threads);

  nb::class_<State>(m, "State", "Caches of a program, zeroed; memory is taken as it is written.")
      .def("take", &State::take, nb::call_guard<nb::gil_scoped_release>(), "Takes all of it from the system now.")
      .def_prop_ro("nbytes", &State::nbytes)
      .def_ro("pages", &State::pages)
      .def_ro("page_size", &State::page_size);

  // Arrays that a program keeps pointing at must not be converted copies, and live as long as it does.
  nb::class_<Program>(m, "Program", "A flat program over buffers [rows, width]; see kernels/cpu/program.h.")
      .def(nb::new_(&make_program), "pool"_a, "isa"_a = "")
      .def_prop_ro("isa", [](const Program& p) { return std::string(p.kernels().name); })
      .def_prop_ro("instructions", [](const Program& p) { return p.instructions().size(); })
      .def_prop_ro("barriers",
                   [](const Program& p) {
                     int64_t count = 0;
                     for (const Instruction& i : p.instructions()) count += i.barrier;
                     return count;
                   })
      .def("dimension", &Program::dimension)
      .def("buffer", &Program::buffer, "dimension"_a, "width"_a, "slot"_a)
      .def(
          "keep_rounded",
          [](Program& p, int buffer, const std::string& format) { p.keep_rounded(buffer, format_of(format)); },
          "buffer"_a, "format"_a,
          "Many rows of a buffer, which one product makes and others read, all with matrices of this format, lie in it "
          "rounded, as these want them.")
      .def("input", &Program::input, "dimension"_a, "width"_a)
      .def("output", &Program::output, "dimension"_a, "width"_a)
      .def("int_input", &Program::int_input, "name"_a)
      .def(
          "cache",
          [](Program& p, int64_t kv_heads, int64_t head_dim, const std::string& dtype) {
            return p.cache({kv_heads, head_dim, cache_type(dtype)});
          },
          "kv_heads"_a, "head_dim"_a, "dtype"_a)
      .def(
          "embed",
          [](Program& p, int out, int tokens, const Bytes& weight, const std::string& format, int64_t rows,
             int64_t width) { p.embed(out, tokens, weight_of(weight, format, rows, width)); },
          "out"_a, "tokens"_a, "weight"_a.noconvert(), "format"_a, "rows"_a, "width"_a, nb::keep_alive<1, 4>())
      .def("embed_packed", &Program::embed_packed, "out"_a, "tokens"_a, "weight"_a)
      .def(
          "weight", &weight, "data"_a.noconvert(), "format"_a, "n_out"_a, "n_in"_a, "bias"_a.noconvert() = nb::none(),
          "mapped"_a = false, "room"_a = "", "first"_a = -1, nb::keep_alive<1, 6>(),
          "A matrix for `linears`, packed or kept in place; its index. mapped: the bytes are a read-only file mapping. "
          "room: the format of a matrix of this shape that comes next, with this one's index as `first`: their panels "
          "take turns.")
      .def(
          "linears",
          [](Program& p, int x, const std::vector<std::array<int, 4>>& members, const std::optional<Vector>& norm,
             float eps) {
            std::vector<Linears::Member> list;
            for (const auto& [out, weight, second, add] : members) list.push_back({out, weight, second, add});
            p.linears(x, norm ? norm->data() : nullptr, norm ? static_cast<int64_t>(norm->size()) : 0, eps,
                      std::move(list));
          },
          "x"_a, "members"_a, "norm"_a.noconvert() = nb::none(), "eps"_a = 0.0f, nb::keep_alive<1, 4>(),
          "Products of x, or of its norm; members are (out, weight, second or -1, add or -1).")
      .def(
          "rms_norm",
          [](Program& p, int out, int x, const Vector& weight, float eps) {
            p.rms_norm(out, x, weight.data(), static_cast<int64_t>(weight.size()), eps);
          },
          "out"_a, "x"_a, "weight"_a.noconvert(), "eps"_a, nb::keep_alive<1, 4>())
      .def(
          "rope",
          [](Program& p, int out, int x, int positions, const Vector& frequencies, float scale,
             std::optional<Vector> norm, float eps) {
            const int64_t head_dim = 2 * static_cast<int64_t>(frequencies.size());
            if (norm && static_cast<int64_t>(norm->size()) != head_dim)
              throw std::invalid_argument("rope: a norm [head_dim] goes with frequencies [head_dim / 2]");
            p.rope(out, x, positions, frequencies.data(), head_dim, scale, norm ? norm->data() : nullptr, eps);
          },
          "out"_a, "x"_a, "positions"_a, "frequencies"_a.noconvert(), "scale"_a, "norm"_a.noconvert() = nb::none(),
          "eps"_a = 0.0f, nb::keep_alive<1, 5>(), nb::keep_alive<1, 7>(), "Of heads, or of their norms.")
      .def("cache_write", &Program::cache_write, "cache"_a, "keys"_a, "values"_a, "slots"_a)
      .def("attention", &Program::attention, "out"_a, "queries"_a, "cache"_a, "positions"_a, "starts"_a, "lengths"_a,
           "pages"_a, "window"_a, "scale"_a)
      .def("silu_mul", &Program::silu_mul, "out"_a, "gate"_a, "up"_a)
      .def("add", &Program::add, "out"_a, "a"_a, "b"_a)
      .def("select_rows", &Program::select_rows, "out"_a, "x"_a, "rows"_a)
      .def("profile", &Program::profile, "on"_a, "Note, from zero, what each instruction takes; or stop that.")
      .def(
          "timings",
          [](Program& p) {
            std::vector<std::tuple<std::string, int64_t, int64_t, double, double>> rows;
            for (const Timing& t : p.timings()) rows.emplace_back(t.what, t.bytes, t.calls, t.seconds, t.waiting);
            return rows;
          },
          "Each instruction: what, bytes of weights per call, calls, seconds of work, seconds at the barrier before "
          "it.")
      .def("pack", &Program::pack, "Begins to pack the mapped weights; new_state and run wait for its end.")
      .def("new_state", &Program::new_state, "pages"_a, "page_size"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("run", &run, "sizes"_a, "ints"_a.noconvert(), "inputs"_a.noconvert(), "outputs"_a.noconvert(), "state"_a,
           "One step, without the interpreter's lock. ValueError names an input that points outside its arrays.")
      .def("sample", &sample, "sizes"_a, "ints"_a.noconvert(), "inputs"_a.noconvert(), "state"_a, "output"_a,
           "choices"_a, "draws"_a,
           "As run; the token of each row of one output, the others having no rows: -1 where the caller must choose. "
           "Choices are (temperature, top_k, top_p, min_p).");

  nb::class_<Ahead>(m, "Ahead", "A run of decode steps; see kernels/cpu/ahead.h.")
      .def(nb::new_(&make_ahead), "program"_a, "roles"_a, "per_row"_a, "output"_a, "rows"_a, "draws"_a.noconvert(),
           "pages"_a.noconvert(),
           "roles: the integer inputs tokens, positions, starts, lengths, pages, slots, wanted. rows: (choice, stop "
           "ids, token, position, tokens that it may get).")
      .def("burst", &Ahead::burst, "state"_a, "seconds"_a, nb::call_guard<nb::gil_scoped_release>(),
           "The tokens of the next steps, those of all rows one step after the other; empty when the run is over.");
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "The native CPU backend: kernels per instruction set, a thread pool, and programs that run a step.";

  m.def(
      "isa", [] { return std::string(find_kernels("")->name); },
      "The instruction set in use: the best of this CPU, or FINIAL_CPU_ISA. RuntimeError when that is not available.");
  m.def("isas_available", &isas_available, "Instruction sets that this build and this CPU share, slowest first.");
  m.def(
      "cpu_features",
      [] {
        nb::dict d;
        for (const auto& [name, present] : cpu_features()) d[name.c_str()] = present;
        return d;
      },
      "CPU features that kernels are chosen by: name -> present and enabled.");
  m.def(
      "cores",
      [] {
        const Topology t = topology();
        nb::dict d;
        d["logical"] = t.logical;
        d["physical"] = t.physical;
        d["cpus"] = t.cpus;
        return d;
      },
      "Cores this process may use: logical CPUs, physical cores (bounded by a container's quota), CPUs to pin to.");
  m.def(
      "activations",
      [](const std::string& format, const std::string& isa) {
        switch (find_kernels(isa.c_str())->rounding(format_of(format))) {
          case Rounding::BF16:
            return "bf16";
          case Rounding::INT8:
            return "int8";
          case Rounding::F32:
          case Rounding::None:
            break;
        }
        return "f32";
      },
      "format"_a, "isa"_a = "",
      "What a linear with weights of this format rounds its input to: f32 (not at all), bf16, or int8 (blocks of 32).");
  m.def(
      "packs",
      [](const std::string& format, const std::string& isa) {
        return find_kernels(isa.c_str())->rounding(format_of(format)) != Rounding::None;
      },
      "format"_a, "isa"_a = "", "Whether weights of this format are repacked for their products.");
  m.def(
      "attention_precision",
      [](const std::string& dtype, const std::string& isa) {
        const Rounding rounding = find_kernels(isa.c_str())->attention_rounding(cache_type(dtype));
        return rounding == Rounding::BF16 ? "bf16" : "f32";
      },
      "dtype"_a, "isa"_a = "",
      "What attention over a cache of this dtype rounds scaled queries and weights to: f32 (not at all) or bf16.");
  nb::class_<BandwidthProbe>(m, "BandwidthProbe", "A buffer of `bytes` that so many threads read.")
      .def(nb::init<int, int64_t>(), "threads"_a, "bytes"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("gb_s", &BandwidthProbe::gb_s, "seconds"_a, nb::call_guard<nb::gil_scoped_release>(),
           "Measured read bandwidth in GB/s (1e9): the fastest of several passes.");
  m.def(
      "peak_flops",
      [](int threads, const std::string& kind, double seconds) {
        const Rounding wanted = kind == "bf16" ? Rounding::BF16 : kind == "int8" ? Rounding::INT8 : Rounding::None;
        if (wanted == Rounding::None && kind != "f32")
          throw std::invalid_argument("peak_flops: kind is f32, bf16 or int8, not " + kind);
        nb::gil_scoped_release release;
        return peak_flops(threads, wanted, seconds);
      },
      "threads"_a, "kind"_a, "seconds"_a = 0.3,
      "Measured peak of the multiply-add instruction that products use, GFLOP/s (1e9; two a multiply-add): the fastest "
      "of several passes over registers. kind: f32, bf16 or int8; ValueError where there is no such instruction.");
  m.def(
      "exp",
      [](const Vector& x, const Out& y, const std::string& isa) {
        if (y.shape(0) != 1 || y.shape(1) != x.size()) throw std::invalid_argument("exp: y must be [1, len(x)]");
        find_kernels(isa.c_str())->exp(x.data(), y.data(), static_cast<int64_t>(x.size()));
      },
      "x"_a, "y"_a.noconvert(), "isa"_a = "", "The vector exponential inside attention and silu_mul, for its test.");
  m.def(
      "choose",
      [](const Vector& logits, double temperature, int64_t top_k, double top_p, double min_p, double draw,
         const std::string& isa) {
        const Kernels* kernels = find_kernels(isa.c_str());
        const int64_t n = static_cast<int64_t>(logits.size());
        if (n == 0) throw std::invalid_argument("choose: no logits");
        ChoiceRoom room;
        return choose(*kernels, logits.data(), n, kernels->highest(logits.data(), n),
                      {temperature, top_k, top_p, min_p}, draw, room);
      },
      "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "draw"_a, "isa"_a = "",
      "The token of one row of logits as a step chooses it, for its test; -1 where the caller must choose.");
  bind_program(m);
}
