// A run of decode steps: each takes in the tokens that the one before chose. See backends/__init__.py `RunsAhead`.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "program.h"

namespace finial {

class Ahead {
 public:
  struct Roles {  // which integer input of the program is which
    int tokens, positions, starts, lengths, pages, slots, wanted;
  };
  struct Row {
    Choice choice;
    std::vector<int32_t> stops;  // tokens that end it
    int32_t token, position;     // of its next step
    int32_t left;                // tokens that it may still get
  };

  // per_row: of the program's dimensions, whether each sequence has a row of it; of the others there are none.
  // draws [steps, rows]; pages [rows, n / rows]. Throws std::invalid_argument when they do not fit each other.
  Ahead(std::shared_ptr<Program> program, Roles roles, std::vector<bool> per_row, int output, std::vector<Row> rows,
        std::vector<double> draws, std::vector<int32_t> pages);

  // Steps until `seconds` are over, of which the last one is not to be longer than those before; at least one where any
  // is left. The tokens of each step, [rows] after [rows]; none: the run is over.
  std::vector<int32_t> burst(const State& state, double seconds);

 private:
  void step(const State& state, int32_t* tokens);
  void gather();

  std::shared_ptr<Program> program_;
  Roles roles_;
  std::vector<bool> per_row_;
  int output_;
  std::vector<Row> rows_;
  std::vector<double> draws_;
  std::vector<int32_t> pages_;
  size_t width_, at_ = 0, steps_;

  // The step's arrays, of the rows that have not ended.
  std::vector<size_t> live_;
  std::vector<int32_t> tokens_, positions_, starts_, lengths_, tables_, slots_, wanted_, chosen_;
  std::vector<Choice> choices_;
  std::vector<double> numbers_;
  std::vector<int64_t> sizes_;
  std::vector<IntArray> ints_;
  std::vector<FloatArray> outputs_;
};

}  // namespace finial
