// From torch tensors to the structures a kernel takes. Python has checked the arguments before, for its callers; this
// checks them again, for whoever calls the operator itself: nothing that passes can make a kernel read out of bounds.
#pragma once

#include "binding/tensors.h"

namespace flash_attn {

inline const OptionalTensor kNoTensor;

// Positions and their sums stay inside an int; element offsets are 64 bits wide everywhere.
constexpr int64_t kMaxLength = int64_t{1} << 30;

// The arguments that forward and backward share, as torch hands them over; names as in the operators' schemas.
struct Arguments {
  const Tensor& q;  // [batch, seqlen_q, heads_q, head_dim], or [total_q, heads_q, head_dim] when packed
  const Tensor& k;  // [batch, seqlen_k, heads_kv, head_dim], or [total_k, heads_kv, head_dim], or pages
  const Tensor& v;  // k's shape
  const OptionalTensor& cu_seqlens_q;  // int32 [batch + 1]
  const OptionalTensor& cu_seqlens_k;  // int32 [batch + 1]
  const OptionalTensor& seqused_k;     // int32 [batch]
  const OptionalTensor& alibi_slopes;  // float32 [heads_q] or [batch, heads_q]
  const OptionalTensor& sink;          // accum [heads_q]
  const OptionalTensor& rng_state;     // int64 [2]
  int64_t max_seqlen_q, max_seqlen_k;
  double softmax_scale;
  int64_t window_left, window_right;
  double softcap, dropout_p;
  bool performance_mode;
  const OptionalTensor& block_table = kNoTensor;  // int32 [batch, pages], the last stride 1
};

// Everything but out, lse and what a block table says. Throws std::invalid_argument, saying argument, wanted, got and
// fix.
AttentionParams read_arguments(const Arguments& arguments);

// What it says.
void read_pages(const Arguments& arguments, ForwardParams& params);

// Throw, as the above does, unless the tensor is on like's device, of that dtype, of that shape, its last stride 1.
void require_beside(const char* name, const Tensor& tensor, const Tensor& like);
void require_dtype(const char* name, const Tensor& tensor, int32_t dtype);
void require_shape(const char* name, const Tensor& tensor, const Shape& shape);
void require_unit_stride(const char* name, const Tensor& tensor);

// The kernels' dtype for q.
DType read_dtype(const Tensor& q);

// int32, contiguous; null where absent.
const int32_t* read_int32s(const char* name, const OptionalTensor& tensor, const Tensor& like, const Shape& shape);

// int32 [batch, pages of a sequence], with room for `keys` in pages of the shape [pages, page_size, ...].
struct PageTable {
  const int32_t* entries;
  int64_t stride;
  int columns;
};
PageTable read_table(const Tensor& table, const Tensor& like, const Shape& pages, int64_t batch, int64_t keys);

// The shape of softmax_lse and delta: [batch, heads_q, seqlen_q], packed [heads_q, total_q].
Shape rows_shape(const AttentionParams& params);
bool is_packed(const AttentionParams& params);

// A tensor of `shape` in params.dtype beside `like`: as read, or (writable) also as one whose elements do not overlap.
TensorRef read_tensor(const char* name, const Tensor& tensor, const Tensor& like, DType dtype);
TensorRef write_tensor(const char* name, const Tensor& tensor, const Tensor& like, DType dtype);

// One accum value a query row; see rows_shape.
RowsRef read_rows(const char* name, const Tensor& tensor, const Tensor& like, const AttentionParams& params);

// May a kernel use 16-byte accesses on this tensor: pointer, strides and row length all being multiples?
bool is_aligned(const TensorRef& ref, const Tensor& tensor, DType dtype);

// On the CPU, where looking costs nothing: do the packed sequences leave rows of q (of k) that belong to none?
bool has_unowned_rows_q(const AttentionParams& params);
bool has_unowned_rows_k(const AttentionParams& params);

}  // namespace flash_attn
