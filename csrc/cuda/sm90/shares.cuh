// A few rows whose keys are shared out among the thread blocks of a cluster, which fold them among themselves: each
// folds some columns, and all send it their share of these. That takes no device memory, and no Combine.
#pragma once

#include "../attention/epilogue.cuh"
#include "tma.cuh"

namespace flash_attn {
namespace sm90 {

// One thread block's part of it, in shared memory at `room`. Columns go by eight, as a fragment has them, to the thread
// blocks in turn. Up to GROUPS warpgroups have a part of the thread block's share each.
template <int D, int GROUPS>
class ShareExchange {
 public:
  static constexpr int kMostShares = 16, kRows = 16;  // thread blocks of a cluster; rows, those of one warp
  static constexpr int kOctets = D / 8;
  static constexpr int kOutBytes = (kOctets + kMostShares - 1) * kRows * 8 * 4;
  static constexpr int kBytes = kOutBytes + kMostShares * kRows * 8;
  // A warpgroup's part: rows, padded against bank conflicts, and their maxima and sums.
  static constexpr int kPartRow = D + 8, kPartOut = kRows * kPartRow * 4, kPartBytes = kPartOut + kRows * 8;

  // Barrier `full` completes when all shares of this thread block's columns have come.
  FA_DEVICE ShareExchange(char* room, Barrier& full, int rows, int head_dim, int shares, uint32_t inverse_of_shares,
                          int rank)
      : room_(room),
        full_(full),
        rows_(rows),
        octets_(ceil_div(head_dim, 8)),
        shares_(shares),
        inverse_(inverse_of_shares),
        rank_(rank) {}

  // By one thread, before anybody sends. A thread block without columns is sent nothing, for it does not wait.
  FA_DEVICE void expect() const {
    const int octets = quotient(octets_ - 1 - rank_ + shares_);  // this thread block's
    full_.init(1);
    full_.arrive_expecting(octets > 0 ? shares_ * rows_ * (octets * 32 + 8) : 0);
  }

  // A warpgroup's part, by the warp whose rows these are.
  template <class Softmax, class Output>
  FA_DEVICE void keep(char* part, Softmax& softmax, Output& output) const {
    const int lane = int(threadIdx.x) % 32;
    FA_UNROLL
    for (int slot = 0; slot < 2; ++slot) {
      const int row = lane / 4 + 8 * slot;
      if (row >= rows_) continue;
      if (lane % 4 == 0) {
        reinterpret_cast<float2*>(part + kPartOut)[row] = make_float2(softmax.max[slot], softmax.sum[slot]);
      }
      float* const out = reinterpret_cast<float*>(part) + row * kPartRow + lane % 4 * 2;
      FA_UNROLL
      for (int octet = 0; octet < kOctets; ++octet) {
        const int reg = octet * 4 + 2 * slot;
        *reinterpret_cast<float2*>(out + octet * 8) = make_float2(output[reg], output[reg + 1]);
      }
    }
  }

  // The first `count` of the parts, `part_bytes` apart, folded, to the thread blocks that fold them further. By
  // `threads`, of which this is number `thread`.
  FA_DEVICE void send(const char* parts, int part_bytes, int count, int thread, int threads) const {
    const uint32_t room = shared_address(room_), full = shared_address(&full_);
    const int bits = row_bits(), outs = octets_ * 2 << bits;
    for (int e = thread; e < outs + (kMostShares << bits); e += threads) {
      const bool is_out = e < outs;
      const int at = is_out ? e : e - outs;  // four columns of a row, or a row for a thread block
      const int row = (is_out ? at / 2 : at) & ((1 << bits) - 1), octet = at / 2 >> bits;
      const int slot = quotient(octet), to = is_out ? octet - slot * shares_ : at >> bits;
      if (row >= rows_ || to >= min_int(shares_, octets_)) continue;
      ChunkFold<float> folds[4];
      FA_UNROLL
      for (int part = 0; part < GROUPS; ++part) {
        const char* const from = parts + part * part_bytes;
        const float2 stat = reinterpret_cast<const float2*>(from + kPartOut)[row];
        const float4 out = *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(from) + row * kPartRow +
                                                            (is_out ? octet * 8 + at % 2 * 4 : 0));
        folds[0].add(stat.x, stat.y, out.x, part < count);
        folds[1].add(stat.x, stat.y, out.y, part < count);
        folds[2].add(stat.x, stat.y, out.z, part < count);
        folds[3].add(stat.x, stat.y, out.w, part < count);
      }
      const uint32_t there = cluster_address(room, to), its_full = cluster_address(full, to);
      if (is_out) {
        store_in_cluster(there + out_at(rank_, slot, row, at % 2 * 4) * 4,
                         make_float4(folds[0].out, folds[1].out, folds[2].out, folds[3].out), its_full);
      } else {
        store_in_cluster(there + kOutBytes + stat_at(rank_, row) * 8, make_float2(folds[0].max, folds[0].sum),
                         its_full);
      }
    }
  }

  // Folds this thread block's columns, when they have come, and writes them. By `threads`.
  template <class T>
  FA_DEVICE void fold(const ForwardParams& p, const Sequence& seq, int batch, int head, int thread, int threads) const {
    const float* const outs = reinterpret_cast<const float*>(room_);
    const float2* const stats = reinterpret_cast<const float2*>(room_ + kOutBytes);
    const int bits = row_bits();
    for (int e = thread;; e += threads) {
      const int slot = e / 8 >> bits, row = e / 8 & ((1 << bits) - 1), col = (slot * shares_ + rank_) * 8 + e % 8;
      if (col >= p.head_dim) return;
      if (row >= rows_) continue;
      const FoldedElement<T, float> element(p, seq, batch, head, row, col);
      full_.wait(0);
      const auto fold = fold_chunks<float>(shares_, [&](int share) {
        const float2 stat = stats[stat_at(share, row)];
        return Chunk<float>{stat.x, stat.y, outs[out_at(share, slot, row, e % 8)]};
      });
      element.write(fold, 1.0f);
    }
  }

 private:
  // By the number of shares.
  FA_DEVICE int quotient(int x) const {
    const int high = int(uint64_t(uint32_t(x)) * inverse_ >> 32);
    return high + (x - high * shares_ >= shares_);
  }
  // Of a power of two that rows have room in.
  FA_DEVICE int row_bits() const { return rows_ > 8 ? 4 : rows_ > 4 ? 3 : rows_ > 2 ? 2 : rows_ > 1; }
  FA_DEVICE int stat_at(int share, int row) const { return share * kRows + row; }
  FA_DEVICE int out_at(int share, int slot, int row, int col) const {
    return ((slot * shares_ + share) * kRows + row) * 8 + col;
  }

  char* const room_;
  Barrier& full_;
  const int rows_, octets_, shares_;
  const uint32_t inverse_;
  const int rank_;
};

}  // namespace sm90
}  // namespace flash_attn
