// The forward on Hopper (FlashAttention-3, arXiv 2407.08608): a warp keeps the copy engine busy, and warpgroups of 64
// query rows each take turns on the tensor cores, so that one's softmax runs under the other's multiplies; within a
// warpgroup the next block's Q K^T is issued before this block's P V. Thread blocks are persistent: the next tile's
// loads run under the last one's epilogue. The arithmetic, and so every bit, is that of kernels/forward.cuh.
#pragma once

#include "../attention/epilogue.cuh"
#include "../sm80/fragment.cuh"
#include "../tile/tile.cuh"
#include "launch.cuh"
#include "tma.cuh"
#include "tuning.cuh"
#include "wgmma.cuh"

namespace flash_attn {
namespace sm90 {

template <class T_, int D>
struct Forward {
  using T = T_;
  using Params = ForwardParams;
  using Tuning = ForwardTuning<D>;
  static constexpr int kM = Tuning::kBlockM, kN = Tuning::kBlockN, kStages = Tuning::kStages;
  static constexpr int kBlockM = kM, kBlockN = kN;
  static constexpr int kGroups = kM / 64, kWarps = 4 * kGroups;  // that compute; the producer is one more group
  static constexpr int kThreads = (kGroups + 1) * 128;

  using Work = ForwardWork<kM>;
  using Scores = sm80::Accumulator<float, kM, kN, kWarps, kWarps>;
  using Output = sm80::Accumulator<float, kM, D, kWarps, kWarps>;
  using Probabilities = sm80::Operand<T, kM, kN, kWarps>;
  using Rows = sm80::Rows<float, kM, kWarps>;
  using IntRows = sm80::Rows<int, kM, kWarps>;

  static constexpr int kPanels = D / 64;
  static constexpr int kQBytes = kM * D * 2, kKBytes = kN * D * 2;
  static constexpr int kQPanel = kM * 128, kKPanel = kN * 128;
  static constexpr int kTileBytes = kQBytes + 2 * kStages * kKBytes;
  static constexpr int kOutBytes = kM * D * 2;  // where a warp turns its rows' fragments into rows
  static constexpr int kStash = kM * D * 4, kStashRows = 2 * kM * 4;

  struct Barriers {
    Barrier q_full, q_free, k_full[kStages], k_free[kStages], v_full[kStages], v_free[kStages];
  };
  static constexpr int kSharedBytes = kTileBytes + int(sizeof(Barriers) + 127) / 128 * 128 + kOutBytes;
  // The stash of a row with several chunks overlays the room for rows.
  static constexpr int kStashBytes = kStash + kStashRows - kOutBytes;

  struct Launched {
    ForwardParams p;
    CUtensorMap q, k, v;

    explicit Launched(const ForwardParams& p)
        : p(p),
          q(tensor_map(p.q, p.dtype, batches(p), p.cu_seqlens_q ? p.total_q : p.seqlen_q, p.heads_q, p.head_dim, kM)),
          k(tensor_map(p.k, p.dtype, batches(p), p.cu_seqlens_q ? p.total_k : p.seqlen_k, p.heads_kv, p.head_dim, kN)),
          v(tensor_map(p.v, p.dtype, batches(p), p.cu_seqlens_q ? p.total_k : p.seqlen_k, p.heads_kv, p.head_dim,
                       kN)) {}
    static int batches(const ForwardParams& p) { return p.cu_seqlens_q ? 1 : p.batch; }
  };

  static int64_t blocks(const Params& p) { return Work::blocks(p); }
  static void launch(const void* params, int64_t blocks, int shared_bytes, void* stream) {
    launch_persistent<Forward>(params, blocks, shared_bytes, stream);
  }
  static const void* device() { return reinterpret_cast<const void*>(&run_persistent<Forward>); }

  const Launched& launched;
  const ForwardParams& p;
  char* const shared;
  Barriers& barriers;

  FA_DEVICE Forward(const Launched& launched, char* shared)
      : launched(launched),
        p(launched.p),
        shared(shared),
        barriers(*reinterpret_cast<Barriers*>(shared + kTileBytes)) {}

  FA_DEVICE char* scratch() const { return shared + kSharedBytes - kOutBytes; }
  FA_DEVICE uint32_t q_address() const { return shared_address(shared); }
  FA_DEVICE uint32_t k_address(int stage) const { return shared_address(shared) + kQBytes + stage * 2 * kKBytes; }
  FA_DEVICE uint32_t v_address(int stage) const { return k_address(stage) + kKBytes; }

  FA_DEVICE void run() {
    if (threadIdx.x == 0) {
      barriers.q_full.init(1);
      barriers.q_free.init(kWarps);
      for (int stage = 0; stage < kStages; ++stage) {
        barriers.k_full[stage].init(1);
        barriers.v_full[stage].init(1);
        barriers.k_free[stage].init(kWarps);
        barriers.v_free[stage].init(kWarps);
      }
      fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x >= kGroups * 128) {
      keep_registers<Tuning::kProducerRegisters>();
      if (threadIdx.x == kGroups * 128) produce();
    } else {
      take_registers<Tuning::kConsumerRegisters>();
      consume();
    }
  }

  // Calls f(work, seq, mask, keys) for each of this thread block's tiles that has rows.
  template <class F>
  FA_DEVICE void for_each_tile(F&& f) {
    const uint32_t tiles = uint32_t(ceil_div(p.seqlen_q, kM)) * p.num_splits * p.heads_q * p.batch;
    for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const Work work(p, tile);
      const Sequence seq(p, work.batch);
      const Mask mask(p, seq);
      f(work, seq, mask, VisibleKeys(p, work, mask, kN));
    }
  }

  // A place in a ring of stages: which stage, and which phase of its barriers.
  struct Place {
    int stage = 0;
    uint32_t phase = 0;
    FA_DEVICE void step() {
      if (++stage == kStages) {
        stage = 0;
        phase ^= 1;
      }
    }
  };

  FA_DEVICE void produce() {
    prefetch(launched.q);
    prefetch(launched.k);
    prefetch(launched.v);
    Place place;
    uint32_t tile_phase = 0;
    for_each_tile([&](const Work& work, const Sequence& seq, const Mask&, const VisibleKeys& keys) {
      if (work.query_begin >= seq.len_q || keys.begin >= keys.end) return;
      const int batch = p.cu_seqlens_q ? 0 : work.batch, kv_head = work.head / (p.heads_q / p.heads_kv);
      barriers.q_free.wait(tile_phase ^ 1);
      barriers.q_full.arrive_expecting(kQBytes);
      for (int panel = 0; panel < kPanels; ++panel) {
        load_box(q_address() + panel * kQPanel, launched.q, barriers.q_full, panel * 64,
                 int(seq.first_q) + work.query_begin, work.head, batch);
      }
      tile_phase ^= 1;
      for (int key = keys.begin; key < keys.end; key += kN) {
        load_keys(launched.k, k_address(place.stage), barriers.k_full[place.stage], barriers.k_free[place.stage],
                  place.phase, int(seq.first_k) + key, kv_head, batch);
        load_keys(launched.v, v_address(place.stage), barriers.v_full[place.stage], barriers.v_free[place.stage],
                  place.phase, int(seq.first_k) + key, kv_head, batch);
        place.step();
      }
    });
  }

  static FA_DEVICE void load_keys(const CUtensorMap& map, uint32_t dst, Barrier& full, Barrier& free, uint32_t phase,
                                  int row, int head, int batch) {
    free.wait(phase ^ 1);
    full.arrive_expecting(kKBytes);
    for (int panel = 0; panel < kPanels; ++panel) {
      load_box(dst + panel * kKPanel, map, full, panel * 64, row, head, batch);
    }
  }

  // The threads that compute, as functions that share work among a block's lanes see them.
  struct Lanes {
    static constexpr int kThreads = kGroups * 128;
    static FA_DEVICE int lane() { return int(threadIdx.x); }
  };

  static FA_DEVICE int group() { return int(threadIdx.x) / 128; }
  static FA_DEVICE bool first_lane() { return threadIdx.x % 32 == 0; }

  // Warpgroups issue their multiplies in turns.
  static FA_DEVICE void await_turn() { sync_named(1 + group(), 256); }
  static FA_DEVICE void pass_turn() { arrive_named(1 + (group() + 1) % kGroups, 256); }

  FA_DEVICE void consume() {
    if (group() == kGroups - 1) pass_turn();
    State state;
    uint32_t tile_phase = 0;
    for_each_tile([&](const Work& work, const Sequence& seq, const Mask& mask, const VisibleKeys& keys) {
      clear_rows_of_no_sequence<T, Lanes>(p, work);
      if (work.query_begin >= seq.len_q) return;
      state.softmax.clear();
      if (keys.begin < keys.end) {
        attend(work, seq, mask, keys, tile_phase, state);
        tile_phase ^= 1;
      } else {
        state.output.fill(0);
        state.softmax.finish();
      }
      write(work, seq, state.output, state.softmax);
    });
  }

  // What a warpgroup carries along a tile's keys.
  struct State {
    Output output;
    OnlineSoftmax<float, Rows> softmax;
    Probabilities probabilities;  // of the last block, not multiplied yet
    Place place;                  // of the last block
  };

  FA_DEVICE void attend(const Work& work, const Sequence& seq, const Mask& mask, const VisibleKeys& keys,
                        uint32_t tile_phase, State& state) {
    const bool folds = p.split_size > 0 && p.num_splits == 1 &&
                       keys.begin / p.split_size != (keys.end - 1) / p.split_size;
    // Keys behind a sequence's last may be another's: their values must not reach the multiply, where 0 * NaN is NaN.
    const bool foreign = (p.cu_seqlens_q != nullptr || p.seqused_k != nullptr) && seq.len_k % kN != 0;
    state.output.fill(0);
    if (folds) clear_stash();
    barriers.q_full.wait(tile_phase);
    begin(work, mask, keys.begin, state);

    int chunk_end = folds ? (keys.begin / p.split_size + 1) * p.split_size : keys.end;
    for (int key = keys.begin + kN; key < keys.end; key += kN) {
      if (key == chunk_end) {
        step<true, true>(work, mask, key, state);
        chunk_end += p.split_size;
      } else if (!mask.all_visible(work.query_begin, work.query_begin + kM, key, key + kN)) {
        step<true, false>(work, mask, key, state);
      } else {
        step<false, false>(work, mask, key, state);
      }
    }
    if (first_lane()) barriers.q_free.arrive();

    const int stage = state.place.stage;
    barriers.v_full[stage].wait(state.place.phase);
    if (foreign && seq.len_k <= (keys.end + kN - 1) / kN * kN) clear_values(stage, seq.len_k % kN);
    await_turn();
    multiply_values(state.output, state.probabilities, stage);
    pass_turn();
    wgmma_wait<0>();
    hold(state.output.value);
    if (first_lane()) barriers.v_free[stage].arrive();
    state.place.step();
    if (folds) {
      fold(state.output, state.softmax);
      take_stash(state.output, state.softmax);
    } else {
      state.softmax.finish();
    }
  }

  FA_DEVICE float scale_log2() const { return float(p.softmax_scale) * float(kLog2E); }

  // The first block of keys.
  FA_DEVICE void begin(const Work& work, const Mask& mask, int key, State& state) {
    Scores scores;
    Rows rescale;
    barriers.k_full[state.place.stage].wait(state.place.phase);
    await_turn();
    multiply_scores(scores, state.place.stage);
    pass_turn();
    wgmma_wait<0>();
    hold(scores.value);
    if (first_lane()) barriers.k_free[state.place.stage].arrive();
    hide(mask, work, key, scores);
    state.softmax.raise_max(scores, scale_log2(), rescale);
    state.softmax.exponentiate(scores, scale_log2());
    state.probabilities.narrow(scores);
  }

  // The next block's scores, while the last block's values are multiplied. No branches between issuing multiplies and
  // waiting for them: the compiler waits early where there are.
  template <bool MASKED, bool NEW_CHUNK>
  FA_DEVICE void step(const Work& work, const Mask& mask, int key, State& state) {
    Scores scores;
    Rows rescale;
    const Place last = state.place;
    state.place.step();
    const int stage = state.place.stage;
    barriers.k_full[stage].wait(state.place.phase);
    await_turn();
    multiply_scores(scores, stage);
    barriers.v_full[last.stage].wait(last.phase);
    multiply_values(state.output, state.probabilities, last.stage);
    pass_turn();
    wgmma_wait<1>();
    hold(scores.value);
    if (first_lane()) barriers.k_free[stage].arrive();
    if (MASKED) hide(mask, work, key, scores);
    if (NEW_CHUNK) {
      wgmma_wait<0>();
      hold(state.output.value);
      fold(state.output, state.softmax);
    }
    state.softmax.raise_max(scores, scale_log2(), rescale);
    state.softmax.exponentiate(scores, scale_log2());
    // The compiler would wait for the multiply before all this. It does not move a wait across a branch, nor know that
    // sums are never negative: so this branch, on a barrier that is open, comes after them and before the wait.
    const bool never = state.softmax.sum[0] == -1.0f || state.softmax.sum[1] == -1.0f;
    barriers.k_full[stage].wait(state.place.phase ^ uint32_t(never));
    if (!NEW_CHUNK) {
      wgmma_wait<0>();
      hold(state.output.value);
      state.softmax.apply(rescale, state.output);
    }
    if (first_lane()) barriers.v_free[last.stage].arrive();
    state.probabilities.narrow(scores);
  }

  // scores = Q K^T
  FA_DEVICE void multiply_scores(Scores& scores, int stage) {
    const uint64_t q = descriptor(q_address() + group() * 64 * 128, 0), k = descriptor(k_address(stage), 0);
    hold(scores.value);
    wgmma_fence();
    FA_UNROLL
    for (int step = 0; step < D / 16; ++step) {
      Wgmma<kN>::template shared<T, false, false>(scores.value, advance(q, step / 4 * kQPanel + step % 4 * 32),
                                                  advance(k, step / 4 * kKPanel + step % 4 * 32), step > 0);
    }
    wgmma_commit();
  }

  // output += P V
  FA_DEVICE void multiply_values(Output& output, Probabilities& probabilities, int stage) {
    const uint64_t v = descriptor(v_address(stage), kKPanel);
    hold(output.value);
    FA_UNROLL
    for (int step = 0; step < kN / 16; ++step) hold(probabilities.value[0][step]);
    wgmma_fence();
    FA_UNROLL
    for (int step = 0; step < kN / 16; ++step) {
      Wgmma<D>::template registers<T, true>(output.value, probabilities.value[0][step], advance(v, step * 16 * 128));
    }
    wgmma_commit();
  }

  FA_DEVICE void hide(const Mask& mask, const Work& work, int key, Scores& scores) {
    for_each_hidden<Scores, IntRows>(mask, work.query_begin, key, [&](int reg) { scores[reg] = -infinity<float>(); });
  }

  // Zeros in a block of values, from row `begin` on. Every warpgroup clears for itself, before it multiplies.
  FA_DEVICE void clear_values(int stage, int begin) {
    char* values = shared + kQBytes + stage * 2 * kKBytes + kKBytes;
    for (int panel = 0; panel < kPanels; ++panel) {
      for (int at = begin * 128 + int(threadIdx.x) % 128 * 16; at < kKPanel; at += 128 * 16) {
        *reinterpret_cast<uint4*>(values + panel * kKPanel + at) = uint4{};
      }
    }
    fence_async_proxy();
    sync_named(1 + kGroups + group(), 128);
  }

  // The running fold of chunks: each warp has its part of the scratch memory, in which its rows are turned later.
  FA_DEVICE float& stashed(int reg) {
    float* mine = reinterpret_cast<float*>(scratch()) + int(threadIdx.x) / 32 * (16 * D) + int(threadIdx.x) % 32;
    return mine[reg * 32];
  }
  FA_DEVICE float& stashed_max(int row) { return reinterpret_cast<float*>(scratch() + kStash)[row]; }
  FA_DEVICE float& stashed_sum(int row) { return stashed_max(kM + row); }

  FA_DEVICE bool stash_is_there() const { return p.split_size > 0 && p.num_splits == 1 && p.seqlen_k > p.split_size; }

  FA_DEVICE void clear_stash() {
    Rows::for_each([&](int, int row, bool owner) {
      if (!owner) return;
      stashed_max(row) = -infinity<float>();
      stashed_sum(row) = 0;
    });
    __syncwarp();
    FA_UNROLL
    for (int reg = 0; reg < Output::kRegs; ++reg) stashed(reg) = 0;
  }
  FA_DEVICE void fold(Output& output, OnlineSoftmax<float, Rows>& softmax) {
    softmax.finish();
    Rows keep, add;
    Rows::for_each([&](int slot, int row, bool owner) {
      float max = stashed_max(row), sum = stashed_sum(row);
      fold_weights(max, sum, softmax.max[slot], softmax.sum[slot], keep[slot], add[slot]);
      __syncwarp();
      if (owner) {
        stashed_max(row) = max;
        stashed_sum(row) = sum;
      }
      __syncwarp();
    });
    Output::for_each([&](int slot, int, int, int reg) {
      stashed(reg) = fma_rn(output[reg], add[slot], stashed(reg) * keep[slot]);
    });
    softmax.clear();
    output.fill(0);
  }
  FA_DEVICE void take_stash(Output& output, OnlineSoftmax<float, Rows>& softmax) {
    Rows::for_each([&](int slot, int row, bool) {
      softmax.max[slot] = stashed_max(row);
      softmax.sum[slot] = stashed_sum(row);
    });
    Output::for_each([&](int, int, int, int reg) { output[reg] = stashed(reg); });
  }

  FA_DEVICE void write(const Work& work, const Sequence& seq, Output& output, OnlineSoftmax<float, Rows>& softmax) {
    const int rows = min_int(kM, seq.len_q - work.query_begin);
    if (p.num_splits > 1) return write_partial(p, work, rows, softmax, output);
    normalise(p, work, seq, rows, 1.0f, softmax, output);

    // Through shared memory, so that whole rows are written; 16-byte chunks are swizzled against bank conflicts.
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, row = lane / 4;
    char* const mine = scratch() + warp * (stash_is_there() ? 16 * D * 4 : 16 * D * 2);
    FA_UNROLL
    for (int n = 0; n < D / 8; ++n) {
      const float* x = output.tile(0, n);
      char* at = mine + row * (D * 2) + ((n ^ row) * 16) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(at) = sm80::pack(T{}, x[0], x[1]);
      *reinterpret_cast<uint32_t*>(at + 8 * D * 2) = sm80::pack(T{}, x[2], x[3]);
    }
    __syncwarp();
    T* out = head_rows<T>(p.out, work.batch, work.head, seq.first_q + work.query_begin + warp * 16);
    FA_UNROLL
    for (int i = lane; i < 16 * D / 8; i += 32) {
      const int r = i / (D / 8), chunk = i % (D / 8);
      if (warp * 16 + r >= rows) continue;
      const uint4 x = *reinterpret_cast<const uint4*>(mine + r * (D * 2) + ((chunk ^ (r % 8)) * 16));
      T* to = out + r * p.out.row_stride + chunk * 8;
      if (chunk * 8 + 8 <= p.head_dim) {
        *reinterpret_cast<uint4*>(to) = x;
      } else {
        for (int i = 0; i < 8 && chunk * 8 + i < p.head_dim; ++i) to[i] = reinterpret_cast<const T*>(&x)[i];
      }
    }
    __syncwarp();  // the next tile's rows come into the same memory
  }
};

}  // namespace sm90
}  // namespace flash_attn
