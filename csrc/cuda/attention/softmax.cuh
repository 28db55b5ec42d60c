// Online softmax over ascending key blocks (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention-2,
// arXiv 2307.08691, Algorithm 1) and the fold of chunks that were each started from scratch.
//
// A row's state is (max, sum, O) with max in log2 units of the scaled score, rounded once: every exponential is taken
// relative to that rounded value, so a fully masked block changes nothing, bit for bit.
#pragma once

#include "../compat.cuh"

namespace flash_attn {

template <class Scalar, class Rows>
struct OnlineSoftmax {
  Rows max;  // of the raw scores; -inf while the row has seen no key
  Rows sum;  // this lane's part until finish()

  FA_DEVICE void clear() {
    max.fill(-infinity<Scalar>());
    sum.fill(Scalar(0));
  }

  // The row's reference exponent; 0 for a row without keys, so that no inf - inf arises.
  static FA_DEVICE Scalar reference(Scalar raw_max, Scalar scale_log2) {
    return raw_max == -infinity<Scalar>() ? Scalar(0) : raw_max * scale_log2;
  }

  // Turns raw scores into exp2(score - max), rescales the output and adds to the sums.
  template <class Scores, class Output>
  FA_DEVICE void update(Scores& scores, Output& output, Scalar scale_log2) {
    Rows negated, rescale;
    Rows previous = max;
    scores.max_rows(max);
    Rows::for_each([&](int slot, int, bool) {
      const Scalar ref = reference(max[slot], scale_log2);
      negated[slot] = -ref;
      rescale[slot] = exp2_fast(previous[slot] * scale_log2 - ref);
      sum[slot] *= rescale[slot];
    });
    Output::for_each([&](int slot, int, int, int reg) { output[reg] *= rescale[slot]; });
    Scores::for_each([&](int slot, int, int, int reg) {
      scores[reg] = exp2_fast(fma_rn(scores[reg], scale_log2, negated[slot]));
    });
    scores.sum_rows(sum);
  }

  // Completes the sums and turns max into log2 units.
  FA_DEVICE void finish(Scalar scale_log2) {
    sum.finish_sum();
    Rows::for_each([&](int slot, int, bool) {
      if (max[slot] != -infinity<Scalar>()) max[slot] *= scale_log2;
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

// What turns an unnormalised row into the output and its log-sum-exp (natural units), the sink included.
template <class Scalar>
struct RowResult {
  Scalar scale, lse;

  FA_DEVICE RowResult(Scalar max, Scalar sum, const Scalar* sink) {
    Scalar weight = 1;
    if (sink != nullptr) {
      Scalar total_max = *sink * Scalar(kLog2E), total = 1, keep, add;
      fold_weights(total_max, total, max, sum, keep, add);
      weight = add;
      max = total_max;
      sum = total;
    }
    const bool empty = sum == Scalar(0);
    scale = empty ? Scalar(0) : weight / sum;
    lse = empty ? infinity<Scalar>() : (max + log2_accurate(sum)) * Scalar(kLn2);
  }
};

}  // namespace flash_attn
