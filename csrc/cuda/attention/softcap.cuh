// Softcap where special functions are slow: tanh by a polynomial, if none of a tile's elements needs anything else.
#pragma once

#include <algorithm>
#include <cmath>

#include "../../core/params.h"
#include "../compat.cuh"

namespace flash_attn {

// tanh(x) = x P(x^2) within 3e-6 of it for |x| <= 0.625: a minimax polynomial by Remez' algorithm, here of raw scores.
inline SoftcapSeries softcap_series(double softmax_scale, double softcap) {
  constexpr double kEnd = 0.625, kMinimax[4] = {0.999997089982, -0.333092316252, 0.130154592025, -0.0400295158336};
  // Below the least factor nothing finite is capped. Above the largest, fp32 does not hold the coefficients; so small a
  // softcap does without.
  constexpr double kLeast = 1e-30, kMost = 1e6;
  const double wanted = softmax_scale / softcap, factor = std::copysign(std::max(std::fabs(wanted), kLeast), wanted);
  SoftcapSeries series{};
  series.exponent = float(2 * kLog2E * factor);
  series.twice_cap = float(2 / factor);
  series.end = series.exponent_end = -1;
  if (std::fabs(factor) <= kMost) {
    for (int i = 0; i < 4; ++i) series.coefficients[i] = float(kMinimax[i] * std::pow(factor, 2 * i));
    series.end = float(kEnd / std::fabs(factor));
    series.exponent_end = series.end * std::fabs(series.exponent);
  }
  return series;
}

// Raw scores to their softcap over the softmax scale. Which of two formulas an element takes depends on itself alone.
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

  // `far`: any_far().
  template <class Scores>
  FA_DEVICE void apply(Scores& scores, bool far) const {
    if (!far) {
      Scores::for_each([&](int, int, int, int reg) { scores[reg] = by_series(scores[reg]); });
    } else {
      Scores::for_each([&](int, int, int, int reg) {
        // Rounding is monotonic: no |score| <= end becomes far. (Compared itself, scores would stay in registers.)
        const float x = scores[reg] * series_.exponent;
        const float near = unhoisted(by_series(scores[reg])), far = unhoisted(by_exponential(x));
        scores[reg] = absolute(x) > series_.exponent_end ? far : near;
      });
    }
  }

  // Calls f(reg, derivative) for the results of apply().
  template <class Scores, class F>
  FA_DEVICE void differentiate(const Scores& scores, F&& f) const {
    const float inverse = 2 * reciprocal(series_.twice_cap);
    Scores::for_each([&](int, int, int, int reg) {
      const float tanh = scores[reg] * inverse;
      f(reg, fma_rn(-tanh, tanh, 1.0f));
    });
  }

 private:
  FA_DEVICE float by_series(float score) const {
    const float square = score * score;
    float y = fma_rn(series_.coefficients[3], square, series_.coefficients[2]);
    y = fma_rn(y, square, series_.coefficients[1]);
    y = fma_rn(y, square, series_.coefficients[0]);
    return score * y;
  }
  // 2 (1/2 - 1 / (e^2x + 1)): it cancels only near 0.
  FA_DEVICE float by_exponential(float x) const {
    return (0.5f - reciprocal(exp2_fast(x) + 1.0f)) * series_.twice_cap;
  }

  const SoftcapSeries& series_;
};

}  // namespace flash_attn
