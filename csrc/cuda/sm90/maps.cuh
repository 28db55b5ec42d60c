// Tensor maps of what has a row for each query or for each key.
#pragma once

#include "launch.cuh"
#include "pages.cuh"

namespace flash_attn {
namespace sm90 {

inline CUtensorMap map_queries(const AttentionParams& p, const TensorRef& t, int box_rows, int box_cols = 64) {
  return p.cu_seqlens_q ? tensor_map(t, p.dtype, 1, p.total_q, p.heads_q, p.head_dim, box_rows, box_cols)
                        : tensor_map(t, p.dtype, p.batch, p.seqlen_q, p.heads_q, p.head_dim, box_rows, box_cols);
}
inline CUtensorMap map_keys(const AttentionParams& p, const TensorRef& t, int box_rows, int box_cols = 64,
                            bool streamed = false) {
  const int batch = p.cu_seqlens_q ? 1 : p.batch, rows = p.cu_seqlens_q ? p.total_k : p.seqlen_k;
  return tensor_map(t, p.dtype, batch, rows, p.heads_kv, p.head_dim, box_rows, box_cols, streamed);
}

// Or in pages, boxes as large as pages allow.
inline CUtensorMap map_keys(const ForwardParams& p, const TensorRef& t, int box_rows, int box_cols = 64,
                            bool streamed = false) {
  if (p.block_table == nullptr) {
    return map_keys(static_cast<const AttentionParams&>(p), t, box_rows, box_cols, streamed);
  }
  return tensor_map(t, p.dtype, p.pages, p.page_size, p.heads_kv, p.head_dim, rows_of_page_box(p, box_rows), box_cols,
                    streamed);
}

}  // namespace sm90
}  // namespace flash_attn
