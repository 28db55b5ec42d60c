// Tile sizes for gfx90a: 64 KiB of LDS and 512 registers a lane of each SIMD, shared by the waves on it.
#pragma once

#include "../../cuda/tile/tile.cuh"
#include "../../cuda/compat.cuh"

namespace flash_attn::gfx90a {

// kMinBlocks is what __launch_bounds__ means on AMD: waves on each SIMD. Two or more keep everything in 256
// registers, where a product's accumulator can be read by any instruction; with one the accumulators move to the other half
// of the register file and every access copies.
template <Kernel KERNEL, class T, int D, bool MODIFIED>
struct Tuning;

template <class T, int D, bool MODIFIED>
struct Tuning<Kernel::kForward, T, D, MODIFIED> {
  static constexpr int kRowBytes = D * int(sizeof(T));
  static constexpr int kWaveRows = kRowBytes <= 384 && D <= 128 ? 32 : 16;  // output, its stash and Q of one row: 10 D bytes
  static constexpr int kWarps = 4;
  static constexpr int kBlockM = kWarps * kWaveRows;
  static constexpr int kBlockN = kRowBytes <= 256 ? 64 : kRowBytes <= 512 ? 32 : 16;  // K and V: 32 KiB, two blocks a unit
  static constexpr int kMinBlocks = 2;
};

template <class T, int D, bool MODIFIED>
struct Tuning<Kernel::kBackward, T, D, MODIFIED> {
  static constexpr int kWarps = 4;
  static constexpr bool kSmall = sizeof(T) == 2 ? D > 128 : D > 96;  // the gradients of 32 keys a wave would not fit in its registers
  static constexpr int kBlockM = kSmall ? 16 : 32;
  static constexpr int kBlockN = kSmall ? 64 : 128;
  static constexpr int kWarpsM = 1, kWarpsN = kWarps;
  static constexpr int kWarpsQ = D % 64 == 0 ? 1 : 2;
  static constexpr int kStages = 1;
  static constexpr int kMinBlocks = 1;
};

}  // namespace flash_attn::gfx90a
