// FinishDq: dQ from the accumulator in device memory, in the arch's fragment order, to its own dtype and strides.
#pragma once

#include "backward.cuh"

namespace flash_attn {

template <class Arch, class P>
struct FinishDq {
  using Params = BackwardParams;
  using Main = Backward<Arch, P>;  // whose fragments these are
  using T = typename Main::T;
  using Scalar = typename Main::Scalar;
  using A = typename Main::A;
  using QueryGradient = typename Main::QueryGradient;
  using Tile = typename A::template Tile<T, Main::kM, Main::kD, kStaging>;
  static constexpr int kThreads = A::kThreads, kMinBlocks = 1, kSharedBytes = Tile::kBytes, kStashBytes = 0;
  static constexpr int kBlockM = Main::kM, kBlockN = Main::kN;

  static int64_t blocks(const Params& p) { return int64_t(ceil_div(p.seqlen_q, kBlockM)) * p.heads_q * p.batch; }

  static FA_DEVICE void run(const Params& p, int64_t block, char* shared) {
    const HeadItem at(uint32_t(block), ceil_div(p.seqlen_q, kBlockM), p.heads_q);
    const int first_row = at.item * kBlockM, head = at.head, batch = at.batch;
    const Sequence seq(p, batch);
    const int rows = seq.len_q - first_row;
    if (rows <= 0) return;

    const int64_t slot = place_of_queries<int64_t>(p, batch, head, seq.first_q, first_row, kBlockM);
    QueryGradient dq;
    A::restore(dq, static_cast<const Scalar*>(p.dq_accum) + slot * (kBlockM * Main::kD));
    QueryGradient::for_each([&](int, int, int, int reg) { dq[reg] *= Scalar(p.softmax_scale); });
    Tile tile(shared);
    tile.put(dq);
    A::sync();
    tile.write(head_rows<T>(p.dq, batch, head, seq.first_q + first_row), p.dq.row_stride, rows, p.head_dim,
               p.aligned);
  }
};

}  // namespace flash_attn
