// Score modifiers: what happens to q.k before the softmax.
#pragma once

#include "../../core/params.h"
#include "../compat.cuh"

namespace flash_attn {

// Without softcap and ALiBi the softmax scales by softmax_scale * log2(e), in the exponent's fma; with them, scores
// leave apply() scaled, softcapped, biased, in log2 units, but that softcap's own factor may be left to the softmax. A
// modified instance without either computes what the plain one does.
template <class T, bool MODIFIED>
class ScoreModifier {
 public:
  using Scalar = AccumOf<T>;

  FA_DEVICE ScoreModifier(const AttentionParams& p, int batch, int head, int shift)
      : p_(p), scale_(Scalar(p.softmax_scale)), shift_(shift) {
    if (MODIFIED && p.alibi_slopes != nullptr) slope_ = p.alibi_slopes[batch * p.alibi_batch_stride + head];
  }

  // The factor left for the softmax.
  FA_DEVICE Scalar scale_log2() const {
    if (leaves_softcap()) return Scalar(reread(p_).softcap) * Scalar(kLog2E);
    return active() ? Scalar(1) : uniform(scale_ * Scalar(kLog2E));
  }

  // Raw scores, element (0, 0) that of (query, key), to log2 units. One branch for a whole tile, not for each element.
  template <class Scores>
  FA_DEVICE void apply(Scores& scores, int query, int key) const {
    apply(scores, query, key, [](int, Scalar) {});
  }

  // Also calls differentiate(reg, derivative of the softcap), where there is one.
  template <class Scores, class F>
  FA_DEVICE void apply(Scores& scores, int query, int key, F&& differentiate) const {
    if (!active()) return;
    const AttentionParams& p = reread(p_);
    const Scalar softcap = p.softcap;
    if (softcap > 0) {
      cap(scores, softcap, differentiate);
      if (leaves_softcap()) return;
      if (kTanhBySeries) Scores::for_each([&](int, int, int, int reg) { scores[reg] *= softcap; });
    } else {
      Scores::for_each([&](int, int, int, int reg) { scores[reg] *= scale_; });
    }
    if (p.alibi_slopes != nullptr) {
      int first = 0;  // row - col of register 0, from which the others' differ by constants
      Scores::for_each([&](int, int row, int col, int reg) {
        if (reg == 0) first = row - col;
      });
      const Scalar distance = Scalar(query + shift_ - key + first);
      Scores::for_each([&](int, int row, int col, int reg) {
        scores[reg] -= slope_ * absolute(distance + Scalar(row - col - first));
      });
    }
    Scores::for_each([&](int, int, int, int reg) { scores[reg] *= Scalar(kLog2E); });
  }

 private:
  // Scores to the tanh of what they are, scaled, of softcap; but for kTanhBySeries times softcap.
  template <class Scores, class F>
  FA_DEVICE void cap(Scores& scores, Scalar softcap, F&& differentiate) const {
    const auto apply_tanh = [&](auto&& tanh) {
      Scores::for_each([&](int, int, int, int reg) {
        const Scalar t = tanh(scores[reg]);
        differentiate(reg, Scalar(1) - t * t);
        scores[reg] = kTanhBySeries ? t : softcap * t;
      });
    };
    if constexpr (kTanhBySeries && sizeof(T) == 2) {
      // Which of the two an element takes depends on itself alone, and so do its bits.
      const Scalar factor = scale_ * reciprocal(softcap), end = kTanhSeriesEnd * reciprocal(absolute(factor));
      Scalar largest[4] = {};  // four, lest each comparison wait for the one before
      Scores::for_each([&](int, int, int, int reg) {
        largest[reg % 4] = ::fmaxf(largest[reg % 4], absolute(scores[reg]));
      });
      if (!any_lane(::fmaxf(::fmaxf(largest[0], largest[1]), ::fmaxf(largest[2], largest[3])) > end)) {
        apply_tanh([&](Scalar score) { return tanh_series(score * factor); });
      } else {
        apply_tanh([&](Scalar score) {
          const Scalar near = unhoisted(tanh_series(score * factor)), far = unhoisted(tanh_of(score * factor));
          return absolute(score) > end ? far : near;
        });
      }
    } else {
      // The compiler brings the reciprocal out of the loop; written before it, it costs AMD scalar registers.
      apply_tanh([&](Scalar score) { return tanh_of(score * scale_ * reciprocal(softcap)); });
    }
  }
  static FA_DEVICE Scalar tanh_of(Scalar x) {
    if constexpr (sizeof(T) == 2) return tanh_fast(x * Scalar(2 * kLog2E));
    return tanh_accurate(x);
  }

  // Whether softcap itself is all that is left to multiply by. AMD has no registers to spare for the distinction.
  FA_DEVICE bool leaves_softcap() const {
    if (!MODIFIED || !kTanhBySeries) return false;
    const AttentionParams& p = reread(p_);
    return p.softcap > 0 && p.alibi_slopes == nullptr;
  }
  // A score of -inf must not meet a scale of 0, nor a maximum a negative one.
  FA_DEVICE bool active() const {
    if (!MODIFIED) return false;
    const AttentionParams& p = reread(p_);
    return p.softcap > 0 || p.alibi_slopes != nullptr || !(Scalar(p.softmax_scale) > Scalar(0));
  }

  const AttentionParams& p_;
  Scalar scale_, slope_ = 0;
  int shift_;
};

}  // namespace flash_attn
