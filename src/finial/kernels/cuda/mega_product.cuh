// Products of the persistent kernel: x into shared memory, weights from the ring, sums through tensor cores.
//
// x is the left side of the instruction, its 16 rows the B rows of x in TERMS terms of bf16 each: three are float32
// itself, two are within 2^-17.  Weights are the right side, 8 rows at a time (units.cuh).  Warps take a row group's
// units in turn, so a group's sum has WARPS · TERMS parts, which are added in one order.  A norm's scale is one factor
// on the finished sums.
//
// Whoever multiplies never waits for memory while another warp could: what an entry needs besides weights (norm
// weights, biases, residuals) comes into L2 before its wait, and into registers before its first unit.
#pragma once
#include "mega_parts.cuh"

template <class C>
struct Product : Parts<C> {
  using P = Parts<C>;
  using typename P::Memory;
  using typename P::Stages;
  using typename P::Team;
  using U = typename P::U;
  static constexpr int B = P::B, D = P::D, ROWS = P::ROWS, GA = P::GA, STRIDE = P::STRIDE, THREADS = P::THREADS,
                       WARPS = C::WARPS, CHUNK = P::CHUNK;
  static constexpr int TURN = C::STAGE_UNITS / WARPS;                        // units of a warp in a stage
  static constexpr int PAIRS = GA * 4 * B, EACH = ceil_div(PAIRS, THREADS);  // results, two rows each; of a thread

  struct Source {  // what a kind of product reads
    const float *x, *norm, *bias, *scales;
    int k, rows, pitch;  // pitch: from one row of x to the next
  };
  FINIAL_DEVICE static Source source(const MegaArgs& a, const Entry& entry) {
    const float* vectors = a.vectors + (u64)entry.layer * P::LAYER;
    switch (entry.kind) {
      case QKV:
        return {entry.layer == 0 ? nullptr : a.x0,
                vectors + P::ATTN_NORM,
                C::BIAS ? vectors + P::QKV_BIAS : nullptr,
                vectors + P::QKV_SCALES,
                D,
                P::QKV_ROWS,
                D};
      case OUTPUT:
        return {a.attn, nullptr, nullptr, vectors + P::O_SCALES, P::ATTN, D, P::ATTN};
      case GROUP_OUTPUT: {
        const int number = entry.first / P::ROW_GROUPS, head = number / P::PARTS, part = number % P::PARTS;
        const float* x = a.attn + (head * P::GROUP + part * C::GB) * C::HD;
        return {x, nullptr, nullptr, vectors + P::O_SCALES, P::group_columns(entry), D, P::ATTN};
      }
      case GATE_UP:
      case MLP_UP:
        return {a.x1, vectors + P::MLP_NORM, nullptr, vectors + P::GATE_UP_SCALES, D, 2 * C::F, D};
      case DOWN:
      case MLP_DOWN:
        return {a.act + P::down_first(entry), nullptr, nullptr, vectors + P::DOWN_SCALES,
                P::down_columns(entry),       D,       C::F};
      default:
        return {a.x0, a.vectors + P::FINAL_NORM, nullptr, a.vectors + P::HEAD_SCALES, D, C::V, D};
    }
  }

  // Before the wait: what no other block writes.
  FINIAL_DEVICE static void warm(const MegaArgs& a, const Entry& entry) {
    const Source s = source(a, entry);
    if (s.norm) lines(s.norm, D);
    if (s.bias) lines(s.bias + entry.first * 8, entry.count * 8);
    if (P::CHANNELS && entry.kind != MLP_DOWN) lines(s.scales + P::row_group(entry) * 8, entry.count * 8);
    if (P::CHANNELS && entry.kind == MLP_UP) lines(a.vectors + (u64)entry.layer * P::LAYER + P::DOWN_SCALES, D);
  }
  FINIAL_DEVICE static void lines(const float* p, int n) {
    for (int i = threadIdx.x * 32; i < n; i += THREADS * 32) ptx::prefetch_l2(p + i);
  }

  // x, times the norm's weights, as terms; and the squares' sum by chunk.
  FINIAL_DEVICE static void stage(const MegaArgs& a, const Memory& m, const Source& s) {
    constexpr int AT_ONCE = 4;  // loads of a lane on their way
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int padded = round_up(s.k, 32), chunks = ceil_div(padded, CHUNK), all = B * chunks;
#pragma unroll 1
    for (int first = warp; first < all; first += WARPS * AT_ONCE) {
      Float4 values[AT_ONCE], weights[AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        const int c = first + j * WARPS, b = B == 1 ? 0 : c / chunks, k = (c - b * chunks) * CHUNK + lane * 4;
        values[j] = {0.0f, 0.0f, 0.0f, 0.0f}, weights[j] = {1.0f, 1.0f, 1.0f, 1.0f};
        if (c < all && k < s.k) {
          if (s.x) {
            values[j] = ptx::load_float4(s.x + (u64)b * s.pitch + k);
          } else if (m.state->active[b]) {
            float v[4];
            P::embedding(a, m.state->token[b], k / 4, v);
            values[j] = {v[0], v[1], v[2], v[3]};
          }
          if (s.norm) weights[j] = ptx::load_float4(s.norm + k);
        }
      }
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        const int c = first + j * WARPS, b = B == 1 ? 0 : c / chunks, k = (c - b * chunks) * CHUNK + lane * 4;
        if (c >= all) break;
        const Float4 x = values[j], w = weights[j];
        if (s.norm) {
          const float squares = warp_sum(x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w);
          if (lane == 0) m.state->squares[c] = squares;
        }
        if (k >= padded) continue;
        float rest[4] = {x.x * w.x, x.y * w.y, x.z * w.z, x.w * w.w};
#pragma unroll
        for (int t = 0; t < C::TERMS; t++) {
          const u32 low = ptx::pack_bf16(rest[0], rest[1]), high = ptx::pack_bf16(rest[2], rest[3]);
          u32* to = (u32*)(m.x() + (t * B + b) * STRIDE + k);
          to[0] = low, to[1] = high;
          rest[0] -= bf16_low(low), rest[1] -= bf16_high(low), rest[2] -= bf16_low(high), rest[3] -= bf16_high(high);
        }
      }
    }
  }
  // After a barrier: the norm's factor of each row, before the next one.
  FINIAL_DEVICE static void norms(const Memory& m) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int b = warp; b < B; b += WARPS) {
      float squares = 0.0f;
      for (int c = lane; c < P::SQUARES; c += 32) squares += m.state->squares[b * P::SQUARES + c];
      squares = warp_sum(squares);
      if (lane == 0) m.state->inverse[b] = ptx::reciprocal_root(squares / (float)D + C::EPS);
    }
  }

  // A worker warp's place in the stream.
  struct Reader {
    typename Stages::Place at;
    const u8* unit = nullptr;
    int left = 0;  // of this warp's units in the stage that it has
    bool has = false;

    FINIAL_DEVICE void release(const Memory& m) {
      ptx::sync_warp();  // all lanes have read
      if (has && threadIdx.x % 32 == 0) ptx::barrier_arrive(&m.state->barriers.empty[at.slot]);
      at.next();
      has = false;
    }
    // `offset`: of the warp's first bytes; `turn`: how often its turn comes in a stage.
    FINIAL_DEVICE void next(const MegaArgs& a, const Memory& m, int entry, int offset, int turn) {
      if (has) release(m);
      typename P::Patience patience;
      has = Stages::wait(&m.state->barriers.full[at.slot], at.parity, [&] {
        if (ptx::load_block(&m.state->broken)) return true;
        const bool over = patience.over(a, entry);
        if (over) ptx::store_block(&m.state->broken, 1);  // the next wait for another block ends for all warps alike
        return over;
      });
      unit = m.ring + at.slot * P::RingShape::SLOT_BYTES + offset;
      left = turn;
    }
  };

  FINIAL_DEVICE static void multiply(float sums[2][4], const u8* unit, const u16* x, int kb, int lane) {
    const int g = lane / 4, t = lane % 4;
    u32 w[4];
    U::weights(unit, lane, w);
    const u16* from = x + g * STRIDE + kb * 32 + t * 8;
    Vec4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
    if (ROWS >= 8 || g < ROWS) low = *(const Vec4*)from;
    if (ROWS > 8 && g + 8 < ROWS) high = *(const Vec4*)(from + 8 * STRIDE);
    const u32 first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
    if (U::BLOCKS) {
      float block[4] = {0.0f, 0.0f, 0.0f, 0.0f}, scales[2];
      U::scales(unit, lane, scales);
      ptx::mma_bf16(block, first, w);
      ptx::mma_bf16(block, second, w + 2);
#pragma unroll
      for (int i = 0; i < 4; i++) sums[0][i] += block[i] * scales[i % 2];
    } else {
      ptx::mma_bf16(sums[0], first, w);
      ptx::mma_bf16(sums[1], second, w + 2);
    }
  }

  // What is added to or multiplied with a pair of results: from before the units, so that nobody waits for it after.
  struct Extra {
    float add[2], scale[2];
  };
  FINIAL_DEVICE static Extra extra(const MegaArgs& a, const Memory& m, const Entry& entry, const Source& s, int b,
                                   int row) {
    Extra e = {{0.0f, 0.0f}, {1.0f, 1.0f}};
    if (row >= s.rows) return e;
    if (s.bias) e.add[0] = s.bias[row], e.add[1] = s.bias[row + 1];
    if (P::CHANNELS) e.scale[0] = s.scales[row], e.scale[1] = s.scales[row + 1];
    if (entry.kind == OUTPUT && entry.layer == 0) {
      if (m.state->active[b]) {
        float v[4];
        P::embedding(a, m.state->token[b], row / 4, v);
        e.add[0] = row % 4 ? v[2] : v[0], e.add[1] = row % 4 ? v[3] : v[1];
      }
    } else if (entry.kind == OUTPUT || entry.kind == DOWN) {
      const bool goes_on = P::is_part(entry) && entry.first >= P::ROW_GROUPS;  // from this block's part before
      const float* x = (entry.kind == OUTPUT || goes_on ? a.x0 : a.x1) + b * D + row;
      e.add[0] = ptx::load_shared_by_all(x), e.add[1] = ptx::load_shared_by_all(x + 1);
    }
    return e;
  }

  // An entry.  `staged`: x lies in shared memory from the entry before.
  FINIAL_DEVICE static void run(const MegaArgs& a, const Memory& m, const Entry& entry, int number, u32 step,
                                bool staged, Reader& reader) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Source s = source(a, entry);
    const int blocks = ceil_div(s.k, 32), origin = P::row_group(entry);
    const u16* x = m.x();
    if (P::is_part(entry) && C::DOWN_WHOLE) {  // x of all parts, from the first one
      Source all = s;
      all.x = a.act, all.k = C::F;
      if (!staged) stage(a, m, all);
      x += P::down_first(entry);
    } else if (!staged) {
      stage(a, m, s);
    }
    if (C::BY_HEAD && entry.kind == QKV) residual(a, m, entry);
    u64 best[EACH];
#pragma unroll
    for (int n = 0; n < EACH; n++) best[n] = 0;
    int unit = warp, stages = 0;  // this warp's next unit of the entry
#pragma unroll 1
    for (int first = 0; first < entry.count; first += GA) {
      const int last = first + GA < entry.count ? first + GA : entry.count;
      Extra extras[EACH];
#pragma unroll
      for (int n = 0; n < EACH; n++) {
        const int pair = threadIdx.x + n * THREADS, b = pair / (GA * 4),
                  row = (origin + first) * 8 + pair % (GA * 4) * 2;
        extras[n] = {{0.0f, 0.0f}, {1.0f, 1.0f}};
        if (pair < PAIRS && row < (origin + last) * 8) extras[n] = extra(a, m, entry, s, b, row);
      }
      Team::sync();  // x lies there; the sums before were read
      if (first == 0 && s.norm && !staged) norms(m);
#pragma unroll 1
      for (int group = first; group < last; group++) {
        float sums[2][4] = {{0.0f, 0.0f, 0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
        const int end = (group + 1) * blocks;
        int kb = unit - group * blocks;
#pragma unroll 1
        while (unit < end) {
          if (reader.left == 0) reader.next(a, m, number, warp * U::BYTES, TURN), stages++;
          const int mine = (end - unit + WARPS - 1) / WARPS, count = mine < reader.left ? mine : reader.left;
          const u8* from = reader.unit;
#pragma unroll 4
          for (int i = 0; i < count; i++) multiply(sums, from + i * (WARPS * U::BYTES), x, kb + i * WARPS, lane);
          reader.unit += count * (WARPS * U::BYTES), reader.left -= count;
          unit += count * WARPS, kb += count * WARPS;
        }
        float* to = m.sums() + ((warp * GA + group - first) * ROWS + lane / 4) * 8 + lane % 4 * 2;
        if (ROWS >= 8 || lane / 4 < ROWS) to[0] = sums[0][0] + sums[1][0], to[1] = sums[0][1] + sums[1][1];
        if (ROWS > 8 && lane / 4 + 8 < ROWS) to[64] = sums[0][2] + sums[1][2], to[65] = sums[0][3] + sums[1][3];
      }
      Team::sync();
#pragma unroll
      for (int n = 0; n < EACH; n++) {
        const int pair = threadIdx.x + n * THREADS, b = pair / (GA * 4), p = pair % (GA * 4);
        const int row = (origin + first) * 8 + p * 2;
        if (pair >= PAIRS || row >= (origin + last) * 8 || row >= s.rows) continue;
        float v[2] = {0.0f, 0.0f};
#pragma unroll
        for (int t = 0; t < C::TERMS; t++) {
          const float* from = m.sums() + (p / 4 * ROWS + t * B + b) * 8 + p % 4 * 2;
#pragma unroll
          for (int w = 0; w < WARPS; w++) v[0] += from[w * GA * ROWS * 8], v[1] += from[w * GA * ROWS * 8 + 1];
        }
        if (s.norm) v[0] *= m.state->inverse[b], v[1] *= m.state->inverse[b];
        if (P::CHANNELS) v[0] *= extras[n].scale[0], v[1] *= extras[n].scale[1];
        v[0] += extras[n].add[0], v[1] += extras[n].add[1];
        finish(a, m, entry, s, b, row, v, best[n]);
      }
    }
    // Stages in which this warp had nothing are its to give back all the same.
#pragma unroll 1
    for (; stages < entry.stages; stages++) reader.next(a, m, number, warp * U::BYTES, TURN);
    if (reader.has) reader.release(m);
    reader.left = 0;
    if (entry.kind == HEAD && !C::SAMPLED) candidates(a, m, best, step);
  }

  // What blocks add to later begins as the layer's input: each block of QKV copies its part, as many of D as it has of
  // the rows of QKV.
  FINIAL_DEVICE static void residual(const MegaArgs& a, const Memory& m, const Entry& entry) {
    constexpr int PLANES = D / 4, GROUPS = ceil_div(P::QKV_ROWS, 8);
    const int begin = entry.first * PLANES / GROUPS, count = (entry.first + entry.count) * PLANES / GROUPS - begin;
    for (int i = threadIdx.x; i < count * B; i += THREADS) {
      const int b = i / count, plane = begin + i % count;
      float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (entry.layer == 0) {
        if (m.state->active[b]) P::embedding(a, m.state->token[b], plane, v);
      } else {
        const Float4 x = ptx::load_float4(a.x0 + b * D + plane * 4);
        v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
      }
      *(Float4*)(a.x1 + b * D + plane * 4) = {v[0], v[1], v[2], v[3]};
      if (C::MLP && entry.layer == 0) *(Float4*)(a.x0 + b * D + plane * 4) = {v[0], v[1], v[2], v[3]};
    }
  }

  FINIAL_DEVICE static void finish(const MegaArgs& a, const Memory& m, const Entry& entry, const Source& s, int b,
                                   int row, const float v[2], u64& best) {
    if (entry.kind == GATE_UP || (C::MLP && entry.kind == MLP_UP)) {
      float act = silu(v[0]) * v[1];
      if (!C::MLP) {
        a.act[b * C::F + row / 2] = act;
      } else {  // the block's own neurons, as terms
#pragma unroll
        for (int t = 0; t < C::TERMS; t++) {
          const u16 term = to_bf16(act);
          m.own[(t * B + b) * P::OWN_STRIDE + row / 2 - entry.first * 4] = term;
          act -= from_bf16(term);
        }
      }
    } else if (P::is_grouped(entry)) {
      ptx::add_pair(a.x1 + b * D + row, v[0], v[1]);
      if (C::MLP) ptx::add_pair(a.x0 + b * D + row, v[0], v[1]);  // to which parts of down are added too
    } else if (entry.kind == HEAD && !C::SAMPLED) {
#pragma unroll
      for (int i = 0; i < 2; i++) {  // the highest, the lowest id among ties; NaN counts as the highest
        const u64 key = (u64)(v[i] == v[i] ? key_of(v[i]) : 0xffffffffu) << 32 | (u32) ~(row + i);
        if (row + i < s.rows && key > best) best = key;
      }
    } else {
      float* to = entry.kind == QKV ? a.qkv : entry.kind == OUTPUT ? a.x1 : entry.kind == DOWN ? a.x0 : a.logits;
      to += (u64)b * s.rows + row;
      to[0] = v[0];
      if (row + 1 < s.rows) to[1] = v[1];
      if (C::MLP && entry.kind == OUTPUT) {  // parts of down are added to it; this layer's readers of x0 are done
        float* sum = a.x0 + (u64)b * D + row;
        sum[0] = v[0], sum[1] = v[1];
      }
    }
  }

  // Down, of the block's own neurons: a part of every row of the output, added to x0 by reductions.  A warp has whole
  // row groups, and its instructions one term of x at a time, so that a group's sums are complete in its registers.
  FINIAL_DEVICE static void down(const MegaArgs& a, const Memory& m, const Entry& entry, int number, Reader& reader) {
    constexpr int OCTET = U::BYTES / 4, GROUPS = ceil_div(D, 8);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int octets = entry.count, turn = P::down_groups(octets) / WARPS;
    const float* scales = P::CHANNELS ? source(a, entry).scales : nullptr;
    float* y = (float*)m.scratch;  // [B, D]; nobody reads x after the barrier before this
    const u16* own = m.own + g * P::OWN_STRIDE + 2 * t;
    const int stride = WARPS * octets * OCTET;
    int group = warp;
#pragma unroll 1
    for (int stage = 0; stage < entry.stages; stage++) {
      reader.next(a, m, number, warp * octets * OCTET, turn);
#pragma unroll 1
      for (int i = 0; i < turn && group < GROUPS;) {  // two at a time, which share what is read of x
        const bool two = i + 1 < turn && group + WARPS < GROUPS;
        const u8* unit = reader.unit + i * stride;
        float sums[2][C::TERMS][4];
#pragma unroll
        for (int n = 0; n < 2 * C::TERMS * 4; n++) (&sums[0][0][0])[n] = 0.0f;
#pragma unroll 2
        for (int o = 0; o < octets; o++) {
          const u32 w[2] = {U::octet(unit + o * OCTET, lane), U::octet(unit + (two ? stride : 0) + o * OCTET, lane)};
#pragma unroll
          for (int term = 0; term < C::TERMS; term++) {
            const u32 x[2] = {g < B ? *(const u32*)(own + term * B * P::OWN_STRIDE + o * 8) : 0, 0};
            ptx::mma_bf16_short(sums[0][term], x, w[0]);
            ptx::mma_bf16_short(sums[1][term], x, w[1]);
          }
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
          const int row = (group + n * WARPS) * 8 + 2 * t;
          if (g >= B || row >= D || (n == 1 && !two)) continue;
          float v[2] = {sums[n][0][0], sums[n][0][1]};
#pragma unroll
          for (int term = 1; term < C::TERMS; term++) v[0] += sums[n][term][0], v[1] += sums[n][term][1];
          if (P::CHANNELS) v[0] *= scales[row], v[1] *= scales[row + 1];
          y[g * D + row] = v[0], y[g * D + row + 1] = v[1];
        }
        i += two ? 2 : 1, group += two ? 2 * WARPS : WARPS;
      }
    }
    if (reader.has) reader.release(m);
    reader.left = 0;
    Team::sync();
    for (int i = threadIdx.x * 4; i < B * D; i += THREADS * 4) ptx::add_vector(a.x0 + i, *(const Float4*)(y + i));
  }

  // The block's best of each row, for every block to compare.
  FINIAL_DEVICE static void candidates(const MegaArgs& a, const Memory& m, const u64 best[EACH], u32 step) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u64* all = (u64*)m.scratch;
    Team::sync();  // nobody reads x or sums
#pragma unroll
    for (int n = 0; n < EACH; n++)
      if ((int)threadIdx.x + n * THREADS < PAIRS) all[threadIdx.x + n * THREADS] = best[n];
    Team::sync();
    for (int b = warp; b < B; b += WARPS) {
      u64 highest = 0;
      for (int i = lane; i < GA * 4; i += 32) highest = all[b * GA * 4 + i] > highest ? all[b * GA * 4 + i] : highest;
      highest = warp_most(highest);
      if (lane == 0) a.candidates[((u64)(step & 1) * gridDim.x + blockIdx.x) * B + b] = highest;
    }
  }
  FINIAL_DEVICE static u64 warp_most(u64 v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const u64 other = ptx::shuffle_xor(v, offset);
      v = other > v ? other : v;
    }
    return v;
  }
};
