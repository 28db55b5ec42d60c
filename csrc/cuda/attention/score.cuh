// Score modifiers: what happens to q.k before the softmax.
#pragma once

#include "../../core/params.h"
#include "../compat.cuh"

namespace flash_attn {

// Plain: the softmax scales by softmax_scale * log2(e) in the exponent's fma. MODIFIED: scores leave apply() scaled,
// softcapped, ALiBi-biased, in log2 units.
template <class Scalar, bool MODIFIED>
class ScoreModifier {
 public:
  FA_DEVICE ScoreModifier(const AttentionParams& p, int batch, int head, int shift)
      : scale_(Scalar(p.softmax_scale)), softcap_(p.softcap), shift_(shift) {
    if (MODIFIED && p.alibi_slopes != nullptr) slope_ = p.alibi_slopes[batch * p.alibi_batch_stride + head];
  }

  // The factor left for the softmax.
  FA_DEVICE Scalar scale_log2() const { return MODIFIED ? Scalar(1) : uniform(scale_ * Scalar(kLog2E)); }

  // Raw score of (query, key) to log2 units.
  FA_DEVICE Scalar apply(Scalar raw, int query, int key) const {
    Scalar derivative;
    return apply(raw, query, key, derivative);
  }

  // Also gives the derivative of the softcap.
  FA_DEVICE Scalar apply(Scalar raw, int query, int key, Scalar& derivative) const {
    derivative = 1;
    if (!MODIFIED) return raw;
    Scalar score = raw * scale_;
    if (softcap_ > 0) {
      const Scalar t = tanh_accurate(score / softcap_);
      score = softcap_ * t;
      derivative = Scalar(1) - t * t;
    }
    const int distance = query + shift_ - key;
    score -= slope_ * Scalar(distance < 0 ? -distance : distance);
    return score * Scalar(kLog2E);
  }

 private:
  Scalar scale_, softcap_, slope_ = 0;
  int shift_;
};

}  // namespace flash_attn
