// PTX of a lane and of its warp in C++: loads, shuffles, arithmetic, matrix products and asynchronous copies, with the
// layouts of the PTX manual.  Copies happen as late as they may, at the wait that needs them.  For twin.h.
#pragma once

#include "twin_block.h"

namespace ptx {

template <class T>
T load_aligned(const void* p) {
  if ((u64)p % sizeof(T)) {
    std::fprintf(stderr, "twin: a load of %zu bytes at %p\n", sizeof(T), p);
    std::abort();
  }
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}
inline Vec4 load_stream(const void* p) { return load_aligned<Vec4>(p); }
inline u16 load_stream_half(const void* p) { return load_aligned<u16>(p); }
inline float load_shared_by_all(const float* p) { return *p; }
inline Vec4 load_cached(const void* p) { return load_aligned<Vec4>(p); }
inline void store_host(u64* p, u64 v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline void prefetch_l2(const void*) {}
inline void allow_next() {}
inline void wait_previous() {}

template <class T>
T shuffle_any(T v, int from) {
  return twin::get<T>(twin::exchange(v)[from & 31]);
}
inline float shuffle_xor(float v, int mask) { return shuffle_any(v, twin::current->id() ^ mask); }
inline u32 shuffle_xor(u32 v, int mask) { return shuffle_any(v, twin::current->id() ^ mask); }
inline u64 shuffle_xor(u64 v, int mask) { return shuffle_any(v, twin::current->id() ^ mask); }
inline float shuffle(float v, int lane) { return shuffle_any(v, lane); }
inline void sync_block() { twin::meet(twin::current->block->meeting); }
inline void sync_warp() { twin::meet(twin::current->warp().meeting); }
inline void fence_device() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline u32 atomic_add(u32* p, u32 v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline u64 atomic_add(u64* p, u64 v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }
inline void sin_cos_pi(float x, float* s, float* c) {
  *s = (float)std::sin(M_PI * (double)x), *c = (float)std::cos(M_PI * (double)x);
}
inline float as_float(u32 x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
inline u32 as_bits(float x) {
  u32 b;
  std::memcpy(&b, &x, 4);
  return b;
}
inline float from_half(u32 bits) {
  const u32 sign = (bits & 0x8000) << 16, e = bits >> 10 & 31, m = bits & 1023;
  if (e == 0) return as_float(sign | as_bits((float)m * 0x1p-24f));
  return as_float(sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13);
}
inline u32 to_half(float x) {
  const u32 sign = as_bits(x) >> 16 & 0x8000;
  const float a = std::fabs(x);
  if (!(a < 65520.0f)) return sign | (a != a ? 0x7e00u : 0x7c00u);
  if (a < 0x1p-14f) return sign | (u32)std::nearbyint(a * 0x1p24f);
  u32 bits = as_bits(a);
  bits += 0xfffu + (bits >> 13 & 1);
  return sign | ((bits >> 13) - (112u << 10));
}
inline u32 bf16_bits(float x) {
  const u32 bits = as_bits(x);
  if (x != x) return bits >> 16 | 0x40;
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  auto half = [](u32 pair, int which) { return as_float(which ? pair & 0xffff0000u : pair << 16); };
  return pack_bf16(std::fma(half(a, 0), half(b, 0), half(c, 0)), std::fma(half(a, 1), half(b, 1), half(c, 1)));
}
inline u32 permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = (u64)b << 32 | a;
  u32 v = 0;
  for (int i = 0; i < 4; i++) v |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return v;
}

struct Fragments {
  u32 a[4], b[2];
};
inline void mma_bf16(float d[4], const u32 a[4], const u32 b[2]) {
  Fragments own;
  std::memcpy(own.a, a, 16), std::memcpy(own.b, b, 8);
  const twin::Slot* slots = twin::exchange(own);
  const int g = twin::current->id() / 4, t = twin::current->id() % 4;
  auto half = [](u32 pair, int which) { return as_float(which ? pair & 0xffff0000u : pair << 16); };
  for (int i = 0; i < 4; i++) {
    const int row = i / 2, column = 2 * t + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      const int lane = k % 8 / 2;
      const auto left = twin::get<Fragments>(slots[g * 4 + lane]);
      const auto right = twin::get<Fragments>(slots[column * 4 + lane]);
      sum += half(left.a[row + k / 8 * 2], k % 2) * half(right.b[k / 8], k % 2);
    }
    d[i] += sum;
  }
}
inline void mma_bf16_short(float d[4], const u32 a[2], u32 b) {
  Fragments own = {{a[0], a[1], 0, 0}, {b, 0}};
  const twin::Slot* slots = twin::exchange(own);
  const int g = twin::current->id() / 4, t = twin::current->id() % 4;
  auto half = [](u32 pair, int which) { return as_float(which ? pair & 0xffff0000u : pair << 16); };
  for (int i = 0; i < 4; i++) {
    float sum = 0;
    for (int k = 0; k < 8; k++)
      sum += half(twin::get<Fragments>(slots[g * 4 + k / 2]).a[i / 2], k % 2) *
             half(twin::get<Fragments>(slots[(2 * t + i % 2) * 4 + k / 2]).b[0], k % 2);
    d[i] += sum;
  }
}
inline void load_matrix(u32 r[4], const void* row, bool transposed) {
  const twin::Slot* slots = twin::exchange((u64)row);
  const int g = twin::current->id() / 4, t = twin::current->id() % 4;
  for (int m = 0; m < 4; m++) {
    u32 pair[2];
    for (int i = 0; i < 2; i++) {
      const int at = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
      const u64 base = twin::get<u64>(slots[m * 8 + at]);
      if (base % 16) std::abort();
      pair[i] = ((const u16*)base)[column];
    }
    r[m] = pair[0] | pair[1] << 16;
  }
}
inline void load_matrix_x4(u32 r[4], const void* row) { load_matrix(r, row, false); }
inline void load_matrix_x4_transposed(u32 r[4], const void* row) { load_matrix(r, row, true); }

inline void copy_async(void* shared, const void* global, bool valid) {
  twin::current->groups.back().push_back({shared, global, valid});
}
inline void copy_commit() { twin::current->groups.emplace_back(); }
template <int PENDING>
void copy_wait() {
  auto& groups = twin::current->groups;  // the last is the open one
  while ((int)groups.size() - 1 > PENDING) {
    for (const auto& copy : groups.front())
      if (copy.valid)
        *(Vec4*)copy.to = load_aligned<Vec4>(copy.from);
      else
        *(Vec4*)copy.to = Vec4{0, 0, 0, 0};
    groups.erase(groups.begin());
  }
}

}  // namespace ptx
