// Whether a block's scores leave the softmax's references where they are, as most do: asked of raw scores, without the
// row's other lanes. Positive floats compare like integers, and the largest of three integers takes one instruction.
#pragma once

#include <cfloat>
#include <climits>

#include "../attention/schedule.cuh"
#include "../attention/softmax.cuh"

namespace flash_attn {
namespace sm90 {

// Of a lane's two rows.
template <class Scores, class Rows>
class ScoreLimits {
 public:
  // No score below its limit moves the reference, by OnlineSoftmax::raise_max's own rounding; one above it may not.
  // Limits are `most` at most.
  FA_DEVICE void set(const OnlineSoftmax<float, Rows>& softmax, float scale_log2, float most = FLT_MAX) {
    constexpr float kBelow = 1 - 1e-6f;
    const float inverse = reciprocal(scale_log2) * kBelow;
    FA_UNROLL
    for (int slot = 0; slot < 2; ++slot) {
      const float limit = fminf((softmax.max.value[slot] + softmax.kSlack) * inverse, most);
      bits_[slot] = limit >= 0 ? int(float_to_bits(limit)) : INT_MIN;  // reached by any score
    }
  }

  FA_DEVICE bool reached(const Scores& scores) const {
    static_assert(Scores::kTilesM == 1 && Scores::kTilesN % 2 == 0);
    int most[2][2];  // of a row's even columns' tiles, and of the odd ones': two chains take half of the time
    Scores::for_each([&](int slot, int, int, int reg) {
      const int tile = reg / 4, bits = int(float_to_bits(scores[reg]));
      int& so_far = most[slot][tile % 2];
      so_far = (tile < 2 && reg % 2 == 0) || bits > so_far ? bits : so_far;
    });
    const bool first = max_int(most[0][0], most[0][1]) >= bits_[0];
    const bool second = max_int(most[1][0], most[1][1]) >= bits_[1];
    return first | second;
  }

  // Whether any score is less than -most. As unsigned integers, negative floats are larger than others, the larger the
  // more negative.
  static FA_DEVICE bool falls_below(const Scores& scores, float most) {
    uint32_t largest[2] = {0, 0};  // two chains, as above
    Scores::for_each([&](int, int, int, int reg) {
      const uint32_t bits = float_to_bits(scores[reg]);
      uint32_t& so_far = largest[reg / 4 % 2];
      so_far = bits > so_far ? bits : so_far;
    });
    return (largest[0] > largest[1] ? largest[0] : largest[1]) > float_to_bits(-most);
  }

 private:
  int bits_[2];
};

}  // namespace sm90
}  // namespace flash_attn
