// Block sizes for the host, one row a kernel and element size. kBlockN of the forward is part of the numerics contract
// (it fixes the order of the online softmax): changing it changes bits.
#pragma once

#include "../cuda/tile/tile.cuh"
#include "fragment.h"

namespace flash_attn {
namespace FA_ISA {

template <Kernel KERNEL, class T, int D>
struct Tuning;

// Rows in vectors: keys and values are the splatted side, which is read as it lies in memory; only Q is transposed,
// once a block. 64 x 64: the scores (16 KiB) and a panel of K or V stay in a 32 KiB first-level cache.
template <class T, int D>
struct Tuning<Kernel::kForward, T, D> {
  static constexpr int kBlockM = 64, kBlockN = 64, kWarps = kRowsInVectors, kMinBlocks = 1;
};

// Columns in vectors: K and V are the transposed side, once a block; Q and dO stream past as they lie in memory.
template <class T, int D>
struct Tuning<Kernel::kBackward, T, D> {
  static constexpr int kBlockM = 64, kBlockN = 64, kWarps = kColsInVectors, kMinBlocks = 1;
  static constexpr int kWarpsM = 1, kWarpsN = 1, kWarpsQ = 1, kStages = 1;  // one lane: nothing to divide
};

}  // namespace FA_ISA
}  // namespace flash_attn
