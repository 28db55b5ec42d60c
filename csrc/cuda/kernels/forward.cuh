// Forward: out = softmax(score(Q K^T)) V and the log-sum-exp of every row (FlashAttention-2, arXiv 2307.08691,
// Algorithm 1). A block owns block_m query rows of one head and walks the visible keys upward.
//
// With split_size > 0 keys are folded in chunks with boundaries at absolute multiples of split_size. One block may walk
// all chunks of its rows and fold as it goes, or num_splits blocks may do one each and Combine folds: the same
// arithmetic in the same order, so the same bits.
#pragma once

#include "../attention/dropout.cuh"
#include "../attention/epilogue.cuh"
#include "../attention/schedule.cuh"
#include "../attention/score.cuh"
#include "../attention/softmax.cuh"
#include "../tile/pages.cuh"
#include "../tile/tile.cuh"

namespace flash_attn {

template <class Arch, class P>
struct Forward {
  using Params = ForwardParams;
  using T = typename P::Element;
  using Scalar = AccumOf<T>;
  static constexpr int kD = P::kHeadDim;
  static constexpr bool kModified = P::kModified;
  static constexpr Modifiers kModifiers = kModified ? Modifiers::kAny : Modifiers::kNone;

  using Tuning = typename Arch::template Tuning<Kernel::kForward, T, kD, kModified>;
  static constexpr int kM = Tuning::kBlockM, kN = Tuning::kBlockN, kWarps = Tuning::kWarps;
  using A = typename Arch::template Block<kWarps>;
  // Finding every row takes plain kernels' time.
  static constexpr Pages kReadsPages = !A::kFindsRows ? Pages::kBlocks : kModified ? Pages::kAny : Pages::kNone;

  using QTile = typename A::template Tile<T, kM, kD, kMK | kStaging>;
  using KTile = typename A::template Tile<T, kN, kD, kNK>;
  using VTile = typename A::template Tile<T, kN, kD, kKN>;
  using Scores = typename A::template Accumulator<Scalar, kM, kN, kWarps>;
  using Output = typename A::template Accumulator<Scalar, kM, kD, kWarps>;
  using Probabilities = typename A::template Operand<T, kM, kN, kWarps>;
  using Rows = typename A::template Rows<Scalar, kM, kWarps>;
  using IntRows = typename A::template Rows<int, kM, kWarps>;
  using Stash = typename A::template Stash<Output>;

  static constexpr int kThreads = A::kThreads;
  static constexpr int kMinBlocks = Tuning::kMinBlocks;
  static constexpr int kBlockM = kM, kBlockN = kN;
  static constexpr int kSharedBytes = QTile::kBytes + KTile::kBytes + VTile::kBytes;
  // More shared memory, only where a row has several chunks: the running fold's output, maxima and sums.
  static constexpr int kStashBytes = Stash::kBytes + 2 * Rows::kSlots * kThreads * int(sizeof(Scalar));

  using Work = ForwardWork<kM>;

  static int64_t blocks(const Params& p) { return Work::blocks(p); }

  // What one block knows and holds while it runs.
  const Params& p;
  Work work;
  const Sequence seq;
  Mask mask;
  const ScoreModifier<T, kModifiers> modifier;
  const Dropout dropout;
  const T* k;
  const T* v;
  QTile q_tile;
  KTile k_tile;
  VTile v_tile;
  Stash stash;
  Scalar* const stashed_rows;

  static FA_DEVICE void run(const Params& p, int64_t block, char* shared) {
    clear_rows_of_no_sequence<T, A>(p, Work(p, uint32_t(block)));
    Forward self(p, uint32_t(block), shared);
    if (self.work.query_begin < self.seq.len_q) {
      Output output;
      OnlineSoftmax<Scalar, Rows> softmax;
      self.attend(output, softmax);
      // Worked out again rather than held across the loop: registers are full.
      Forward(reread(p), uint32_t(unhoisted(int(block))), shared).write(output, softmax);
    }
  }

  FA_DEVICE Forward(const Params& p, uint32_t block, char* shared)
      : p(p),
        work(p, block),
        seq(p, work.batch),
        mask(p, seq),
        modifier(p, work.batch, work.head, mask.shift),
        dropout(p, work.batch, work.head),
        k(head_rows<const T>(p.k, work.batch, kv_head(), seq.first_k)),
        v(head_rows<const T>(p.v, work.batch, kv_head(), seq.first_k)),
        q_tile(shared),
        k_tile(shared + QTile::kBytes),
        v_tile(shared + QTile::kBytes + KTile::kBytes),
        stash(shared + kSharedBytes),
        stashed_rows(reinterpret_cast<Scalar*>(shared + kSharedBytes + Stash::kBytes)) {}

  FA_DEVICE int kv_head() const { return work.head / (p.heads_q / p.heads_kv); }
  // Rows that do not allow 16-byte access take the modified instance.
  FA_DEVICE bool aligned() const { return !kModified || reread(p).aligned; }
  FA_DEVICE int rows() const { return min_int(kM, seq.len_q - work.query_begin); }

  FA_DEVICE void load_queries() {
    const T* q = head_rows<const T>(p.q, work.batch, work.head, seq.first_q + work.query_begin);
    q_tile.load(q, p.q.row_stride, rows(), p.head_dim, aligned());
  }
  FA_DEVICE void load_keys(int key) { load(k_tile, &Params::k, k, key); }
  FA_DEVICE void load_values(int key) { load(v_tile, &Params::v, v, key); }
  // A block of keys or values: in pages, or of a sequence and head whose rows begin at `first`.
  template <class Tile>
  FA_DEVICE void load(Tile& tile, TensorRef Params::*which, const T* first, int key) {
    const Params& p = reread(this->p);
    const TensorRef& rows = p.*which;
    const T* block = first + key * rows.row_stride;
    int count = seq.len_k - key;
    if constexpr (kReadsPages != Pages::kNone) {
      if (p.block_table != nullptr) {
        const PagedRows<T> in_pages(p, rows, work.batch, kv_head(), key);
        if constexpr (kReadsPages == Pages::kAny) return tile.load(in_pages, count, p.head_dim, aligned());
        block = in_pages.find_block();
        if (block == nullptr) count = 0;
      }
    }
    tile.load(block, rows.row_stride, count, p.head_dim, aligned());
  }

  // scores = Q K^T for the keys in k_tile, modified, for what that returns, and masked.
  FA_DEVICE bool score(Scores& scores, int key) {
    scores.fill(Scalar(0));
    A::multiply_nt(scores, q_tile, k_tile);
    const bool far = modifier.apply(scores, work.query_begin, key);
    if (!mask.all_visible(work.query_begin, work.query_begin + kM, key, key + kN)) {
      for_each_hidden<Scores, IntRows>(mask, work.query_begin, key,
                                       [&](int reg) { scores[reg] = -infinity<Scalar>(); });
    }
    return far;
  }

  FA_DEVICE VisibleKeys keys() const {
    return VisibleKeys(p, mask, work.split, work.query_begin, work.query_begin + kM, kN);
  }

  // Leaves the unnormalised output, and the softmax finished.
  FA_DEVICE void attend(Output& output, OnlineSoftmax<Scalar, Rows>& softmax) {
    const int begin = keys().begin, end = keys().end;
    const HeldFlag several_chunks =
        p.split_size > 0 && p.num_splits == 1 && begin < end && begin / p.split_size != (end - 1) / p.split_size;

    if (begin < end) {
      load_queries();
      load_keys(begin);
      A::commit();
    }

    softmax.clear();
    output.fill(Scalar(0));
    if (several_chunks) clear_stash();

    for (int key = begin; key < end;) {
      const int chunk_end = several_chunks ? min_int(end, (key / p.split_size + 1) * p.split_size) : end;
      for (; key < chunk_end; key += kN) visit(key, begin, end, output, softmax);
      if (several_chunks) fold(output, softmax);
    }

    if (several_chunks) {
      Rows::for_each([&](int slot, int, bool) {
        softmax.max[slot] = stashed_max(slot);
        softmax.sum[slot] = stashed_sum(slot);
      });
      stash.take(output);
    } else {
      softmax.finish();
    }
  }

  // One block of keys, whose load has been started; starts the next one's.
  FA_DEVICE void visit(int key, int begin, int end, Output& output, OnlineSoftmax<Scalar, Rows>& softmax) {
    renew(work.query_begin, mask.left, mask.right);
    A::template wait<0>();
    if (key == begin) q_tile.land();
    k_tile.land();
    A::sync();  // keys have arrived, and the last block's values are no longer read
    load_values(key);
    A::commit();

    Scores scores;
    const bool far = score(scores, key);

    A::template wait<0>();
    v_tile.land();
    A::sync();  // values have arrived, and the keys are no longer read
    if (key + kN < end) {
      load_keys(key + kN);
      A::commit();
    }

    Rows rescale;
    softmax.raise_max(scores, modifier.scale_of_any(), rescale);
    softmax.apply(rescale, output);
    modifier.with_scale(far, [&](const auto& scale) { softmax.exponentiate(scores, scale); });
    if (kModified && dropout.enabled()) dropout.drop(scores, work.query_begin, key);
    A::multiply_nn(output, Probabilities(scores), v_tile);
  }

  // The running fold's state lives in memory: registers are full.
  FA_DEVICE Scalar& stashed_max(int slot) { return stashed_rows[slot * kThreads + A::lane()]; }
  FA_DEVICE Scalar& stashed_sum(int slot) { return stashed_rows[(Rows::kSlots + slot) * kThreads + A::lane()]; }

  FA_DEVICE void clear_stash() {
    Rows::for_each([&](int slot, int, bool) {
      stashed_max(slot) = -infinity<Scalar>();
      stashed_sum(slot) = Scalar(0);
    });
    stash.clear();
  }

  // Folds a finished chunk into the stash and starts the next from scratch.
  FA_DEVICE void fold(Output& output, OnlineSoftmax<Scalar, Rows>& softmax) {
    softmax.finish();
    Rows keep, add;
    Rows::for_each([&](int slot, int, bool) {
      fold_weights(stashed_max(slot), stashed_sum(slot), softmax.max[slot], softmax.sum[slot], keep[slot], add[slot]);
    });
    stash.fold(output, keep, add);
    softmax.clear();
    output.fill(Scalar(0));
  }

  FA_DEVICE void write(Output& output, OnlineSoftmax<Scalar, Rows>& softmax) {
    if (p.num_splits > 1) return write_partial(p, work, rows(), softmax, output);
    const Scalar kept = kModified && dropout.enabled() ? Scalar(1) / (Scalar(1) - Scalar(p.dropout_p)) : Scalar(1);
    Rows scale;
    finish_rows(p, work, seq, rows(), kept, softmax, scale);
    softmax.apply(scale, output);
    if (kModified && p.s_dmask != nullptr) write_probabilities(softmax.sum);

    T* out = head_rows<T>(p.out, work.batch, work.head, seq.first_q + work.query_begin);
    A::sync();  // the tile held Q
    q_tile.put(output);
    A::sync();
    q_tile.write(out, p.out.row_stride, rows(), p.head_dim, aligned());
  }

  // Probabilities relative to the final log-sum-exp, negative where dropped: a second pass over the keys.
  FA_DEVICE void write_probabilities(Rows& lse) {
    T* dmask = static_cast<T*>(p.s_dmask) +
               ((int64_t(work.batch) * p.heads_q + work.head) * p.seqlen_q + work.query_begin) * p.seqlen_k;
    bool first = true;  // of the loop: comparing with keys().begin costs AMD scalar registers
    for (int key = keys().begin; key < keys().end; key += kN) {
      A::sync();  // the last block's keys are no longer read
      if (first) load_queries();  // an Arch may have held them in registers
      load_keys(key);
      A::commit();
      A::template wait<0>();
      if (first) q_tile.land();
      k_tile.land();
      first = false;
      A::sync();
      Scores scores;
      score(scores, key);
      const auto scale = modifier.scale_of_any();
      Scores::for_each([&](int slot, int, int, int reg) {
        const Scalar score = OnlineSoftmax<Scalar, Rows>::log2_of(scale, scores[reg], slot);
        scores[reg] = exp2_fast(fma_rn(lse[slot], Scalar(-kLog2E), score));
      });
      if (dropout.enabled()) {
        dropout.template for_each<Scores>(work.query_begin, key, [&](int reg, bool keep) {
          if (!keep) scores[reg] = -scores[reg];
        });
      }
      Scores::for_each([&](int, int row, int col, int reg) {
        if (row < rows() && key + col < seq.len_k)
          dmask[int64_t(row) * p.seqlen_k + key + col] = narrow<T>(scores[reg]);
      });
    }
  }
};

}  // namespace flash_attn
