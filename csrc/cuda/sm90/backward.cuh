// The backward on Hopper, kernels/backward.cuh with roles for warps (FlashAttention-3, arXiv 2407.08608): one loads,
// two in turn add dQ to device memory, waiting until they may where the order is fixed, and two warpgroups of 64 keys
// each compute. They work on transposed scores, S^T = K Q^T: P^T and dS^T are then left factors in registers, and
// only dS^T goes through shared memory, for dQ = dS K. Thread blocks are persistent: the next block's keys and queries
// arrive while the last one's gradients are written, and with these some of the dQ of heads that are done.
#pragma once

#include "../attention/dropout.cuh"
#include "../attention/score.cuh"
#include "../tile/tile.cuh"
#include "backward_block.cuh"
#include "tuning.cuh"

namespace flash_attn {
namespace sm90 {

template <class T_, int D, Modifiers MODIFIERS, bool RAGGED = false>
struct Backward
    : BackwardBlock<T_, D, BackwardTuning<D, MODIFIERS>::kBlockM, 128, BackwardTuning<D, MODIFIERS>::kWarpsQ, 2> {
  using T = T_;
  using Tuning = BackwardTuning<D, MODIFIERS>;
  using Ragged = Backward<T, D, MODIFIERS, true>;
  using Block = BackwardBlock<T, D, Tuning::kBlockM, 128, Tuning::kWarpsQ, 2>;
  using typename Block::A, typename Block::Launched, typename Block::QueryGradient, typename Block::Step;
  using Writer = typename Block::Sums::Writer;
  using Block::group, Block::kComputing, Block::kM, Block::kN, Block::launched, Block::mask, Block::p, Block::part,
      Block::seq, Block::shared, Block::steps, Block::take, Block::walk, Block::work;
  static constexpr int kD = D, kStages = 2;  // a step's stage is its number modulo 2
  static constexpr int kWarps = kComputing / 32;

  using Scores = sm80::Accumulator<float, kN, kM, kWarps, kWarps>;  // [keys, queries]
  using Factor = sm80::Operand<T, kN, kM, kWarps>;
  using KeyGradient = sm80::Accumulator<float, kN, D, kWarps, kWarps>;
  // Of dQ, that a warpgroup multiplies: half a panel, or whole ones, and so at d=96 some columns of zeros.
  static constexpr int kDqCols = QueryGradient::kWarpCols == 32 ? 32 : (QueryGradient::kWarpCols + 63) / 64 * 64;
  static constexpr int kDqRegs = kDqCols / 2;
  using IntRows = sm80::Rows<int, kN, kWarps>;

  static constexpr int kPanels = (D + 63) / 64, kKPanel = kN * 128, kQPanel = kM * 128;
  static constexpr int kKBytes = kPanels * kKPanel, kQBytes = kPanels * kQPanel;
  static constexpr int kDsBytes = kM * kN * 2, kDqBytes = kM * D * 4, kRowsBytes = 2 * kM * 4;
  static constexpr int kQAt = 2 * kKBytes, kDsAt = kQAt + kStages * 2 * kQBytes, kDqAt = kDsAt + 2 * kDsBytes;
  static constexpr int kRowsAt = kDqAt + 2 * kDqBytes, kBarriersAt = kRowsAt + kStages * kRowsBytes;

  struct Barriers {
    typename Block::Announcements next;
    typename Block::Sums::Completions complete;
    Barrier keys_full, keys_free, full[kStages], free[kStages], ds_full, dq_full[2], dq_free[2];
  };
  static constexpr int kBarrierBytes = 384;
  static_assert(sizeof(Barriers) <= kBarrierBytes);
  static constexpr int kSharedBytes = kBarriersAt + kBarrierBytes;

  static void launch(const void* params, int64_t, int shared_bytes, void* stream) {
    Block::template launch_persistent<Backward>(params, shared_bytes, stream);
  }
  static const void* device() { return reinterpret_cast<const void*>(&run_blocks<Backward>); }

  Barriers& barriers;

  FA_DEVICE Backward(const Launched& launched, char* shared)
      : Block(launched, shared), barriers(*reinterpret_cast<Barriers*>(shared + kBarriersAt)) {}

  FA_DEVICE uint32_t k_address() const { return shared_address(shared); }
  FA_DEVICE uint32_t v_address() const { return k_address() + kKBytes; }
  FA_DEVICE uint32_t q_address(int stage) const { return k_address() + kQAt + stage * 2 * kQBytes; }
  FA_DEVICE uint32_t do_address(int stage) const { return q_address(stage) + kQBytes; }
  FA_DEVICE uint32_t ds_address(int buffer) const { return k_address() + kDsAt + buffer * kDsBytes; }
  FA_DEVICE float* negated_lse(int stage) const {
    return reinterpret_cast<float*>(shared + kRowsAt + stage * kRowsBytes);
  }
  FA_DEVICE float* delta(int stage) const { return negated_lse(stage) + kM; }

  FA_DEVICE void run() {
    if (threadIdx.x == 0) {
      barriers.next.init(kComputing + 3);
      barriers.complete.init(kComputing);
      barriers.keys_full.init(1);
      barriers.keys_free.init(kWarps);
      for (int stage = 0; stage < kStages; ++stage) {
        barriers.full[stage].init(32);  // every lane that loads rows
        barriers.free[stage].init(kWarps * 32);  // every lane that has read rows
      }
      barriers.ds_full.init(kWarps);
      for (int buffer = 0; buffer < 2; ++buffer) {
        barriers.dq_full[buffer].init(kWarps);
        barriers.dq_free[buffer].init(1);
      }
      fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x >= kComputing) {
      keep_registers<Block::kLoadingRegisters>();
      const int warp = (int(threadIdx.x) - kComputing) / 32;
      if (warp == 0) load();
      if ((warp == 1 || warp == 2) && first_lane()) add_up(warp - 1);
      if (warp == 3 && first_lane()) Block::await_sums(barriers.next, barriers.complete);
    } else {
      take_registers<Block::kComputingRegisters>();
      compute();
    }
  }

  FA_DEVICE void load() {
    Block::template load_blocks<RAGGED>(
        barriers.next, [this](uint32_t n) { load_keys(n); }, [this](uint32_t& i) { load_queries(i); });
  }

  FA_DEVICE void load_keys(uint32_t load) {
    barriers.keys_free.wait(load % 2 ^ 1);
    if (!first_lane()) return;
    const int row = int(seq.first_k) + work.key_begin, batch = p.cu_seqlens_q ? 0 : work.batch;
    barriers.keys_full.arrive_expecting(2 * kKBytes);
    for (int panel = 0; panel < kPanels; ++panel) {
      load_box(k_address() + panel * kKPanel, launched.k, barriers.keys_full, panel * 64, row, work.kv_head, batch);
      load_box(v_address() + panel * kKPanel, launched.v, barriers.keys_full, panel * 64, row, work.kv_head, batch);
    }
  }

  // From step i on.
  FA_DEVICE void load_queries(uint32_t& i) {
    const int lane = int(threadIdx.x) % 32, batch = p.cu_seqlens_q ? 0 : work.batch;
    Step step(work.kv_head * group);
    for (int left = steps(); left > 0; --left, ++i, step.next(walk.steps)) {
      const int query = walk.query(step.index), rows = seq.len_q - query, stage = int(i % 2);
      Barrier& full = barriers.full[stage];
      const float* lse = head_rows<const float>(p.lse, work.batch, step.head, seq.first_q + query);
      const float* deltas = head_rows<const float>(p.delta, work.batch, step.head, seq.first_q + query);
      float lse_values[kM / 32], delta_values[kM / 32];
      FA_UNROLL
      for (int part = 0; part < kM / 32; ++part) {
        const bool inside = part * 32 + lane < rows;
        lse_values[part] = inside ? lse[part * 32 + lane] : infinity<float>();
        delta_values[part] = inside ? deltas[part * 32 + lane] : 0.0f;
      }
      barriers.free[stage].wait(i / 2 % 2 ^ 1);
      if (lane == 0) {
        full.expect(2 * kQBytes);
        for (int panel = 0; panel < kPanels; ++panel) {
          const int row = int(seq.first_q) + query;
          load_box(q_address(stage) + panel * kQPanel, launched.q, full, panel * 64, row, step.head, batch);
          load_box(do_address(stage) + panel * kQPanel, launched.dout, full, panel * 64, row, step.head, batch);
        }
      }
      FA_UNROLL
      for (int part = 0; part < kM / 32; ++part) {
        negated_lse(stage)[part * 32 + lane] = lse_values[part] * -float(kLog2E);
        delta(stage)[part * 32 + lane] = delta_values[part];
      }
      full.arrive();
    }
  }

  // Adds the dQ of every other step to device memory: in any order, or when it is this thread block's turn.
  FA_DEVICE void add_up(int buffer) {
    uint32_t i = 0;
    for (uint32_t n = 0;; ++n) {
      const auto next = barriers.next.told(n);
      if (next.is_none()) return;
      if (!Block::has_keys(next.block)) continue;
      take(next.work);
      Block::await_room();
      add_up(buffer, i);
      wait_written<false>();
      Block::tell_added();
    }
  }
  FA_DEVICE void add_up(int buffer, uint32_t& i) {
    Step step(work.kv_head * group);
    for (int left = steps(); left > 0; --left, ++i, step.next(walk.steps)) {
      if (i % 2 != uint32_t(buffer)) continue;
      const int query = walk.query(step.index);
      int32_t* const turn = p.dq_turn + Block::turn_of(step.head, query);
      int32_t before = 0;
      if (p.deterministic) before = Block::await_turn(turn, query);
      barriers.dq_full[buffer].wait(i / 2 % 2);
      fence_async_proxy();  // for all who wrote: here nobody computes meanwhile
      if (!p.deterministic) before = Block::take_turn(turn);
      float* const sum = Block::sum_of(step.head, query);
      if (before == 0) {
        store(sum, k_address() + kDqAt + buffer * kDqBytes, kDqBytes);
      } else {
        reduce_add(sum, k_address() + kDqAt + buffer * kDqBytes, kDqBytes);
      }
      wait_written<true>();
      barriers.dq_free[buffer].arrive();
      if (Block::is_awaited(before == 0)) {
        wait_written<false>();
        Block::pass_turn(turn);
      }
    }
  }

  FA_DEVICE void compute() {
    uint32_t i = 0, loads = 0;
    Writer writer(barriers.complete, p);
    for (uint32_t n = 0;; ++n) {
      const auto next = barriers.next.told(n);
      if (next.is_none()) return;
      bool has_keys = Block::has_keys(next.block);
      if (has_keys) {
        take(next.work);
        Block::template clear_spare_keys<T, typename Block::A>();
        has_keys = work.key_begin < seq.stored_k;
      }
      KeyGradient dk, dv;
      dk.fill(0);
      dv.fill(0);
      typename Writer::Rows rows, more;
      const auto fetch = [&] {
        if (Block::writes(next.block)) writer.fetch(rows);
      };
      if (has_keys && steps() > 0) {
        walk_queries(i, loads, dk, dv, fetch);
      } else {
        fetch();
      }
      if (has_keys) write(dv, p.dv, 1.0f, i);
      if (rows.any) {
        writer.fetch(more, 1);
        writer.write(rows, scratch(i));
      }
      if (has_keys) write(dk, p.dk, float(p.softmax_scale), i);
      writer.write_all(more, scratch(i));
      if (Block::writes(next.block)) writer.end();
    }
  }

  // under_last() is called before the last multiply.
  template <class F>
  FA_DEVICE void walk_queries(uint32_t& i, uint32_t& loads, KeyGradient& dk, KeyGradient& dv, F&& under_last) {
    const bool foreign = Block::has_foreign_rows();
    const typename Block::PlainQueries plain(mask, work.key_begin, foreign);
    const float scale_log2 = Block::scale_log2();
    barriers.keys_full.wait(loads++ % 2);
    if (foreign && seq.len_k - work.key_begin < kN) clear_rows<kPanels>(shared, kKPanel, seq.len_k - work.key_begin);
    Step step(work.kv_head * group);
    for (int left = steps(); left > 0; --left, ++i, step.next(walk.steps)) {
      const int query = walk.query(step.index), stage = int(i % 2);
      barriers.full[stage].wait(i / 2 % 2);
      const bool first = left == steps();
      if (plain.holds(query)) {
        visit<false>(step.head, query, i, first, scale_log2, dk, dv);
      } else {
        if (foreign && seq.len_q - query < kM) {
          char* const q = shared + kQAt + stage * 2 * kQBytes;
          clear_rows<kPanels>(q, kQPanel, seq.len_q - query);
          clear_rows<kPanels>(q + kQBytes, kQPanel, seq.len_q - query);
        }
        visit<true>(step.head, query, i, first, scale_log2, dk, dv);
      }
    }
    under_last();
    barriers.ds_full.wait((i - 1) % 2);
    float dq[kDqRegs];
    multiply_queries(dq, ds_address((i - 1) % 2));
    wgmma_wait<0>();
    hold(dq);
    if (first_lane()) barriers.keys_free.arrive();
    pass_on(dq, i - 1);
  }

  template <bool MASKED>
  FA_DEVICE void visit(int head, int query, uint32_t i, bool first, float scale_log2, KeyGradient& dk,
                       KeyGradient& dv) {
    const int stage = int(i % 2);
    Scores scores, gradient;
    constexpr int kPairs = kM / 8, kAhead = kPairs < 8 ? kPairs : 8;  // as many as there are registers for
    using Ahead = typename Block::template Pairs<0, kAhead>;
    using More = typename Block::template Pairs<kAhead, kPairs>;
    const Ahead lse(negated_lse(stage));
    wgmma_fence();
    multiply_transposed(scores, k_address(), q_address(stage));
    multiply_transposed(gradient, v_address(), do_address(stage));
    if constexpr (MODIFIERS == Modifiers::kAny) {
      wgmma_wait<0>();
      hold(scores.value);
      hold(gradient.value);
      differentiate_modified(head, query, stage, scores, gradient);
    } else {
      wgmma_wait<1>();
      hold(scores.value);
      constexpr bool kSoftcap = MODIFIERS == Modifiers::kSoftcap;
      const Softcap softcap(p);
      auto near = softcap.near<false>();
      Scores slopes;  // of the softcap, times P
      if constexpr (kSoftcap) {
        if (softcap.any_far(scores)) {  // results here, which remain what they are below
          Scores::for_each([&](int, int, int, int reg) { scores[reg] = softcap.any<false>().log2_of(scores[reg]); });
          near = {{1, 0, 0}};
        }
      }
      const auto exponential = [&](int reg, float negated_lse) {
        if constexpr (kSoftcap) {
          const float capped = near.log2_of(scores[reg]);
          scores[reg] = exp2_fast(capped + negated_lse);
          slopes[reg] = softcap.derivative(capped) * scores[reg];
        } else {
          Block::exponential(scale_log2, scores)(reg, negated_lse);
        }
      };
      const auto differentiate = [&](int reg, float delta) {
        gradient[reg] = (kSoftcap ? slopes[reg] : scores[reg]) * (gradient[reg] - delta);
      };
      const More more_lse(negated_lse(stage));
      lse.for_each(exponential);
      if constexpr (kSoftcap) {  // has no registers for what is read ahead
        more_lse.for_each(exponential);
        wgmma_wait<0>();
        hold(gradient.value);
        Block::for_each_with(delta(stage), differentiate);
      } else {
        const Ahead deltas(delta(stage));
        more_lse.for_each(exponential);
        wgmma_wait<0>();
        hold(gradient.value);
        const More more_deltas(delta(stage));
        deltas.for_each(differentiate);
        more_deltas.for_each(differentiate);
      }
    }
    if (MASKED) {
      Block::template for_each_hidden<Scores, IntRows>(query, [&](int reg) { scores[reg] = gradient[reg] = 0; });
    }
    Factor probabilities(scores);
    multiply_rows(dv, probabilities, do_address(stage));

    // dQ is one step behind, so that a warpgroup need not wait here for the other's dS.
    Factor differences(gradient);
    if (!first) barriers.ds_full.wait((i - 1) % 2);
    Block::store_rows(differences.value[0], ds_address(i % 2), int(threadIdx.x) / 32 * 16);
    float dq[kDqRegs];
    multiply_queries(dq, ds_address((i - 1) % 2));  // of whatever is there in a block's first step
    multiply_rows(dk, differences, q_address(stage));
    // For dS. It takes a hundred cycles and more: under multiplies, and where measured best.
    constexpr bool kFencesLate = kM == 128;
    if (!kFencesLate) fence_async_proxy();
    wgmma_wait<1>();
    hold(dq);
    hold(dv.value);
    if (!first) pass_on(dq, i - 1);
    if (kFencesLate) fence_async_proxy();
    wgmma_wait<0>();
    hold(dk.value);
    barriers.free[stage].arrive();
    __syncwarp();  // all lanes have written dS
    if (first_lane()) barriers.ds_full.arrive();
  }

  // Raw scores to the probabilities that dV needs, dP to dS.
  FA_DEVICE void differentiate_modified(int head, int query, int stage, Scores& scores, Scores& gradient) {
    // ALiBi's distance is the same seen from the key.
    const ScoreModifier<T, MODIFIERS> modifier(p, work.batch, head, -mask.shift);
    const Dropout dropout(p, work.batch, head);
    const float kept = kept_scale<float>(p);
    typename Block::template Kept<Scores> keep;
    if (dropout.enabled()) {
      Block::find_kept(dropout, query, keep);
      Block::drop(keep, kept, gradient);
    }
    Block::for_each_with(delta(stage), [&](int reg, float delta) { gradient[reg] -= delta; });
    modifier.apply(scores, work.key_begin, query, [&](int reg, float derivative) { gradient[reg] *= derivative; });
    Block::exponentiate(negated_lse(stage), modifier.scale_log2(), scores);
    Scores::for_each([&](int, int, int, int reg) { gradient[reg] *= scores[reg]; });
    if (dropout.enabled()) Block::drop(keep, kept, scores);
  }

  // dQ's fragments to the warp that adds them up.
  FA_DEVICE void pass_on(const float (&dq)[kDqRegs], uint32_t i) {
    barriers.dq_free[i % 2].wait(i / 2 % 2 ^ 1);
    char* const buffer = shared + kDqAt + i % 2 * kDqBytes;
    FA_UNROLL
    for (int reg = 0; reg < kDqRegs; reg += 4) {
      int to = reg * kComputing + int(threadIdx.x) * 4;
      if constexpr (kDqCols != QueryGradient::kWarpCols) {  // the registers that QueryGradient has the columns in
        constexpr int kTiles = QueryGradient::kTilesN;
        const int tile = part * kDqCols / 8 + reg / 4;
        if (tile >= 2 * kTiles) break;
        to = tile % kTiles * 4 * kComputing + (tile / kTiles * 128 + int(threadIdx.x) % 128) * 4;
      }
      *reinterpret_cast<float4*>(buffer + to * 4) = float4{dq[reg], dq[reg + 1], dq[reg + 2], dq[reg + 3]};
    }
    __syncwarp();
    if (first_lane()) barriers.dq_full[i % 2].arrive();
  }

  // c = rows x queries^T, for this warpgroup's 64 of the 128 rows.
  FA_DEVICE void multiply_transposed(Scores& c, uint32_t rows, uint32_t queries) {
    multiply_panels<T, kM, D>(c.value, rows + part * 64 * 128, kKPanel, queries, kQPanel);
  }

  // c += a x queries
  FA_DEVICE void multiply_rows(KeyGradient& c, Factor& a, uint32_t queries) {
    multiply_registers<T, D, kM>(c.value, a.value[0], queries, kQPanel);
  }

  // dQ = dS K: the warpgroups share out the rows, or where there are only 64, the columns.
  FA_DEVICE void multiply_queries(float (&dq)[kDqRegs], uint32_t ds) {
    const uint64_t a = descriptor(ds + (kM == 64 ? 0 : part * kN * 128), 0);
    const uint32_t columns = kM == 64 ? part * (kDqCols == 32 ? 64 : kDqCols / 64 * kKPanel) : 0;
    const uint64_t b = descriptor(k_address() + columns, kKPanel);
    wgmma_fence();
    FA_UNROLL
    for (int step = 0; step < kN / 16; ++step) {
      Wgmma<kDqCols>::template shared<T, true, true>(dq, advance(a, step * 16 * 128),
                                                                 advance(b, step * 16 * 128), step > 0);
    }
    wgmma_commit();
  }

  // A warp's rows of the next step's dS: nobody reads them any more, and only the warp will write them.
  FA_DEVICE char* scratch(uint32_t i) const {
    return shared + kDsAt + i % 2 * kDsBytes + int(threadIdx.x) / 32 * 16 * 128;
  }
  FA_DEVICE void write(KeyGradient& gradient, const TensorRef& dst, float scale, uint32_t i) {
    KeyGradient::for_each([&](int, int, int, int reg) { gradient[reg] *= scale; });
    const int row = int(threadIdx.x) / 32 * 16;
    constexpr int kCols = D % 64 == 0 ? 64 : 32;
    static_assert(kTurnBytes<kCols, kCols == 64> <= 16 * 128);
    char* const scratch = this->scratch(i);
    T* const to = head_rows<T>(dst, work.batch, work.kv_head, seq.first_k + work.key_begin + row);
    FA_UNROLL
    for (int col = 0; col < D; col += kCols) {
      write_rows<T, kCols, kCols == 64>(gradient.value + col / 2, scratch, to + col, dst.row_stride,
                                        seq.stored_k - work.key_begin - row, p.head_dim - col);
    }
  }
};

}  // namespace sm90
}  // namespace flash_attn
