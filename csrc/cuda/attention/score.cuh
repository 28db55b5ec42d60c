// Score modifiers: what happens to q.k before the softmax.
#pragma once

#include "../../core/params.h"
#include "../compat.cuh"
#include "softcap.cuh"

namespace flash_attn {

// Unmodified, the softmax scales by softmax_scale * log2(e), in the exponent's fma; so too after a softcap by series.
// Else scores leave apply() scaled, softcapped, biased, in log2 units. An instance that could modify, and is not asked
// to, computes what the plain one does.
template <class T, Modifiers MODIFIERS>
class ScoreModifier {
 public:
  using Scalar = AccumOf<T>;

  FA_DEVICE ScoreModifier(const AttentionParams& p, int batch, int head, int shift)
      : p_(p), scale_(Scalar(p.softmax_scale)), shift_(shift) {
    if (biases(p)) slope_ = p.alibi_slopes[batch * p.alibi_batch_stride + head];
  }

  // The factor left for the softmax.
  FA_DEVICE Scalar scale_log2() const {
    return leaves_scale(reread(p_)) ? uniform(scale_ * Scalar(kLog2E)) : Scalar(1);
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
    if (caps(p)) {
      cap(scores, p.softcap, differentiate);
      if (kSeries && leaves_scale(p)) return;
    }
    if (kSeries || !caps(p)) Scores::for_each([&](int, int, int, int reg) { scores[reg] *= scale_; });
    if (biases(p)) bias(scores, query, key);
    Scores::for_each([&](int, int, int, int reg) { scores[reg] *= Scalar(kLog2E); });
  }

 private:
  static constexpr bool kSeries = kTanhBySeries && sizeof(T) == 2;
  static_assert(kSeries || MODIFIERS != Modifiers::kSoftcap);

  template <class Scores, class F>
  FA_DEVICE void cap(Scores& scores, Scalar softcap, F&& differentiate) const {
    if constexpr (kSeries) {
      const Softcap series(reread(p_));
      series.apply(scores, series.any_far(scores));
      series.differentiate(scores, differentiate);
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
  FA_DEVICE void bias(Scores& scores, int query, int key) const {
    int first = 0;  // row - col of register 0, from which the others' differ by constants
    Scores::for_each([&](int, int row, int col, int reg) {
      if (reg == 0) first = row - col;
    });
    const Scalar distance = Scalar(query + shift_ - key + first);
    Scores::for_each([&](int, int row, int col, int reg) {
      scores[reg] -= slope_ * absolute(distance + Scalar(row - col - first));
    });
  }

  static FA_DEVICE bool caps(const AttentionParams& p) {
    return MODIFIERS == Modifiers::kSoftcap || (MODIFIERS == Modifiers::kAny && p.softcap > 0);
  }
  static FA_DEVICE bool biases(const AttentionParams& p) {
    return MODIFIERS == Modifiers::kAny && p.alibi_slopes != nullptr;
  }
  FA_DEVICE bool active() const {
    const AttentionParams& p = reread(p_);
    return caps(p) || !leaves_scale(p);
  }
  // A score of -inf must not meet a scale of 0, nor a maximum a negative one.
  static FA_DEVICE bool leaves_scale(const AttentionParams& p) {
    if (MODIFIERS != Modifiers::kAny) return true;
    return (kSeries || !caps(p)) && !biases(p) && Scalar(p.softmax_scale) > Scalar(0);
  }

  const AttentionParams& p_;
  Scalar scale_, slope_ = 0;
  int shift_;
};

}  // namespace flash_attn
