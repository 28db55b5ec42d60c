// Score modifiers: what happens to q.k before the softmax.
#pragma once

#include "../../core/params.h"
#include "../compat.cuh"

namespace flash_attn {

// Without softcap and ALiBi the softmax scales by softmax_scale * log2(e), in the exponent's fma; with them, scores
// leave apply() scaled, softcapped, biased, in log2 units. A modified instance without either computes what the plain
// one does.
template <class T, bool MODIFIED>
class ScoreModifier {
 public:
  using Scalar = AccumOf<T>;

  FA_DEVICE ScoreModifier(const AttentionParams& p, int batch, int head, int shift)
      : p_(p), scale_(Scalar(p.softmax_scale)), shift_(shift) {
    if (MODIFIED && p.alibi_slopes != nullptr) slope_ = p.alibi_slopes[batch * p.alibi_batch_stride + head];
  }

  // The factor left for the softmax.
  FA_DEVICE Scalar scale_log2() const { return active() ? Scalar(1) : uniform(scale_ * Scalar(kLog2E)); }

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
      // The compiler brings the reciprocal out of the loop; written before it, it costs AMD scalar registers.
      Scores::for_each([&](int, int, int, int reg) {
        const Scalar t = tanh_of(scores[reg] * scale_ * reciprocal(softcap));
        differentiate(reg, Scalar(1) - t * t);
        scores[reg] = softcap * t;
      });
    } else {
      Scores::for_each([&](int, int, int, int reg) { scores[reg] *= scale_; });
    }
    if (p.alibi_slopes != nullptr) {
      const int shift = query + shift_ - key;
      Scores::for_each([&](int, int row, int col, int reg) {
        const int distance = shift + row - col;
        scores[reg] -= slope_ * Scalar(distance < 0 ? -distance : distance);
      });
    }
    Scores::for_each([&](int, int, int, int reg) { scores[reg] *= Scalar(kLog2E); });
  }

 private:
  static FA_DEVICE Scalar tanh_of(Scalar x) {
    if constexpr (sizeof(T) == 2) return tanh_fast(x * Scalar(2 * kLog2E));
    return tanh_accurate(x);
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
