// csrc/cuda/sm90/launch.cuh on the host: tensor maps alone.
#pragma once

#include <algorithm>

#include "../../core/registry.h"
#include "tma.cuh"

namespace flash_attn {
namespace sm90 {

inline CUtensorMap tensor_map(const TensorRef& t, DType dtype, int batch, int rows, int heads, int head_dim,
                              int box_rows, int box_cols = 64, bool = false) {
  return {static_cast<const char*>(t.data),
          {head_dim, rows, heads, batch},
          {1, t.row_stride, t.head_stride, t.batch_stride},
          box_rows,
          box_cols,
          is_16_bit(dtype) ? 2 : 4};
}

int multiprocessors();
template <class K>
void run_blocks(typename K::Launched);
template <class K>
void launch_blocks(const typename K::Launched&, int64_t, int, int, void*);
struct ClustersAtOnce {
  int largest(int64_t) const;
};
template <class K, int MOST>
const ClustersAtOnce& clusters_at_once(int);

}  // namespace sm90
}  // namespace flash_attn
