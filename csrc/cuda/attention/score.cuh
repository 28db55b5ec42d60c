// Score modifiers: what happens to q.k before the softmax.
#pragma once

#include "../../core/params.h"
#include "../compat.cuh"

namespace flash_attn {

// Without softcap and ALiBi the softmax scales by softmax_scale * log2(e), in the exponent's fma; with them, scores leave
// apply() scaled, softcapped, biased, in log2 units. A modified instance without either computes what the plain one does.
template <class Scalar, bool MODIFIED>
class ScoreModifier {
 public:
  FA_DEVICE ScoreModifier(const AttentionParams& p, int batch, int head, int shift)
      : p_(p), scale_(Scalar(p.softmax_scale)), shift_(shift) {
    if (MODIFIED && p.alibi_slopes != nullptr) slope_ = p.alibi_slopes[batch * p.alibi_batch_stride + head];
  }

  // The factor left for the softmax.
  FA_DEVICE Scalar scale_log2() const { return active() ? Scalar(1) : uniform(scale_ * Scalar(kLog2E)); }

  // Raw score of (query, key) to log2 units.
  FA_DEVICE Scalar apply(Scalar raw, int query, int key) const {
    Scalar derivative;
    return apply(raw, query, key, derivative);
  }

  // Also gives the derivative of the softcap.
  FA_DEVICE Scalar apply(Scalar raw, int query, int key, Scalar& derivative) const {
    derivative = 1;
    if (!active()) return raw;
    Scalar score = raw * scale_;
    const Scalar softcap = p_.softcap;
    if (softcap > 0) {
      const Scalar t = tanh_accurate(score / softcap);
      score = softcap * t;
      derivative = Scalar(1) - t * t;
    }
    const int distance = query + shift_ - key;
    score -= slope_ * Scalar(distance < 0 ? -distance : distance);
    return score * Scalar(kLog2E);
  }

 private:
  // A score of -inf must not meet a scale of 0, nor a maximum a negative one.
  FA_DEVICE bool active() const {
    return MODIFIED && (p_.softcap > 0 || p_.alibi_slopes != nullptr || !(p_.softmax_scale > 0));
  }

  const AttentionParams& p_;
  Scalar scale_, slope_ = 0;
  int shift_;
};

}  // namespace flash_attn
