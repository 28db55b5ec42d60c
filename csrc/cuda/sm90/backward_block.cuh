// What Hopper's backwards have in common: persistent thread blocks that take blocks of keys, scores transposed.
#pragma once

#include "../attention/schedule.cuh"
#include "../sm80/arch.cuh"
#include "key_block.cuh"
#include "maps.cuh"
#include "messages.cuh"
#include "packed.cuh"
#include "rows.cuh"
#include "sums.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace flash_attn {
namespace sm90 {

// A block of BLOCK_N keys at hand, and its walk over blocks of BLOCK_M queries. Of eight warps WARPS_Q lie along the
// queries of dQ. ADDERS threads know when a block's additions to dQ have landed, each of its own.
template <class T_, int D, int BLOCK_M, int BLOCK_N, int WARPS_Q, int ADDERS>
struct BackwardBlock : KeyBlock<BLOCK_M, BLOCK_N> {
  using Keys = KeyBlock<BLOCK_M, BLOCK_N>;
  using Keys::group, Keys::kM, Keys::kN, Keys::mask, Keys::p, Keys::seq, Keys::steps, Keys::take, Keys::walk,
      Keys::work;
  using Params = BackwardParams;
  using T = T_;
  using Scalar = float;
  static constexpr bool kPersistent = true;
  static constexpr int kBlockM = kM, kBlockN = kN, kStashBytes = 0;
  static constexpr int kComputing = 256, kThreads = 384;  // two warpgroups of three compute
  // A thread is launched with 168. What two warpgroups take the third must give, or they wait for ever.
  static constexpr int kComputingRegisters = 232, kLoadingRegisters = 40;
  static_assert(2 * kComputingRegisters + kLoadingRegisters <= 3 * 168);
  using A = Sm80::Block<kComputing / 32>;
  using Sums = QuerySums<T, D, kM, WARPS_Q>;
  using QueryGradient = typename Sums::QueryGradient;
  static_assert(Sums::kThreads == kComputing);
  using Announcements = sm90::Announcements<BackwardWork<kN>>;

  struct Launched {
    BackwardParams p;
    CUtensorMap q, k, v, dout;

    explicit Launched(const BackwardParams& p)
        : p(p),
          q(map_queries(p, p.q, kM)),
          k(map_keys(p, p.k, kN)),
          v(map_keys(p, p.v, kN)),
          dout(map_queries(p, p.dout, kM)) {}
  };

  static FA_HOST_DEVICE int64_t blocks(const Params& p) {
    return int64_t(ceil_div(p.seqlen_k, kN)) * p.heads_kv * p.batch;
  }
  static FA_HOST_DEVICE int64_t numbers(const Params& p) { return blocks(p) + (p.dq_lag > 0 ? p.dq_lag : 0); }
  static bool is_ragged(const Params& p) {
    return p.cu_seqlens_k != nullptr && PackedBlocks<kN>::pay(p.batch, p.total_k, p.seqlen_k);
  }
  // Of the kernel K, made of this, or of K::Ragged, for packed sequences of very different lengths: what the loading
  // warp does for them would slow others down.
  template <class K>
  static void launch_persistent(const void* params, int shared_bytes, void* stream) {
    const Params& p = *static_cast<const Params*>(params);
    const auto launch = is_ragged(p) ? &launch_blocks<typename K::Ragged> : &launch_blocks<K>;
    launch(Launched(p), std::min<int64_t>(numbers(p), multiprocessors()), 1, shared_bytes, stream);
    using Finish = typename Sums::Kernel;
    if (p.dq_lag < 0) launch_blocks<Finish>(p, Finish::blocks(p), 1, Finish::kSharedBytes, stream);
  }

  const Launched& launched;
  const int part;  // this thread's warpgroup, of the two that compute
  char* const shared;

  FA_DEVICE BackwardBlock(const Launched& launched, char* shared)
      : KeyBlock<BLOCK_M, BLOCK_N>(launched.p, 0), launched(launched), part(warpgroup()), shared(shared) {}

  // For the warp that loads: takes one block after another and tells the others. load_keys(n) is called for the n-th
  // block that has steps, load_queries(i) for each block, i being the number of its first step, to be advanced.
  // RAGGED: in K::Ragged.
  template <bool RAGGED, class LoadKeys, class LoadQueries>
  FA_DEVICE void load_blocks(Announcements& next, LoadKeys&& load_keys, LoadQueries&& load_queries) {
    if (first_lane()) {
      prefetch(launched.q);
      prefetch(launched.dout);
    }
    // Blocks are begun in their order, however many thread blocks there is room for at a time: each may wait for
    // those before it.
    uint32_t i = 0, loads = 0;
    PackedBlocks<kN> packed(p, p.cu_seqlens_k, p.total_k, p.seqlen_k, p.heads_kv, 1);
    for (uint32_t n = 0;; ++n) {
      const uint32_t block = take_block(p.blocks_taken);
      bool any = block < uint32_t(numbers(p));
      if (RAGGED) {
        HeadItem item;
        int key_blocks;
        any = any && packed.find(block, item, key_blocks);
        if (!any) return next.tell(n, {Announcement<BackwardWork<kN>>::kNone, {}});  // `work` need not be kept
        take(BackwardWork<kN>(p, key_blocks, item));
      } else if (has_keys(block)) {
        take(BackwardWork<kN>(p, block));
      }
      next.tell(n, {any ? block : Announcement<BackwardWork<kN>>::kNone, work});
      if (!any) return;
      if (!has_keys(block)) continue;
      if (steps() > 0) load_keys(loads++);
      load_queries(i);
    }
  }
  FA_DEVICE bool has_keys(uint32_t block) const { return block < uint32_t(blocks(p)); }

  // A block of queries has a sum of dQ in device memory and an entry of dq_turn, which counts who added. The first
  // addition stores, so that nobody need clear the memory. In any order that is whoever comes first, and kStored in the
  // count says that the store has landed.
  static constexpr int32_t kStored = 1 << 30;
  FA_DEVICE int turn_of(int head, int query) const { return Sums::index(p, seq, work.batch, head, query); }
  // KV heads take the room that there is for sums in turn; then all sequences are of one length.
  FA_DEVICE float* sum_of(int head, int query) const {
    int at = turn_of(head, query);
    if (p.dq_heads < p.batch * p.heads_kv) {
      at = (flat_head() % p.dq_heads * group + head % group) * ceil_div(p.seqlen_q, kM) + query / kM;
    }
    return static_cast<float*>(p.dq_accum) + int64_t(at) * (kM * D);
  }
  FA_DEVICE int flat_head() const { return work.batch * p.heads_kv + work.kv_head; }
  FA_DEVICE int32_t* blocks_added() const { return p.dq_progress + flat_head(); }
  FA_DEVICE int32_t* shares_written() const { return blocks_added() + p.batch * p.heads_kv; }
  FA_DEVICE int key_blocks() const { return ceil_div(p.seqlen_k, kN); }

  // Before a block's first addition: waits until what was in its head's room is in dq.
  FA_DEVICE void await_room() const {
    if (flat_head() < p.dq_heads) return;
    while (sm80::load_acquire(shares_written() - p.dq_heads) < key_blocks()) {
    }
    fence_async_proxy_global();
  }
  // After a block's last addition has landed.
  FA_DEVICE void tell_added() const { sm80::add_release(blocks_added(), 1); }

  // For one thread: finds sums that are complete for those who write dQ. A block writes the share of the block p.dq_lag
  // before it in what the blocks of its KV head have added to: they have all been begun, and most likely are done.
  // Numbers from the launch's blocks on stand for the shares that are left.
  FA_DEVICE void await_sums(Announcements& next, typename Sums::Completions& complete) {
    uint32_t i = 0;
    for (uint32_t n = 0;; ++n) {
      const auto told = next.told(n);
      if (told.is_none()) return;
      if (!writes(told.block)) continue;
      take(BackwardWork<kN>(p, told.block - uint32_t(p.dq_lag)));
      bool done = false;
      const int query_blocks = ceil_div(p.seqlen_q, kM);
      for (int at = work.key_begin / kN; at < group * query_blocks; at += key_blocks()) {
        while (!done) done = sm80::load_acquire(blocks_added()) == ADDERS * key_blocks();
        const int head = work.kv_head * group + at / query_blocks, query = at % query_blocks * kM;
        complete.await_free(i);
        complete.send(i++, {Sums::any(mask, query) ? sum_of(head, query) : nullptr,
                            head_rows<T>(p.dq, work.batch, head, query), seq.len_q - query});
      }
      complete.await_free(i);
      complete.send(i++, {});
      complete.await_free(i + 3);  // the end was read, and so was everything before it
      sm80::add_release(shares_written(), 1);
    }
  }
  FA_DEVICE bool writes(uint32_t block) const { return block >= uint32_t(p.dq_lag); }

  // In the fixed order: waits until those before have added. Returns how many.
  FA_DEVICE int32_t await_turn(const int32_t* turn, int query) const {
    const int32_t before = walk.blocks_before(mask, work.key_begin, query);
    while (sm80::load_acquire(turn) != before) {
    }
    return before;
  }
  // In any order: 0 for the first to come.
  static FA_DEVICE int32_t take_turn(int32_t* turn) {
    int32_t before = sm80::add_acquire(turn, 1);
    while (before > 0 && before < kStored) before = sm80::load_acquire(turn);
    return before;
  }
  // Whether somebody may wait for an addition to land; and telling them that it has.
  FA_DEVICE bool is_awaited(bool stores) const { return p.deterministic || stores; }
  FA_DEVICE void pass_turn(int32_t* turn) const { sm80::add_release(turn, p.deterministic ? 1 : kStored); }
};

}  // namespace sm90
}  // namespace flash_attn
