// What a block of the forward leaves behind: the log-sum-exp, and the output or, for Combine, a share of it.
#pragma once

#include "schedule.cuh"
#include "softmax.cuh"

namespace flash_attn {

// -inf without sinks.
template <class Scalar>
FA_DEVICE Scalar sink_of(const ForwardParams& p, int head, int row) {
  if (p.sink == nullptr) return -infinity<Scalar>();
  return static_cast<const Scalar*>(p.sink)[p.rows_are_heads ? head * p.seqlen_q + row : head];
}

// Rows of a packed tensor that are no sequence's, as rows that see no key.
template <class T, class A, int BLOCK_M>
FA_DEVICE void clear_rows_of_no_sequence(const ForwardParams& p, const ForwardWork<BLOCK_M>& work) {
  using Scalar = AccumOf<T>;
  const Scalar* sink = static_cast<const Scalar*>(p.sink);
  clear_spare_rows<A>(p, p.cu_seqlens_q, p.total_q, work.batch, work.query_begin / BLOCK_M,
                      ceil_div(p.seqlen_q, BLOCK_M), [&](int64_t row, int col) {
                        head_rows<T>(p.out, 0, work.head, row)[col] = T{};
                        *head_rows<Scalar>(p.lse, 0, work.head, row) = sink ? sink[work.head] : infinity<Scalar>();
                      });
}

// Writes the log-sum-exp of the block's first `rows` rows, keeps it in softmax.sum, and leaves in `scale` what the rows
// of the output are to be multiplied by, `factor` included.
template <class Scalar, class Rows, int BLOCK_M>
FA_DEVICE void finish_rows(const ForwardParams& p, const ForwardWork<BLOCK_M>& work, const Sequence& seq, int rows,
                           Scalar factor, OnlineSoftmax<Scalar, Rows>& softmax, Rows& scale) {
  Scalar* lse = head_rows<Scalar>(p.lse, work.batch, work.head, seq.first_q + work.query_begin);
  Rows sinks;
  Rows::for_each([&](int slot, int row, bool) {
    sinks[slot] = sink_of<Scalar>(p, work.head, work.query_begin + min_int(row, rows - 1));
  });
  Rows::for_each([&](int slot, int, bool) {
    const RowResult<Scalar> result(softmax.max[slot], softmax.sum[slot], sinks[slot]);
    scale[slot] = result.scale * factor;
    softmax.sum[slot] = result.lse;
  });
  Rows::for_each([&](int slot, int row, bool owner) {
    if (owner && row < rows) lse[row] = softmax.sum[slot];
  });
}

// The block's chunk, not normalised, for Combine.
template <class Scalar, class Rows, class Output, int BLOCK_M>
FA_DEVICE void write_partial(const ForwardParams& p, const ForwardWork<BLOCK_M>& work, int rows,
                             OnlineSoftmax<Scalar, Rows>& softmax, Output& output) {
  const int64_t first =
      ((int64_t(work.split) * p.batch + work.batch) * p.heads_q + work.head) * p.seqlen_q + work.query_begin;
  Scalar* max = static_cast<Scalar*>(p.partial_max) + first;
  Scalar* sum = static_cast<Scalar*>(p.partial_sum) + first;
  Scalar* out = static_cast<Scalar*>(p.partial_out) + first * p.head_dim;
  Rows::for_each([&](int slot, int row, bool owner) {
    if (owner && row < rows) {
      max[row] = softmax.max[slot];
      sum[row] = softmax.sum[slot];
    }
  });
  Output::for_each([&](int, int row, int col, int reg) {
    if (row < rows && col < p.head_dim) out[int64_t(row) * p.head_dim + col] = output[reg];
  });
}

// Where an element of the output goes; with column 0 the row's log-sum-exp.
template <class T, class Scalar>
class FoldedElement {
 public:
  FA_DEVICE FoldedElement(const ForwardParams& p, const Sequence& seq, int batch, int head, int row, int col)
      : out_(head_rows<T>(p.out, batch, head, seq.first_q) + (row * p.out.row_stride + col)),
        lse_(col == 0 ? head_rows<Scalar>(p.lse, batch, head, seq.first_q) + row : nullptr),
        sink_(sink_of<Scalar>(p, head, row)) {}

  // Once its chunks are folded, times `factor`.
  FA_DEVICE void write(const ChunkFold<Scalar>& fold, Scalar factor) const {
    const RowResult<Scalar> result(fold.max, fold.sum, sink_);
    *out_ = narrow<T>(fold.out * (result.scale * factor));
    if (lse_ != nullptr) *lse_ = result.lse;
  }

 private:
  T* out_;
  Scalar* lse_;
  Scalar sink_;
};

}  // namespace flash_attn
