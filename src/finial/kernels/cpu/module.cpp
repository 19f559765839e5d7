// finial._native: what Python sees of the CPU backend.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bandwidth.h"
#include "isa.h"
#include "kernels.h"
#include "topology.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace finial;

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
  m.def("read_bandwidth", &read_bandwidth, "threads"_a, "bytes"_a, "seconds"_a,
        nb::call_guard<nb::gil_scoped_release>(),
        "Measured read bandwidth in GB/s (1e9): the fastest of several passes over a buffer of `bytes`.");
}
