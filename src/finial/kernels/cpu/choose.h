// The token of one row of logits: greedy, or temperature, top-k, top-p, min-p and a draw.
//
// Reference: engine/sampling.py `candidates` and `choose`, the same rules in the same order, ties included. The choice
// is that of the reference, bit for bit: where a sum comes so near to a bound or a draw that the order of additions or
// the last bits of exp could decide, no choice is made.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace finial {

struct Choice {  // temperature 0: greedy; top_k 0, top_p 1, min_p 0: all tokens
  double temperature = 0;
  int64_t top_k = 0;
  double top_p = 1, min_p = 0;
};

constexpr int32_t FOR_HOST = -1;  // instead of a token: the highest logit is not finite, or it is too close to call

// Working memory, kept from one choice to the next.
struct ChoiceRoom {
  std::vector<float> values, others;
  std::vector<int32_t> ids, order;
  std::vector<double> weights, sums;
};

// highest: as Kernels::highest gives it for the row; draw in [0, 1).
int32_t choose(const Kernels& kernels, const float* logits, int64_t vocab, int64_t highest, const Choice& choice,
               double draw, ChoiceRoom& room);

}  // namespace finial
