// A whole decoder, many steps, one launch: every block works through its list of entries and waits on counters.
//
// Reference: backends/reference.py for a decoder's graph, backends/__init__.py RunsAhead for what a step does to its
// rows.  Blocks are as many as multiprocessors and all resident.  WARPS warps work; one more brings their weights
// through shared memory (ring.cuh), which never looks at what the others wait for: it runs on over entries, layers and
// steps. backends/cuda/mega/table.py makes the lists, check.py proves that their waits order every read after its
// writes.
//
// A counter never goes back: an entry waits until it has all arrivals of the steps so far and of this one.  A wait that
// takes longer than `limit_ns` is noted in `control`, and everybody leaves; the host then zeroes counters and tickets
// and goes on otherwise.
//
// Sums are those of float32 inputs (see mega_product.cuh) and always in one order, the same launch gives the same bits;
// but for what blocks add to other blocks' rows (MLP, BY_HEAD), whose order is that of arrival.
#pragma once
#include "mega_product.cuh"

template <class C>
struct Mega : Parts<C> {
  using P = Parts<C>;
  using typename P::Memory;
  using typename P::Stages;
  using typename P::State;
  using typename P::Team;
  using Work = Product<C>;
  static constexpr int B = P::B, THREADS = P::THREADS;

  FINIAL_DEVICE static void run(const MegaArgs& a) {
    FINIAL_DYNAMIC_SHARED(shared);
    const Memory m = P::memory(shared);
    State& state = *m.state;
    const i32* table = a.table + (u64)blockIdx.x * C::ENTRIES * 8;
    for (int i = threadIdx.x; i < C::ENTRIES * 8; i += blockDim.x) ((i32*)m.table)[i] = table[i];
    if (threadIdx.x == 0) {
      Stages::init(state.barriers);
      state.failed[0] = state.failed[1] = state.broken = state.left = 0;
      state.done = a.control[1];
      state.begins = 0;
      for (int b = 0; b < B; b++) {
        const i32* row = a.state + b * 4;
        state.token[b] = row[0], state.position[b] = row[1], state.remaining[b] = row[3];
        state.active[b] = row[2] && row[3] > 0;
        state.begins |= state.active[b];
      }
      if (ptx::load_volatile(a.control)) state.begins = 0;
    }
    ptx::sync_block();
    // Nothing to do, or counters are as an error left them.  (`active` is the workers' own from here on.)
    if (!state.begins) return;
    if ((int)threadIdx.x >= THREADS)
      produce(a, m);
    else
      work(a, m);
  }

  FINIAL_DEVICE static bool any_active(const State& state) {
    bool any = false;
#pragma unroll
    for (int b = 0; b < B; b++) any |= state.active[b] != 0;
    return any;
  }

  FINIAL_DEVICE static void produce(const MegaArgs& a, const Memory& m) {
    if (C::BULK && threadIdx.x % 32 != 0) return;
    State& state = *m.state;
    typename Stages::Producer producer;
    const u8* stream = a.streams + a.offsets[blockIdx.x];
    typename P::Patience patience;
    auto gone = [&] { return ptx::load_block(&state.left) != 0; };
    bool going = true;
#pragma unroll 1
    for (int step = 0; going && step < a.steps; step++) {
      const u8* from = stream;
#pragma unroll 1
      for (const Entry* entry = m.table; going && entry->kind != END; entry++) {
        const int kind = entry->kind;
        if (!P::is_product(kind)) continue;
        const int k = P::is_grouped(*entry) ? P::group_columns(*entry)
                      : kind == OUTPUT      ? P::ATTN
                      : kind == DOWN        ? P::down_columns(*entry)
                                            : C::D;
        int bytes = entry->count * ceil_div(k, 32) * P::U::BYTES, most = P::RingShape::SLOT_BYTES;
        if (C::MLP && kind == MLP_DOWN) {
          const int group = entry->count * (P::U::BYTES / 4);
          bytes = ceil_div(C::D, 8) * group, most = P::down_groups(entry->count) * group;
        }
#pragma unroll 1
        while (going && bytes > 0) {
          const int part = bytes < most ? bytes : most;
          going = producer.put(m.ring, state.barriers, from, part, gone);
          from += part, bytes -= part;
        }
      }
    }
    producer.drain(state.barriers, [&] { return patience.over(a, -1); });
  }

  // Whether all arrivals are there; the same for all workers.  `turn` counts calls.
  FINIAL_DEVICE static bool wait(const MegaArgs& a, State& state, const Entry& entry, int number, u32 step, u32 turn) {
    if (threadIdx.x == 0) {
      bool good = ptx::load_block(&state.broken) == 0;
      if (good && entry.wait >= 0) {
        const u32 wanted = (step + 1) * (u32)entry.target;
        const u32* counter = a.counters + (u64)entry.wait * COUNTER_STRIDE;
        typename P::Patience patience;
        while (good && (i32)(ptx::load_acquire(counter) - wanted) < 0) {
          good = !patience.over(a, number);
          ptx::pause();
        }
      }
      state.failed[turn & 1] = !good;
    }
    Team::sync();  // also: everybody is done with the entry before
    return state.failed[turn & 1] == 0;
  }
  // After all threads' writes and reads of the entry.
  FINIAL_DEVICE static void signal(const MegaArgs& a, const Entry& entry) {
    Team::sync();
    if (threadIdx.x == 0 && entry.signal >= 0) ptx::add_release(a.counters + (u64)entry.signal * COUNTER_STRIDE, 1);
  }

  FINIAL_DEVICE static void work(const MegaArgs& a, const Memory& m) {
    State& state = *m.state;
    typename Work::Reader reader;
    const u32 begun = state.done;
    u32 turn = 0, step = begun;
    bool good = true;
#pragma unroll 1
    for (int left = a.steps; left > 0; left--) {
      int staged_kind = END, staged_layer = 0;
#pragma unroll 1
      for (int number = 0; good; number++) {
        const Entry entry = m.table[number];
        if (entry.kind == END) break;
        const bool product = P::is_product(entry.kind);
        const bool alike = product && entry.kind == staged_kind && entry.layer == staged_layer;
        const bool staged = P::is_grouped(entry) ? C::WHOLE : alike && !(P::is_part(entry) && !C::DOWN_WHOLE);
        if (product && !alike) Work::warm(a, entry);
        if constexpr (C::WHOLE) {
          if (entry.kind == GROUP_ATTEND) warm_group(a, state, entry);
        } else {
          if (entry.kind == ATTEND) warm_attention(a, state, entry);
        }
        good = wait(a, state, entry, number, step, turn++);
        if (!good) break;
        staged_kind = product ? entry.kind : END, staged_layer = entry.layer;
        bool arrives = true;
        if (product && !(C::MLP && entry.kind == MLP_DOWN)) {
          Work::run(a, m, entry, number, step, staged, reader);
        } else if (product) {
          if constexpr (C::MLP) Work::down(a, m, entry, number, reader);
        } else if (C::WHOLE ? entry.kind == GROUP_ATTEND : entry.kind == ATTEND) {
          if constexpr (C::WHOLE)
            attend_group(a, m, entry);
          else
            arrives = attend(a, m, entry);
        } else if (entry.kind == TOKEN) {
          token(a, state, step, step - begun);
        } else {
          if constexpr (C::SAMPLED) sample(a, m, entry, step, step - begun);
        }
        if (arrives && entry.kind != TOKEN) signal(a, entry);
      }
      if (!good) break;
      step++;
      if (!any_active(state)) break;
    }
    if (threadIdx.x == 0) ptx::store_block(&state.left, 1);
    if (blockIdx.x != 0) return;
    // All blocks have begun, and read these, before any can have ended a step.
    if (threadIdx.x == 0) a.control[1] = step;
    if (good && threadIdx.x < B) {
      i32* row = a.state + threadIdx.x * 4;
      row[0] = state.token[threadIdx.x], row[1] = state.position[threadIdx.x];
      row[2] = state.active[threadIdx.x], row[3] = state.remaining[threadIdx.x];
    }
  }

  // --- attention
  // ------------------------------------------------------------------------------------------------------

  struct Stretch {  // of an item's positions
    AttendItem item;
    int row, split, active;  // `active` stretches have positions
  };
  // But for its stretch of positions.
  FINIAL_DEVICE static AttendItem item_of(const MegaArgs& a, const State& state, int layer, int row, int number) {
    AttendItem item;
    const int part = number % P::PARTS;
    item.head = number / P::PARTS, item.heads = P::group_heads(part);
    const float* qkv = a.qkv + ((u64)row * C::KV + item.head) * (P::GROUP + 2) * C::HD;
    const float* vectors = a.vectors + (u64)layer * P::LAYER;
    item.q = qkv + part * C::GB * C::HD, item.k = qkv + P::GROUP * C::HD, item.v = item.k + C::HD;
    item.q_norm = vectors + P::Q_NORM, item.k_norm = vectors + P::K_NORM, item.frequencies = a.frequencies;
    item.cache = a.caches[layer], item.pages = a.pages + (u64)row * a.page_stride;
    item.position = state.position[row];
    item.eps = C::EPS, item.rope_scale = C::ROPE_SCALE, item.scale = C::SCALE;
    return item;
  }
  FINIAL_DEVICE static int newest_slot(const AttendItem& item) {
    return item.pages[item.position / C::PAGE] * C::PAGE + item.position % C::PAGE;
  }
  FINIAL_DEVICE static Stretch stretch(const MegaArgs& a, const State& state, const Entry& entry) {
    Stretch s;
    constexpr int EACH = C::KV * P::PARTS;  // items of a row
    s.row = entry.first / EACH, s.split = entry.count & 0xffff;
    AttendItem& item = s.item;
    item = item_of(a, state, entry.layer, s.row, entry.first % EACH);
    // A short stretch costs what merging costs: few positions are one stretch.
    constexpr int STEP = P::Attention::STEP;
    const int low = P::Attention::first_seen(item.position), count = item.position + 1 - low;
    const int even = round_up(ceil_div(count, C::SPLITS), STEP), least = round_up(C::LEAST, STEP);
    const int per = even > least ? even : least;
    s.active = state.active[s.row] ? ceil_div(count, per) : 0;
    item.begin = low + s.split * per;
    item.end = item.begin + per < item.position + 1 ? item.begin + per : item.position + 1;
    item.newest = s.split == s.active - 1;
    item.slot = item.newest ? newest_slot(item) : 0;
    return s;
  }
  // Cached rows of earlier steps come into L2 while queries are made: 64 KiB a block, which all blocks together have
  // room for even where L2 is 6 MB; what a long stretch has beyond is asked for in time by the many loads before it.
  FINIAL_DEVICE static void warm_attention(const MegaArgs& a, const State& state, const Entry& entry) {
    constexpr int MOST = (64 << 10) / (2 * C::Cache::ROW_BYTES);
    const Stretch s = stretch(a, state, entry);
    if (s.split >= s.active) return;
    const int end = s.item.end - 1 < s.item.begin + MOST ? s.item.end - 1 : s.item.begin + MOST;
    for (int at = s.item.begin + threadIdx.x; at < end; at += THREADS)
      for (int which = 0; which < 2; which++) {
        const u8* row = s.item.cache + P::Attention::address(s.item.pages, at, which, s.item.head);
        for (int i = 0; i < C::Cache::ROW_BYTES; i += 128) ptx::prefetch_l2(row + i);
      }
  }

  // A head group of all rows by this block alone: the result is left as terms where x lies, for GROUP_OUTPUT.
  FINIAL_DEVICE static void attend_group(const MegaArgs& a, const Memory& m, const Entry& entry) {
    using Attention = typename P::Attention;
    State& state = *m.state;
    auto& scratch = *(typename Attention::Scratch*)(m.scratch + P::ATTEND_AT);
    const int columns = P::group_heads(entry.first % P::PARTS) * C::HD, beyond = round_up(columns, 32) - columns;
    for (int i = threadIdx.x; i < P::ROWS * beyond; i += THREADS)
      m.x()[i / beyond * P::STRIDE + columns + i % beyond] = 0;
#pragma unroll 1
    for (int b = 0; b < B; b++) {
      u16* to = m.x() + b * P::STRIDE;
      if (!state.active[b]) {
        for (int i = threadIdx.x; i < C::TERMS * columns; i += THREADS)
          to[i / columns * B * P::STRIDE + i % columns] = 0;
        continue;
      }
      AttendItem item = item_of(a, state, entry.layer, b, entry.first);
      item.begin = Attention::first_seen(item.position), item.end = item.position + 1;
      item.newest = true, item.keeps = entry.count == ATTENDS_AND_KEEPS, item.slot = newest_slot(item);
      item.fresh = (u8*)a.parts + (u64)blockIdx.x * 2 * C::Cache::ROW_BYTES;
      Attention::template scan<true>(item, scratch);
      Attention::combine(scratch, item.heads, [&](int g, int e, float, float sum, float weight) {
        float v = sum / weight;
#pragma unroll
        for (int t = 0; t < C::TERMS; t++) {
          const u16 term = to_bf16(v);
          to[t * B * P::STRIDE + g * C::HD + e] = term;
          v -= from_bf16(term);
        }
      });
    }
  }
  FINIAL_DEVICE static void warm_group(const MegaArgs& a, const State& state, const Entry& entry) {
    constexpr int MOST = (64 << 10) / (2 * B * C::Cache::ROW_BYTES);
    for (int b = 0; b < B; b++) {
      if (!state.active[b]) continue;
      const AttendItem item = item_of(a, state, entry.layer, b, entry.first);
      const int begin = P::Attention::first_seen(item.position);
      const int end = item.position < begin + MOST ? item.position : begin + MOST;
      for (int at = begin + threadIdx.x; at < end; at += THREADS)
        for (int which = 0; which < 2; which++) {
          const u8* row = item.cache + P::Attention::address(item.pages, at, which, item.head);
          for (int i = 0; i < C::Cache::ROW_BYTES; i += 128) ptx::prefetch_l2(row + i);
        }
    }
  }

  // Whether this block is the one that arrives for the item.  Stretches without positions have no part in it.
  FINIAL_DEVICE static bool attend(const MegaArgs& a, const Memory& m, const Entry& entry) {
    using Attention = typename P::Attention;
    State& state = *m.state;
    const Stretch s = stretch(a, state, entry);
    const int heads = s.item.heads, part = entry.first % P::PARTS;
    float* out = a.attn + (u64)s.row * P::ATTN + (s.item.head * P::GROUP + part * C::GB) * C::HD;
    if (s.active == 0) {  // a row that has ended: zeros
      if (s.split == 0)
        for (int i = threadIdx.x; i < heads * C::HD; i += THREADS) out[i] = 0.0f;
      return s.split == 0;
    }
    if (s.split >= s.active) return false;
    auto& scratch = *(typename Attention::Scratch*)m.scratch;
    auto place = [&](int g, int split) {
      return a.parts + (((u64)entry.first * C::SPLITS + split) * C::GB + g) * (C::HD + 2);
    };
    Attention::scan(s.item, scratch);
    Attention::combine(scratch, heads, [&](int g, int e, float best, float sum, float weight) {
      if (s.active == 1)
        out[g * C::HD + e] = sum / weight;
      else
        Attention::keep_part(place(g, s.split), e, best, sum, weight);
    });
    if (s.active == 1) return true;
    Team::sync();
    if (threadIdx.x == 0) {  // releases this part, acquires the others'
      state.ticket = ptx::add_acquire_release(a.tickets + entry.first, 1);
      if (state.ticket == (u32)s.active - 1) ptx::store_volatile(a.tickets + entry.first, 0);
    }
    Team::sync();
    if (state.ticket != (u32)s.active - 1) return false;
    Attention::merge(
        s.active, heads, [&](int g, int split) { return (const float*)place(g, split); },
        [&](int g, int e, float v) { out[g * C::HD + e] = v; });
    return true;
  }

  // --- tokens
  // ---------------------------------------------------------------------------------------------------------

  FINIAL_DEVICE static void sample(const MegaArgs& a, const Memory& m, const Entry& entry, u32 step, u32 own) {
    const int b = entry.first;
    if (!m.state->active[b]) return;
    auto& scratch = *(typename P::Sampler::Scratch*)m.scratch;
    const i32 token =
        P::Sampler::choose(a.logits + (u64)b * C::V, C::V, a.requests[b], a.draws[(u64)own * B + b], scratch);
    if (threadIdx.x == 0) a.tokens[(step & 1) * B + b] = token;
  }

  // Every block finds the same tokens, and so knows for itself what the next step does.
  FINIAL_DEVICE static void token(const MegaArgs& a, State& state, u32 step, u32 own) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, b = threadIdx.x;
    if (C::SAMPLED) {
      if (b < B) state.next[b] = (i32)ptx::load_written(a.tokens + (step & 1) * B + b);
    } else {
      for (int row = warp; row < B; row += C::WARPS) {
        u64 best = 0;
#pragma unroll 4
        for (int i = lane; i < (int)gridDim.x; i += 32) {
          const u64 other = ptx::load_u64(a.candidates + ((u64)(step & 1) * gridDim.x + i) * B + row);
          best = other > best ? other : best;
        }
        best = Work::warp_most(best);
        const u32 key = (u32)(best >> 32);
        const float top = ptx::as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
        if (lane == 0) state.next[row] = top - top == 0.0f ? (i32) ~(u32)best : NOT_FINITE;
      }
    }
    Team::sync();
    if (b < B) {
      i32 next = ROW_ENDED;
      if (state.active[b]) {
        next = state.next[b];
        bool ends = next < 0 || next >= C::V || --state.remaining[b] <= 0;
        for (int i = 0; i < STOPS; i++) ends |= a.stops[b * STOPS + i] == next;
        state.token[b] = next, state.position[b]++;
        state.active[b] = !ends;
      }
      if (blockIdx.x == 0) {
        const u32 epoch = (u32)a.epoch + own;
        ptx::store_host(a.ring + (u64)(epoch % (u32)a.ring_rows) * a.ring_stride + b, (u64)epoch << 32 | (u32)next);
      }
    }
    Team::sync();
  }
};

template <class C>
FINIAL_DEVICE void mega(const MegaArgs& a) {
  Mega<C>::run(a);
}
