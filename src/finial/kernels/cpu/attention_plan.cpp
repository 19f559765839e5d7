#include "attention_plan.h"

#include <algorithm>

namespace finial {

namespace {

constexpr int64_t PIECES_PER_THREAD = 4;  // enough for threads to even out, taking pieces one by one

}  // namespace

void AttentionPlan::build(const int32_t* positions, const int32_t* starts, int64_t sequences, int64_t window,
                          int64_t group, int64_t kv_heads, int64_t partial, int threads, int64_t queries) {
  const int64_t most = std::clamp<int64_t>(queries / group, 1, queries / 2);
  tiles_.clear(), ends_.clear(), pieces_.clear(), wholes_.clear(), parts_.clear();
  tile_rows_ = partial_floats_ = 0;
  int64_t total = 0;  // rows times chunks
  for (int64_t b = 0; b < sequences; ++b) {
    for (int64_t row = starts[b]; row < starts[b + 1]; row += most) {
      const int64_t rows = std::min(most, starts[b + 1] - row);
      const auto [low, high] = std::minmax_element(positions + row, positions + row + rows);
      const int64_t first = window > 0 && *low >= window ? *low - window + 1 : 0;
      tiles_.push_back({row, rows, 0, first / ATTENTION_CHUNK, *high / ATTENTION_CHUNK + 1});
      total += rows * (tiles_.back().end - tiles_.back().begin);
      tile_rows_ = std::max(tile_rows_, rows);
    }
    ends_.push_back(tiles_.size());
  }
  const int64_t fair = total * kv_heads / (threads * PIECES_PER_THREAD);
  for (size_t b = 0, first = 0; b < ends_.size(); first = ends_[b++])
    for (int64_t head = 0; head < kv_heads; ++head)
      for (size_t t = ends_[b]; t-- > first;) {  // a prompt's last rows cost most: they go first
        AttentionPiece tile = tiles_[t];
        tile.head = head;
        const int64_t chunks = tile.end - tile.begin, take = std::max<int64_t>(fair / tile.rows, 1);
        if (threads == 1 || chunks <= take) {
          pieces_.push_back({tile, -1, 0});
          continue;
        }
        const int64_t parts = (chunks + take - 1) / take, floats = tile.rows * group * partial;
        for (int64_t part = 0; part < parts; ++part) {
          AttentionPiece piece = tile;
          piece.begin = tile.begin + chunks * part / parts, piece.end = tile.begin + chunks * (part + 1) / parts;
          pieces_.push_back(
              {piece, static_cast<int64_t>(wholes_.size()), partial_floats_ + (piece.begin - tile.begin) * floats});
        }
        wholes_.push_back({tile, -1, partial_floats_});
        parts_.push_back(parts);
        partial_floats_ += chunks * floats;
      }
  if (left_size_ < wholes_.size()) {
    left_ = std::make_unique<std::atomic<int64_t>[]>(wholes_.size());
    left_size_ = wholes_.size();
  }
  for (size_t i = 0; i < wholes_.size(); ++i) left_[i].store(parts_[i], std::memory_order_relaxed);
}

}  // namespace finial
