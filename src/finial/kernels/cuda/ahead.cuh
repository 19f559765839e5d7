// The end of a step whose tokens go into the next one without the host: choose, note, advance.
//
// Reference: backends/__init__.py RunsAhead.  A row's token goes to the host as one word with its step's epoch, so
// that whoever sees the epoch has the token; then the step's own integers are made those of the next step.  A row that
// has ended loses its place in the cache: it writes nothing and attends to nothing, and costs a row of the products.
#pragma once
#include "sample.cuh"

constexpr i32 ENDED = -2;

struct AheadRow {
  i32 step, left;         // steps so far; tokens that the row may still get, 0 once it has ended
  i32 stops, stop_count;  // which of stop_ids end it
};
struct AheadArgs {
  const float* logits;      // [rows, stride]
  const Request* requests;  // [rows]
  const double* draws;      // [steps, rows], each in [0, 1)
  AheadRow* states;         // [rows]
  const i32* stop_ids;
  const u32* epoch;  // of the run's first step
  u64* ring;         // [RING, RING_ROWS] of the host: epoch in the high half, token in the low
  i32 *tokens, *positions, *slots, *sequence;  // [rows], of the step
  const i32* pages;                            // [sequences, page_stride]
  i32 vocab, stride, page_stride, padding;
};

// A row's token is known: note it, and make the step's integers those of the next one.  By one thread a row.
// PAGE, RING, RING_ROWS; rows: of the step.
template <class C>
FINIAL_DEVICE void advance_row(const AheadArgs& a, int row, AheadRow state, i32 token) {
  const u32 epoch = *a.epoch + (u32)state.step;
  if (state.left > 0) {
    state.left = token < 0 ? 0 : state.left - 1;
    for (int i = 0; i < state.stop_count; i++)
      if (a.stop_ids[state.stops + i] == token) state.left = 0;
    if (state.left > 0) {
      const int position = a.positions[row] + 1;
      const i32* pages = a.pages + (u64)a.sequence[row] * a.page_stride;
      a.tokens[row] = token;
      a.positions[row] = position;
      a.slots[row] = pages[position / C::PAGE] * C::PAGE + position % C::PAGE;
    } else {
      a.slots[row] = a.sequence[row] = -1;
    }
  }
  state.step++;
  a.states[row] = state;
  ptx::store_host(a.ring + (epoch % C::RING) * C::RING_ROWS + row, (u64)epoch << 32 | (u32)token);
}

// THREADS and what advance_row takes.  One block a row.
template <class C>
FINIAL_DEVICE void sample_ahead(const AheadArgs& a) {
  __shared__ typename Sample<C>::Scratch scratch;
  const int row = blockIdx.x;
  ptx::allow_next();
  ptx::wait_previous();
  const AheadRow state = a.states[row];
  i32 token = ENDED;
  if (state.left > 0) {
    const double draw = a.draws[(u64)state.step * gridDim.x + row];
    token = Sample<C>::choose(a.logits + (u64)row * a.stride, a.vocab, a.requests[row], draw, scratch);
  }
  ptx::sync_block();  // every thread has read what the first one changes now
  if (threadIdx.x == 0) advance_row<C>(a, row, state, token);
}
