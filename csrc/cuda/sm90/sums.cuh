// dQ from its sums in device memory, by warps that hold them as they multiplied: QueryGradient's registers, four at a
// time for each of the 256 threads that compute.
#pragma once

#include "../attention/schedule.cuh"
#include "../sm80/fragment.cuh"
#include "messages.cuh"
#include "rows.cuh"

namespace flash_attn {
namespace sm90 {

// Of blocks of BLOCK_M queries, WARPS_Q of eight warps along them.
template <class T_, int D, int BLOCK_M, int WARPS_Q>
struct QuerySums {
  using T = T_;
  static constexpr int kM = BLOCK_M, kWarps = 8, kThreads = kWarps * 32;
  using QueryGradient = sm80::Accumulator<float, kM, D, WARPS_Q, kWarps>;
  static constexpr int kRegs = QueryGradient::kRegs, kScratch = kTurnBytes<64, true>;  // bytes of a warp

  // The sum of a block of queries among those of all heads.
  static FA_DEVICE int index(const BackwardParams& p, const Sequence& seq, int batch, int head, int query) {
    return place_of_queries<int>(p, batch, head, seq.first_q, query, kM);
  }
  // Whether anything was added to it.
  static FA_DEVICE bool any(const Mask& mask, int query) {
    return mask.keys_begin(query) < mask.keys_end(min_int(query + kM, mask.len_q));
  }

  // This thread's registers; zeros where there is no sum.
  static FA_DEVICE void load(const float* sum, float (&value)[kRegs]) {
    FA_UNROLL
    for (int reg = 0; reg < kRegs; reg += 4) {
      float4 x{};
      if (sum != nullptr) {
        x = __ldcg(reinterpret_cast<const float4*>(sum + reg * kThreads + int(threadIdx.x) * 4));
      }
      value[reg] = x.x, value[reg + 1] = x.y, value[reg + 2] = x.z, value[reg + 3] = x.w;
    }
  }
  // To the first `rows` rows of dq.
  static FA_DEVICE void write(const BackwardParams& p, float (&value)[kRegs], char* scratch, T* dq, int rows) {
    static_assert(QueryGradient::kTilesM == 1);
    constexpr int kCols = QueryGradient::kWarpCols, kAtOnce = kCols % 64 == 0 ? 64 : kCols % 32 == 0 ? 32 : 16;
    const int warp = int(threadIdx.x) / 32, row = warp % WARPS_Q * 16, col = warp / WARPS_Q * kCols;
    T* const to = dq + row * p.dq.row_stride + col;
    FA_UNROLL
    for (float& x : value) x *= float(p.softmax_scale);
    FA_UNROLL
    for (int at = 0; at < kCols; at += kAtOnce) {
      write_rows<T, kAtOnce, kAtOnce == 64>(value + at / 2, scratch, to + at, p.dq.row_stride, rows - row,
                                            p.head_dim - col - at);
    }
  }

  // A block of queries whose sum is complete, from the thread that found it; at the end of a share, none.
  struct Complete {
    const float* sum;
    T* dq;  // the first row, or null
    int rows;
  };
  using Completions = Messages<Complete, 4>;

  // For those who compute: writes shares of dQ.
  class Writer {
   public:
    struct Rows {
      bool any = false;
      float value[kRegs] = {};  // lest registers be kept for what is not there
    };

    FA_DEVICE Writer(Completions& complete, const BackwardParams& p) : complete_(complete), p_(p) {}

    // The next rows, or those `ahead` of them, if there are any, on their way from device memory.
    FA_DEVICE void fetch(Rows& rows, int ahead = 0) {
      const volatile Complete& next = complete_.receive(written_ + ahead);
      rows.any = next.dq != nullptr;
      if (rows.any) load(next.sum, rows.value);
    }
    // `scratch`: the warp's.
    FA_DEVICE void write(Rows& rows, char* scratch) {
      const volatile Complete& of = complete_.at(written_);
      QuerySums::write(p_, rows.value, scratch, of.dq, of.rows);
      complete_.release(written_++);
    }
    // `rows` and whatever follows.
    FA_DEVICE void write_all(Rows& rows, char* scratch) {
      while (rows.any) {
        Rows next;
        fetch(next, 1);
        write(rows, scratch);
        rows = next;
      }
    }
    // After a share: so that its sums may make room for others.
    FA_DEVICE void end() { complete_.release(written_++); }

   private:
    Completions& complete_;
    const BackwardParams& p_;
    uint32_t written_ = 0;  // messages
  };

  // A kernel for sums that nobody has written: one a thread block.
  struct Kernel {
    using Launched = BackwardParams;
    static constexpr int kThreads = QuerySums::kThreads, kSharedBytes = kWarps * kScratch;

    static FA_HOST_DEVICE int64_t blocks(const BackwardParams& p) { return p.heads_q * query_blocks(p, kM); }

    const BackwardParams& p;
    char* const shared;

    FA_DEVICE Kernel(const BackwardParams& p, char* shared) : p(p), shared(shared) {}
    FA_DEVICE void run() {
      const HeadItem at(blockIdx.x, uint32_t(query_blocks(p, kM)), p.heads_q);
      const int place = at.item, head = at.head, batch = batch_of(place);
      const Sequence seq(p, batch);
      const int query = (place - int(first_query_block(p, batch, seq.first_q, kM))) * kM;
      if (query >= seq.len_q) return;
      const float* const sum = static_cast<const float*>(p.dq_accum) + int64_t(blockIdx.x) * (kM * D);
      float value[kRegs];
      load(any(Mask(p, seq), query) ? sum : nullptr, value);
      write(p, value, shared + int(threadIdx.x) / 32 * kScratch, head_rows<T>(p.dq, batch, head, seq.first_q + query),
            seq.len_q - query);
    }
    // The last sequence whose sums begin there, or before.
    FA_DEVICE int batch_of(int place) const {
      if (p.cu_seqlens_q == nullptr) return place / ceil_div(p.seqlen_q, kM);
      int batch = 0, end = p.batch;
      while (end - batch > 1) {
        const int middle = (batch + end) / 2, first = max_int(0, min_int(p.cu_seqlens_q[middle], p.total_q));
        (first_query_block(p, middle, first, kM) <= place ? batch : end) = middle;
      }
      return batch;
    }
  };
};

}  // namespace sm90
}  // namespace flash_attn
