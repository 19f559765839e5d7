// What all parts of the persistent kernel know: its arguments, its table's entries, what lies where.
//
// backends/cuda/mega/layout.py and room.py have the same numbers; tests hold both together.
#pragma once
#include "attend.cuh"
#include "ring.cuh"
#include "sample.cuh"
#include "units.cuh"

struct MegaArgs {
  const i32* table;      // [blocks, ENTRIES, 8]
  const u8* streams;     // units in the order of each block's entries
  const u64* offsets;    // [blocks], where each stream begins
  const float* vectors;  // see Parts::Vectors
  const float* frequencies;
  const u8 *embed, *embed_scales;
  u8* const* caches;  // [layers]
  const i32* pages;   // [B, page_stride]
  i32* state;         // [B, 4]: token, position, active, tokens that the row may still get
  float *x0, *x1;     // [B, D]: input of a layer, input of its second half
  float *qkv, *attn, *act;
  float* parts;             // [items, SPLITS, GB, HD + 2]; with WHOLE u8 [blocks, key and value, Cache::ROW_BYTES]
  u32* tickets;             // [items], zero between launches
  u32* counters;            // every COUNTER_STRIDE-th
  u64* candidates;          // [2, blocks, B]
  float* logits;            // [B, V]
  i32* tokens;              // [2, B]
  const Request* requests;  // [B]
  const double* draws;      // [steps, B]
  const i32* stops;         // [B, STOPS], -1 for none
  u64* ring;                // [ring_rows, ring_stride] of the host: epoch in the high half, token in the low
  u32* control;  // error (0, or 1 + the block's number); steps since the counters were zero; entry of the error
  u64 limit_ns;  // of every wait
  i32 steps, page_stride, ring_rows, ring_stride, epoch, padding;
};

enum Kind {
  QKV,
  ATTEND,
  OUTPUT,
  GATE_UP,
  DOWN,
  HEAD,
  SAMPLE,
  TOKEN,
  MLP_UP,
  MLP_DOWN,
  GROUP_ATTEND,
  GROUP_OUTPUT,
  END = -1
};
constexpr int ATTENDS_AND_KEEPS = 2;
constexpr int COUNTER_STRIDE = 32, STOPS = 8;
constexpr i32 ROW_ENDED = -2, NOT_FINITE = -1;

struct alignas(16) Entry {
  i32 kind, layer, first, count, wait, target, signal, stages;
};

// Format, Embed, Cache; L, D, H, KV, HD, F, V; B rows of TERMS terms; WARPS, STAGES, STAGE_UNITS, BULK; GA row groups
// summed at once; SPLITS, GB, U, LEAST positions of a split; PAGE, WINDOW, EPS, ROPE_SCALE, SCALE; NORMED, BIAS,
// SAMPLED; MLP, OWN neurons of a block at most; DOWN_PARTS, DOWN_WHOLE, BY_HEAD, WHOLE (see table.py); ENTRIES of a
// block, SCRATCH bytes.
template <class C>
struct Parts {
  using U = Unit<typename C::Format>;
  using Team = FirstThreads<C::WARPS * 32>;
  static constexpr bool CHANNELS = C::Format::CHANNELS;
  static constexpr int THREADS = C::WARPS * 32, B = C::B, ROWS = B * C::TERMS, D = C::D, GA = C::GA;
  static constexpr int GROUP = C::H / C::KV, QKV_ROWS = C::KV * (GROUP + 2) * C::HD, ATTN = C::H * C::HD;
  static constexpr int PARTS = ceil_div(GROUP, C::GB);
  static_assert(ROWS <= 16 && C::STAGE_UNITS % C::WARPS == 0, "a tile of mma holds all rows, a stage feeds all warps");
  static_assert(D % 4 == 0 && C::F % 4 == 0 && ATTN % 4 == 0, "x is read four values at a time");

  FINIAL_DEVICE static constexpr int most(int a, int b) { return a > b ? a : b; }
  FINIAL_DEVICE static constexpr int four(int n) { return round_up(n, 4); }
  // A row of x in shared memory: 64 bytes more than a multiple of 128, so that of 8 lanes no two meet in a bank.
  // Down comes in parts of its columns, whole units each; DOWN's `first` is part · row groups + row group.
  static constexpr int F_UNITS = ceil_div(C::F, 32), PART = ceil_div(F_UNITS, C::DOWN_PARTS) * 32;
  static constexpr int F_MOST = C::DOWN_WHOLE || PART > C::F ? C::F : PART;
  static constexpr int KMAX = most(most(D, C::BY_HEAD ? C::GB * C::HD : ATTN), C::MLP ? 0 : F_MOST),
                       STRIDE = round_up(KMAX, 64) + 32;
  static constexpr int X_BYTES = round_up(ROWS * STRIDE * 2, 128), SUMS = C::WARPS * GA * ROWS * 8;
  static constexpr int CHUNK = 128, SQUARES = ceil_div(D, CHUNK);  // values of a warp's turn when x is read

  // Of the vectors: offsets in a layer, then those after the layers.
  static constexpr int ATTN_NORM = 0, MLP_NORM = four(D), Q_NORM = 2 * four(D);
  static constexpr int K_NORM = Q_NORM + (C::NORMED ? four(C::HD) : 0),
                       QKV_BIAS = K_NORM + (C::NORMED ? four(C::HD) : 0);
  static constexpr int QKV_SCALES = QKV_BIAS + (C::BIAS ? round_up(QKV_ROWS, 8) : 0);
  static constexpr int O_SCALES = QKV_SCALES + (CHANNELS ? round_up(QKV_ROWS, 8) : 0);
  static constexpr int GATE_UP_SCALES = O_SCALES + (CHANNELS ? round_up(D, 8) : 0);
  static constexpr int DOWN_SCALES = GATE_UP_SCALES + (CHANNELS ? round_up(2 * C::F, 8) : 0);
  static constexpr int LAYER = DOWN_SCALES + (CHANNELS ? round_up(D, 8) : 0);
  static constexpr int FINAL_NORM = C::L * LAYER, HEAD_SCALES = FINAL_NORM + four(D);

  struct RingShape {
    static constexpr int SLOT_BYTES = C::STAGE_UNITS * U::BYTES, STAGES = C::STAGES, WARPS = C::WARPS;
    static constexpr bool BULK = C::BULK;
  };
  using Stages = Ring<RingShape>;

  struct AttendShape {
    using Cache = typename C::Cache;
    static constexpr int D = C::HD, HEADS = C::KV, GROUP = C::H / C::KV, GB = C::GB, WARPS = C::WARPS, U = C::U,
                         SPLITS = C::SPLITS, PAGE = C::PAGE, WINDOW = C::WINDOW;
    static constexpr bool FUSED = true, NORMED = C::NORMED, HALF = false;
  };
  using Attention = Attend<AttendShape, Team>;
  struct SampleShape {
    static constexpr int THREADS = C::WARPS * 32;
  };
  using Sampler = Sample<SampleShape, Team>;

  struct State {
    typename Stages::Barriers barriers;
    u32 failed[2];  // the wait's verdict, in turn: nobody reads the one that is written
    u32 broken;     // a stage did not come in time
    u32 left;       // the workers are gone
    u32 begins;     // there is something to do
    u32 ticket;
    u32 done;  // steps since the counters were zero
    i32 token[B], position[B], active[B], remaining[B], next[B];
    float inverse[B], squares[B * SQUARES];
  };
  static_assert(sizeof(State) <= 4096, "room.py leaves so much");
  // Neurons of a block, as terms: [TERMS, B, OWN], with 16 bytes more a row so that rows lie in other banks.
  static constexpr int OWN_STRIDE = C::OWN + 8, OWN_BYTES = C::MLP ? round_up(ROWS * OWN_STRIDE * 2, 128) : 0;
  static_assert(!C::MLP || (!U::BLOCKS && C::OWN % 8 == 0 && C::TERMS >= 2), "octets of neurons; y lies over x");
  static constexpr int RING = C::STAGES * RingShape::SLOT_BYTES, TABLE = round_up(C::ENTRIES * (int)sizeof(Entry), 128);
  static_assert(C::SCRATCH % 16 == 0 && C::SCRATCH >= X_BYTES + SUMS * 4 && X_BYTES % 16 == 0, "x and sums");
  // A block that attends by itself leaves the result where x lies, and works beyond it.
  static constexpr int ATTEND_AT = C::WHOLE ? X_BYTES : 0;
  static_assert(C::SCRATCH >= ATTEND_AT + (int)sizeof(typename Attention::Scratch), "attention");
  static_assert(C::BY_HEAD || !C::WHOLE, "who attends by itself has the columns of a head group");
  static_assert(!C::SAMPLED || C::SCRATCH >= (int)sizeof(typename Sampler::Scratch), "sampling");
  static constexpr int SHARED = RING + C::SCRATCH + OWN_BYTES + TABLE + 4096;

  struct Memory {  // of a block
    u8 *ring, *scratch;
    u16* own;
    Entry* table;
    State* state;
    FINIAL_DEVICE u16* x() const { return (u16*)scratch; }
    FINIAL_DEVICE float* sums() const { return (float*)(scratch + X_BYTES); }
  };
  FINIAL_DEVICE static Memory memory(u8* shared) {
    u8* own = shared + RING + C::SCRATCH;
    return {shared, shared + RING, (u16*)own, (Entry*)(own + OWN_BYTES), (State*)(own + OWN_BYTES + TABLE)};
  }

  FINIAL_DEVICE static bool is_product(int kind) {
    return kind != ATTEND && kind != SAMPLE && kind != TOKEN && kind != GROUP_ATTEND;
  }
  // Head groups: PARTS of each key/value head; GROUP_OUTPUT's `first` is head group · row groups + row group.
  static constexpr int ROW_GROUPS = ceil_div(D, 8);
  FINIAL_DEVICE static int group_heads(int part) { return GROUP - part * C::GB < C::GB ? GROUP - part * C::GB : C::GB; }
  FINIAL_DEVICE static int group_columns(const Entry& entry) {
    return group_heads(entry.first / ROW_GROUPS % PARTS) * C::HD;
  }
  FINIAL_DEVICE static bool is_grouped(const Entry& entry) { return C::BY_HEAD && entry.kind == GROUP_OUTPUT; }
  FINIAL_DEVICE static bool is_part(const Entry& entry) { return C::DOWN_PARTS > 1 && entry.kind == DOWN; }
  FINIAL_DEVICE static int down_first(const Entry& entry) {
    return is_part(entry) ? F_UNITS * (entry.first / ROW_GROUPS) / C::DOWN_PARTS * 32 : 0;
  }
  FINIAL_DEVICE static int down_columns(const Entry& entry) {
    if (!is_part(entry)) return C::F;
    const int end = F_UNITS * (entry.first / ROW_GROUPS + 1) / C::DOWN_PARTS * 32;
    return (end < C::F ? end : C::F) - down_first(entry);
  }
  // The first row group of a product's entry.
  FINIAL_DEVICE static int row_group(const Entry& entry) {
    return is_grouped(entry) || is_part(entry) ? entry.first % ROW_GROUPS : entry.first;
  }
  // Row groups of a stage of MLP_DOWN: as many whole ones as a slot holds, the same number for every warp.
  FINIAL_DEVICE static int down_groups(int octets) {
    return RingShape::SLOT_BYTES / (octets * (U::BYTES / 4)) / C::WARPS * C::WARPS;
  }

  // A wait that took too long, noted once; every other wait sees it and ends too.
  FINIAL_DEVICE static void fail(const MegaArgs& a, int entry) {
    if (ptx::replace_if(a.control, 0, 1 + blockIdx.x)) ptx::store_volatile(a.control + 2, (u32)entry);
  }

  // Whether a wait must end: looks at the clock and at what others noted only now and then.
  struct Patience {
    u64 start = 0;
    u32 looks = 0;
    FINIAL_DEVICE bool over(const MegaArgs& a, int entry) {
      if (++looks % 64) return false;
      if (ptx::load_volatile(a.control)) return true;
      const u64 now = ptx::nanoseconds();
      if (start == 0) start = now;
      if (now - start <= a.limit_ns) return false;
      fail(a, entry);
      return true;
    }
  };

  FINIAL_DEVICE static void embedding(const MegaArgs& a, int token, int plane, float out[4]) {
    using E = typename C::Embed;
    constexpr int KP = round_up(D, 64);
    const u8* weight = a.embed + (u64)token * (KP / E::UNIT * 16);
    const u8* scales = a.embed_scales + (u64)token * (E::CHANNELS ? 4 : KP / 32 * 2);
    const auto raw = E::load(weight, scales, plane * 4 / E::UNIT);
    E::plane(raw, plane % (E::UNIT / 4), out);
    const float scale = E::CHANNELS ? *(const float*)scales : E::scale(raw);
    for (int i = 0; i < 4; i++) out[i] *= scale;
  }
};
