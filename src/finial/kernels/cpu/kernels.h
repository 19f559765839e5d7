// The table of kernels that each instruction set fills in, and the shapes they agree on.
//
// Every kernel is sequential: it works on the range of items that one thread was given. Which thread takes which range
// never changes a result, because an item's arithmetic depends on that item alone. All activations are float32; a
// packed weight (packed.h) takes them rounded.
#pragma once

#include <cstdint>

namespace finial {

// Weight formats, in the order of FORMATS in formats.py; quants.py defines the byte layouts.
enum class Format : int { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, COUNT };

struct FormatInfo {
  const char* name;
  int block;        // elements
  int block_bytes;  // bytes
};

inline constexpr FormatInfo FORMATS[] = {
    {"f32", 1, 4},    {"f16", 1, 2},    {"bf16", 1, 2},     {"q8_0", 32, 34},   {"q4_0", 32, 18},   {"q4_1", 32, 20},
    {"q5_0", 32, 22}, {"q5_1", 32, 24}, {"q4_k", 256, 144}, {"q5_k", 256, 176}, {"q6_k", 256, 210},
};

struct Linear {
  const uint8_t* weight;  // [n_out, n_in] in `format`, rows row_bytes apart, no alignment promised
  const float* bias;      // [n_out] or null
  int64_t n_in, n_out, row_bytes;
  Format format;
  const uint8_t* packed = nullptr;  // panels (packed.h) where `rounding` of the format is not None
  int64_t stride = 0;               // bytes from one panel to the next
};

constexpr int64_t PANEL = 32;  // outputs of a panel of packed weights

// What activations are rounded to for a weight. None: to nothing, and the weight stays where it is; F32: to nothing,
// for panels.
enum class Rounding : int { None, F32, BF16, INT8 };
constexpr int ROUNDINGS = 4;

// One product with packed weights, or two whose results meet: y = silu(x first^T) * (x second^T).
struct Product {
  const Linear* first;
  const Linear* second;  // null: one
  const uint8_t* x;      // rounded rows
  const float* add;      // [rows, n_out] added to the result, or null
  float* y;              // [rows, n_out]; may be `add`
  int64_t rows;
  int64_t begin, end;  // the tiles of rows that take part, at most Blocking::group
  // None, or y holds the result rounded, as the next product's x; then n_out is a multiple of PANEL and add is null.
  Rounding as = Rounding::None;
};

// Whether few rows ask ahead for weights, and few queries for keys and values, with AVX-512 and AVX2: what a processor
// gains depends on how far its own prefetching reaches, not on its instructions.
enum class Ask { Nothing, Near, Far };  // into the first-level cache, into the second
struct Asking {
  bool always;  // else only beside much arithmetic, and where memory is not read in order
  Ask how;
  int64_t distance = 8192;  // of weights, in bytes, if always
};
extern Asking asking;  // what this processor gains from (isa.cpp); tests try the others

// How many rows meet a panel.
struct Blocking {
  int64_t tile;         // rows that meet a panel at once; so few are read with it in one pass
  int64_t group;        // tiles that meet it together
  int64_t group_bytes;  // of a group's rounded rows: with two panels they fit the second-level cache
  int64_t panels;       // panels of a matrix that meet many rows together
};

enum class CacheType : int { F32, BF16, Q8_0 };

// Bytes of one position's key, or value, of one head. Q8_0 wants a head_dim of whole blocks of 32.
inline int64_t cache_row_bytes(CacheType type, int64_t head_dim) {
  return type == CacheType::F32 ? 4 * head_dim : type == CacheType::BF16 ? 2 * head_dim : head_dim / 32 * 34;
}

// Positions are taken in chunks of this many, aligned to position 0: the unit of the online softmax, and of sharing
// one row's attention among threads.
constexpr int64_t ATTENTION_CHUNK = 256;

// Positions that a blocked cache keeps together.
constexpr int64_t CACHE_BLOCK = 32;

// One layer's keys and values: [group of pages][kv_head][chunk of the group][2: k, v][page of the chunk][position]
// [head_dim]. A chunk is the pages that hold ATTENTION_CHUNK positions; a group is as many chunks as make a large
// memory page (what is left makes smaller ones): pages that follow each other are read as one run, and a short context
// still takes little memory.
//
// Blocked, within blocks of 32 positions: keys [head_dim / 2][position][2], values [position / 2][head_dim][2], which
// is how an instruction for pairs of bf16 takes them, lanes being keys or elements of values.
struct Cache {
  uint8_t* data;
  CacheType type;
  bool blocked;
  int64_t pages, page_size, kv_heads, head_dim;
  int64_t chunk, group;  // in pages

  Cache(uint8_t* data, CacheType type, bool blocked, int64_t pages, int64_t page_size, int64_t kv_heads,
        int64_t head_dim)
      : data(data),
        type(type),
        blocked(blocked),
        pages(pages),
        page_size(page_size),
        kv_heads(kv_heads),
        head_dim(head_dim) {
    constexpr int64_t LARGE = int64_t{2} << 20;
    chunk = page_size < ATTENTION_CHUNK ? ATTENTION_CHUNK / page_size : 1;
    const int64_t bytes = chunk * kv_heads * 2 * run_bytes();
    group = bytes < LARGE ? LARGE / bytes * chunk : chunk;
  }

  int64_t row_bytes() const { return cache_row_bytes(type, head_dim); }
  int64_t run_bytes() const { return page_size * row_bytes(); }  // one page's keys, or values, of one head
  uint8_t* keys(int64_t page, int64_t head) const { return place(page, head, 0); }
  uint8_t* values(int64_t page, int64_t head) const { return place(page, head, 1); }

  // A position in a blocked cache: its key's pairs of elements lie 4 CACHE_BLOCK bytes apart, its value's elements side
  // by side with those of the position that makes the pair.
  struct Blocked {
    uint8_t *key, *value;
  };
  Blocked blocked_at(int64_t slot, int64_t head) const {
    const int64_t page = slot / page_size, at = slot % page_size, within = at % CACHE_BLOCK;
    const int64_t block = (at - within) * row_bytes();
    return {keys(page, head) + block + within * 4, values(page, head) + block + within / 2 * head_dim * 4};
  }

 private:
  uint8_t* place(int64_t page, int64_t head, int64_t which) const {
    const int64_t in_group = page % group, first = page - in_group, in_chunk = in_group % chunk;
    const int64_t grouped = pages - first < group ? pages - first : group, before = in_group - in_chunk;
    const int64_t together = grouped - before < chunk ? grouped - before : chunk;
    return data + ((first * kv_heads + head * grouped + before) * 2 + which * together + in_chunk) * run_bytes();
  }
};

struct AttentionPiece;

struct Attention {
  const float* q;  // [rows, heads * head_dim], heads = kv_heads * group; head h reads kv head h / group
  float* out;      // like q
  Cache cache;
  const int32_t* positions;  // [rows]
  const int32_t* sequence;   // [rows]: which row of `pages`
  const int32_t* pages;      // [sequences, pages_per_sequence]
  int64_t pages_per_sequence;
  int64_t group;
  int64_t window;  // positions seen, counting the row's own; 0 sees all
  float scale;
  const AttentionPiece* next = nullptr;  // what the thread is likely to take then, or null: a hint of what to ask for
};

// What one thread takes at once: neighbouring rows of one sequence, one kv head, chunks [begin, end) of positions.
struct AttentionPiece {
  int64_t row, rows, head, begin, end;
};

struct Kernels {
  const char* name;
  Blocking blocking;
  // y[t, o] = sum_k x[t, k] w[o, k] + bias[o] for t < rows and begin <= o < end. x is [rows, n_in], y [rows, n_out].
  void (*linear)(const Linear&, const float* x, float* y, int64_t rows, int64_t begin, int64_t end, float* scratch);
  // Floats that `linear` wants as scratch.
  int64_t (*linear_scratch)(const Linear&, int64_t rows);
  // How this instruction set wants the activations of a format; None: `linear` multiplies, else `multiply`.
  Rounding (*rounding)(Format);
  void (*pack)(const Linear&, uint8_t* panels, int64_t begin, int64_t end);  // begin <= i < end, each at i * stride
  void (*unpack)(const Linear&, int64_t row, float* out);  // a row of packed bf16, q8_0 or q4_0 as decode gives it
  void (*round)(Rounding, const float* x, int64_t n_in, int64_t rows, uint8_t* tile);  // a tile of x [rows, n_in]
  void (*multiply)(const Product&, int64_t begin, int64_t end);                        // panels begin <= i < end
  void (*rest)();  // for a thread whose step is done: what it holds of the processor is given up
  // Nothing but the multiplying instruction, on registers, `rounds` times; returns the operations done, 0 without one.
  int64_t (*peak)(Rounding, int64_t rounds, float* sink);
  // n elements, the start on a block boundary and n whole blocks.
  void (*decode)(Format, const uint8_t* source, int64_t n, float* out);
  // partial null: the piece holds every chunk that its rows see, and their outputs are written. Otherwise each chunk
  // leaves rows * group * attention_partial floats there, and `attention_merge` makes the outputs of them.
  void (*attention)(const Attention&, const AttentionPiece&, float* partial, float* scratch);
  void (*attention_merge)(const Attention&, const AttentionPiece&, const float* partial, float* scratch);
  int64_t (*attention_scratch)(CacheType, int64_t head_dim, int64_t queries);  // floats; queries: rows * group
  int64_t (*attention_partial)(CacheType, int64_t head_dim);                   // floats of one query and chunk
  int64_t (*attention_queries)(CacheType);                                     // queries that a piece does well to hold
  // Whether a cache may be blocked, if pages and rows allow it; what queries and attention weights are rounded to, None
  // or BF16.
  bool (*attention_in_blocks)(CacheType);
  Rounding (*attention_rounding)(CacheType);
  // Keys and values, [rows, kv_heads * head_dim], of items begin <= i < end, an item being a head of a row, to the
  // rows' slots of a blocked cache.
  void (*store_blocked)(const Cache&, const float* keys, const float* values, const int32_t* slots, int64_t begin,
                        int64_t end);
  void (*rms_norm)(const float* x, const float* weight, float* y, int64_t width, float eps);     // one group of `width`
  void (*rope)(const float* x, const float* cos, const float* sin, float* y, int64_t head_dim);  // one head; y may be x
  void (*store)(CacheType, const float* x, uint8_t* out, int64_t n);
  void (*add)(const float* a, const float* b, float* y, int64_t n);
  void (*silu_mul)(const float* gate, const float* up, float* y, int64_t n);
  void (*exp)(const float* x, float* y, int64_t n);
  int64_t (*highest)(const float* x, int64_t n);  // the index, n >= 1: the lowest among ties, or of the first NaN
  float (*largest)(const float* x, int64_t n);    // of n >= 1 that are no NaN
  // exp((x - best) / temperature) for x <= best and temperature > 0, within 1e-12 of itself; below exp(-700) that.
  void (*weigh)(const float* x, int64_t n, float best, double temperature, double* out);
  float (*read)(const float* x, int64_t n);  // touches n floats with wide loads; for the bandwidth probe
};

// The kernels of one instruction set, by name; null when the build has none. "" is the best that this CPU runs, or what
// the environment variable FINIAL_CPU_ISA names. Throws std::runtime_error when that is unknown or not supported here.
const Kernels* find_kernels(const char* isa);

}  // namespace finial
