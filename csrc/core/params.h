// The plain structures that travel from the binding to a kernel. Passed to GPU kernels by value.
//
// Shapes stand in brackets, strides are in elements. "accum" is float, or double for fp64 inputs.
// A batch is either padded ([batch, seq, heads, dim], cu_seqlens null) or packed ("varlen":
// [total, heads, dim], batch_stride 0, sequence b holding rows cu_seqlens[b] to cu_seqlens[b + 1]).
#pragma once

#include <cstdint>

namespace flash_attn {

enum class DType : int8_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

constexpr bool is_16_bit(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

constexpr int kMaxHeadDim = 256;

// For dividing by n without a division: x / n is the high word of x * inverse_of(n), or, up to x = 2^30, one more.
constexpr uint32_t inverse_of(int n) { return 0xffffffffu / uint32_t(n); }

// What an instance may do to scores before the softmax: nothing but scale them; softcap; softcap, ALiBi and dropout.
enum class Modifiers : int8_t { kNone, kSoftcap, kAny };

// Which pages of keys and values an instance reads where they lie; of one that holds a whole sequence the size does not
// matter.
enum class Pages : int8_t {
  kNone,
  kBlocks,  // of whole blocks of its keys
  kBoxes,   // of a multiple of eight keys, whose rows allow 16-byte access
  kAny,
};

// [batch, seq, heads, dim]; the dim stride is always 1.
struct TensorRef {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
};

// [batch, heads_q, seq_q] when padded, [heads_q, total_q] when packed; the row stride is 1. accum.
struct RowsRef {
  void* data;
  int64_t batch_stride;  // 0 when packed
  int64_t head_stride;
};

// How attention/softcap.cuh caps raw scores where tanh is a polynomial; results in log2 units.
struct SoftcapSeries {
  float terms[3];          // of the raw score's even powers, which make its factor
  float end;               // larger raw scores, in magnitude, take exponentials instead
  float exponent;          // from raw scores to 2 log2(e) times tanh's argument
  float exponent_end;      // end * exponent, in magnitude
  float cap, inverse_cap;
};

// What the forward and the backward share.
struct AttentionParams {
  TensorRef q, k, v, out;
  RowsRef lse;  // natural logarithm, sink included; +inf for a row that sees no key and has no sink

  int batch, heads_q, heads_kv, head_dim;
  int seqlen_q, seqlen_k;         // padded: the lengths; packed: the maxima
  int total_q, total_k;           // packed: rows in all; padded: batch * seqlen
  const int32_t* cu_seqlens_q;    // [batch + 1] or null
  const int32_t* cu_seqlens_k;    // [batch + 1] or null
  const int32_t* seqused_k;       // [batch] or null: keys in use, at most the sequence's length

  double softmax_scale;
  float softcap;                  // 0: off; else scores become softcap * tanh(score / softcap)
  int window_left, window_right;  // keys visible either side of the diagonal; -1: no bound
  const float* alibi_slopes;      // [heads_q] or [batch, heads_q], or null
  int64_t alibi_batch_stride;
  const void* sink;               // [heads_q] accum, or null: one more logit in every row's sum

  float dropout_p;                // 0: off
  const int64_t* rng_state;       // [2] seed and offset, in device memory; null when dropout_p == 0

  DType dtype;
  bool performance_mode;          // 16-bit data: multiplied in bf16, P and dS narrowed toward zero
  bool aligned;                   // every pointer and stride of q k v out (dout) allows 16-byte access
  // Launch order, no bits depend on it: blocks of this many heads (query heads in the forward, KV heads in the
  // backward) are interleaved, the longest first. Filled by the backend; at least 1.
  int head_group;
  SoftcapSeries softcap_series;   // Filled by the backend where softcap > 0
};

struct ForwardParams : AttentionParams {
  // Keys are folded in chunks of split_size (a multiple of block_n, boundaries at absolute multiples);
  // 0: one chunk. num_splits > 1: as many blocks share a row's chunks, and a combine kernel folds them.
  int split_size;
  int num_splits;
  bool deterministic;             // no split by heuristic: the batch's size must not change a row's bits
  // accum [num_splits, batch, heads_q, seqlen_q, head_dim], not normalised. With num_splits 1: the running folds of a
  // kernel that has them in device memory, KernelInfo::stash_device_bytes for each thread block.
  void* partial_out;
  void* partial_max;              // accum [num_splits, batch, heads_q, seqlen_q], log2 units
  void* partial_sum;              // accum [num_splits, batch, heads_q, seqlen_q]
  // [batch, heads_q, seqlen_q, seqlen_k] in q's dtype, contiguous, or null: probabilities, negative where dropped.
  void* s_dmask;
  // The rows of a head are query heads that share its keys, one query each, rather than queries of one head.
  bool rows_are_heads;
  // Zero on entry: blocks that take one tile after another count here those taken. Null: tiles are dealt out.
  uint32_t* tiles_taken;
  // Keys and values in pages, [pages, page_size, heads_kv, head_dim]: row r of a sequence is row r % page_size of page
  // block_table[batch, r / page_size], cu_seqlens_k telling lengths only. Null: padded or packed.
  const int32_t* block_table;
  int64_t block_table_stride;
  int pages, page_size;
  uint32_t page_inverse;          // inverse_of(page_size)
};

struct BackwardParams : AttentionParams {
  TensorRef dout, dq, dk, dv;
  RowsRef dlse;                   // gradient of the returned LSE; data null: zero
  RowsRef delta;                  // rowsum(dout * out) - dlse, written by the preprocess kernel
  void* dq_accum;                 // sums of query blocks, accum, in fragment order; zero on entry
  int32_t* dq_turn;               // [heads_q, query blocks], zero on entry: who has added; null: order is free
  // A persistent kernel stores the first addition to a sum, so that dq_accum may hold anything on entry, needs dq_turn
  // in any case, and writes dq itself: a block the share of the block before it by this number; negative: afterwards.
  int dq_lag;
  int dq_heads;                   // KV heads (of batch * heads_kv) whose sums there is room for at a time
  int32_t* dq_progress;           // [2, batch * heads_kv], zero on entry: blocks that have added, shares written
  uint32_t* blocks_taken;         // zero on entry: how many blocks the thread blocks of a persistent kernel took
  bool deterministic;
};

// New rows for a cache of keys and values, and queries to rotate.
struct AppendParams {
  TensorRef q, rotated_q;         // [batch, seqlen_q, heads_q, head_dim]; rotated_q data null: not asked for
  TensorRef k, v;                 // [batch, seqlen_new, heads_kv, head_dim]
  TensorRef k_cache, v_cache;     // [pages, page_size, heads_kv, head_dim]
  int batch, heads_q, heads_kv, head_dim;
  int seqlen_q, seqlen_new;
  // As in ForwardParams; without a table sequence b has page b alone.
  const int32_t* block_table;     // [batch, pages_of_sequence] or null
  int64_t block_table_stride;
  int pages, page_size, pages_of_sequence;
  const int32_t* seqlens;         // [batch]: keys in the cache before
  int32_t* seqlens_after;         // [batch]: and afterwards, written
  const void* rotary_cos;         // [rotary_positions, rotary_pairs]; the last stride is 1
  const void* rotary_sin;
  int64_t cos_stride, sin_stride;
  int rotary_pairs;               // 0: rows are copied as they are
  int rotary_positions;
  bool tables_are_accum;          // else of the dtype
  bool interleaved;               // pairs are neighbours rather than two halves
  bool queries_advance;           // query i stands at seqlens + i, else all of them at seqlens
  DType dtype;
  bool aligned;                   // every pointer and stride of tensors and caches allows 16-byte access
};

}  // namespace flash_attn
