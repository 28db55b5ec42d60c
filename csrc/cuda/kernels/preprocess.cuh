// Preprocess: delta = rowsum(dO * out) - dLSE, what dS subtracts from dP. The second term is the gradient of a loss
// that uses the log-sum-exp: d lse / d score = P. Clears dq's spare rows.
#pragma once

#include "../attention/schedule.cuh"
#include "../tile/tile.cuh"

namespace flash_attn {

template <class Arch, class P>
struct Preprocess {
  using Params = BackwardParams;
  using T = typename P::Element;
  using Scalar = AccumOf<T>;
  static constexpr int kD = P::kHeadDim, kRows = 64, kWarps = 4;
  using A = typename Arch::template Block<kWarps>;
  static constexpr int kThreads = A::kThreads, kMinBlocks = 1, kSharedBytes = 0, kStashBytes = 0;
  static constexpr int kBlockM = kRows, kBlockN = 1;

  // Rows of a packed batch, whosever they are, are those of one sequence.
  static FA_HOST_DEVICE int row_blocks(const Params& p) {
    return ceil_div(p.cu_seqlens_q == nullptr ? p.seqlen_q : p.total_q, kRows);
  }
  static int64_t blocks(const Params& p) {
    return int64_t(row_blocks(p)) * p.heads_q * (p.cu_seqlens_q == nullptr ? p.batch : 1);
  }

  static FA_DEVICE void run(const Params& p, int64_t block, char*) {
    const HeadItem at(uint32_t(block), row_blocks(p), p.heads_q);
    const int row = at.item * kRows, head = at.head, batch = at.batch;
    int end = p.seqlen_q;
    if (p.cu_seqlens_q != nullptr) {
      end = max_int(0, min_int(uniform(p.cu_seqlens_q[p.batch]), p.total_q));
      for (int spare = max_int(row, end); spare < min_int(row + kRows, p.total_q); ++spare) {
        for (int col = A::lane(); col < p.head_dim; col += A::kThreads) {
          if (col == 0) *head_rows<Scalar>(p.delta, 0, head, spare) = Scalar(0);
          head_rows<T>(p.dq, 0, head, spare)[col] = T{};
        }
      }
    }
    if (row >= end) return;

    const Scalar* dlse = p.dlse.data == nullptr ? nullptr : head_rows<const Scalar>(p.dlse, batch, head, row);
    Scalar* delta = head_rows<Scalar>(p.delta, batch, head, row);
    A::template dot_rows<T, kRows, kD>(head_rows<const T>(p.dout, batch, head, row), p.dout.row_stride,
                                       head_rows<const T>(p.out, batch, head, row), p.out.row_stride,
                                       min_int(kRows, end - row), p.head_dim, p.aligned,
                                       [&](int r, Scalar sum) { delta[r] = dlse == nullptr ? sum : sum - dlse[r]; });
  }
};

}  // namespace flash_attn
