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

  static int64_t blocks(const Params& p) { return int64_t(ceil_div(p.seqlen_q, kRows)) * p.heads_q * p.batch; }

  static FA_DEVICE void run(const Params& p, int64_t block, char*) {
    const int row_blocks = ceil_div(p.seqlen_q, kRows);
    const HeadItem at(uint32_t(block), row_blocks, p.heads_q);
    const int first_row = at.item * kRows, head = at.head, batch = at.batch;
    const Sequence seq(p, batch);
    clear_spare_rows<A>(p, p.cu_seqlens_q, p.total_q, batch, first_row / kRows, row_blocks,
                        [&](int64_t row, int col) {
                          if (col == 0) *head_rows<Scalar>(p.delta, 0, head, row) = Scalar(0);
                          head_rows<T>(p.dq, 0, head, row)[col] = T{};
                        });
    if (first_row >= seq.len_q) return;

    const int64_t row = seq.first_q + first_row;
    const Scalar* dlse = p.dlse.data == nullptr ? nullptr : head_rows<const Scalar>(p.dlse, batch, head, row);
    Scalar* delta = head_rows<Scalar>(p.delta, batch, head, row);
    A::template dot_rows<T, kRows, kD>(head_rows<const T>(p.dout, batch, head, row), p.dout.row_stride,
                                       head_rows<const T>(p.out, batch, head, row), p.out.row_stride,
                                       min_int(kRows, seq.len_q - first_row), p.head_dim, p.aligned,
                                       [&](int r, Scalar sum) { delta[r] = dlse == nullptr ? sum : sum - dlse[r]; });
  }
};

}  // namespace flash_attn
