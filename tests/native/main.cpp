// finial_op_tests: every kernel of every instruction set that this CPU has against plain double precision, without
// Python, for sanitizers, emulators and new machines. Prints "N passed, N failed"; the exit status says the same.
//
//   finial_op_tests [--quick] [ISA...]      --quick: one case of each kind, no fork
#include <algorithm>
#include <cstdio>
#include <exception>

#include "isa.h"
#include "support.h"

int main(int count, char** arguments) {
  using namespace finial;
  std::vector<std::string> isas(arguments + 1, arguments + count);
  const auto option = std::find(isas.begin(), isas.end(), "--quick");
  const bool quick = option != isas.end();
  if (quick) isas.erase(option);
  if (isas.empty()) isas = isas_available();
  test::Report report(!quick);
  try {
    for (const std::string& isa : isas) {
      std::printf("%s\n", isa.c_str());
      std::fflush(stdout);
      const Kernels* kernels = find_kernels(isa.c_str());
      test::test_decode(report, kernels);
      test::test_elementwise(report, kernels);
      test::test_linear(report, kernels);
      test::test_attention(report, kernels);
      test::test_layer(report, kernels);
      if (isa != "avx2" && isa != "avx512_vnni" && isa != "avx512") continue;  // each way of asking ahead
      const Asking here = asking;
      for (const Asking& other : {Asking{true, Ask::Near}, Asking{true, Ask::Far}, Asking{false, Ask::Far}}) {
        if (other.always == here.always && other.how == here.how) continue;
        asking = other;
        test::test_linear(report, kernels);
        test::test_attention(report, kernels);
      }
      asking = here;
    }
    const auto has = [&](const char* isa) { return std::find(isas.begin(), isas.end(), isa) != isas.end(); };
    if (has("amx") && has("amx_emulated")) test::test_tiles(report, find_kernels("amx"), find_kernels("amx_emulated"));
    std::printf("threads\n");
    std::fflush(stdout);
    test::test_pool(report);
  } catch (const std::exception& error) {
    report.expect(false, std::string("exception: ") + error.what());
  }
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(report.passed),
              static_cast<long long>(report.failed));
  return report.failed == 0 ? 0 : 1;
}
