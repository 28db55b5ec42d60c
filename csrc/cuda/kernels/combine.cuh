// Combine: folds the chunks that Forward's blocks left, in ascending order, with Forward's own arithmetic.
#pragma once

#include "../attention/dropout.cuh"
#include "../attention/epilogue.cuh"
#include "../tile/tile.cuh"

namespace flash_attn {

template <class Arch, class P>
struct Combine {
  using Params = ForwardParams;
  using T = typename P::Element;
  using Scalar = AccumOf<T>;
  static constexpr int kRows = 4, kWarps = 4;
  using A = typename Arch::template Block<kWarps>;
  static constexpr int kThreads = A::kThreads, kMinBlocks = 1, kSharedBytes = 0, kStashBytes = 0;
  static constexpr int kBlockM = kRows, kBlockN = 1;

  static int64_t blocks(const Params& p) { return int64_t(ceil_div(p.seqlen_q, kRows)) * p.heads_q * p.batch; }

  static FA_DEVICE void run(const Params& p, int64_t block, char*) {
    const int row_blocks = ceil_div(p.seqlen_q, kRows);
    const int first_row = int(block % row_blocks) * kRows;
    const int head = int(block / row_blocks % p.heads_q);
    const int batch = int(block / row_blocks / p.heads_q);
    const Sequence seq(p, batch);
    const int rows = min_int(kRows, seq.len_q - first_row);
    for (int e = A::lane(); e < rows * p.head_dim; e += kThreads) {
      fold_element(p, seq, batch, head, first_row + e / p.head_dim, e % p.head_dim);
    }
  }

  static FA_DEVICE void fold_element(const Params& p, const Sequence& seq, int batch, int head, int row, int col) {
    Scalar max = -infinity<Scalar>(), sum = 0, out = 0;
    for (int split = 0; split < p.num_splits; ++split) {
      const int64_t at = ((int64_t(split) * p.batch + batch) * p.heads_q + head) * p.seqlen_q + row;
      Scalar keep, add;
      fold_weights(max, sum, static_cast<const Scalar*>(p.partial_max)[at],
                   static_cast<const Scalar*>(p.partial_sum)[at], keep, add);
      out = fma_rn(static_cast<const Scalar*>(p.partial_out)[at * p.head_dim + col], add, out * keep);
    }
    const RowResult<Scalar> result(max, sum, sink_of<Scalar>(p, head, row));
    head_rows<T>(p.out, batch, head, seq.first_q)[row * p.out.row_stride + col] =
        narrow<T>(out * (result.scale * kept_scale<Scalar>(p)));
    if (col == 0) head_rows<Scalar>(p.lse, batch, head, seq.first_q)[row] = result.lse;
  }
};

}  // namespace flash_attn
