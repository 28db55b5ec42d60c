// Softcap where special functions are slow: tanh by a polynomial, if none of a tile's elements needs anything else.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "../../core/params.h"
#include "../compat.cuh"

namespace flash_attn {

// tanh(x) is a polynomial of three terms for |x| <= 0.45, within 4.5e-6 and the closer the smaller x (minimax by Remez'
// algorithm, the first term given): few scores exceed 0.45 of the softcap, and each term is an instruction.
inline SoftcapSeries softcap_series(double softmax_scale, double softcap) {
  constexpr double kEnd = 0.45, kTerms[3] = {1, -0.33233221, 0.118532284};
  // Nothing finite reaches the largest cap. Above the largest factor fp32 does not hold the terms; so small a softcap
  // does without.
  constexpr double kMostCap = 1e30, kMostFactor = 1e6;
  const double cap = std::min(softcap, kMostCap), factor = softmax_scale / cap;
  SoftcapSeries series{};
  series.exponent = float(2 * kLog2E * factor);
  series.cap = float(cap * kLog2E);
  series.inverse_cap = std::min(1 / series.cap, FLT_MAX);
  series.end = series.exponent_end = -1;
  if (std::fabs(factor) <= kMostFactor) {
    for (int i = 0; i < 3; ++i) series.terms[i] = float(kTerms[i] * softmax_scale * kLog2E * std::pow(factor, 2 * i));
    series.end = float(kEnd / std::fabs(factor));
    series.exponent_end = series.end * std::fabs(series.exponent);
  }
  return series;
}

// Raw scores to their softcap in log2 units. Which of two formulas an element takes depends on itself alone.
class Softcap {
 public:
  FA_DEVICE explicit Softcap(const AttentionParams& p) : series_(p.softcap_series) {}

  FA_DEVICE float end() const { return series_.end; }

  // Whether any of a warp's elements lies beyond the series.
  template <class Scores>
  FA_DEVICE bool any_far(const Scores& scores) const {
    float largest[4] = {};  // four, lest each comparison wait for the one before
    Scores::for_each([&](int, int, int, int reg) {
      largest[reg % 4] = ::fmaxf(largest[reg % 4], absolute(scores[reg]));
    });
    return any_lane(::fmaxf(::fmaxf(largest[0], largest[1]), ::fmaxf(largest[2], largest[3])) > series_.end);
  }

  // What the softmax takes for a scale (OnlineSoftmax): of scores none of which is far. MASKED: or -inf, which stays.
  template <bool MASKED>
  struct Near {
    float terms[3];
    FA_DEVICE float factor(float score) const {
      const float square = score * score;
      const float factor = fma_rn(fma_rn(square, terms[2], terms[1]), square, terms[0]);
      return MASKED ? ::fmaxf(factor, FLT_MIN) : factor;
    }
    FA_DEVICE float log2_of(float score) const { return score * factor(score); }
    FA_DEVICE float exponent(float score, float max) const { return fma_rn(score, factor(score), -max); }
  };
  template <bool MASKED>
  FA_DEVICE Near<MASKED> near() const {
    return {{series_.terms[0], series_.terms[1], series_.terms[2]}};
  }

  // Likewise of any scores.
  template <bool MASKED>
  struct Any {
    Near<false> by_series;
    const SoftcapSeries& series;
    FA_DEVICE float log2_of(float score) const { return exponent(score, 0); }
    FA_DEVICE float exponent(float score, float max) const {
      // Rounding is monotonic: no |score| <= end becomes far. (Compared itself, scores would stay in registers.)
      const float x = score * series.exponent;
      const float near = unhoisted(by_series.exponent(score, max));
      // 1 - 2 / (e^2x + 1): it cancels only near 0.
      const float tanh = fma_rn(-2.0f, reciprocal(exp2_fast(x) + 1.0f), 1.0f);
      const float far = fma_rn(tanh, series.cap, -max);
      return MASKED && x == -infinity<float>() ? x : absolute(x) > series.exponent_end ? far : near;
    }
  };
  template <bool MASKED>
  FA_DEVICE Any<MASKED> any() const {
    return {near<false>(), series_};
  }

  // f(scale) of scores for which any_far() was `far`.
  template <bool MASKED, class F>
  FA_DEVICE void with_scale(bool far, F&& f) const {
    far ? f(any<MASKED>()) : f(near<MASKED>());
  }

  // The derivative of a result.
  FA_DEVICE float derivative(float capped) const {
    const float tanh = capped * series_.inverse_cap;
    return fma_rn(-tanh, tanh, 1.0f);
  }

 private:
  const SoftcapSeries& series_;
};

}  // namespace flash_attn
