#include "ahead.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <stdexcept>

namespace finial {

namespace {

constexpr int32_t ENDED = -2;  // backends/__init__.py

}  // namespace

Ahead::Ahead(std::shared_ptr<Program> program, Roles roles, std::vector<bool> per_row, int output,
             std::vector<Row> rows, std::vector<double> draws, std::vector<int32_t> pages)
    : program_(std::move(program)),
      roles_(roles),
      per_row_(std::move(per_row)),
      output_(output),
      rows_(std::move(rows)),
      draws_(std::move(draws)),
      pages_(std::move(pages)) {
  const size_t count = rows_.size();
  if (count == 0 || draws_.size() % count != 0 || pages_.size() % count != 0)
    throw std::invalid_argument("a run of no rows, or random numbers or pages that are not those of its rows");
  const int ints = static_cast<int>(program_->int_inputs());
  for (int role : {roles.tokens, roles.positions, roles.starts, roles.lengths, roles.pages, roles.slots, roles.wanted})
    if (role < 0 || role >= ints) throw std::invalid_argument("a run: no such integer input");
  width_ = pages_.size() / count, steps_ = draws_.size() / count;
  for (size_t i = 0; i < count; ++i) live_.push_back(i);
  ints_.assign(static_cast<size_t>(ints), IntArray{nullptr, {0}});
  outputs_ = program_->no_outputs();
  gather();
}

// The arrays of the next step, anew: somebody has ended.
void Ahead::gather() {
  const size_t n = live_.size();
  const int64_t rows = static_cast<int64_t>(n);
  for (auto* v : {&tokens_, &positions_, &lengths_, &slots_, &chosen_}) v->resize(n);
  starts_.resize(n + 1), wanted_.resize(n), tables_.resize(n * width_);
  std::iota(starts_.begin(), starts_.end(), 0);
  std::iota(wanted_.begin(), wanted_.end(), 0);
  choices_.clear();
  for (size_t i = 0; i < n; ++i) {
    std::copy_n(pages_.begin() + static_cast<std::ptrdiff_t>(live_[i] * width_), width_,
                tables_.begin() + static_cast<std::ptrdiff_t>(i * width_));
    choices_.push_back(rows_[live_[i]].choice);
  }
  numbers_.resize(n);
  sizes_.clear();
  for (const bool per_row : per_row_) sizes_.push_back(per_row ? rows : 0);
  const auto give = [&](int role, const std::vector<int32_t>& values) {
    ints_[static_cast<size_t>(role)] = {values.data(), {static_cast<int64_t>(values.size())}};
  };
  give(roles_.tokens, tokens_), give(roles_.positions, positions_), give(roles_.starts, starts_);
  give(roles_.lengths, lengths_), give(roles_.slots, slots_), give(roles_.wanted, wanted_);
  ints_[static_cast<size_t>(roles_.pages)] = {tables_.data(), {rows, static_cast<int64_t>(width_)}};
}

void Ahead::step(const State& state, int32_t* tokens) {
  const size_t n = live_.size(), count = rows_.size();
  const int64_t size = state.page_size;
  for (size_t i = 0; i < n; ++i) {
    const Row& row = rows_[live_[i]];
    const int64_t page = row.position / size;
    if (row.position < 0 || page >= static_cast<int64_t>(width_))
      throw std::invalid_argument("a run: position " + std::to_string(row.position) + " is on no page");
    tokens_[i] = row.token, positions_[i] = row.position, lengths_[i] = row.position + 1;
    slots_[i] = static_cast<int32_t>(tables_[i * width_ + static_cast<size_t>(page)] * size + row.position % size);
    numbers_[i] = draws_[at_ * count + live_[i]];
  }
  const Sampling sampling{output_, choices_.data(), numbers_.data(), chosen_.data(), static_cast<int64_t>(n)};
  program_->run(sizes_, ints_, {}, outputs_, state, &sampling);
  std::fill_n(tokens, count, ENDED);
  bool ended = false;
  for (size_t i = 0; i < n; ++i) {
    Row& row = rows_[live_[i]];
    const int32_t token = tokens[live_[i]] = chosen_[i];
    row.token = token, row.position += 1;
    const bool stop = token < 0 || std::find(row.stops.begin(), row.stops.end(), token) != row.stops.end();
    row.left = stop ? 0 : row.left - 1;
    ended |= row.left <= 0;
  }
  ++at_;
  if (!ended) return;
  live_.erase(std::remove_if(live_.begin(), live_.end(), [&](size_t i) { return rows_[i].left <= 0; }), live_.end());
  if (!live_.empty()) gather();
}

std::vector<int32_t> Ahead::burst(const State& state, double seconds) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  std::vector<int32_t> tokens;
  double longest = 0, now = 0;
  while (!live_.empty() && at_ < steps_ && (tokens.empty() || now + longest <= seconds)) {
    tokens.resize(tokens.size() + rows_.size());
    step(state, tokens.data() + tokens.size() - rows_.size());
    const double then = now;
    now = std::chrono::duration<double>(Clock::now() - start).count();
    longest = std::max(longest, now - then);
  }
  return tokens;
}

}  // namespace finial
