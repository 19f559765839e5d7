// Attention of many rows on tensor cores, over a paged cache: tiles of up to 64 query rows, 64 keys at a time.
//
// Reference: backends/reference.py attention.  Queries (already normed, rotated and scaled by log2 e / sqrt D) and
// softmax weights are rounded to bf16, keys and values are as cached (f32 and q8_0 rounded to bf16); maxima and sums
// are float32. The query heads of a group lie side by side in a tile, so that they share each key and value.  The shape
// of the loop is FlashAttention-2's (Dao 2023, arXiv:2307.08691, algorithm 1): a warp owns 16 rows and walks all keys
// that they see.
#pragma once
#include "cache.cuh"

struct FlashArgs {
  const u16* q;  // bf16 [rows, q_stride]
  const u8* cache;
  const i32* tiles;  // [tiles, 4]: row of the page table, first row, rows (0: nothing to do), position of the first row
  const i32* pages;  // [sequences, page_stride]
  void* out;         // [rows, out_stride]
  i32 q_stride, out_stride, page_stride, padding;
};

// Cache, RAW (the cache is bf16), D, HEADS (key/value), GROUP, TOKENS (rows of a tile), PAGE, WINDOW (0: none), HALF.
template <class C>
struct Flash {
  using Cache = typename C::Cache;
  static constexpr int D = C::D, GROUP = C::GROUP, KEYS = 64, WARPS = 4,
                       STRIDE = 2 * D + 16;  // bytes, odd in chunks of 16
  static constexpr int QUERY_BYTES = 64 * STRIDE, KEY_BYTES = KEYS * STRIDE;
  static constexpr float NONE = -1e30f;

  // Keys or values of 64 positions; beyond `end` zeros, so that nothing unwritten is ever multiplied.
  FINIAL_DEVICE static void copy(u8* tile, const FlashArgs& a, const i32* pages, int begin, int end, int which,
                                 int head) {
    constexpr int VECS = D / Cache::VEC;
    for (int i = threadIdx.x; i < KEYS * VECS; i += WARPS * 32) {
      const int key = i / VECS, vec = i % VECS, at = begin + key < end ? begin + key : end - 1;
      const int slot = pages[at / C::PAGE] * C::PAGE + at % C::PAGE;
      const u8* row = a.cache + cache_at(slot, which, head, C::HEADS, Cache::ROW_BYTES);
      u8* to = tile + key * STRIDE + vec * Cache::VEC * 2;
      if (C::RAW) {
        ptx::copy_async(to, row + vec * 16, begin + key < end);
      } else {
        float v[Cache::VEC];
        Cache::decode(Cache::load(row, vec), v);
#pragma unroll
        for (int e = 0; e < Cache::VEC; e += 2)
          ((u32*)to)[e / 2] = begin + key < end ? ptx::pack_bf16(v[e], v[e + 1]) : 0;
      }
    }
  }

  FINIAL_DEVICE static void run(const FlashArgs& a) {
    FINIAL_DYNAMIC_SHARED(memory);
    u8* const queries = memory;
    u8* const keys = memory + QUERY_BYTES;    // two of them in turn
    u8* const values = keys + 2 * KEY_BYTES;  // likewise
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const i32* tile = a.tiles + 4 * (gridDim.x - 1 - blockIdx.x);  // the deepest first
    const int head = blockIdx.y, sequence = tile[0], row0 = tile[1], count = tile[2], position0 = tile[3];
    ptx::allow_next();
    ptx::wait_previous();
    if (count == 0) return;
    const i32* pages = a.pages + (u64)sequence * a.page_stride;
    const int end = position0 + count;
    const int low = C::WINDOW > 0 && position0 >= C::WINDOW ? position0 - C::WINDOW + 1 : 0, begin = low / KEYS * KEYS;
    for (int i = threadIdx.x; i < 64 * (D / 8); i += WARPS * 32) {
      const int m = i / (D / 8), chunk = i % (D / 8), token = m / GROUP;
      const bool valid = token < count && m < C::TOKENS * GROUP;
      const u16* from =
          a.q + (u64)(row0 + (valid ? token : 0)) * a.q_stride + (head * GROUP + m % GROUP) * D + chunk * 8;
      ptx::copy_async(queries + m * STRIDE + chunk * 16, from, valid);
    }
    copy(keys, a, pages, begin, end, 0, head);
    ptx::copy_commit();
    copy(values, a, pages, begin, end, 1, head);
    ptx::copy_commit();

    float sums[D / 8][4], top[2] = {NONE, NONE}, total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[j][e] = 0.0f;
    // The last position that each of this thread's two rows sees; none for rows that are not there.
    int sees[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int m = warp * 16 + h * 8 + g;
      sees[h] = m < C::TOKENS * GROUP && m / GROUP < count ? position0 + m / GROUP : -1;
    }

    int turn = 0;
    for (int base = begin; base < end; base += KEYS, turn ^= 1) {
      const bool more = base + KEYS < end;
      if (more) copy(keys + (turn ^ 1) * KEY_BYTES, a, pages, base + KEYS, end, 0, head);
      ptx::copy_commit();
      ptx::copy_wait<2>();  // these keys (and the queries)
      ptx::sync_block();
      float scores[KEYS / 8][4];
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) scores[j][e] = 0.0f;
      const u8* key_tile = keys + turn * KEY_BYTES;
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        u32 left[4];
        ptx::load_matrix_x4(left, queries + (warp * 16 + lane % 16) * STRIDE + (k * 2 + lane / 16) * 16);
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
          u32 right[4];
          ptx::load_matrix_x4(right,
                              key_tile + (j * 16 + lane % 8 + lane / 16 * 8) * STRIDE + (k * 2 + lane / 8 % 2) * 16);
          ptx::mma_bf16(scores[2 * j], left, right);
          ptx::mma_bf16(scores[2 * j + 1], left, right + 2);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float best = top[h];
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int at = base + j * 8 + 2 * t + e;
            float& score = scores[j][2 * h + e];
            if (at > sees[h] || (C::WINDOW > 0 && at <= sees[h] - C::WINDOW)) score = NONE;
            best = score > best ? score : best;
          }
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) {
          const float other = ptx::shuffle_xor(best, offset);
          best = other > best ? other : best;
        }
        const float keep = ptx::exp2_fast(top[h] - best);
        top[h] = best, total[h] *= keep;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float& score = scores[j][2 * h + e];
            score = score <= NONE ? 0.0f : ptx::exp2_fast(score - best);
            total[h] += score;
          }
#pragma unroll
        for (int j = 0; j < D / 8; j++) sums[j][2 * h] *= keep, sums[j][2 * h + 1] *= keep;
      }
      if (more) copy(values + (turn ^ 1) * KEY_BYTES, a, pages, base + KEYS, end, 1, head);
      ptx::copy_commit();
      ptx::copy_wait<2>();  // these values
      ptx::sync_block();
      const u8* value_tile = values + turn * KEY_BYTES;
#pragma unroll
      for (int k = 0; k < KEYS / 16; k++) {
        const u32 left[4] = {ptx::pack_bf16(scores[2 * k][0], scores[2 * k][1]),
                             ptx::pack_bf16(scores[2 * k][2], scores[2 * k][3]),
                             ptx::pack_bf16(scores[2 * k + 1][0], scores[2 * k + 1][1]),
                             ptx::pack_bf16(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
          u32 right[4];
          ptx::load_matrix_x4_transposed(right, value_tile + (k * 16 + lane % 16) * STRIDE + (j * 2 + lane / 16) * 16);
          ptx::mma_bf16(sums[2 * j], left, right);
          ptx::mma_bf16(sums[2 * j + 1], left, right + 2);
        }
      }
      ptx::sync_block();  // the next round writes into what this one read
    }
    ptx::copy_wait<0>();
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) total[h] += ptx::shuffle_xor(total[h], offset);
      const int m = warp * 16 + h * 8 + g;
      if (sees[h] < 0) continue;
      const float inverse = 1.0f / total[h];
      const u64 to = (u64)(row0 + m / GROUP) * a.out_stride + (head * GROUP + m % GROUP) * D;
#pragma unroll
      for (int j = 0; j < D / 8; j++) {
        const float first = sums[j][2 * h] * inverse, second = sums[j][2 * h + 1] * inverse;
        const int column = j * 8 + 2 * t;
        if (C::HALF) {
          *(u32*)((u16*)a.out + to + column) = ptx::pack_bf16(first, second);
        } else {
          ((float*)a.out)[to + column] = first, ((float*)a.out)[to + column + 1] = second;
        }
      }
    }
  }
};

template <class C>
FINIAL_DEVICE void flash(const FlashArgs& a) {
  Flash<C>::run(a);
}
