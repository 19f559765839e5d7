// Choosing a token as engine/sampling.py does, in one or two passes over the logits instead of a dozen.
//
// Sums here and there differ by rounding alone: n additions of positive numbers, each of them within some ulp and
// (l - best) / temperature within one, of which exp makes at most 700: (n + 1,500) * 2^-52 of the sum, less than CLOSE
// for vocabularies up to 4 million. An edge of a token's share of the sum is within CLOSE of a draw about once in
// 1 / (2 * CLOSE * tokens) draws, a few thousand for 150 k tokens that are all alike.
#include "choose.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace finial {

namespace {

constexpr double CLOSE = 1e-9;
constexpr int64_t BLOCK = 64;
// (best - l) / temperature in so many steps a unit: the bin of top-p's bound has few tokens, which are sorted.
constexpr int BINS = 4096;
constexpr double STEPS = 64;
constexpr int64_t SORTED = 128;  // so few values are sorted without bins

// The ids, ascending, of the values that are at least the count-th largest; ties may make them more. 0 < count < n.
void keep_largest(const Kernels& kernels, const float* values, int64_t n, int64_t count, ChoiceRoom& room) {
  const int64_t blocks = n / BLOCK;
  room.ids.clear();
  if (blocks > 4 * count) {
    // The count-th largest of the blocks' maxima is a lower bound, and few blocks reach it.
    room.values.resize(static_cast<size_t>(blocks));
    for (int64_t b = 0; b < blocks; ++b)
      room.values[static_cast<size_t>(b)] = kernels.largest(values + b * BLOCK, BLOCK);
    room.others = room.values;
    std::nth_element(room.others.begin(), room.others.begin() + (count - 1), room.others.end(), std::greater<float>());
    const float bound = room.others[static_cast<size_t>(count - 1)];
    for (int64_t b = 0; b <= blocks; ++b) {
      if (b < blocks && room.values[static_cast<size_t>(b)] < bound) continue;
      for (int64_t i = b * BLOCK; i < std::min(n, (b + 1) * BLOCK); ++i)
        if (values[i] >= bound) room.ids.push_back(static_cast<int32_t>(i));
    }
  } else {
    room.ids.resize(static_cast<size_t>(n));
    std::iota(room.ids.begin(), room.ids.end(), 0);
  }
  room.others.clear();
  for (int32_t id : room.ids) room.others.push_back(values[id]);
  std::nth_element(room.others.begin(), room.others.begin() + (count - 1), room.others.end(), std::greater<float>());
  const float bound = room.others[static_cast<size_t>(count - 1)];
  room.ids.erase(std::remove_if(room.ids.begin(), room.ids.end(), [&](int32_t id) { return values[id] < bound; }),
                 room.ids.end());
}

double sum_of(const double* x, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) lanes[j] += x[i + j];
  for (; i < n; ++i) lanes[0] += x[i];
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// Weights become 0 but for the smallest set of the largest values that weighs at least top_p of all; among equal values
// the lower index comes first. False: too close to call.
bool keep_nucleus(const float* values, int64_t n, float best, const Choice& choice, ChoiceRoom& room) {
  double* weights = room.weights.data();
  const double total = sum_of(weights, n), need = choice.top_p * total, close = CLOSE * total;
  double over = 0;  // of what is surely kept
  room.order.clear();
  if (n <= SORTED) {
    room.order.resize(static_cast<size_t>(n));
    std::iota(room.order.begin(), room.order.end(), 0);
  } else {
    constexpr int64_t PART = 256;
    const double scale = std::min(STEPS / choice.temperature, 1e300), base = static_cast<double>(best);
    int32_t bins[PART];
    const auto find = [&](int64_t from, int64_t count) {  // higher values have lower bins
      for (int64_t i = 0; i < count; ++i) {
        const double at = (base - static_cast<double>(values[from + i])) * scale;
        bins[i] = static_cast<int32_t>(at < BINS - 1 ? at : BINS - 1);
      }
    };
    room.sums.assign(BINS, 0.0);
    for (int64_t from = 0; from < n; from += PART) {
      const int64_t count = std::min(PART, n - from);
      find(from, count);
      for (int64_t i = 0; i < count; ++i) room.sums[static_cast<size_t>(bins[i])] += weights[from + i];
    }
    int32_t bin = 0;
    while (bin < BINS - 1 && over + room.sums[static_cast<size_t>(bin)] < need)
      over += room.sums[static_cast<size_t>(bin++)];
    if (bin > 0 && need - over < close) return false;  // the bound may lie in the bin before
    for (int64_t from = 0; from < n; from += PART) {
      const int64_t count = std::min(PART, n - from);
      find(from, count);
      for (int64_t i = 0; i < count; ++i)
        if (bins[i] == bin) room.order.push_back(static_cast<int32_t>(from + i));
    }
  }
  std::sort(room.order.begin(), room.order.end(),
            [&](int32_t a, int32_t b) { return values[a] > values[b] || (values[a] == values[b] && a < b); });
  for (int32_t last : room.order) {
    const bool first = over == 0;
    if (!first && need - over < close) return false;
    over += weights[last];
    if (std::abs(over - need) < close) return false;
    if (over < need) continue;
    const float bound = values[last];
    for (int64_t i = 0; i < n; ++i) {
      const bool kept = values[i] > bound || (values[i] == bound && i <= last);
      weights[i] = kept ? weights[i] : 0.0;
    }
    return true;
  }
  return false;
}

// Weights below min_p become 0; the largest weighs 1. False: too close to call.
bool keep_likely(const float* values, int64_t n, float best, double min_p, double* weights) {
  bool close = min_p < 1e-290;  // weigh knows none so small
  for (int64_t i = 0; i < n; ++i) {
    const double off = weights[i] - min_p;
    close |= (off < 0 ? -off : off) <= CLOSE * min_p && values[i] != best;
    weights[i] = off >= 0 || values[i] == best ? weights[i] : 0.0;
  }
  return !close;
}

// The index whose share of the sum of weights holds draw * sum; -1: too close to call.
int64_t drawn(const double* weights, int64_t n, double draw, std::vector<double>& sums) {
  sums.clear();
  for (int64_t from = 0; from < n; from += BLOCK) sums.push_back(sum_of(weights + from, std::min(BLOCK, n - from)));
  const double total = sum_of(sums.data(), static_cast<int64_t>(sums.size()));
  const double target = draw * total, close = CLOSE * total;
  double before = 0;
  size_t block = 0;
  while (block < sums.size() && before + sums[block] <= target + close) before += sums[block++];
  if (block == sums.size() || (before > 0 && target - before < close)) return -1;
  int64_t i = static_cast<int64_t>(block) * BLOCK;
  for (; i < n; before += weights[i++]) {
    if (before > 0 && target - before < close) return -1;
    if (before + weights[i] > target + close) return i;
  }
  return -1;
}

}  // namespace

int32_t choose(const Kernels& kernels, const float* logits, int64_t vocab, int64_t highest, const Choice& choice,
               double draw, ChoiceRoom& room) {
  const float best = logits[highest];
  if (!std::isfinite(best)) return FOR_HOST;
  if (choice.temperature == 0) return static_cast<int32_t>(highest);
  const bool some = choice.top_k > 0 && choice.top_k < vocab;
  const float* values = logits;
  int64_t n = vocab;
  if (some) {
    keep_largest(kernels, logits, vocab, choice.top_k, room);
    n = static_cast<int64_t>(room.ids.size());
    room.values.clear();
    for (int32_t id : room.ids) room.values.push_back(logits[id]);
    values = room.values.data();
  }
  room.weights.resize(static_cast<size_t>(n));
  kernels.weigh(values, n, best, choice.temperature, room.weights.data());
  if (choice.top_p < 1 && !keep_nucleus(values, n, best, choice, room)) return FOR_HOST;
  if (choice.min_p > 0 && !keep_likely(values, n, best, choice.min_p, room.weights.data())) return FOR_HOST;
  const int64_t index = drawn(room.weights.data(), n, draw, room.sums);
  if (index < 0) return FOR_HOST;
  return some ? room.ids[static_cast<size_t>(index)] : static_cast<int32_t>(index);
}

}  // namespace finial
