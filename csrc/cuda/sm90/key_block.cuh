// A block of keys of the backward, its walk over blocks of queries, and its scores, transposed: rows are keys.
#pragma once

#include "../attention/dropout.cuh"
#include "../attention/schedule.cuh"
#include "wgmma.cuh"

namespace flash_attn {
namespace sm90 {

template <int BLOCK_M, int BLOCK_N>
struct KeyBlock {
  static constexpr int kM = BLOCK_M, kN = BLOCK_N;

  const BackwardParams& p;
  const int group;  // query heads per KV head
  BackwardWork<kN> work;
  Sequence seq;
  Mask mask;
  QueryWalk<kM, kN> walk;

  FA_DEVICE KeyBlock(const BackwardParams& p, uint32_t block)
      : p(p),
        group(p.heads_q / p.heads_kv),
        work(p, block),
        seq(p, work.batch),
        mask(p, seq),
        walk(mask, work.key_begin) {}
  FA_DEVICE void take(const BackwardWork<kN>& next) {
    work = next;
    seq = Sequence(p, work.batch);
    mask = Mask(p, seq);
    walk = QueryWalk<kM, kN>(mask, work.key_begin);
  }
  FA_DEVICE int steps() const { return group * walk.steps; }

  // This block's share of the gradients of no sequence's keys.
  template <class T, class A>
  FA_DEVICE void clear_spare_keys() const {
    clear_spare_rows<A>(p, p.cu_seqlens_k, p.total_k, work.batch, work.key_begin / kN, ceil_div(p.seqlen_k, kN),
                        [&](int64_t row, int col) {
                          head_rows<T>(p.dk, 0, work.kv_head, row)[col] = T{};
                          head_rows<T>(p.dv, 0, work.kv_head, row)[col] = T{};
                        });
  }

  // The position in a block's walk: heads of the group in turn, each over its visible query blocks. Steps are counted
  // on through all blocks: a step's number says which stage, which buffers and which phase of their barriers it uses.
  struct Step {
    int head, index = 0;
    FA_DEVICE Step(int head) : head(head) {}
    FA_DEVICE void next(int steps) {
      if (++index == steps) {
        index = 0;
        ++head;
      }
    }
  };

  // Whether rows behind a sequence's last may be another's, or hold anything: 0 * NaN is NaN.
  FA_DEVICE bool has_foreign_rows() const { return p.cu_seqlens_q != nullptr || p.seqused_k != nullptr; }

  // Queries [begin, end) for which there is nothing to hide: they see all of the block's keys, and rows of another are
  // not among them. Worked out once, for nothing is multiplied while a step asks.
  struct PlainQueries {
    static constexpr int kUnbounded = 0x7fffffff;
    int begin, end;

    FA_DEVICE PlainQueries(const Mask& mask, int key_begin, bool foreign_rows)
        : begin(mask.queries_begin(key_begin + kN - 1)), end(mask.queries_end(key_begin + 1)) {
      if (end == mask.len_q && !foreign_rows) end = kUnbounded;  // spare rows of the last step are zeros
      if (key_begin + kN > mask.len_k) end = 0;
    }
    FA_DEVICE bool holds(int query) const { return query >= begin && query + kM <= end; }
  };
  // Of raw scores, softcapped or not, as the exponent's fma takes it.
  FA_DEVICE float scale_log2() const { return float(p.softmax_scale) * float(kLog2E); }

  // For a lane's part of transposed scores: its n-th pair of queries, of a row of LSE or delta, and f(reg, value of the
  // register's query) for the registers of that pair, or of all.
  static FA_DEVICE float2 pair_of(const float* of_query, int n) {
    return *reinterpret_cast<const float2*>(of_query + int(threadIdx.x) % 4 * 2 + 8 * n);
  }
  template <class F>
  static FA_DEVICE void for_pair(int n, float2 pair, F&& f) {
    FA_UNROLL
    for (int e = 0; e < 4; ++e) f(4 * n + e, e % 2 == 0 ? pair.x : pair.y);
  }
  template <class F>
  static FA_DEVICE void for_each_with(const float* of_query, F&& f) {
    FA_UNROLL
    for (int n = 0; n < kM / 8; ++n) for_pair(n, pair_of(of_query, n), f);
  }
  // Pairs BEGIN to END, read ahead of their use: loads from shared memory queue behind the multiplies'.
  template <int BEGIN, int END>
  struct Pairs {
    float2 value[END > BEGIN ? END - BEGIN : 1];

    explicit FA_DEVICE Pairs(const float* of_query) {
      FA_UNROLL
      for (int n = BEGIN; n < END; ++n) value[n - BEGIN] = pair_of(of_query, n);
    }
    template <class F>
    FA_DEVICE void for_each(F&& f) const {
      FA_UNROLL
      for (int n = BEGIN; n < END; ++n) for_pair(n, value[n - BEGIN], f);
    }
  };

  // Scores to probabilities.
  template <class Scores>
  static FA_DEVICE auto exponential(float scale_log2, Scores& scores) {
    return [scale_log2, &scores](int reg, float negated_lse) {
      scores[reg] = exp2_fast(fma_rn(scores[reg], scale_log2, negated_lse));
    };
  }
  template <class Scores>
  static FA_DEVICE void exponentiate(const float* negated_lse, float scale_log2, Scores& scores) {
    for_each_with(negated_lse, exponential(scale_log2, scores));
  }

  // clear(reg) for transposed scores that are hidden. Ends are relative to a lane's first query: one comparison with a
  // constant for each element and end.
  template <class Scores, class IntRows, class F>
  FA_DEVICE void for_each_hidden(int query, F&& clear) const {
    const int lane_col = int(threadIdx.x) % 4 * 2, origin = query + lane_col;
    const auto clear_if = [&](IntRows& bound, auto&& hidden) {
      Scores::for_each([&](int slot, int, int col, int reg) {
        if (hidden(col - lane_col, bound[slot])) clear(reg);
      });
    };
    if (query < mask.queries_begin(work.key_begin + kN - 1)) {
      IntRows begin;
      IntRows::for_each([&](int slot, int row, bool) {
        begin[slot] = mask.queries_begin(work.key_begin + row) - origin;
      });
      clear_if(begin, [](int col, int begin) { return col < begin; });
    }
    if (query + kM > mask.queries_end(work.key_begin + 1) || work.key_begin + kN > mask.len_k) {
      IntRows end;
      IntRows::for_each([&](int slot, int row, bool) {
        const int key = work.key_begin + row;
        end[slot] = (key < mask.len_k ? mask.queries_end(key + 1) : query) - origin;
      });
      clear_if(end, [](int col, int end) { return col >= end; });
    }
  }

  // A bit for each register: whether dropout keeps it. A lane's keys r and r + 8 are of one parity, so it has half of
  // the patch of queries c, c + 8, and half of that of c + 1, c + 9; a neighbour has the others. Each works out one.
  template <class Scores>
  struct Kept {
    uint32_t bits[(Scores::kRegs + 31) / 32];
    FA_DEVICE void keep(int reg) { bits[reg / 32] |= 1u << reg % 32; }
    FA_DEVICE bool keeps(int reg) const { return bits[reg / 32] >> (reg % 32) & 1; }
  };
  template <class Scores>
  FA_DEVICE void find_kept(const Dropout& dropout, int query, Kept<Scores>& kept) const {
    FA_UNROLL
    for (uint32_t& bits : kept.bits) bits = 0;
    Scores::for_each_patch([&](int row, int col, const int(&reg)[8]) {
      const bool odd = row % 2 != 0;
      uint32_t bits[4];
      dropout.patch(query + col + int(odd), work.key_begin + row % kN, bits);
      FA_UNROLL
      for (int half = 0; half < 2; ++half) {  // queries c and c + 1, then c + 8 and c + 9
        const uint32_t left = __byte_perm(bits[2 * half], bits[2 * half + 1], 0x5410);
        const uint32_t right = __byte_perm(bits[2 * half], bits[2 * half + 1], 0x7632);
        const uint32_t given = __shfl_xor_sync(0xffffffffu, odd ? left : right, 4), mine = odd ? right : left;
        const uint32_t first = odd ? given : mine, second = odd ? mine : given;
        const int at = 2 * half;
        if (dropout.keeps(first)) kept.keep(reg[at]);
        if (dropout.keeps(first >> 16)) kept.keep(reg[at + 4]);
        if (dropout.keeps(second)) kept.keep(reg[at + 1]);
        if (dropout.keeps(second >> 16)) kept.keep(reg[at + 5]);
      }
    });
  }
  // What dropout leaves of x, times `scale`.
  template <class Scores>
  static FA_DEVICE void drop(const Kept<Scores>& kept, float scale, Scores& x) {
    Scores::for_each([&](int, int, int, int reg) {
      x[reg] = kept.keeps(reg) ? x[reg] * scale : 0.0f;
    });
  }

  // 16 rows of dS^T of a warp, as a left factor has them, to shared memory, from row `first` on: rows of keys, in
  // panels of 64 queries.
  static FA_DEVICE void store_rows(const uint32_t (&a)[kM / 16][4], uint32_t dst, int first) {
    const int lane = int(threadIdx.x) % 32, row = first + lane % 16;
    FA_UNROLL
    for (int step = 0; step < kM / 16; ++step) {
      const int chunk = 2 * step + lane / 16;
      store_matrices(dst + chunk / 8 * (kN * 128) + row * 128 + ((chunk ^ row) % 8) * 16, a[step]);
    }
  }
};

}  // namespace sm90
}  // namespace flash_attn
