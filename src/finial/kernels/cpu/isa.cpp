// Finds what the CPU can do and picks the kernels. x86: CPUID leaves 1 and 7, and XCR0 for what the operating system
// saves; bit positions: Intel SDM volume 2A, table 3-8 and "CPUID leaf 07H"; AMD APM volume 3, appendix E. ARM: what
// the operating system says (Linux, Documentation/arch/arm64/elf_hwcaps.rst; Apple, "Determining instruction set
// characteristics"); NEON itself is part of every 64-bit ARM.
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#define FINIAL_X86 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#define FINIAL_ARM64 1
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace finial {

#ifdef FINIAL_HAS_baseline
namespace baseline {
extern const Kernels kernels;
}
#endif
#ifdef FINIAL_HAS_avx2
namespace avx2 {
extern const Kernels kernels;
}
#endif
#ifdef FINIAL_HAS_avx2_vnni_emulated
namespace avx2_vnni_emulated {
extern const Kernels kernels;
}
#endif
#ifdef FINIAL_HAS_avx2_vnni
namespace avx2_vnni {
extern const Kernels kernels;
}
#endif
#ifdef FINIAL_HAS_avx512_vnni
namespace avx512_vnni {
extern const Kernels kernels;
}
#endif
#ifdef FINIAL_HAS_avx512
namespace avx512 {
extern const Kernels kernels;
}
#endif
#ifdef FINIAL_HAS_amx
namespace amx {
extern const Kernels kernels;
}
#endif
#ifdef FINIAL_HAS_amx_emulated
namespace amx_emulated {
extern const Kernels kernels;
}
#endif
#ifdef FINIAL_HAS_neon
namespace neon {
extern const Kernels kernels;
}
#endif
#ifdef FINIAL_HAS_neon_dot
namespace neon_dot {
extern const Kernels kernels;
}
#endif

namespace {

struct Features {
  bool avx2 = false, fma = false, f16c = false, avx_vnni = false;
  bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false, avx512_bf16 = false, avx512_vnni = false;
  bool amx_tile = false, amx_bf16 = false, amx_int8 = false;
  bool neon = false, dotprod = false;
};

#ifdef FINIAL_X86
void cpuid(unsigned leaf, unsigned sub, unsigned (&r)[4]) {
#if defined(_MSC_VER)
  int out[4];
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(sub));
  for (int i = 0; i < 4; ++i) r[i] = static_cast<unsigned>(out[i]);
#else
  r[0] = r[1] = r[2] = r[3] = 0;
  __get_cpuid_count(leaf, sub, &r[0], &r[1], &r[2], &r[3]);
#endif
}

unsigned long long saved_state() {  // XCR0
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
#endif
}
#endif

#ifdef FINIAL_X86
// Tile registers are 8 KiB of state for each thread that uses them, which a process has to ask for (Linux,
// Documentation/arch/x86/xstate.rst).
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

#ifdef FINIAL_ARM64
bool has_dotprod() {
#if defined(__linux__)
  constexpr unsigned long ASIMDDP = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & ASIMDDP) != 0;
#elif defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value != 0;
#else
  return false;
#endif
}
#endif

Features detect() {
  Features f;
#ifdef FINIAL_ARM64
  f.neon = true;
  f.dotprod = has_dotprod();
#endif
#ifdef FINIAL_X86
  unsigned one[4], seven[4], seven_one[4];
  cpuid(1, 0, one);
  auto bit = [](unsigned word, int at) { return ((word >> at) & 1u) != 0; };
  if (!bit(one[2], 27)) return f;  // OSXSAVE
  const unsigned long long state = saved_state();
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xE6) == 0xE6;
  cpuid(7, 0, seven);
  cpuid(7, 1, seven_one);
  f.fma = ymm && bit(one[2], 12);
  f.f16c = ymm && bit(one[2], 29);
  f.avx2 = ymm && bit(seven[1], 5);
  f.avx_vnni = ymm && bit(seven_one[0], 4);
  f.avx512f = zmm && bit(seven[1], 16);
  f.avx512dq = zmm && bit(seven[1], 17);
  f.avx512bw = zmm && bit(seven[1], 30);
  f.avx512vl = zmm && bit(seven[1], 31);
  f.avx512_vnni = zmm && bit(seven[2], 11);
  f.avx512_bf16 = zmm && bit(seven_one[0], 5);
  if (zmm && (state & 0x60000) == 0x60000 && bit(seven[3], 24) && tiles_permitted())
    f.amx_tile = true, f.amx_bf16 = bit(seven[3], 22), f.amx_int8 = bit(seven[3], 25);
#endif
  return f;
}

const Features& features() {
  static const Features found = detect();
  return found;
}

#ifdef FINIAL_X86
// AMD's families: 0x19 is Zen 3 and 4, what came after them more (Zen 5: 0x1A).
bool made_by_amd() {
  unsigned zero[4];
  cpuid(0, 0, zero);
  return zero[1] == 0x68747541 && zero[3] == 0x69746e65 && zero[2] == 0x444d4163;  // "AuthenticAMD"
}
unsigned family() {
  unsigned one[4];
  cpuid(1, 0, one);
  const unsigned base = (one[0] >> 8) & 0xF;
  return base == 0xF ? base + ((one[0] >> 20) & 0xFF) : base;
}
#endif

// Measured: Zen 3 (AMD's last without AVX-512; panels.h; Zen 4 with AVX2 alone reads one row alike whatever it asks),
// Zen 4 (attention_bf16.cpp too), Zen 5, Intel processors with tile registers and Ice Lake; the next ones are taken to
// be like the last of their maker, those before Zen 3 like it.
Asking asking_here() {
#ifdef FINIAL_X86
  if (made_by_amd() && !features().avx512f) return {true, Ask::Far, 1280};
  if (made_by_amd()) return family() <= 0x19 ? Asking{false, Ask::Far} : Asking{true, Ask::Near};
  if (!features().amx_tile) return {true, Ask::Near};
#endif
  return {true, Ask::Far};
}

struct Choice {
  const Kernels* kernels;
  bool supported;
};

std::vector<Choice> choices() {  // slowest first
  std::vector<Choice> list;
  const Features& f = features();
  (void)f;
#ifdef FINIAL_HAS_baseline
  list.push_back({&baseline::kernels, true});
#endif
  const bool avx2 = f.avx2 && f.fma && f.f16c;
#ifdef FINIAL_HAS_avx2_vnni_emulated
  list.push_back({&avx2_vnni_emulated::kernels, avx2});  // for tests
#endif
#ifdef FINIAL_HAS_avx2
  list.push_back({&avx2::kernels, avx2});
#endif
#ifdef FINIAL_HAS_avx2_vnni
  list.push_back({&avx2_vnni::kernels, avx2 && f.avx_vnni});
#endif
  const bool avx512_vnni = avx2 && f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq && f.avx512_vnni;
  const bool avx512 = avx512_vnni && f.avx512_bf16;
  (void)avx2, (void)avx512_vnni, (void)avx512;
#ifdef FINIAL_HAS_avx512_vnni
  list.push_back({&avx512_vnni::kernels, avx512_vnni});
#endif
#ifdef FINIAL_HAS_amx_emulated
  list.push_back({&amx_emulated::kernels, avx512});  // for tests, and slow
#endif
#ifdef FINIAL_HAS_avx512
  list.push_back({&avx512::kernels, avx512});
#endif
#ifdef FINIAL_HAS_amx
  list.push_back({&amx::kernels, avx512 && f.amx_tile && f.amx_bf16 && f.amx_int8});
#endif
#ifdef FINIAL_HAS_neon
  list.push_back({&neon::kernels, f.neon});
#endif
#ifdef FINIAL_HAS_neon_dot
  list.push_back({&neon_dot::kernels, f.neon && f.dotprod});
#endif
  return list;
}

}  // namespace

Asking asking = asking_here();

std::vector<std::pair<std::string, bool>> cpu_features() {
  const Features& f = features();
#ifdef FINIAL_ARM64
  return {{"neon", f.neon}, {"dotprod", f.dotprod}};
#else
  return {{"avx2", f.avx2},
          {"fma", f.fma},
          {"f16c", f.f16c},
          {"avx_vnni", f.avx_vnni},
          {"avx512f", f.avx512f},
          {"avx512bw", f.avx512bw},
          {"avx512vl", f.avx512vl},
          {"avx512dq", f.avx512dq},
          {"avx512_bf16", f.avx512_bf16},
          {"avx512_vnni", f.avx512_vnni},
          {"amx_tile", f.amx_tile},
          {"amx_bf16", f.amx_bf16},
          {"amx_int8", f.amx_int8}};
#endif
}

std::vector<std::string> isas_available() {
  std::vector<std::string> names;
  for (const Choice& c : choices())
    if (c.supported) names.push_back(c.kernels->name);
  return names;
}

const Kernels* find_kernels(const char* isa) {
  std::string wanted = isa, from = "isa";
  if (wanted.empty()) {
    const char* variable = std::getenv("FINIAL_CPU_ISA");
    if (variable != nullptr) wanted = variable, from = "FINIAL_CPU_ISA";
  }
  const Kernels* best = nullptr;
  std::string known;
  for (const Choice& c : choices()) {
    if (c.supported) best = c.kernels;
    if (c.supported) known += std::string(known.empty() ? "" : ", ") + c.kernels->name;
    if (wanted == c.kernels->name && c.supported) return c.kernels;
  }
  if (!wanted.empty())
    throw std::runtime_error(from + "=" + wanted + " is not an instruction set of this CPU and build, which have " +
                             known);
  return best;
}

}  // namespace finial
