// Tile sizes for gfx90a, one row a kernel, element size and head dimension. A compute unit has 64 KiB of LDS, and each
// of its four SIMDs 512 registers a lane, shared by the waves on it.
//
// WAVES is what the second argument of __launch_bounds__ means on AMD: waves a SIMD. With two or more the compiler
// keeps everything in 256 registers, where any instruction can read a product; with one, products lie in the other half
// of the register file and are copied before they are used.
#pragma once

#include "../../cuda/compat.cuh"
#include "../../cuda/tile/tile.cuh"

namespace flash_attn::gfx90a {

// Four waves, each with ROWS rows. BLOCK_N of the forward is part of the numerics contract (it fixes the order of the
// online softmax): changing it changes bits.
template <int ROWS, int BLOCK_N, int WAVES, int WAVES_MODIFIED>
struct ForwardTuning {
  static constexpr int kWarps = 4, kBlockM = kWarps * ROWS, kBlockN = BLOCK_N;
  static constexpr int kWaves = WAVES, kWavesModified = WAVES_MODIFIED;
};

// Four waves, each with KEYS keys, whose K and V it holds as operands: so KEYS is 16 where 32 would not leave
// registers. Queries come in blocks of as many rows. kWarpsQ: waves along the queries of dQ, the others sharing the
// head dimension.
template <int KEYS, int WAVES, int WAVES_MODIFIED>
struct BackwardTuning {
  static constexpr int kWarps = 4, kBlockM = KEYS, kBlockN = kWarps * KEYS;
  static constexpr int kWarpsM = 1, kWarpsN = kWarps;
  static constexpr int kStages = 1;  // registers hold the next Q and dO
  static constexpr int kWaves = WAVES, kWavesModified = WAVES_MODIFIED;
};

template <Kernel KERNEL, int ELEMENT_BYTES, int D>
struct TuningRow;

// 16-bit. 32 rows a wave take 2.5 D registers (output, its stash, Q); K and V of a block take 32 KiB at most, so that
// two blocks fit on a compute unit.
template <> struct TuningRow<Kernel::kForward, 2, 32> : ForwardTuning<32, 64, 2, 2> {};
template <> struct TuningRow<Kernel::kForward, 2, 64> : ForwardTuning<32, 64, 2, 2> {};
template <> struct TuningRow<Kernel::kForward, 2, 96> : ForwardTuning<32, 64, 2, 1> {};
template <> struct TuningRow<Kernel::kForward, 2, 128> : ForwardTuning<32, 64, 2, 1> {};
template <> struct TuningRow<Kernel::kForward, 2, 192> : ForwardTuning<16, 32, 2, 2> {};
template <> struct TuningRow<Kernel::kForward, 2, 256> : ForwardTuning<16, 32, 2, 1> {};

template <> struct TuningRow<Kernel::kBackward, 2, 32> : BackwardTuning<32, 2, 1> {};
template <> struct TuningRow<Kernel::kBackward, 2, 64> : BackwardTuning<32, 2, 1> {};
template <> struct TuningRow<Kernel::kBackward, 2, 96> : BackwardTuning<32, 1, 1> {};
template <> struct TuningRow<Kernel::kBackward, 2, 128> : BackwardTuning<32, 1, 1> {};
template <> struct TuningRow<Kernel::kBackward, 2, 192> : BackwardTuning<16, 2, 1> {};
template <> struct TuningRow<Kernel::kBackward, 2, 256> : BackwardTuning<16, 1, 1> {};

// fp32. Matrix instructions are four times slower, so smaller tiles keep them busy.
template <> struct TuningRow<Kernel::kForward, 4, 32> : ForwardTuning<32, 64, 2, 2> {};
template <> struct TuningRow<Kernel::kForward, 4, 64> : ForwardTuning<32, 32, 2, 2> {};
template <> struct TuningRow<Kernel::kForward, 4, 96> : ForwardTuning<32, 32, 2, 1> {};
template <> struct TuningRow<Kernel::kForward, 4, 128> : ForwardTuning<16, 32, 2, 2> {};
template <> struct TuningRow<Kernel::kForward, 4, 192> : ForwardTuning<16, 16, 2, 1> {};
template <> struct TuningRow<Kernel::kForward, 4, 256> : ForwardTuning<16, 16, 2, 1> {};

template <> struct TuningRow<Kernel::kBackward, 4, 32> : BackwardTuning<32, 2, 1> {};
template <> struct TuningRow<Kernel::kBackward, 4, 64> : BackwardTuning<16, 2, 2> {};
template <> struct TuningRow<Kernel::kBackward, 4, 96> : BackwardTuning<32, 1, 1> {};  // 16 x 96 of dQ would not divide
template <> struct TuningRow<Kernel::kBackward, 4, 128> : BackwardTuning<16, 2, 1> {};
template <> struct TuningRow<Kernel::kBackward, 4, 192> : BackwardTuning<16, 1, 1> {};
template <> struct TuningRow<Kernel::kBackward, 4, 256> : BackwardTuning<16, 1, 1> {};

// Softcap, dropout and the like need registers of their own.
template <Kernel KERNEL, class T, int D, bool MODIFIED>
struct Tuning : TuningRow<KERNEL, int(sizeof(T)), D> {
  using Row = TuningRow<KERNEL, int(sizeof(T)), D>;
  static constexpr int kMinBlocks = MODIFIED ? Row::kWavesModified : Row::kWaves;
  static constexpr int kWarpsQ = D % 64 == 0 ? 1 : 2;
};

}  // namespace flash_attn::gfx90a
