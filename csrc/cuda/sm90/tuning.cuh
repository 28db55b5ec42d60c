// Block sizes for Hopper. kBlockN of the forward is part of the numerics contract, and the same in its own main loops
// and in those of sm80 that serve what its own do not cover: a call's bits do not depend on which of them ran it.
#pragma once

#include "../sm80/tuning.cuh"

namespace flash_attn {
namespace sm90 {

// What forward.cuh runs: 16-bit.
template <int BLOCK_M, int BLOCK_N, bool QUERIES_IN_REGISTERS, bool STORES_BOXES, bool PAIRS = false,
          bool RESCALES_AT_ONCE = true>
struct ForwardRow {
  static constexpr bool kCovered = true;
  static constexpr int kBlockM = BLOCK_M, kBlockN = BLOCK_N, kStages = BLOCK_M == 192 ? 3 : 2;
  static constexpr bool kPairs = PAIRS;
  static constexpr bool kQueriesInRegisters = QUERIES_IN_REGISTERS;
  static constexpr bool kStoresBoxes = STORES_BOXES;  // of the output, by the copy engine
  // Where a row's reference moves, which is rare, its output is multiplied before the exponentials, not among them.
  static constexpr bool kRescalesAtOnce = RESCALES_AT_ONCE;
  // Of 65,536 registers: three warpgroups and the producer's, or two.
  static constexpr int kProducerRegisters = BLOCK_M == 192 ? 32 : 40;
  static constexpr int kConsumerRegisters = BLOCK_M == 192 ? 160 : 232;
};
template <int D>
struct ForwardTuning {
  static constexpr bool kCovered = false;
};
template <> struct ForwardTuning<64> : ForwardRow<192, 128, false, false> {};
template <> struct ForwardTuning<96> : ForwardRow<128, 128, true, true, true> {};
template <> struct ForwardTuning<128> : ForwardRow<128, 128, true, true, true, false> {};
template <> struct ForwardTuning<192> : ForwardRow<128, 64, true, true> {};
template <> struct ForwardTuning<256> : ForwardRow<128, 64, false, false> {};

template <int BLOCK_M>
struct BackwardRow {
  static constexpr bool kCovered = true;
  static constexpr int kBlockM = BLOCK_M, kWarpsQ = BLOCK_M / 16;  // kWarpsQ: warps along the queries of dQ
};
template <int D, Modifiers MODIFIERS>
struct BackwardTuning {
  static constexpr bool kCovered = false;
};
template <Modifiers MODIFIERS> struct BackwardTuning<64, MODIFIERS> : BackwardRow<128> {};
template <> struct BackwardTuning<64, Modifiers::kAny> : BackwardRow<64> {};  // 128 would spill
template <Modifiers MODIFIERS> struct BackwardTuning<96, MODIFIERS> : BackwardRow<64> {};
template <Modifiers MODIFIERS> struct BackwardTuning<128, MODIFIERS> : BackwardRow<64> {};

// sm80's main loops on Hopper: its tuning, but for the 16-bit forward's key block, and for the fp32 backward's dQ, of
// which each of two warpgroups has half of the columns.
template <Kernel KERNEL, class T, int D, bool MODIFIED>
struct Tuning
    : std::conditional_t<KERNEL == Kernel::kForward && sizeof(T) == 2 && (D == 96 || D == 128),
                         sm80::ForwardTuning<128, 128, 8, 1>,
                         std::conditional_t<KERNEL == Kernel::kBackward && sizeof(T) == 4 && D == 128,
                                            sm80::BackwardTuning<64, 64, 8, 4, 2, 4, 1>,
                                            sm80::Tuning<KERNEL, T, D, MODIFIED>>> {};

}  // namespace sm90
}  // namespace flash_attn
