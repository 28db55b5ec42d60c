// The backward on Hopper for wide heads, whose gradients of 64 keys fill the registers: one warpgroup has dV, the
// other dK, over all columns. The first works out S^T = K Q^T and from it P^T, which is its own left factor for dV and
// goes to the other through shared memory; that one works out dP^T = V dO^T, and dS^T from both, for dK and, through
// shared memory, for dQ = dS K, of which either does half of the columns one step behind. dQ is added to device memory
// from registers; two threads see to whose turn it is. Otherwise as backward.cuh.
#pragma once

#include "../attention/score.cuh"
#include "../tile/tile.cuh"
#include "backward_block.cuh"
#include "tuning.cuh"

namespace flash_attn {
namespace sm90 {

template <class T_, int D, Modifiers MODIFIERS, bool RAGGED = false>
struct WideBackward : BackwardBlock<T_, D, 64, 64, 4, 1> {
  using T = T_;
  using Ragged = WideBackward<T, D, MODIFIERS, true>;
  using Block = BackwardBlock<T, D, 64, 64, 4, 1>;
  using typename Block::Launched, typename Block::Step;
  using Writer = typename Block::Sums::Writer;
  using Block::group, Block::kComputing, Block::kM, Block::kN, Block::launched, Block::mask, Block::p, Block::part,
      Block::seq, Block::shared, Block::steps, Block::take, Block::walk, Block::work;
  static constexpr int kD = D, kStages = 2;

  using Scores = sm80::Accumulator<float, kN, kM, 4, 4>;  // [keys, queries], of a warpgroup
  using Factor = sm80::Operand<T, kN, kM, 4>;
  using KeyGradient = sm80::Accumulator<float, kN, D, 4, 4>;
  using IntRows = sm80::Rows<int, kN, 4>;

  static constexpr int kPanels = D / 64, kPanel = 64 * 128, kBytes = kPanels * kPanel;  // of K, V, Q and dO alike
  static constexpr int kQAt = 2 * kBytes, kDoAt = kQAt + kStages * kBytes, kPAt = kDoAt + kStages * kBytes;
  static constexpr int kPBytes = kM * kN * 4, kDsBytes = kM * kN * 2;
  static constexpr int kDsAt = kPAt + kPBytes, kRowsAt = kDsAt + 2 * kDsBytes;
  static constexpr int kBarriersAt = kRowsAt + kStages * 2 * kM * 4;

  struct Barriers {
    typename Block::Announcements next;
    typename Block::Sums::Completions complete;
    Barrier keys_full, keys_free, q_full[kStages], q_free[kStages], do_full[kStages], do_free[kStages];
    Barrier p_full[4], p_free[4];  // of a warp that computes P, and of the one that needs it
    Barrier ds_full[2], may_add[2], added[2], passed_on[2];
    struct {
      float* sum;
      bool stores;  // rather than adds
    } target[2];    // of a step's dQ
  };
  static constexpr int kBarrierBytes = 512;
  static_assert(sizeof(Barriers) <= kBarrierBytes);
  static constexpr int kSharedBytes = kBarriersAt + kBarrierBytes;

  static void launch(const void* params, int64_t, int shared_bytes, void* stream) {
    Block::template launch_persistent<WideBackward>(params, shared_bytes, stream);
  }
  static const void* device() { return reinterpret_cast<const void*>(&run_blocks<WideBackward>); }

  Barriers& barriers;

  FA_DEVICE WideBackward(const Launched& launched, char* shared)
      : Block(launched, shared), barriers(*reinterpret_cast<Barriers*>(shared + kBarriersAt)) {}

  FA_DEVICE uint32_t k_address() const { return shared_address(shared); }
  FA_DEVICE uint32_t v_address() const { return k_address() + kBytes; }
  FA_DEVICE uint32_t q_address(int stage) const { return k_address() + kQAt + stage * kBytes; }
  FA_DEVICE uint32_t do_address(int stage) const { return k_address() + kDoAt + stage * kBytes; }
  FA_DEVICE uint32_t ds_address(uint32_t i) const { return k_address() + kDsAt + i % 2 * kDsBytes; }
  FA_DEVICE float* negated_lse(int stage) const { return reinterpret_cast<float*>(shared + kRowsAt) + stage * kM; }
  FA_DEVICE float* delta(int stage) const { return negated_lse(kStages + stage); }
  // What a warp of the first warpgroup and one of the second exchange.
  FA_DEVICE static int pair() { return int(threadIdx.x) / 32 % 4; }
  FA_DEVICE char* room_of_pair() const { return shared + kPAt + pair() * (kPBytes / 4); }

  FA_DEVICE void run() {
    if (threadIdx.x == 0) {
      barriers.next.init(kComputing + 3);
      barriers.complete.init(kComputing);
      barriers.keys_full.init(1);
      barriers.keys_free.init(8);
      for (int stage = 0; stage < kStages; ++stage) {
        barriers.ds_full[stage].init(4);
        barriers.q_full[stage].init(32);  // every lane that loads rows
        barriers.do_full[stage].init(32);
        barriers.q_free[stage].init(kComputing);  // every lane that may have read rows
        barriers.do_free[stage].init(kComputing);
      }
      for (int pair = 0; pair < 4; ++pair) {
        barriers.p_full[pair].init(32);
        barriers.p_free[pair].init(32);
      }
      for (int buffer = 0; buffer < 2; ++buffer) {
        barriers.may_add[buffer].init(1);
        barriers.added[buffer].init(kComputing);  // every lane that has read the target
        barriers.passed_on[buffer].init(1);
      }
      fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x >= kComputing) {
      keep_registers<Block::kLoadingRegisters>();
      const int warp = (int(threadIdx.x) - kComputing) / 32;
      if (warp == 0) load();
      if (warp == 1 && first_lane()) take_turns<true>();
      if (warp == 2 && first_lane()) take_turns<false>();
      if (warp == 3 && first_lane()) Block::await_sums(barriers.next, barriers.complete);
    } else {
      take_registers<Block::kComputingRegisters>();
      if (part == 0) {
        compute<false>();
      } else {
        compute<true>();
      }
    }
  }

  FA_DEVICE void load() {
    Block::template load_blocks<RAGGED>(
        barriers.next, [this](uint32_t n) { load_keys(n); }, [this](uint32_t& i) { load_queries(i); });
  }

  FA_DEVICE void load_rows(uint32_t dst, const CUtensorMap& map, Barrier& full, int row, int head) const {
    for (int panel = 0; panel < kPanels; ++panel) {
      load_box(dst + panel * kPanel, map, full, panel * 64, row, head, p.cu_seqlens_q ? 0 : work.batch);
    }
  }
  FA_DEVICE void load_keys(uint32_t load) {
    barriers.keys_free.wait(load % 2 ^ 1);
    if (!first_lane()) return;
    const int row = int(seq.first_k) + work.key_begin;
    barriers.keys_full.arrive_expecting(2 * kBytes);
    load_rows(k_address(), launched.k, barriers.keys_full, row, work.kv_head);
    load_rows(v_address(), launched.v, barriers.keys_full, row, work.kv_head);
  }

  // From step i on.
  FA_DEVICE void load_queries(uint32_t& i) {
    Step step(work.kv_head * group);
    for (int left = steps(); left > 0; --left, ++i, step.next(walk.steps)) {
      const int query = walk.query(step.index), stage = int(i % 2);
      load_queries(i, query, step.head, q_address(stage), launched.q, p.lse, negated_lse(stage), -float(kLog2E),
                   infinity<float>(), barriers.q_full[stage], barriers.q_free[stage]);
      load_queries(i, query, step.head, do_address(stage), launched.dout, p.delta, delta(stage), 1.0f, 0.0f,
                   barriers.do_full[stage], barriers.do_free[stage]);
    }
  }
  // A tile, and a value for each of its rows, times `scale`; `beyond` for those that do not exist.
  FA_DEVICE void load_queries(uint32_t i, int query, int head, uint32_t dst, const CUtensorMap& map,
                              const RowsRef& values, float* values_dst, float scale, float beyond, Barrier& full,
                              Barrier& free) const {
    const int lane = int(threadIdx.x) % 32, rows = seq.len_q - query;
    const float* from = head_rows<const float>(values, work.batch, head, seq.first_q + query);
    const float low = lane < rows ? from[lane] : beyond, high = lane + 32 < rows ? from[lane + 32] : beyond;
    free.wait(i / 2 % 2 ^ 1);
    if (lane == 0) {
      full.expect(kBytes);
      load_rows(dst, map, full, int(seq.first_q) + query, head);
    }
    values_dst[lane] = low * scale;
    values_dst[lane + 32] = high * scale;
    full.arrive();
  }

  // Two threads see to it that a step's dQ is added in any order, or when it is this thread block's turn: one waits for
  // the turn ahead of those who add, the other passes it on behind them.
  template <bool AHEAD>
  FA_DEVICE void take_turns() {
    uint32_t i = 0;
    for (uint32_t n = 0;; ++n) {
      const auto next = barriers.next.told(n);
      if (next.is_none()) return;
      if (!Block::has_keys(next.block)) continue;
      take(next.work);
      if (AHEAD) Block::await_room();
      Step step(work.kv_head * group);
      for (int left = steps(); left > 0; --left, ++i, step.next(walk.steps)) {
        const int query = walk.query(step.index);
        int32_t* const turn = p.dq_turn + Block::turn_of(step.head, query);
        const uint32_t phase = i / 2 % 2;
        auto& target = barriers.target[i % 2];
        if (AHEAD) {
          barriers.passed_on[i % 2].wait(phase ^ 1);
          target.sum = Block::sum_of(step.head, query);
          target.stores = (p.deterministic ? Block::await_turn(turn, query) : Block::take_turn(turn)) == 0;
          barriers.may_add[i % 2].arrive();
        } else {
          barriers.added[i % 2].wait(phase);
          const bool awaited = Block::is_awaited(target.stores);
          barriers.passed_on[i % 2].arrive();
          if (awaited) Block::pass_turn(turn);  // cumulative: covers what the others wrote before they arrived
        }
      }
      if (!AHEAD) Block::tell_added();
    }
  }

  // KEYS: dK, else dV.
  template <bool KEYS>
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
      KeyGradient sum;
      sum.fill(0);
      if (has_keys && steps() > 0) walk_queries<KEYS>(i, loads, sum);
      typename Writer::Rows rows;
      if (Block::writes(next.block)) writer.fetch(rows);
      if (has_keys) write<KEYS>(sum, i);
      writer.write_all(rows, scratch<KEYS>());
      if (Block::writes(next.block)) writer.end();
      sync_named(3, kComputing);  // the room for P was used
    }
  }

  template <bool KEYS>
  FA_DEVICE void walk_queries(uint32_t& i, uint32_t& loads, KeyGradient& sum) {
    const bool foreign = Block::has_foreign_rows();
    const typename Block::PlainQueries plain(mask, work.key_begin, foreign);
    const float scale_log2 = Block::scale_log2();
    barriers.keys_full.wait(loads++ % 2);
    if (foreign && seq.len_k - work.key_begin < kN) clear_rows<kPanels>(shared, kPanel, seq.len_k - work.key_begin);
    Step step(work.kv_head * group);
    for (int left = steps(); left > 0; --left, ++i, step.next(walk.steps)) {
      const int query = walk.query(step.index), known = foreign ? seq.len_q - query : kM;
      const bool first = left == steps();
      // Scores of rows that are not the sequence's own may be anything, and are hidden.
      if (plain.holds(query)) {
        visit<KEYS, false>(step.head, query, known, i, first, scale_log2, sum);
      } else {
        visit<KEYS, true>(step.head, query, known, i, first, scale_log2, sum);
      }
    }
    float dq[kColsFirst / 2], more_dq[kColsMore / 2];
    barriers.ds_full[(i - 1) % 2].wait((i - 1) / 2 % 2);
    multiply_queries(dq, first_columns(), i - 1);
    multiply_queries(more_dq, more_columns(), i - 1);
    wgmma_wait<0>();
    hold(dq);
    hold(more_dq);
    if (first_lane()) barriers.keys_free.arrive();
    add_first(dq, i - 1);
    add_more(more_dq, i - 1);
  }

  // `known`: rows of queries that are the sequence's own.
  template <bool KEYS, bool MASKED>
  FA_DEVICE void visit(int head, int query, int known, uint32_t i, bool first, float scale_log2, KeyGradient& sum) {
    const int stage = int(i % 2);
    const uint32_t phase = i / 2 % 2;
    Barrier &q_full = barriers.q_full[stage], &do_full = barriers.do_full[stage];
    Scores x;  // S^T, then P^T; or dP^T, then dS^T
    (KEYS ? do_full : q_full).wait(phase);
    wgmma_fence();
    multiply_panels<T, kM, D>(x.value, KEYS ? v_address() : k_address(), kPanel,
                              KEYS ? do_address(stage) : q_address(stage), kPanel);
    wgmma_wait<0>();
    hold(x.value);
    const Dropout dropout(p, work.batch, head);
    typename Block::template Kept<Scores> kept;
    const bool drops = MODIFIERS == Modifiers::kAny && dropout.enabled();
    if (drops) Block::find_kept(dropout, query, kept);
    const auto drop_some = [&] {
      if (drops) Block::drop(kept, kept_scale<float>(p), x);
    };
    const auto hide_some = [&] {
      if (MASKED) Block::template for_each_hidden<Scores, IntRows>(query, [&](int reg) { x[reg] = 0; });
    };
    if constexpr (KEYS) {
      drop_some();
      Block::for_each_with(delta(stage), [&](int reg, float delta) { x[reg] -= delta; });
      receive(x, i);
      hide_some();
    } else if constexpr (MODIFIERS != Modifiers::kNone) {
      // ALiBi's distance is the same seen from the key.
      const ScoreModifier<T, MODIFIERS> modifier(p, work.batch, head, -mask.shift);
      Scores slope;  // dS is P's times that of the softcap
      slope.fill(1);
      modifier.apply(x, work.key_begin, query, [&](int reg, float derivative) { slope[reg] = derivative; });
      Block::exponentiate(negated_lse(stage), modifier.scale_log2(), x);
      hide_some();
      Scores::for_each([&](int, int, int, int reg) { slope[reg] *= x[reg]; });
      send(slope, i);
      drop_some();
    } else {
      Block::exponentiate(negated_lse(stage), scale_log2, x);
      hide_some();
      send(x, i);
    }
    (KEYS ? barriers.do_free : barriers.q_free)[stage].arrive();
    Factor factor(x);
    if (KEYS) {
      barriers.added[stage].wait(phase ^ 1);  // every warp has read the dS that lay there
      Block::store_rows(factor.value[0], ds_address(i), pair() * 16);
      fence_async_proxy();
      __syncwarp();
      if (first_lane()) barriers.ds_full[stage].arrive();
    }
    (KEYS ? q_full : do_full).wait(phase);
    if (MASKED && known < kM) clear_rows<kPanels>(shared + (KEYS ? kQAt : kDoAt) + stage * kBytes, kPanel, known);
    if (!first) barriers.ds_full[(i - 1) % 2].wait((i - 1) / 2 % 2);
    float dq[kColsFirst / 2], more_dq[kColsMore / 2];
    multiply_queries(dq, first_columns(), i - 1);  // of whatever is there in a block's first step
    multiply_registers<T, D, kM>(sum.value, factor.value[0], KEYS ? q_address(stage) : do_address(stage), kPanel);
    wgmma_wait<1>();
    hold(dq);
    if (!first) add_first(dq, i - 1);
    multiply_queries(more_dq, more_columns(), i - 1);
    wgmma_wait<1>();
    hold(sum.value);
    (KEYS ? barriers.q_free : barriers.do_free)[stage].arrive();
    wgmma_wait<0>();
    hold(more_dq);
    if (!first) add_more(more_dq, i - 1);
  }

  // P^T from one warpgroup to the other, lane by lane.
  FA_DEVICE float4* exchanged(int n) const {
    return reinterpret_cast<float4*>(room_of_pair()) + n * 32 + int(threadIdx.x) % 32;
  }
  FA_DEVICE void send(const Scores& x, uint32_t i) {
    barriers.p_free[pair()].wait(i % 2 ^ 1);
    FA_UNROLL
    for (int n = 0; n < Scores::kRegs / 4; ++n) {
      *exchanged(n) = float4{x[4 * n], x[4 * n + 1], x[4 * n + 2], x[4 * n + 3]};
    }
    barriers.p_full[pair()].arrive();
  }
  FA_DEVICE void receive(Scores& x, uint32_t i) {
    barriers.p_full[pair()].wait(i % 2);
    FA_UNROLL
    for (int n = 0; n < Scores::kRegs / 4; ++n) {
      const float4 p = *exchanged(n);
      x[4 * n] *= p.x, x[4 * n + 1] *= p.y, x[4 * n + 2] *= p.z, x[4 * n + 3] *= p.w;
    }
    barriers.p_free[pair()].arrive();
  }

  // A warpgroup's half of dQ's columns, in two parts: a panel of K, then another, or at d=192 half of the middle one.
  static constexpr int kColsFirst = 64, kColsMore = D / 2 - kColsFirst;
  FA_DEVICE uint32_t first_columns() const { return k_address() + part * 2 * kPanel; }
  FA_DEVICE uint32_t more_columns() const {
    return kColsMore == 64 ? first_columns() + kPanel : k_address() + kPanel + part * 64;
  }
  template <int REGS>
  FA_DEVICE void multiply_queries(float (&dq)[REGS], uint32_t columns, uint32_t i) {
    const uint64_t a = descriptor(ds_address(i), 0), b = descriptor(columns, kPanel);
    wgmma_fence();
    FA_UNROLL
    for (int step = 0; step < kN / 16; ++step) {
      Wgmma<2 * REGS>::template shared<T, true, true>(dq, advance(a, step * 16 * 128), advance(b, step * 16 * 128),
                                                      step > 0);
    }
    wgmma_commit();
  }

  // To device memory, in the order of QueryGradient's registers: their columns ascend.
  FA_DEVICE void add_first(const float (&dq)[kColsFirst / 2], uint32_t i) {
    barriers.may_add[i % 2].wait(i / 2 % 2);
    add(dq, kColsMore == 32 && part == 1 ? kColsMore / 2 : 0, i);
  }
  FA_DEVICE void add_more(const float (&dq)[kColsMore / 2], uint32_t i) {
    add(dq, kColsMore == 32 && part == 1 ? 0 : kColsFirst / 2, i);
    barriers.added[i % 2].arrive();
  }
  template <int REGS>
  FA_DEVICE void add(const float (&dq)[REGS], int to, uint32_t i) {
    const volatile auto& target = barriers.target[i % 2];
    float* const sum = target.sum + to * kComputing + int(threadIdx.x) * 4;
    if (target.stores) {
      FA_UNROLL
      for (int reg = 0; reg < REGS; reg += 4) {
        *reinterpret_cast<float4*>(sum + reg * kComputing) = float4{dq[reg], dq[reg + 1], dq[reg + 2], dq[reg + 3]};
      }
    } else {
      FA_UNROLL
      for (int reg = 0; reg < REGS; reg += 4) sm80::reduce_add(sum + reg * kComputing, dq + reg);
    }
  }

  static constexpr int kScratch = kTurnBytes<64, true>;  // bytes of a warp
  static_assert(2 * kScratch <= kPBytes / 4);
  template <bool KEYS>
  FA_DEVICE char* scratch() const {
    return room_of_pair() + (KEYS ? kScratch : 0);
  }
  template <bool KEYS>
  FA_DEVICE void write(KeyGradient& sum, uint32_t i) {
    const TensorRef& dst = KEYS ? p.dk : p.dv;
    if (KEYS) {
      KeyGradient::for_each([&](int, int, int, int reg) { sum[reg] *= float(p.softmax_scale); });
    } else {
      barriers.p_free[pair()].wait(i % 2 ^ 1);  // the other has read what is in the room
    }
    constexpr int kCols = 64;
    const int row = pair() * 16;
    char* const scratch = this->template scratch<KEYS>();
    T* const to = head_rows<T>(dst, work.batch, work.kv_head, seq.first_k + work.key_begin + row);
    FA_UNROLL
    for (int col = 0; col < D; col += kCols) {
      write_rows<T, kCols, true>(sum.value + col / 2, scratch, to + col, dst.row_stride,
                                 seq.stored_k - work.key_begin - row, p.head_dim - col);
    }
  }
};

}  // namespace sm90
}  // namespace flash_attn
