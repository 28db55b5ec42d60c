// Score modifiers: what happens to q.k before the softmax.
#pragma once

#include "../../core/params.h"
#include "../compat.cuh"
#include "softcap.cuh"

namespace flash_attn {

// Unmodified, the softmax scales by softmax_scale * log2(e), in the exponent's fma. In the forward a softcap by series
// may be left to it, too. Else scores leave apply() scaled, softcapped, biased, in log2 units. An instance that could
// modify, and is not asked to, computes what the plain one does.
template <class T, Modifiers MODIFIERS>
class ScoreModifier {
 public:
  using Scalar = AccumOf<T>;

  FA_DEVICE ScoreModifier(const AttentionParams& p, int batch, int head, int shift)
      : p_(p), scale_(Scalar(p.softmax_scale)), shift_(shift) {
    if (biases(p)) slope_ = p.alibi_slopes[batch * p.alibi_batch_stride + head];
  }

  // The forward's: raw scores, element (0, 0) that of (query, key), to such as with_scale() gives the scale of. One
  // branch for a whole tile, not for each element. Returns what with_scale() asks for.
  template <class Scores>
  FA_DEVICE bool apply(Scores& scores, int query, int key) const {
    if constexpr (kSeries && MODIFIERS != Modifiers::kNone) {
      const AttentionParams& p = reread(p_);
      if (leaves_softcap(p)) return Softcap(p).any_far(scores);
    }
    apply(scores, query, key, [](int, Scalar) {});
    return false;
  }
  // f(scale), as OnlineSoftmax takes it, of these scores and hidden ones, -inf.
  template <class F>
  FA_DEVICE void with_scale(bool far, F&& f) const {
    if constexpr (kSeries && MODIFIERS != Modifiers::kNone) {
      const AttentionParams& p = reread(p_);
      if (leaves_softcap(p)) return Softcap(p).with_scale<true>(far, f);
    }
    f(scale_log2());
  }
  // The scale of single ones of them, near or far.
  FA_DEVICE auto scale_of_any() const {
    if constexpr (kSeries && MODIFIERS != Modifiers::kNone) {
      return ScaleOfAny{*this};
    } else {
      return scale_log2();
    }
  }
  struct ScaleOfAny {
    const ScoreModifier& modifier;
    FA_DEVICE Scalar log2_of(Scalar score) const {
      const AttentionParams& p = reread(modifier.p_);
      return modifier.leaves_softcap(p) ? Softcap(p).any<true>().log2_of(score) : score * modifier.scale_log2();
    }
  };

  // The backward's: also calls differentiate(reg, derivative of the softcap), where there is one, and leaves nothing
  // but scale_log2() to multiply by.
  template <class Scores, class F>
  FA_DEVICE void apply(Scores& scores, int query, int key, F&& differentiate) const {
    if (!active()) return;
    const AttentionParams& p = reread(p_);
    if (caps(p)) cap(scores, p.softcap, differentiate);
    // Where a series caps, in log2 units from here on; else at last, which costs AMD fewer scalar registers.
    const Scalar unit = kSeries ? Scalar(kLog2E) : Scalar(1);
    if (!caps(p)) Scores::for_each([&](int, int, int, int reg) { scores[reg] *= scale_ * unit; });
    if (biases(p)) bias(scores, query, key, slope_ * unit);
    if (!kSeries) Scores::for_each([&](int, int, int, int reg) { scores[reg] *= Scalar(kLog2E); });
  }
  FA_DEVICE Scalar scale_log2() const {
    return leaves_scale(reread(p_)) ? uniform(scale_ * Scalar(kLog2E)) : Scalar(1);
  }

 private:
  static constexpr bool kSeries = kTanhBySeries && sizeof(T) == 2;
  static_assert(kSeries || MODIFIERS != Modifiers::kSoftcap);

  template <class Scores, class F>
  FA_DEVICE void cap(Scores& scores, Scalar softcap, F&& differentiate) const {
    if constexpr (kSeries) {
      const Softcap series(reread(p_));
      series.with_scale<false>(series.any_far(scores), [&](const auto& scale) {
        Scores::for_each([&](int, int, int, int reg) { scores[reg] = scale.log2_of(scores[reg]); });
      });
      Scores::for_each([&](int, int, int, int reg) { differentiate(reg, series.derivative(scores[reg])); });
    } else {
      Scores::for_each([&](int, int, int, int reg) {
        // The compiler brings the reciprocal out of the loop; written before it, it costs AMD scalar registers.
        const Scalar tanh = tanh_of(scores[reg] * scale_ * reciprocal(softcap));
        differentiate(reg, Scalar(1) - tanh * tanh);
        scores[reg] = softcap * tanh;
      });
    }
  }
  static FA_DEVICE Scalar tanh_of(Scalar x) {
    if constexpr (sizeof(T) == 2) return tanh_fast(x * Scalar(2 * kLog2E));
    return tanh_accurate(x);
  }

  template <class Scores>
  FA_DEVICE void bias(Scores& scores, int query, int key, Scalar slope) const {
    int first = 0;  // row - col of register 0, from which the others' differ by constants
    Scores::for_each([&](int, int row, int col, int reg) {
      if (reg == 0) first = row - col;
    });
    const Scalar distance = Scalar(query + shift_ - key + first);
    Scores::for_each([&](int, int row, int col, int reg) {
      scores[reg] = fma_rn(-slope, absolute(distance + Scalar(row - col - first)), scores[reg]);
    });
  }

  static FA_DEVICE bool caps(const AttentionParams& p) {
    return MODIFIERS == Modifiers::kSoftcap || (MODIFIERS == Modifiers::kAny && p.softcap > 0);
  }
  static FA_DEVICE bool biases(const AttentionParams& p) {
    return MODIFIERS == Modifiers::kAny && p.alibi_slopes != nullptr;
  }
  // Is !leaves_scale(), asked in the way that costs AMD fewer scalar registers.
  FA_DEVICE bool active() const {
    const AttentionParams& p = reread(p_);
    return caps(p) || !leaves_scale(p);
  }
  FA_DEVICE bool leaves_scale(const AttentionParams& p) const {
    return MODIFIERS == Modifiers::kNone || (!caps(p) && maximum_scales(p));
  }
  FA_DEVICE bool leaves_softcap(const AttentionParams& p) const {
    return MODIFIERS == Modifiers::kSoftcap || (kSeries && caps(p) && maximum_scales(p));
  }
  // A score of -inf must not meet a scale of 0, nor a maximum a negative one.
  FA_DEVICE bool maximum_scales(const AttentionParams& p) const {
    return !biases(p) && scale_ > Scalar(0);
  }

  const AttentionParams& p_;
  Scalar scale_, slope_ = 0;
  int shift_;
};

}  // namespace flash_attn
