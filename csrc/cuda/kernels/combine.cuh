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
  static constexpr int kWarps = 4;
  using A = typename Arch::template Block<kWarps>;
  static constexpr int kThreads = A::kThreads, kMinBlocks = 1, kSharedBytes = 0, kStashBytes = 0;
  static constexpr int kBlockM = 1, kBlockN = 1;

  // A thread has one element, where a row is no longer than a block.
  static FA_HOST_DEVICE int rows_at_once(const Params& p) { return max_int(1, kThreads / p.head_dim); }
  static int64_t blocks(const Params& p) {
    return int64_t(ceil_div(p.seqlen_q, rows_at_once(p))) * p.heads_q * p.batch;
  }

  static FA_DEVICE void run(const Params& p, int64_t block, char*) {
    const HeadItem at(uint32_t(block), ceil_div(p.seqlen_q, rows_at_once(p)), p.heads_q);
    const int first_row = at.item * rows_at_once(p), head = at.head, batch = at.batch;
    const Sequence seq(p, batch);
    const int rows = min_int(rows_at_once(p), seq.len_q - first_row);
    for (int e = A::lane(); e < rows * p.head_dim; e += kThreads) {
      fold_element(p, seq, batch, head, first_row + e / p.head_dim, e % p.head_dim);
    }
  }

  static FA_DEVICE void fold_element(const Params& p, const Sequence& seq, int batch, int head, int row, int col) {
    const int64_t first = (int64_t(batch) * p.heads_q + head) * p.seqlen_q + row;
    const int64_t rows_of_split = int64_t(p.batch) * p.heads_q * p.seqlen_q;
    const auto* const maxima = static_cast<const Scalar*>(p.partial_max);
    const auto* const sums = static_cast<const Scalar*>(p.partial_sum);
    const auto* const outs = static_cast<const Scalar*>(p.partial_out);
    const auto fold = fold_chunks<Scalar>(p.num_splits, [&](int split) {
      const int64_t at = first + split * rows_of_split;
      return Chunk<Scalar>{maxima[at], sums[at], outs[at * p.head_dim + col]};
    });
    FoldedElement<T, Scalar>(p, seq, batch, head, row, col).write(fold, kept_scale<Scalar>(p));
  }
};

}  // namespace flash_attn
