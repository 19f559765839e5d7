// Attention of single rows over a paged cache: split along the positions, merged by the last block to finish.
//
// Reference: backends/reference.py rms_norm, rope, cache_write, attention.  Softmax and sums in float32, keys and
// values as the cache holds them.  A block has GB query heads of one key/value head, so that a group shares each read;
// it takes a stretch of the positions that there are, so the cost follows the depth.  LANES lanes of a warp share a
// cached row of 16 bytes each; every such team keeps its own running maximum and sum (Milakov & Gimelshein 2018,
// arXiv:1805.02867, algorithm 3), merged in one fixed order. With FUSED the block first norms and rotates its queries,
// and the block that has the newest position also makes its key and value; nobody else reads them in this step.
#pragma once
#include "rows.cuh"
#include "team.cuh"

struct AttendArgs {
  const float *q, *k, *v;  // rows of q_stride and kv_stride floats
  const float *q_norm, *k_norm, *frequencies;
  u8* cache;
  const i32 *positions, *slots;  // [rows]
  const i32* sequence;           // [rows] row of the page table; -1: a row that does not exist
  const i32* pages;              // [sequences, page_stride]
  float* out;                    // [rows, out_stride]
  float* parts;                  // [rows, heads, SPLITS, D + 2]
  u32* tickets;                  // [rows, blocks of heads], zero between launches
  i32 q_stride, kv_stride, out_stride, page_stride;
  float eps, rope_scale, scale;
  i32 padding;
};

// What a block does of it: a stretch of the positions for some query heads of one key/value head.
struct AttendItem {
  const float *q, *k, *v;  // the heads' queries one after another; key and value of the newest position
  const float *q_norm, *k_norm, *frequencies;
  u8* cache;
  const i32* pages;  // of this sequence
  i32 position, slot, head, heads, begin, end;
  bool newest;  // the stretch ends with the newest position, whose key and value go into the cache
  bool keeps;   // with ALONE: whether they do
  u8* fresh;    // with ALONE: the block's own copy of them, [key, value][ROW_BYTES]
  float eps, rope_scale, scale;
};

// Cache, D, HEADS (key/value), GROUP, GB, WARPS, U, SPLITS, PAGE, WINDOW (0: none), FUSED, NORMED, HALF (result in
// bf16).  Team: the first WARPS warps of a block, and how they meet.
template <class C, class Team = AllThreads>
struct Attend {
  using Cache = typename C::Cache;
  static constexpr int D = C::D, GB = C::GB, U = C::U, P = Cache::P, VEC = Cache::VEC, VECS = P / VEC,
                       SPLITS = C::SPLITS;
  static constexpr int LANES = VECS >= 32 ? 32 : VECS > 16 ? 32 : VECS > 8 ? 16 : VECS > 4 ? 8 : VECS > 2 ? 4 : VECS;
  static constexpr int PER_LANE = ceil_div(VECS, LANES), TEAMS = 32 / LANES, ALL_TEAMS = C::WARPS * TEAMS;
  static constexpr int STEP = ALL_TEAMS * U, PARTS = ceil_div(C::GROUP, GB);
  static constexpr float NONE = -1e30f;
  struct Scratch {
    float queries[GB + 1][D];  // and the new key
    float value[D];
    float cosine[D / 2], sine[D / 2];
    float merged[C::WARPS][GB][P + 2];
  };

  FINIAL_DEVICE static void run(const AttendArgs& a) {
    __shared__ Scratch scratch;
    __shared__ u32 ticket;
    const int split = blockIdx.x, head = blockIdx.y / PARTS, part = blockIdx.y % PARTS, row = blockIdx.z;
    const int heads = GB < C::GROUP - part * GB ? GB : C::GROUP - part * GB;
    const int first_head = head * C::GROUP + part * GB;
    ptx::allow_next();
    const int sequence = a.sequence[row], position = a.positions[row];
    const int low = first_seen(position);
    const int count = sequence < 0 ? 0 : position + 1 - low;
    const int per = round_up(ceil_div(count, SPLITS), STEP), active = count > 0 ? ceil_div(count, per) : 0;
    if (split >= active) {
      ptx::wait_previous();  // so that completion of this kernel means completion of all before
      if (split == 0)        // a row that does not exist: zeros
        for (int i = threadIdx.x; i < heads * D; i += C::WARPS * 32) put(a, row, first_head * D + i, 0.0f);
      return;
    }
    AttendItem item;
    item.q = a.q + (u64)row * a.q_stride + first_head * D;
    item.k = a.k + (u64)row * a.kv_stride + head * D, item.v = a.v + (u64)row * a.kv_stride + head * D;
    item.q_norm = a.q_norm, item.k_norm = a.k_norm, item.frequencies = a.frequencies;
    item.cache = a.cache, item.pages = a.pages + (u64)sequence * a.page_stride;
    item.position = position, item.head = head, item.heads = heads;
    item.begin = low + split * per;
    item.end = item.begin + per < position + 1 ? item.begin + per : position + 1;
    item.newest = C::FUSED && split == active - 1;
    item.slot = item.newest ? a.slots[row] : 0;
    item.eps = a.eps, item.rope_scale = a.rope_scale, item.scale = a.scale;
    prefetch(item);  // the first rows come into L2 while the kernel before ends
    ptx::wait_previous();
    scan(item, scratch);
    combine(scratch, heads, [&](int g, int e, float best, float sum, float weight) {
      if (active == 1) {
        put(a, row, (first_head + g) * D + e, sum / weight);
      } else {
        keep_part(parts(a, row, first_head + g, split), e, best, sum, weight);
      }
    });
    if (active == 1) return;
    ptx::fence_device();
    ptx::sync_block();
    u32* counter = a.tickets + (u64)row * gridDim.y + blockIdx.y;
    if (threadIdx.x == 0) ticket = ptx::atomic_add(counter, 1);
    ptx::sync_block();
    if (ticket != (u32)active - 1) return;
    ptx::fence_device();
    if (threadIdx.x == 0) *counter = 0;
    merge(
        active, heads, [&](int g, int s) { return (const float*)parts(a, row, first_head + g, s); },
        [&](int g, int e, float v) { put(a, row, (first_head + g) * D + e, v); });
  }

  // The lowest position that attention from this one sees.
  FINIAL_DEVICE static int first_seen(int position) {
    return C::WINDOW > 0 && position >= C::WINDOW ? position - C::WINDOW + 1 : 0;
  }

  FINIAL_DEVICE static void prefetch(const AttendItem& item) {
    const int at = item.begin + threadIdx.x;
    if (threadIdx.x < STEP && at < item.end - 1) {
      const u8* key = item.cache + address(item.pages, at, 0, item.head);
      for (int i = 0; i < Cache::ROW_BYTES; i += 128) ptx::prefetch_l2(key + i);
    }
  }

  // Queries, then scores and sums over the stretch: what each warp has of it is left in `merged`.  ALONE: several
  // blocks make the newest key and value, each for itself; one of them puts them into the cache, and nobody reads them
  // there in this step.
  template <bool ALONE = false>
  FINIAL_DEVICE static void scan(const AttendItem& item, Scratch& scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int heads = item.heads, head = item.head, begin = item.begin, end = item.end;
    const i32* pages = item.pages;
    float (*queries)[D] = scratch.queries;
    float (*merged)[GB][P + 2] = scratch.merged;
    prepare<ALONE>(item, scratch);

    float q[GB][PER_LANE][VEC], sums[GB][PER_LANE][VEC], top[GB], total[GB];
    const int team = warp * TEAMS + lane / LANES, own = lane % LANES;
#pragma unroll
    for (int g = 0; g < GB; g++) {
      top[g] = NONE, total[g] = 0.0f;
#pragma unroll
      for (int n = 0; n < PER_LANE; n++) {
        const int vec = n * LANES + own;
#pragma unroll
        for (int i = 0; i < VEC; i++) {
          q[g][n][i] = vec < VECS && g < heads ? at_or_zero(queries[g], vec * VEC + i) : 0.0f;
          sums[g][n][i] = 0.0f;
        }
      }
    }
    for (int base = begin; base < end; base += STEP) {
      typename Cache::Raw keys[U][PER_LANE], values[U][PER_LANE];
#pragma unroll
      for (int u = 0; u < U; u++) {
        const int j = base + u * ALL_TEAMS + team, at = j < end ? j : end - 1;
        const bool fresh = ALONE && at == item.position;
        const u8* key = fresh ? item.fresh : item.cache + address(pages, at, 0, head);
        const u8* value = key + (fresh ? 1 : C::HEADS) * Cache::ROW_BYTES;
#pragma unroll
        for (int n = 0; n < PER_LANE; n++) {
          const int vec = n * LANES + own < VECS ? n * LANES + own : VECS - 1;
          keys[u][n] = Cache::load(key, vec);
          values[u][n] = Cache::load(value, vec);
        }
      }
      float scores[GB][U];
#pragma unroll
      for (int u = 0; u < U; u++) {
#pragma unroll
        for (int g = 0; g < GB; g++) scores[g][u] = 0.0f;
#pragma unroll
        for (int n = 0; n < PER_LANE; n++) {
          float k[VEC];
          Cache::decode(keys[u][n], k);
#pragma unroll
          for (int g = 0; g < GB; g++)
#pragma unroll
            for (int i = 0; i < VEC; i++) scores[g][u] += q[g][n][i] * k[i];
        }
      }
#pragma unroll
      for (int g = 0; g < GB; g++)
#pragma unroll
        for (int u = 0; u < U; u++) {
#pragma unroll
          for (int offset = LANES / 2; offset > 0; offset /= 2) scores[g][u] += ptx::shuffle_xor(scores[g][u], offset);
          if (base + u * ALL_TEAMS + team >= end) scores[g][u] = NONE;
        }
#pragma unroll
      for (int g = 0; g < GB; g++) {
        float best = top[g];
#pragma unroll
        for (int u = 0; u < U; u++) best = scores[g][u] > best ? scores[g][u] : best;
        const float keep = ptx::exp2_fast(top[g] - best);
        top[g] = best, total[g] *= keep;
#pragma unroll
        for (int n = 0; n < PER_LANE; n++)
#pragma unroll
          for (int i = 0; i < VEC; i++) sums[g][n][i] *= keep;
#pragma unroll
        for (int u = 0; u < U; u++) {
          // While a team has seen no position its maximum is NONE too, and NONE - NONE would weigh 1.
          scores[g][u] = base + u * ALL_TEAMS + team < end ? ptx::exp2_fast(scores[g][u] - best) : 0.0f;
          total[g] += scores[g][u];
        }
      }
#pragma unroll
      for (int u = 0; u < U; u++)
#pragma unroll
        for (int n = 0; n < PER_LANE; n++) {
          float v[VEC];
          Cache::decode(values[u][n], v);
#pragma unroll
          for (int g = 0; g < GB; g++)
#pragma unroll
            for (int i = 0; i < VEC; i++) sums[g][n][i] += scores[g][u] * v[i];
        }
    }

#pragma unroll
    for (int g = 0; g < GB; g++) {
#pragma unroll
      for (int offset = LANES; offset < 32; offset *= 2) {
        const float other = ptx::shuffle_xor(top[g], offset), best = other > top[g] ? other : top[g];
        const float keep = ptx::exp2_fast(top[g] - best);
        total[g] *= keep;
        total[g] += ptx::shuffle_xor(total[g], offset);
#pragma unroll
        for (int n = 0; n < PER_LANE; n++)
#pragma unroll
          for (int i = 0; i < VEC; i++) {
            sums[g][n][i] *= keep;
            sums[g][n][i] += ptx::shuffle_xor(sums[g][n][i], offset);
          }
        top[g] = best;
      }
      if (lane < LANES) {
#pragma unroll
        for (int n = 0; n < PER_LANE; n++)
#pragma unroll
          for (int i = 0; i < VEC; i++)
            if (n * LANES + own < VECS) merged[warp][g][(n * LANES + own) * VEC + i] = sums[g][n][i];
        if (lane == 0) merged[warp][g][P] = top[g], merged[warp][g][P + 1] = total[g];
      }
    }
    Team::sync();
  }

  // put(g, e, best, sum, weight) for every value of every head: the warps' results together.
  template <class Put>
  FINIAL_DEVICE static void combine(const Scratch& scratch, int heads, Put put) {
    for (int i = threadIdx.x; i < heads * D; i += C::WARPS * 32) {
      const int g = i / D, e = i % D;
      float best = NONE, sum = 0.0f, weight = 0.0f;
      for (int w = 0; w < C::WARPS; w++) best = scratch.merged[w][g][P] > best ? scratch.merged[w][g][P] : best;
      for (int w = 0; w < C::WARPS; w++) {
        const float keep = ptx::exp2_fast(scratch.merged[w][g][P] - best);
        sum += scratch.merged[w][g][e] * keep, weight += scratch.merged[w][g][P + 1] * keep;
      }
      put(g, e, best, sum, weight);
    }
  }

  // The result of one stretch [D + 2] for who merges them.
  FINIAL_DEVICE static void keep_part(float* to, int e, float best, float sum, float weight) {
    to[e] = sum;
    if (e == 0) to[D] = best, to[D + 1] = weight;
  }

  // put(g, e, value): the stretches together, in their order; part(g, s) is where the result of one is.
  template <class Part, class Put>
  FINIAL_DEVICE static void merge(int active, int heads, Part part, Put put) {
    for (int i = threadIdx.x; i < heads * D; i += C::WARPS * 32) {
      const int g = i / D, e = i % D;
      float best = NONE, sum = 0.0f, weight = 0.0f;
      for (int s = 0; s < active; s++) {
        const float other = ptx::load_shared_by_all(part(g, s) + D);
        best = other > best ? other : best;
      }
      for (int s = 0; s < active; s++) {
        const float* from = part(g, s);
        const float keep = ptx::exp2_fast(ptx::load_shared_by_all(from + D) - best);
        sum += ptx::load_shared_by_all(from + e) * keep;
        weight += ptx::load_shared_by_all(from + D + 1) * keep;
      }
      put(g, e, sum / weight);
    }
  }

  FINIAL_DEVICE static float at_or_zero(const float* row, int i) { return P == D || i < D ? row[i] : 0.0f; }
  FINIAL_DEVICE static float* parts(const AttendArgs& a, int row, int head, int split) {
    return a.parts + (((u64)row * C::HEADS * C::GROUP + head) * SPLITS + split) * (D + 2);
  }
  FINIAL_DEVICE static void put(const AttendArgs& a, int row, int column, float v) {
    if (C::HALF)
      ((u16*)a.out)[(u64)row * a.out_stride + column] = to_bf16(v);
    else
      a.out[(u64)row * a.out_stride + column] = v;
  }
  FINIAL_DEVICE static u64 address(const i32* pages, int position, int which, int head) {
    const int slot = pages[position / C::PAGE] * C::PAGE + position % C::PAGE;
    return cache_at(slot, which, head, C::HEADS, Cache::ROW_BYTES);
  }

  template <bool ALONE>
  FINIAL_DEVICE static void prepare(const AttendItem& item, Scratch& scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = item.heads + (item.newest ? 1 : 0);
    const float log2e = 1.4426950408889634f;
    for (int h = warp; h < rows; h += C::WARPS) {
      const bool is_key = h == item.heads;
      const float* from = is_key ? item.k : item.q + h * D;
      const float* weight = is_key ? item.k_norm : item.q_norm;
      float* to = scratch.queries[is_key ? GB : h];
      float squares = 0.0f;
      for (int i = lane; i < D; i += 32) {
        const float v = ptx::load_shared_by_all(from + i);
        squares += v * v;
        to[i] = v;
      }
      if (C::FUSED && C::NORMED) {
        const float inverse = ptx::reciprocal_root(warp_sum(squares) / (float)D + item.eps);
        for (int i = lane; i < D; i += 32) to[i] *= inverse * weight[i];
      }
      if (!C::FUSED)
        for (int i = lane; i < D; i += 32) to[i] *= item.scale * log2e;
    }
    if (C::FUSED)
      for (int i = threadIdx.x; i < D / 2; i += C::WARPS * 32)
        rotation(item.position, item.frequencies[i], item.rope_scale, &scratch.cosine[i], &scratch.sine[i]);
    Team::sync();
    if (!C::FUSED) return;
    for (int i = threadIdx.x; i < rows * (D / 2); i += C::WARPS * 32) {
      const int h = i / (D / 2), e = i % (D / 2);
      float* head_row = scratch.queries[h == item.heads ? GB : h];
      const float factor = h == item.heads ? 1.0f : item.scale * log2e;
      const float first = head_row[e], second = head_row[e + D / 2];
      head_row[e] = (first * scratch.cosine[e] - second * scratch.sine[e]) * factor;
      head_row[e + D / 2] = (second * scratch.cosine[e] + first * scratch.sine[e]) * factor;
    }
    Team::sync();
    if (!item.newest) return;
    const bool keeps = !ALONE || item.keeps;
    if (warp == 0) {
      if (ALONE) Cache::store(item.fresh, scratch.queries[GB]);
      if (keeps) Cache::store(item.cache + at_slot(item, 0), scratch.queries[GB]);
    }
    if (warp == C::WARPS - 1) {
      for (int i = lane; i < D; i += 32) scratch.value[i] = ptx::load_shared_by_all(item.v + i);
      ptx::sync_warp();
      if (ALONE) Cache::store(item.fresh + Cache::ROW_BYTES, scratch.value);
      if (keeps) Cache::store(item.cache + at_slot(item, 1), scratch.value);
    }
    Team::sync();
  }
  FINIAL_DEVICE static u64 at_slot(const AttendItem& item, int which) {
    return cache_at(item.slot, which, item.head, C::HEADS, Cache::ROW_BYTES);
  }
};

template <class C>
FINIAL_DEVICE void attend(const AttendArgs& a) {
  Attend<C>::run(a);
}

// The same preparation for many rows, in place in q, before a kernel that attends for all of them.  Cache, D, HEADS,
// GROUP, NORMED; grid (rows, HEADS · (GROUP + 2)); one warp a head: queries, then keys, then values.
template <class C>
FINIAL_DEVICE void prepare_rows(const AttendArgs& a) {
  __shared__ float values[C::D];
  ptx::allow_next();
  ptx::wait_previous();
  const int row = blockIdx.x, lane = threadIdx.x, heads = C::HEADS * C::GROUP;
  const int kind = blockIdx.y < heads ? 0 : blockIdx.y < heads + C::HEADS ? 1 : 2;
  const int head = kind == 0 ? blockIdx.y : kind == 1 ? blockIdx.y - heads : blockIdx.y - heads - C::HEADS;
  const int slot = a.slots[row], position = a.positions[row];
  const float* from = kind == 0 ? a.q + (u64)row * a.q_stride : (kind == 1 ? a.k : a.v) + (u64)row * a.kv_stride;
  float squares = 0.0f;
  for (int i = lane; i < C::D; i += 32) {
    values[i] = ptx::load_shared_by_all(from + head * C::D + i);
    squares += values[i] * values[i];
  }
  if (kind < 2) {
    if (C::NORMED) {
      const float* weight = kind == 0 ? a.q_norm : a.k_norm;
      const float inverse = ptx::reciprocal_root(warp_sum(squares) / (float)C::D + a.eps);
      for (int i = lane; i < C::D; i += 32) values[i] *= inverse * weight[i];
    }
    ptx::sync_warp();
    for (int i = lane; i < C::D / 2; i += 32) {
      float c, s;
      rotation(position, a.frequencies[i], a.rope_scale, &c, &s);
      const float first = values[i], second = values[i + C::D / 2];
      values[i] = first * c - second * s, values[i + C::D / 2] = second * c + first * s;
    }
  }
  ptx::sync_warp();
  if (kind == 0) {
    for (int i = lane; i < C::D; i += 32) {
      if (C::HALF)
        ((u16*)a.out)[(u64)row * a.out_stride + head * C::D + i] = to_bf16(values[i] * a.scale * 1.4426950408889634f);
      else
        a.out[(u64)row * a.out_stride + head * C::D + i] = values[i];
    }
  } else if (slot >= 0) {
    C::Cache::store(a.cache + cache_at(slot, kind - 1, head, C::HEADS, C::Cache::ROW_BYTES), values);
  }
}
