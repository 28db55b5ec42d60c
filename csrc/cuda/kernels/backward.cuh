// Backward (FlashAttention-2, arXiv 2307.08691, Algorithm 2): P is recomputed from the saved log-sum-exp, then
//   dV += P^T dO,  dP = dO V^T,  dS = P * (dP - delta),  dK += dS^T Q,  dQ += dS K.
// A block owns block_n keys of one KV head and walks the queries of its group's heads that see them. dQ is added up in
// device memory: in any order, or, under determinism, in descending order of the keys, each block waiting for its turn.
// Blocks of a head are then numbered from the last keys down, so that a block waits only for blocks with smaller
// numbers, which were launched before it; under a causal mask, blocks that start together and walk up from the diagonal
// never wait at all. Without determinism they are numbered upward, which under a causal mask is the longest first.
#pragma once

#include "../attention/dropout.cuh"
#include "../attention/schedule.cuh"
#include "../attention/score.cuh"
#include "../tile/tile.cuh"

namespace flash_attn {

template <class Arch, class P>
struct Backward {
  using Params = BackwardParams;
  using T = typename P::Element;
  using Scalar = AccumOf<T>;
  static constexpr int kD = P::kHeadDim;
  static constexpr bool kModified = P::kModified;
  static constexpr Modifiers kModifiers = kModified ? Modifiers::kAny : Modifiers::kNone;

  using Tuning = typename Arch::template Tuning<Kernel::kBackward, T, kD, kModified>;
  static constexpr int kM = Tuning::kBlockM, kN = Tuning::kBlockN, kWarps = Tuning::kWarps;
  // Named: clang 21 may not find the end of the aliases below with Tuning's own names among their arguments.
  static constexpr int kWarpsM = Tuning::kWarpsM, kWarpsN = Tuning::kWarpsN, kWarpsQ = Tuning::kWarpsQ;
  static constexpr int kStages = Tuning::kStages;  // buffers of Q and dO
  using A = typename Arch::template Block<kWarps>;

  using KTile = typename A::template Tile<T, kN, kD, kNK | kKN | kStaging>;
  using VTile = typename A::template Tile<T, kN, kD, kNK | kStaging>;
  using QTile = typename A::template Tile<T, kM, kD, kMK | kKN>;
  using STile = typename A::template Tile<T, kM, kN, kKM>;
  using DSTile = typename A::template Tile<T, kM, kN, kKM | kMK>;
  using Scores = typename A::template Accumulator<Scalar, kM, kN, kWarpsM>;
  using Rows = typename A::template Rows<Scalar, kM, kWarpsM>;
  using IntRows = typename A::template Rows<int, kM, kWarpsM>;
  using KeyGradient = typename A::template Accumulator<Scalar, kN, kD, kWarpsN>;
  using QueryGradient = typename A::template Accumulator<Scalar, kM, kD, kWarpsQ>;

  static constexpr int kThreads = A::kThreads;
  static constexpr int kMinBlocks = Tuning::kMinBlocks;
  static constexpr int kBlockM = kM, kBlockN = kN;
  static constexpr int kSharedBytes =
      KTile::kBytes + VTile::kBytes + 2 * kStages * QTile::kBytes + STile::kBytes + DSTile::kBytes;
  static constexpr int kStashBytes = 0;

  static int64_t blocks(const Params& p) { return int64_t(ceil_div(p.seqlen_k, kN)) * p.heads_kv * p.batch; }

  using Work = BackwardWork<kN>;
  using Walk = QueryWalk<kM, kN>;

  const Params& p;
  Work work;
  Sequence seq;
  Mask mask;
  const int group;                     // query heads per KV head
  const int query_begin, query_steps;  // first visible query block's start, number of visible query blocks
  char* const shared;
  KTile k_tile;
  VTile v_tile;
  STile p_tile;
  DSTile ds_tile;

  static FA_DEVICE void run(const Params& p, int64_t block, char* shared) {
    const Work work(p, uint32_t(block));
    clear_spare_rows<A>(p, p.cu_seqlens_k, p.total_k, work.batch, work.key_begin / kN, ceil_div(p.seqlen_k, kN),
                        [&](int64_t row, int col) {
                          head_rows<T>(p.dk, 0, work.kv_head, row)[col] = T{};
                          head_rows<T>(p.dv, 0, work.kv_head, row)[col] = T{};
                        });
    Backward self(p, uint32_t(block), shared);
    if (self.work.key_begin < self.seq.stored_k) {
      KeyGradient dk, dv;
      self.differentiate(dk, dv);
      // Worked out again rather than held across the loop: registers are full.
      Backward(reread(p), reread(uint32_t(block)), shared).write(dk, dv);
    }
  }

  FA_DEVICE Backward(const Params& p, uint32_t block, char* shared)
      : p(p),
        work(p, block),
        seq(p, work.batch),
        mask(p, seq),
        group(p.heads_q / p.heads_kv),
        query_begin(uniform(Walk(mask, work.key_begin).begin)),
        query_steps(uniform(Walk(mask, work.key_begin).steps)),
        shared(shared),
        k_tile(shared),
        v_tile(shared + KTile::kBytes),
        p_tile(shared + KTile::kBytes + VTile::kBytes + 2 * kStages * QTile::kBytes),
        ds_tile(shared + KTile::kBytes + VTile::kBytes + 2 * kStages * QTile::kBytes + STile::kBytes) {}

  // Rows that do not allow 16-byte access take the modified instance.
  FA_DEVICE bool aligned() const { return !kModified || reread(p).aligned; }

  // The position in the walk: heads of the group in turn, each from its first visible query block.
  struct Step {
    int head, query, stage;
  };
  FA_DEVICE Step next(const Step& step) const {
    const bool more = step.query + kM < query_begin + query_steps * kM;
    return {more ? step.head : step.head + 1, more ? step.query + kM : query_begin, (step.stage + 1) % kStages};
  }

  FA_DEVICE QTile q_tile(int stage) const {
    return QTile(shared + KTile::kBytes + VTile::kBytes + 2 * stage * QTile::kBytes);
  }
  FA_DEVICE QTile do_tile(int stage) const {
    return QTile(shared + KTile::kBytes + VTile::kBytes + (2 * stage + 1) * QTile::kBytes);
  }

  FA_DEVICE void load_queries(QTile& q, QTile& dout, const Step& step) {
    const Params& p = reread(this->p);
    const int rows = seq.len_q - step.query;
    q.load(head_rows<const T>(p.q, work.batch, step.head, seq.first_q + step.query), p.q.row_stride, rows, p.head_dim,
           aligned());
    dout.load(head_rows<const T>(p.dout, work.batch, step.head, seq.first_q + step.query), p.dout.row_stride, rows,
              p.head_dim, aligned());
  }

  FA_DEVICE void differentiate(KeyGradient& dk, KeyGradient& dv) {
    dk.fill(Scalar(0));
    dv.fill(Scalar(0));
    const int steps = group * query_steps;
    if (steps > 0) {
      const int keys = seq.len_k - work.key_begin;
      k_tile.load(head_rows<const T>(p.k, work.batch, work.kv_head, seq.first_k + work.key_begin), p.k.row_stride, keys,
                  p.head_dim, aligned());
      v_tile.load(head_rows<const T>(p.v, work.batch, work.kv_head, seq.first_k + work.key_begin), p.v.row_stride, keys,
                  p.head_dim, aligned());
      Step step{work.kv_head * group, query_begin, 0};
      QTile q = q_tile(0), dout = do_tile(0);
      load_queries(q, dout, step);
      A::commit();
      constexpr bool kAhead = kStages > 1 || A::kLoadsThroughRegisters;  // load the next Q and dO during a step
      for (int left = steps; left > 0; --left) {
        renew(work.key_begin, work.batch, seq.first_q, mask.left, mask.right, mask.shift);
        A::template wait<0>();
        if (left == steps) {
          k_tile.land();
          v_tile.land();
        }
        q.land();
        dout.land();
        A::sync();  // Q and dO have arrived, and the last step's tiles are no longer read
        const Step following = next(step);
        QTile next_q = q_tile(following.stage), next_dout = do_tile(following.stage);
        if (kAhead && left > 1) {
          load_queries(next_q, next_dout, following);
          A::commit();
        }
        visit(step, q, dout, dk, dv);
        if (kStages == 1 && left > 1) A::sync();
        if (!kAhead && left > 1) {
          load_queries(next_q, next_dout, following);
          A::commit();
        }
        step = following;
        q = next_q;
        dout = next_dout;
      }
    }
  }

  FA_DEVICE void visit(const Step& step, QTile& q, QTile& dout, KeyGradient& dk, KeyGradient& dv) {
    Rows negated_lse, delta;
    load_rows(step, negated_lse, delta);  // used after the multiplies, which hide the latency
    Scores scores, gradient;
    scores.fill(Scalar(0));
    A::multiply_nt(scores, q, k_tile);
    gradient.fill(Scalar(0));
    A::multiply_nt(gradient, dout, v_tile);
    differentiate_scores(step, negated_lse, delta, scores, gradient);

    ds_tile.put(gradient);
    A::sync();
    const Params& p = reread(this->p);
    const int64_t block = place_of_queries<int64_t>(p, work.batch, step.head, seq.first_q, step.query, kM);
    const int turn = p.deterministic ? A::peek_turn(p.dq_turn + block) : 0;
    A::multiply_tn(dv, p_tile, dout);
    QueryGradient dq;
    dq.fill(Scalar(0));
    A::multiply_nn(dq, ds_tile, k_tile);
    if (p.deterministic) A::wait_turn(p.dq_turn + block, Walk::blocks_before(mask, work.key_begin, step.query), turn);
    A::accumulate(dq, static_cast<Scalar*>(p.dq_accum) + block * (kM * kD));
    A::multiply_tn(dk, ds_tile, q);
    if (p.deterministic) A::pass_turn(p.dq_turn + block);  // by now the additions have landed: nobody waits for them
  }

  FA_DEVICE void load_rows(const Step& step, Rows& negated_lse, Rows& delta) {
    const Params& p = reread(this->p);
    const int rows = seq.len_q - step.query;
    negated_lse.read(head_rows<const Scalar>(p.lse, work.batch, step.head, seq.first_q + step.query), rows,
                     infinity<Scalar>());
    delta.read(head_rows<const Scalar>(p.delta, work.batch, step.head, seq.first_q + step.query), rows, Scalar(0));
  }

  // scores: raw scores to P as dV needs it, put into p_tile; gradient: dP to dS.
  FA_DEVICE void differentiate_scores(const Step& step, Rows& negated_lse, Rows& delta, Scores& scores,
                                      Scores& gradient) {
    const Params& p = reread(this->p);
    const ScoreModifier<T, kModifiers> modifier(p, work.batch, step.head, mask.shift);
    const Dropout dropout(p, work.batch, step.head);
    const bool masked = !mask.all_visible(step.query, step.query + kM, work.key_begin, work.key_begin + kN);

    if (kModified && dropout.enabled()) {
      const Scalar kept = Scalar(1) / (Scalar(1) - Scalar(p.dropout_p));
      dropout.template for_each<Scores>(step.query, work.key_begin, [&](int reg, bool keep) {
        gradient[reg] = keep ? gradient[reg] * kept : Scalar(0);
      });
    }
    const Scalar scale_log2 = modifier.scale_log2();
    Rows::for_each([&](int slot, int, bool) { negated_lse[slot] *= Scalar(-kLog2E); });
    Scores::for_each([&](int slot, int, int, int reg) { gradient[reg] -= delta[slot]; });
    modifier.apply(scores, step.query, work.key_begin,
                   [&](int reg, Scalar derivative) { gradient[reg] *= derivative; });
    Scores::for_each([&](int slot, int, int, int reg) {
      const Scalar probability = exp2_fast(fma_rn(scores[reg], scale_log2, negated_lse[slot]));
      scores[reg] = probability;
      gradient[reg] *= probability;
    });
    if (masked) {
      for_each_hidden<Scores, IntRows>(mask, step.query, work.key_begin,
                                       [&](int reg) { scores[reg] = gradient[reg] = Scalar(0); });
    }
    if (kModified && dropout.enabled()) {
      const Scalar kept = Scalar(1) / (Scalar(1) - Scalar(p.dropout_p));
      dropout.template for_each<Scores>(step.query, work.key_begin, [&](int reg, bool keep) {
        scores[reg] = keep ? scores[reg] * kept : Scalar(0);
      });
    }
    p_tile.put(scores);
  }

  FA_DEVICE void write(KeyGradient& dk, KeyGradient& dv) {
    write(dk, p.dk, k_tile, Scalar(p.softmax_scale));
    write(dv, p.dv, v_tile, Scalar(1));
  }

  template <class StagingTile>
  FA_DEVICE void write(KeyGradient& gradient, const TensorRef& dst, StagingTile& staging, Scalar scale) {
    KeyGradient::for_each([&](int, int, int, int reg) { gradient[reg] *= scale; });
    A::sync();  // the tile held K or V
    staging.put(gradient);
    A::sync();
    staging.write(head_rows<T>(dst, work.batch, work.kv_head, seq.first_k + work.key_begin), dst.row_stride,
                  seq.stored_k - work.key_begin, p.head_dim, aligned());
  }
};

}  // namespace flash_attn
