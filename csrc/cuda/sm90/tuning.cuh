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

// sm80's main loops on Hopper have its tuning, but for the 16-bit forward's key block, and for the fp32 backward:
// Hopper's own at 128 has half of dQ's columns in each of two warpgroups; wider heads use the larger shared memory.
template <Kernel KERNEL, int ELEMENT_BYTES, int D>
struct Sm80Row {
  using Type = void;
};
template <> struct Sm80Row<Kernel::kForward, 2, 96> { using Type = sm80::ForwardTuning<128, 128, 8, 1>; };
template <> struct Sm80Row<Kernel::kForward, 2, 128> { using Type = sm80::ForwardTuning<128, 128, 8, 1>; };
template <> struct Sm80Row<Kernel::kBackward, 4, 128> { using Type = sm80::BackwardTuning<64, 64, 8, 4, 2, 4, 1>; };
template <> struct Sm80Row<Kernel::kBackward, 4, 192> { using Type = sm80::BackwardTuning<64, 32, 8, 4, 2, 4, 1>; };
template <> struct Sm80Row<Kernel::kBackward, 4, 256> { using Type = sm80::BackwardTuning<64, 32, 8, 4, 2, 4, 1>; };

template <Kernel KERNEL, class T, int D, bool MODIFIED, class Row = typename Sm80Row<KERNEL, int(sizeof(T)), D>::Type>
struct Tuning : Row {};
template <Kernel KERNEL, class T, int D, bool MODIFIED>
struct Tuning<KERNEL, T, D, MODIFIED, void> : sm80::Tuning<KERNEL, T, D, MODIFIED> {};

}  // namespace sm90
}  // namespace flash_attn
