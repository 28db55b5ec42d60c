// Online softmax over ascending key blocks (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention-2,
// arXiv 2307.08691, Algorithm 1) and the fold of chunks that were each started from scratch.
//
// A row's state is (max, sum, O) with max in log2 units of the scaled score, rounded once: every exponential is taken
// relative to that rounded value, so a fully masked block changes nothing, bit for bit. A block's maximum replaces it
// where it is larger by more than kSlack, which is rare (FlashAttention-4's idea): what is left unchanged, kernels need
// not multiply by 1.
#pragma once

#include "../compat.cuh"

namespace flash_attn {

template <class Scalar, class Rows>
struct OnlineSoftmax {
  Rows max;  // within kSlack of it, log2 units; kNoKey while the row has seen no key, -inf instead after finish()
  Rows sum;  // this lane's part until finish()

  // Finite, so that exp2(-inf - kNoKey) is 0 and exp2(kNoKey - kNoKey) 1: rows without keys need no branch.
  static constexpr Scalar kNoKey = Scalar(-3.4028234663852886e38);
  // Exponentials stay below 2^8, which fp16 holds, and as precise as ever.
  static constexpr Scalar kSlack = Scalar(8);

  FA_DEVICE void clear() {
    max.fill(kNoKey);
    sum.fill(Scalar(0));
  }

  // Turns raw scores into exp2(score - max), rescales the output and adds to the sums: in these steps. A scale brings
  // scores to log2 units: a positive factor, for all rows or for each, or what has log2_of(score), which rises with the
  // score, and exponent(score, max). So the scaled scores' maximum is the maximum's scaled.
  template <class Scores, class Scale>
  FA_DEVICE void raise_max(const Scores& scores, const Scale& scale, Rows& rescale) {
    Rows block_max;
    block_max.fill(-infinity<Scalar>());
    scores.max_rows(block_max);
    Rows::for_each([&](int slot, int, bool) {
      const Scalar scaled = log2_of(scale, block_max[slot], slot), former = max[slot];
      max[slot] = scaled > former + kSlack ? scaled : former;
      rescale[slot] = exp2_fast(former - max[slot]);
      sum[slot] *= rescale[slot];
    });
  }
  template <class Output>
  static FA_DEVICE void apply(Rows& rescale, Output& output) {
    Output::for_each([&](int slot, int, int, int reg) { output[reg] *= rescale[slot]; });
  }
  template <class Scores, class Scale>
  FA_DEVICE void exponentiate(Scores& scores, const Scale& scale) {
    Scores::for_each([&](int slot, int, int, int reg) {
      scores[reg] = exp2_fast(exponent(scale, scores[reg], max[slot], slot));
    });
    scores.sum_rows(sum);
  }
  // Likewise of one of the lane's rows, from register BEGIN of its scores to END.
  template <int SLOT, int BEGIN, int END, class Scores, class Scale>
  FA_DEVICE void exponentiate_part(Scores& scores, const Scale& scale) {
    Scores::for_each([&](int slot, int, int, int reg) {
      if (slot != SLOT || reg < BEGIN || reg >= END) return;
      scores[reg] = exp2_fast(exponent(scale, scores[reg], max[slot], slot));
      sum[slot] += scores[reg];
    });
  }

  static FA_DEVICE Scalar log2_of(Scalar scale, Scalar score, int) { return score * scale; }
  static FA_DEVICE Scalar log2_of(const Rows& scale, Scalar score, int slot) { return score * scale.value[slot]; }
  template <class Scale>
  static FA_DEVICE Scalar log2_of(const Scale& scale, Scalar score, int) {
    return scale.log2_of(score);
  }
  static FA_DEVICE Scalar exponent(Scalar scale, Scalar score, Scalar max, int) { return fma_rn(score, scale, -max); }
  static FA_DEVICE Scalar exponent(const Rows& scale, Scalar score, Scalar max, int slot) {
    return fma_rn(score, scale.value[slot], -max);
  }
  template <class Scale>
  static FA_DEVICE Scalar exponent(const Scale& scale, Scalar score, Scalar max, int) {
    return scale.exponent(score, max);
  }

  FA_DEVICE void finish() {
    sum.finish_sum();
    Rows::for_each([&](int slot, int, bool) {
      if (max[slot] == kNoKey) max[slot] = -infinity<Scalar>();
    });
  }
};

// The weights with which a running (max, sum) and the next chunk's enter their fold; updates the running pair.
template <class Scalar>
FA_DEVICE void fold_weights(Scalar& max, Scalar& sum, Scalar chunk_max, Scalar chunk_sum, Scalar& keep, Scalar& add) {
  const Scalar folded = max > chunk_max ? max : chunk_max;
  const Scalar ref = folded == -infinity<Scalar>() ? Scalar(0) : folded;
  keep = exp2_fast(max - ref);
  add = exp2_fast(chunk_max - ref);
  sum = fma_rn(chunk_sum, add, sum * keep);
  max = folded;
}

// An element of the output along a row's chunks, in ascending order.
template <class Scalar>
struct ChunkFold {
  Scalar max = -infinity<Scalar>(), sum = 0, out = 0;

  // The next chunk's, not normalised. Without `any` nothing changes; nor is there a branch, behind which the compiler
  // would put loads.
  FA_DEVICE void add(Scalar chunk_max, Scalar chunk_sum, Scalar chunk_out, bool any = true) {
    Scalar folded_max = max, folded_sum = sum, keep, weight;
    fold_weights(folded_max, folded_sum, chunk_max, chunk_sum, keep, weight);
    max = any ? folded_max : max;
    sum = any ? folded_sum : sum;
    out = any ? fma_rn(chunk_out, weight, out * keep) : out;
  }
};

template <class Scalar>
struct Chunk {
  Scalar max, sum, out;
};
// Of chunks load(0) to load(count - 1), in ascending order. Eight are on their way at a time: a decoding step has few
// rows, and time only for latency.
template <class Scalar, class Load>
FA_DEVICE ChunkFold<Scalar> fold_chunks(int count, Load&& load) {
  constexpr int kAtOnce = 8;
  ChunkFold<Scalar> fold;
#pragma unroll 1
  for (int first = 0; first < count; first += kAtOnce) {
    Chunk<Scalar> chunks[kAtOnce];
    FA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) chunks[i] = load(min_int(first + i, count - 1));
    FA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) fold.add(chunks[i].max, chunks[i].sum, chunks[i].out, first + i < count);
  }
  return fold;
}

// What turns an unnormalised row into the output and its log-sum-exp (natural units), the sink included: -inf for none.
// Without branches, so that a lane's rows are worked out side by side.
template <class Scalar>
struct RowResult {
  Scalar scale, lse;

  FA_DEVICE RowResult(Scalar max, Scalar sum, Scalar sink) {
    Scalar total_max = sink * Scalar(kLog2E), total = 1, keep, weight;
    fold_weights(total_max, total, max, sum, keep, weight);
    const Scalar inverse = reciprocal(total), log = log2_accurate(total);
    const bool empty = total == Scalar(0);
    scale = empty ? Scalar(0) : weight * inverse;
    lse = empty ? infinity<Scalar>() : (total_max + log) * Scalar(kLn2);
  }
};

}  // namespace flash_attn
