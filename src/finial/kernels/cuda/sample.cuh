// The next token of each row of logits: greedy, or temperature, top-k, top-p, min-p and a draw.
//
// Reference: engine/sampling.py candidates and choose, the same rules in the same order, ties included.  Probabilities
// are float32 here (float64 there) and are added as integers, in units of 2^-44 of the most likely one: the sum does
// not depend on the order, and a choice can differ only where a draw or a bound falls within about 2^-21 of an edge. A
// row whose highest logit is not finite gives token -1. One block a row.  Thresholds are found by radix: four passes
// over the logits, 8 bits of their order-preserving key each.
#pragma once
#include "team.cuh"

struct Request {  // temperature 0: greedy; top_k 0, top_p 1, min_p 0: all tokens
  float temperature;
  i32 top_k;
  float top_p, min_p;
};
struct SampleArgs {
  const float* logits;      // [rows, stride]
  const Request* requests;  // [rows]
  const double* draws;      // [rows], each in [0, 1)
  i32* tokens;              // [rows]
  i32 vocab, stride;
};

FINIAL_DEVICE u32 key_of(float v) {  // larger floats have larger keys
  const u32 bits = ptx::as_bits(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// THREADS.  Team: the first THREADS threads of a block, and how they meet.
template <class C, class Team = AllThreads>
struct Sample {
  static constexpr int THREADS = C::THREADS, WARPS = THREADS / 32;
  struct Scratch {
    u64 bins[256];
    u64 sums[WARPS];
    u64 shares[THREADS];
    u64 before;
    u32 chosen;
    i32 result;
  };

  // The sum of one number of every thread, known to all.
  FINIAL_DEVICE static u64 block_sum(u64 v, Scratch& scratch) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += ptx::shuffle_xor(v, offset);
    if (threadIdx.x % 32 == 0) scratch.sums[threadIdx.x / 32] = v;
    Team::sync();
    u64 total = 0;
    for (int w = 0; w < WARPS; w++) total += scratch.sums[w];
    Team::sync();
    return total;
  }

  // The largest key such that weights of keys at least as large add up to `need`, and what those above it add up to.
  // `weight(i)` is 0 for what does not count; `need` is at least 1 and at most the sum of all.
  template <class Weight>
  FINIAL_DEVICE static u32 threshold(const float* logits, int vocab, u64 need, Weight weight, Scratch& scratch,
                                     u64* above) {
    u64* bins = scratch.bins;
    u32 prefix = 0;
    u64 sum = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = threadIdx.x; i < 256; i += THREADS) bins[i] = 0;
      Team::sync();
      for (int i = threadIdx.x; i < vocab; i += THREADS) {
        const u32 key = key_of(logits[i]);
        if (shift == 24 || key >> (shift + 8) == prefix) {
          const u64 w = weight(i);
          if (w) ptx::atomic_add(&bins[key >> shift & 255u], w);
        }
      }
      Team::sync();
      if (threadIdx.x == 0) {
        u64 over = sum;
        int bin = 255;
        while (bin > 0 && over + bins[bin] < need) over += bins[bin--];
        scratch.chosen = (u32)bin, scratch.before = over;
      }
      Team::sync();
      prefix = prefix << 8 | scratch.chosen;
      sum = scratch.before;
      Team::sync();
    }
    *above = sum;
    return prefix;
  }

  // The token of one row, known to all threads; -1 where the highest logit is not finite.
  FINIAL_DEVICE static i32 choose(const float* logits, int vocab, const Request& request, double draw,
                                  Scratch& scratch) {
    // The highest logit, the lowest id among ties: the larger of (key, not id).  NaN counts as the highest.
    u64 best = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < vocab; i += THREADS) {
      const float v = ptx::load_shared_by_all(logits + i);
      const u64 candidate = (u64)(v == v ? key_of(v) : 0xffffffffu) << 32 | (u32)~i;
      best = candidate > best ? candidate : best;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const u64 other = ptx::shuffle_xor(best, offset);
      best = other > best ? other : best;
    }
    if (threadIdx.x % 32 == 0) scratch.sums[threadIdx.x / 32] = best;
    Team::sync();
    for (int w = 0; w < WARPS; w++) best = scratch.sums[w] > best ? scratch.sums[w] : best;
    Team::sync();
    const int first = (int)~(u32)best;
    const float top = ptx::load_shared_by_all(logits + first);
    const bool finite = top - top == 0.0f;
    if (!finite || request.temperature == 0.0f) return finite ? first : -1;

    u64 above;
    u32 lowest = 0;  // keys below are out
    if (request.top_k > 0 && request.top_k < vocab)
      lowest = threshold(logits, vocab, (u64)request.top_k, [](int) { return (u64)1; }, scratch, &above);
    const float scale = 1.4426950408889634f / request.temperature;
    auto share = [&](int i) { return ptx::exp2_fast((logits[i] - top) * scale); };
    auto units = [&](float w) { return (u64)(w * 17592186044416.0f); };
    int ties = vocab;  // of the tokens whose key is `lowest`, so many stay, the lowest ids
    if (request.top_p < 1.0f) {
      auto kept = [&](int i) { return key_of(logits[i]) >= lowest ? units(share(i)) : (u64)0; };
      u64 own = 0;
      for (int i = threadIdx.x; i < vocab; i += THREADS) own += kept(i);
      const u64 total = block_sum(own, scratch);
      const double exact = (double)request.top_p * (double)total;
      u64 need = (u64)exact;
      need += (double)need < exact;
      need = need < 1 ? 1 : need;
      lowest = threshold(logits, vocab, need, kept, scratch, &above);
      const u32 bits = lowest & 0x80000000u ? lowest & 0x7fffffffu : ~lowest;
      const u64 each = units(ptx::exp2_fast((ptx::as_float(bits) - top) * scale));
      ties = each == 0 ? vocab : (int)((need - above + each - 1) / each);
    }
    // Each thread has a stretch of neighbouring ids, so that the draw walks them in order.
    const int stretch = ceil_div(vocab, THREADS), begin = threadIdx.x * stretch;
    const int end = begin + stretch < vocab ? begin + stretch : vocab;
    u64 equal = 0;
    for (int i = begin; i < end; i++) equal += key_of(logits[i]) == lowest;
    scratch.shares[threadIdx.x] = equal;
    Team::sync();
    int taken = 0;  // ties before this stretch
    for (int t = 0; t < (int)threadIdx.x; t++) taken += (int)scratch.shares[t];
    Team::sync();
    auto counts = [&](int i, int* seen) {
      const u32 key = key_of(logits[i]);
      if (key < lowest || (key == lowest && (*seen)++ >= ties)) return (u64)0;
      const float w = share(i);
      return w >= request.min_p ? units(w) : (u64)0;
    };
    u64 own = 0;
    int seen = taken;
    for (int i = begin; i < end; i++) own += counts(i, &seen);
    scratch.shares[threadIdx.x] = own;
    if (threadIdx.x == 0) scratch.result = first;
    const u64 total = block_sum(own, scratch);
    u64 sum = 0;
    for (int t = 0; t < (int)threadIdx.x; t++) sum += scratch.shares[t];
    u64 target = (u64)(draw * (double)total);
    target = target < total ? target : total - 1;
    if (target >= sum && target < sum + own) {
      seen = taken;
      for (int i = begin; i < end; i++) {
        sum += counts(i, &seen);
        if (sum > target) {
          scratch.result = i;
          break;
        }
      }
    }
    Team::sync();
    return scratch.result;
  }
};

template <class C>
FINIAL_DEVICE void sample(const SampleArgs& a) {
  __shared__ typename Sample<C>::Scratch scratch;
  const int row = blockIdx.x;
  ptx::allow_next();
  ptx::wait_previous();
  const float* logits = a.logits + (u64)row * a.stride;
  const i32 token = Sample<C>::choose(logits, a.vocab, a.requests[row], a.draws[row], scratch);
  if (threadIdx.x == 0) a.tokens[row] = token;
}
