// Block sizes for sm80, one row a kernel, element size and head dimension. kBlockN of the forward is part of the
// numerics contract (it fixes the order of the online softmax): changing it changes bits.
#pragma once

#include "../tile/tile.cuh"

namespace flash_attn {
namespace sm80 {

template <int BLOCK_M, int BLOCK_N, int WARPS, int MIN_BLOCKS>
struct ForwardTuning {
  static constexpr int kBlockM = BLOCK_M, kBlockN = BLOCK_N, kWarps = WARPS;
  static constexpr int kMinBlocks = MIN_BLOCKS;  // thread blocks to fit on a multiprocessor
};

template <int BLOCK_M, int BLOCK_N, int WARPS, int WARPS_M, int WARPS_N, int WARPS_Q, int STAGES>
struct BackwardTuning {
  static constexpr int kBlockM = BLOCK_M, kBlockN = BLOCK_N, kWarps = WARPS;
  static constexpr int kWarpsM = WARPS_M;  // warps along the queries of S and dP
  static constexpr int kWarpsN = WARPS_N;  // along the keys of dK and dV
  static constexpr int kWarpsQ = WARPS_Q;  // along the queries of dQ
  static constexpr int kStages = STAGES;   // 2 where Q and dO fit twice beside K, V, P and dS in 163 KiB
  static constexpr int kMinBlocks = 1;
};

template <Kernel KERNEL, int ELEMENT_BYTES, int D>
struct TuningRow;

// 16-bit. Four warps of 32 rows, two blocks a multiprocessor: 255 registers each, and one block's softmax runs under
// the other's multiplies. From 192 on, 16 rows a warp: the output alone takes 96 and 128 registers.
template <> struct TuningRow<Kernel::kForward, 2, 32> : ForwardTuning<128, 128, 4, 2> {};
template <> struct TuningRow<Kernel::kForward, 2, 64> : ForwardTuning<128, 128, 4, 2> {};
template <> struct TuningRow<Kernel::kForward, 2, 96> : ForwardTuning<128, 64, 4, 2> {};
template <> struct TuningRow<Kernel::kForward, 2, 128> : ForwardTuning<128, 64, 4, 2> {};
template <> struct TuningRow<Kernel::kForward, 2, 192> : ForwardTuning<64, 64, 4, 2> {};
template <> struct TuningRow<Kernel::kForward, 2, 256> : ForwardTuning<64, 64, 4, 2> {};

template <> struct TuningRow<Kernel::kBackward, 2, 32> : BackwardTuning<128, 128, 8, 4, 4, 4, 2> {};
template <> struct TuningRow<Kernel::kBackward, 2, 64> : BackwardTuning<128, 128, 8, 4, 4, 4, 2> {};
template <> struct TuningRow<Kernel::kBackward, 2, 96> : BackwardTuning<64, 128, 8, 2, 4, 4, 2> {};
template <> struct TuningRow<Kernel::kBackward, 2, 128> : BackwardTuning<64, 128, 8, 2, 4, 2, 2> {};
template <> struct TuningRow<Kernel::kBackward, 2, 192> : BackwardTuning<64, 64, 8, 4, 2, 2, 2> {};
template <> struct TuningRow<Kernel::kBackward, 2, 256> : BackwardTuning<64, 64, 8, 4, 2, 2, 1> {};

// fp32, three tf32 multiplies a product: fragments come in pairs of high and low parts, so blocks are smaller.
template <> struct TuningRow<Kernel::kForward, 4, 32> : ForwardTuning<64, 64, 4, 2> {};
template <> struct TuningRow<Kernel::kForward, 4, 64> : ForwardTuning<64, 64, 4, 2> {};
template <> struct TuningRow<Kernel::kForward, 4, 96> : ForwardTuning<64, 32, 4, 2> {};
template <> struct TuningRow<Kernel::kForward, 4, 128> : ForwardTuning<64, 32, 4, 2> {};
template <> struct TuningRow<Kernel::kForward, 4, 192> : ForwardTuning<64, 32, 4, 1> {};
template <> struct TuningRow<Kernel::kForward, 4, 256> : ForwardTuning<32, 32, 2, 1> {};

template <> struct TuningRow<Kernel::kBackward, 4, 32> : BackwardTuning<64, 64, 8, 4, 4, 4, 2> {};
template <> struct TuningRow<Kernel::kBackward, 4, 64> : BackwardTuning<64, 64, 8, 4, 4, 4, 2> {};
template <> struct TuningRow<Kernel::kBackward, 4, 96> : BackwardTuning<64, 64, 8, 4, 4, 4, 1> {};
template <> struct TuningRow<Kernel::kBackward, 4, 128> : BackwardTuning<64, 64, 8, 4, 2, 2, 1> {};
template <> struct TuningRow<Kernel::kBackward, 4, 192> : BackwardTuning<32, 32, 4, 2, 2, 2, 1> {};
template <> struct TuningRow<Kernel::kBackward, 4, 256> : BackwardTuning<32, 32, 4, 2, 2, 2, 1> {};

// Softcap, dropout and the like need registers of their own: the forward halves the rows of a warp.
template <Kernel KERNEL, class T, int D, bool MODIFIED>
struct Tuning : TuningRow<KERNEL, int(sizeof(T)), D> {};
template <class T, int D>
struct Tuning<Kernel::kForward, T, D, true> : TuningRow<Kernel::kForward, int(sizeof(T)), D> {
  using Row = TuningRow<Kernel::kForward, int(sizeof(T)), D>;
  static constexpr bool kWide = Row::kBlockM / Row::kWarps == 32;
  static constexpr int kWarps = kWide ? 2 * Row::kWarps : Row::kWarps;
  static constexpr int kMinBlocks = kWide ? 1 : Row::kMinBlocks;
};

}  // namespace sm80
}  // namespace flash_attn
