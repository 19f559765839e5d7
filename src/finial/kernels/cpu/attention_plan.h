// Who computes which part of a step's attention: rows in tiles, tiles times kv heads, and these by chunks of positions
// where whole ones would leave threads idle. Sequence after sequence and head after head, as rows of heads lie: a
// thread that begins with its own part of the list reads the keys and values that it has just written.
//
// Integers only. A plan depends on the thread count and on the batch; results do not, because every chunk is computed
// by itself and merged in ascending order wherever it was computed (see attention.cpp).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace finial {

class AttentionPlan {
 public:
  struct Share {
    AttentionPiece piece;
    int64_t whole;    // which tile and head this is a part of; -1: it is all of it
    int64_t partial;  // where its first chunk's partial results go, in floats
  };

  // positions [rows], starts [sequences + 1], checked. partial: floats that a query leaves per chunk.
  // queries: how many a piece does well to hold, if one sequence has them.
  void build(const int32_t* positions, const int32_t* starts, int64_t sequences, int64_t window, int64_t group,
             int64_t kv_heads, int64_t partial, int threads, int64_t queries);

  int64_t pieces() const { return static_cast<int64_t>(pieces_.size()); }
  const Share& piece(int64_t index) const { return pieces_[static_cast<size_t>(index)]; }
  const Share& whole(int64_t index) const { return wholes_[static_cast<size_t>(index)]; }
  int64_t tile_rows() const { return tile_rows_; }  // at most
  int64_t partial_floats() const { return partial_floats_; }

  // Notes that one part is done. True for the last one, which then merges; the count starts anew for the next layer.
  bool last_of(int64_t whole) {
    std::atomic<int64_t>& left = left_[static_cast<size_t>(whole)];
    if (left.fetch_sub(1, std::memory_order_acq_rel) > 1) return false;
    left.store(parts_[static_cast<size_t>(whole)], std::memory_order_relaxed);
    return true;
  }

 private:
  std::vector<Share> pieces_, wholes_;
  std::vector<AttentionPiece> tiles_;
  std::vector<size_t> ends_;  // [sequences]: one past its last tile
  std::vector<int64_t> parts_;
  std::unique_ptr<std::atomic<int64_t>[]> left_;
  size_t left_size_ = 0;
  int64_t tile_rows_ = 0, partial_floats_ = 0;
};

}  // namespace finial
