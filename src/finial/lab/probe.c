// What the machine can do now: core-to-core latency and arithmetic peaks.  Compiled once with `cc -O2 -shared -pthread`.
// Knows nothing of models.  A value that this CPU cannot give is -1.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define TILES 1
#endif

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  return pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

// ---- core-to-core latency: two threads pass a cache line to and fro; half a round trip.

typedef struct {
  _Alignas(128) _Atomic int64_t ball;
  int cpu;
  int64_t rounds;
} Court;

static void* far_side(void* argument) {
  Court* court = argument;
  pin(court->cpu);
  for (int64_t i = 0; i < court->rounds; ++i) {
    while (atomic_load_explicit(&court->ball, memory_order_acquire) != 2 * i + 1) {
    }
    atomic_store_explicit(&court->ball, 2 * i + 2, memory_order_release);
  }
  return 0;
}

typedef struct {
  Court court;
  int cpu;
  double ns;
} Match;

static void* near_side(void* argument) {
  Match* match = argument;
  Court* court = &match->court;
  pin(match->cpu);
  pthread_t other;
  if (pthread_create(&other, 0, far_side, court)) return 0;
  double start = 0;
  for (int64_t i = 0; i < court->rounds; ++i) {
    if (i == court->rounds / 10) start = now();  // until then the other thread may still be starting
    atomic_store_explicit(&court->ball, 2 * i + 1, memory_order_release);
    while (atomic_load_explicit(&court->ball, memory_order_acquire) != 2 * i + 2) {
    }
  }
  match->ns = 1e9 * (now() - start) / (2.0 * (court->rounds - court->rounds / 10));
  pthread_join(other, 0);
  return 0;
}

double core_to_core_ns(int a, int b, int64_t rounds) {
  Match match = {.court = {.cpu = b, .rounds = rounds}, .cpu = a, .ns = -1};
  atomic_init(&match.court.ball, 0);
  pthread_t thread;
  if (a == b || pthread_create(&thread, 0, near_side, &match)) return -1;
  pthread_join(thread, 0);
  return match.ns;
}

// ---- arithmetic peak: independent accumulators, operands in registers; a multiplication and an addition are two.

enum { CHAINS = 12, INNER = 4096 };

#if defined(__x86_64__)
#define PEAK(NAME, TARGET, VECTOR, ZERO, STEP)                                       \
  __attribute__((target(TARGET), noinline)) static void NAME(void) {                 \
    VECTOR sum[CHAINS];                                                              \
    _Pragma("GCC unroll 12") for (int c = 0; c < CHAINS; ++c) sum[c] = ZERO;         \
    for (int i = 0; i < INNER; ++i) {                                                \
      _Pragma("GCC unroll 12") for (int c = 0; c < CHAINS; ++c) {                    \
        STEP;                                                                        \
        __asm__ volatile("" : "+v"(sum[c]));                                         \
      }                                                                              \
    }                                                                                \
  }
PEAK(peak_f32, "avx2,fma", __m256, _mm256_setzero_ps(), sum[c] = _mm256_fmadd_ps(_mm256_set1_ps(1), _mm256_set1_ps(1), sum[c]))
PEAK(peak_f32_wide, "avx512f", __m512, _mm512_setzero_ps(), sum[c] = _mm512_fmadd_ps(_mm512_set1_ps(1), _mm512_set1_ps(1), sum[c]))
PEAK(peak_bf16, "avx512f,avx512bf16", __m512, _mm512_setzero_ps(),
     sum[c] = _mm512_dpbf16_ps(sum[c], (__m512bh)_mm512_set1_epi16(0x3f80), (__m512bh)_mm512_set1_epi16(0x3f80)))
PEAK(peak_i8, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(),
     sum[c] = _mm512_dpbusd_epi32(sum[c], _mm512_set1_epi8(1), _mm512_set1_epi8(1)))
#if __GNUC__ >= 11 || __clang_major__ >= 12
#define NARROW_I8 1
PEAK(peak_i8_narrow, "avx2,avxvnni", __m256i, _mm256_setzero_si256(),
     sum[c] = _mm256_dpbusd_avx_epi32(sum[c], _mm256_set1_epi8(1), _mm256_set1_epi8(1)))
#endif
#endif

#if defined(TILES)
// Tile registers: products of 16 rows of 64 bytes with 16 columns, on the zeros that the registers begin with.
#define TILE_PEAK(NAME, PRODUCT)                                                                           \
  __attribute__((noinline)) static void NAME(void) {                                                       \
    static const struct {                                                                                  \
      uint8_t palette, start, nothing[14];                                                                 \
      uint16_t bytes[16];                                                                                  \
      uint8_t rows[16];                                                                                    \
    } shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};             \
    __asm__ volatile("ldtilecfg %0" : : "m"(shape) : "memory");                                            \
    for (int i = 0; i < INNER / 4; ++i)                                                                    \
      __asm__ volatile(PRODUCT " %tmm6, %tmm4, %tmm0\n" PRODUCT " %tmm7, %tmm4, %tmm1\n"                   \
                       PRODUCT " %tmm6, %tmm5, %tmm2\n" PRODUCT " %tmm7, %tmm5, %tmm3");                   \
    __asm__ volatile("tilerelease");                                                                       \
  }
TILE_PEAK(peak_bf16_tiles, "tdpbf16ps")
TILE_PEAK(peak_i8_tiles, "tdpbssd")

static int tiles_permitted(void) {
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
}
#endif

typedef struct {
  void (*work)(void);
  int cpu;
  double seconds, best;
} Runner;

static void* race(void* argument) {
  Runner* runner = argument;
  pin(runner->cpu);
  runner->best = 1e9;
  const double end = now() + runner->seconds;
  while (now() < end) {
    const double start = now();
    for (int i = 0; i < 8; ++i) runner->work();
    const double took = (now() - start) / 8;
    if (took < runner->best) runner->best = took;
  }
  return 0;
}

// kind: 0 f32 (FMA, of AVX-512 or AVX2), 1 bf16 (vdpbf16ps), 2 int8 (vpdpbusd); 3 bf16 and 4 int8 in AMX tile registers, which the caller
// knows to be there.  1e9 operations per second of all CPUs together.
double peak_gops(int kind, const int* cpus, int threads, double seconds) {
  void (*work)(void) = 0;
  double lanes = 0;  // products of one instruction
  const double instructions = kind < 3 ? CHAINS * INNER : INNER;
#if defined(TILES)
  if (kind >= 3 && tiles_permitted()) work = kind == 3 ? peak_bf16_tiles : peak_i8_tiles, lanes = kind == 3 ? 8192 : 16384;
#endif
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (kind == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) work = peak_f32, lanes = 8;
  if (kind == 0 && __builtin_cpu_supports("avx512f")) work = peak_f32_wide, lanes = 16;
  if (kind == 1 && __builtin_cpu_supports("avx512bf16")) work = peak_bf16, lanes = 32;
#if defined(NARROW_I8)
  if (kind == 2 && __builtin_cpu_supports("avxvnni")) work = peak_i8_narrow, lanes = 32;
#endif
  if (kind == 2 && __builtin_cpu_supports("avx512vnni")) work = peak_i8, lanes = 64;
#endif
  if (!work || threads < 1 || threads > 256) return -1;
  Runner runners[256];
  pthread_t handles[256];
  double total = 0;
  for (int t = 0; t < threads; ++t) {
    runners[t] = (Runner){work, cpus[t], seconds, 0};
    if (pthread_create(&handles[t], 0, race, &runners[t])) return -1;
  }
  for (int t = 0; t < threads; ++t) {
    pthread_join(handles[t], 0);
    total += 2.0 * lanes * instructions / runners[t].best / 1e9;
  }
  return total;
}
