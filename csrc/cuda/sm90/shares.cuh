// A few rows whose keys are shared out among the thread blocks of a cluster, which fold them among themselves: each
// folds some columns, and all send it their share of these. That takes no device memory, and no Combine.
#pragma once

#include "../attention/epilogue.cuh"
#include "tma.cuh"

namespace flash_attn {
namespace sm90 {

// One thread block's part of it, in shared memory at `room`. Columns go by eight, as a fragment has them, to the thread
// blocks in turn.
template <int D>
class ShareExchange {
 public:
  static constexpr int kMostShares = 16, kRows = 16;  // thread blocks of a cluster; rows, those of one warp
  static constexpr int kOctets = D / 8;
  static constexpr int kOutBytes = (kOctets + kMostShares - 1) * kRows * 8 * 4;
  static constexpr int kBytes = kOutBytes + kMostShares * kRows * 8;

  FA_DEVICE ShareExchange(char* room, int shares, int rank)
      : room_(room), shares_(shares), rank_(rank), octets_(ceil_div(kOctets, shares)) {}

  // By the warp whose rows these are, when all thread blocks have begun. Theirs to read after sync_cluster().
  template <class Softmax, class Output>
  FA_DEVICE void send(int rows, Softmax& softmax, Output& output) const {
    const int lane = int(threadIdx.x) % 32;
    const uint32_t outs = shared_address(room_), stats = outs + kOutBytes;
    FA_UNROLL
    for (int slot = 0; slot < 2; ++slot) {
      const int row = lane / 4 + 8 * slot;
      if (row >= rows) continue;
      for (int to = lane % 4; to < shares_; to += 4) {
        store_in_cluster(cluster_address(stats + stat_at(rank_, row) * 8, to), softmax.max[slot], softmax.sum[slot]);
      }
      int to = 0, octet = 0;
      FA_UNROLL
      for (int reg = 2 * slot; reg < kOctets * 4; reg += 4) {
        store_in_cluster(cluster_address(outs + out_at(rank_, octet, row, lane % 4 * 2) * 4, to), output[reg],
                         output[reg + 1]);
        if (++to == shares_) to = 0, ++octet;
      }
    }
  }

  // Folds this thread block's columns of the sequence's rows, and writes them. By `threads`, of which this is number
  // `thread`.
  template <class T>
  FA_DEVICE void fold(const ForwardParams& p, const Sequence& seq, int batch, int head, int thread, int threads) const {
    const float* const outs = reinterpret_cast<const float*>(room_);
    const float2* const stats = reinterpret_cast<const float2*>(room_ + kOutBytes);
    for (int e = thread; e < octets_ * seq.len_q * 8; e += threads) {
      const int octet = e / 8 / seq.len_q, row = e / 8 % seq.len_q, col = (octet * shares_ + rank_) * 8 + e % 8;
      if (col >= p.head_dim) continue;
      ChunkFold<float> fold;
#pragma unroll 4
      for (int share = 0; share < shares_; ++share) {
        const float2 of_row = stats[stat_at(share, row)];
        fold.add(of_row.x, of_row.y, outs[out_at(share, octet, row, e % 8)]);
      }
      write_folded<T>(p, seq, batch, head, row, col, 1.0f, fold);
    }
  }

 private:
  FA_DEVICE int stat_at(int share, int row) const { return share * kRows + row; }
  FA_DEVICE int out_at(int share, int octet, int row, int col) const {
    return ((share * octets_ + octet) * kRows + row) * 8 + col;
  }

  char* const room_;
  const int shares_, rank_, octets_;
};

}  // namespace sm90
}  // namespace flash_attn
