// Rows rounded to bf16 and how tiles of them meet a panel in tile registers. Included by packed.cpp.
//
// A panel [pair of inputs][PANEL][2] is two registers of weights for each DEPTH of 32 inputs as it lies there; rows are
// rounded to [step][row of the tile][32], a register of activations for each. Two tiles of rows meet it together: for
// four products two loads of weights and two of activations. The products take 64 cycles, loads from the second-level
// cache 32 each, so weights must come from the first-level one: NEAR_STEPS steps of a panel, 32 KiB, meet all tiles
// before the next ones, and activations are loaded so that they do not drive them out. Sums wait for the next chunk in
// memory, which changes no bit of them. The arithmetic that results go through, and asking for the next panel, run
// beside the products of the next tiles.
#pragma once

#include "finish.h"
#include "rows_bf16_tiles.h"
#include "tiles.h"

#if defined(FINIAL_TILES)

namespace finial::FINIAL_ISA {

namespace {

constexpr int64_t NEAR_STEPS = 16;      // steps of a panel that stay in the first-level cache, at most
constexpr int64_t SLOT = TILE * PANEL;  // floats of a tile's results

FINIAL_INLINE int64_t steps_of(int64_t n_in) { return (n_in + DEPTH - 1) / DEPTH; }

// c [1 or 2 tiles, TILE, PANEL] += `steps` steps of a panel times tiles of rows at x0 and x1, x0_bytes and x1_bytes
// from a step to the next; = where they are the first. `beside(step)` runs with each.
template <bool TWO, class Beside>
FINIAL_INLINE void add_steps(const uint8_t* w, const uint8_t* x0, int64_t x0_bytes, const uint8_t* x1, int64_t x1_bytes,
                             int64_t steps, bool first, float* c, Beside beside) {
  if (first) {
    tile_zero<0>(), tile_zero<1>();
    if (TWO) tile_zero<2>(), tile_zero<3>();
  } else {
    tile_load<0>(c, PANEL * 4), tile_load<1>(c + W, PANEL * 4);
    if (TWO) tile_load<2>(c + SLOT, PANEL * 4), tile_load<3>(c + SLOT + W, PANEL * 4);
  }
  const Asked ask = asks(1, {1, 2 * AHEAD});
  for (int64_t i = 0; i < steps; ++i, w += DEPTH_BYTES, x0 += x0_bytes, x1 += x1_bytes) {
    if (!TWO) stream(ask, w, DEPTH_BYTES);
    tile_load_once<4>(x0, LINE_BYTES);
    tile_load<6>(w, PANEL * 4);
    tile_dot_bf16<0, 4, 6>();
    tile_load<7>(w + LINE_BYTES, PANEL * 4);
    tile_dot_bf16<1, 4, 7>();
    if (TWO) {
      tile_load_once<5>(x1, LINE_BYTES);
      tile_dot_bf16<2, 5, 6>();
      tile_dot_bf16<3, 5, 7>();
    }
    beside(i);
  }
  tile_store<0>(c, PANEL * 4), tile_store<1>(c + W, PANEL * 4);
  if (TWO) tile_store<2>(c + SLOT, PANEL * 4), tile_store<3>(c + SLOT + W, PANEL * 4);
}

constexpr int64_t BESIDE = 3;  // rows of a tile before that are finished beside a step

// Results of tiles that wait to be finished, some rows at a time.
struct Finisher {
  int64_t panel = 0, from = 0, rows = 0;
  Tile tile{};
  const float *first = nullptr, *second = nullptr;

  void some(const Product& p, int64_t most) {
    const int64_t n = rows < most ? rows : most;
    if (n <= 0) return;
    finish(p, panel, tile, from, n, first, second);
    from += n, rows -= n, first += n * PANEL, second += n * PANEL;
  }
};

// Panels [begin, end) times the rows of the product's tiles.
void multiply_bf16(const Product& p, int64_t begin, int64_t end) {
  alignas(64) float first[GROUP * SLOT], second[GROUP * SLOT];
  const int64_t n_in = p.first->n_in, steps = steps_of(n_in), row = rounded_bytes(Rounding::BF16, n_in);
  const int64_t chunks = p.end - p.begin > 2 ? (steps + NEAR_STEPS - 1) / NEAR_STEPS : 1;
  const uint8_t* x[GROUP];
  Tile tile[GROUP];
  int64_t x_bytes[GROUP], most = 0;
  const int64_t count = p.end - p.begin;
  for (int64_t i = 0; i < count; ++i) {
    const Tile t = tile[i] = tile_of(p.rows, p.begin + i);
    x[i] = p.x + t.first * row, x_bytes[i] = t.count * LINE_BYTES;
    most = t.count > most ? t.count : most;
  }
  const Tiles registers(most, DEPTH / 2);
  const int64_t panels = (p.first->n_out + PANEL - 1) / PANEL, weights = p.second == nullptr ? 1 : 2;
  const int64_t lines = (weights * steps * DEPTH_BYTES) / 64, turns = weights * steps * ((count + 1) / 2);
  Finisher waiting;
  for (int64_t panel = begin; panel < end; ++panel) {
    const uint8_t* soon = p.first->packed + (panel + 1) * p.first->stride;
    const int64_t some = count > 1 && panel + 1 < panels ? (lines + turns - 1) / turns : 0;
    for (int64_t which = 0; which < weights; ++which) {
      const Linear& l = which == 0 ? *p.first : *p.second;
      float* c = which == 0 ? first : second;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t from = steps * chunk / chunks, to = steps * (chunk + 1) / chunks;
        const uint8_t* w = l.packed + panel * l.stride + from * DEPTH_BYTES;
        const bool last = which + 1 == weights && chunk + 1 == chunks;
        for (int64_t i = 0; i < count; i += 2) {
          const auto beside = [&](int64_t) {
            for (int64_t k = 0; k < some; ++k, soon += 64) __builtin_prefetch(soon, 0, 2);
            waiting.some(p, BESIDE);
          };
          waiting.some(p, waiting.rows - BESIDE * (to - from));  // few steps: sums of these may overwrite its own
          const uint8_t* x0 = x[i] + from * x_bytes[i];
          const bool two = i + 1 < count;
          if (two)
            add_steps<true>(w, x0, x_bytes[i], x[i + 1] + from * x_bytes[i + 1], x_bytes[i + 1], to - from, chunk == 0,
                            c + i * SLOT, beside);
          else
            add_steps<false>(w, x0, x_bytes[i], x0, 0, to - from, chunk == 0, c + i * SLOT, beside);
          if (!last) continue;
          for (int64_t j = i; j < i + 1 + two; ++j) {
            waiting.some(p, TILE);
            waiting = {panel, 0, tile[j].count, tile[j], first + j * SLOT, second + j * SLOT};
          }
        }
      }
    }
  }
  waiting.some(p, TILE);
}

}  // namespace

}  // namespace finial::FINIAL_ISA

#endif
