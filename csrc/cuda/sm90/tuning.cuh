// Block sizes for Hopper. kBlockN of the forward is part of the numerics contract, and the same in its own main loops
// and in those of sm80 that serve what its own do not cover: a call's bits do not depend on which of them ran it.
#pragma once

#include "../sm80/tuning.cuh"

namespace flash_attn {
namespace sm90 {

// 16-bit, no softcap, ALiBi, dropout and the like: what forward.cuh runs.
template <int D>
struct ForwardTuning {
  static constexpr bool kCovered = false;
};
template <>
struct ForwardTuning<64> {
  static constexpr bool kCovered = true;
  static constexpr int kBlockM = 192, kBlockN = 128, kStages = 2;
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
};
template <>
struct ForwardTuning<128> {
  static constexpr bool kCovered = true;
  static constexpr int kBlockM = 128, kBlockN = 128, kStages = 2;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
};

// sm80's main loops on Hopper: its tuning, but for key blocks that must be as above.
template <Kernel KERNEL, class T, int D, bool MODIFIED>
struct Tuning : sm80::Tuning<KERNEL, T, D, MODIFIED> {};
template <bool MODIFIED>
struct Tuning<Kernel::kForward, Half, 128, MODIFIED> : sm80::ForwardTuning<128, 128, 8, 1> {};
template <bool MODIFIED>
struct Tuning<Kernel::kForward, BFloat16, 128, MODIFIED> : sm80::ForwardTuning<128, 128, 8, 1> {};

}  // namespace sm90
}  // namespace flash_attn
