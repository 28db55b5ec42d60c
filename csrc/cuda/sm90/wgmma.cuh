// Multiplies of a warpgroup: factors in shared memory or in registers.
#pragma once

#include "ptx.cuh"

namespace flash_attn {
namespace sm90 {

// The shuffle tells the compiler that all lanes have the same.
FA_DEVICE int warpgroup() { return __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0); }
FA_DEVICE bool first_lane() { return threadIdx.x % 32 == 0; }

// For a warp: how many of a launch's blocks were taken before this one.
FA_DEVICE uint32_t take_block(uint32_t* taken) {
  uint32_t before = 0;
  if (first_lane()) before = atomicAdd(taken, 1);
  return __shfl_sync(0xffffffffu, before, 0);
}

// A matrix in shared memory in panels of 128-byte rows, swizzled over eight of them (the copy engine's 128-byte mode).
// `stride` is in bytes: between panels where the multiply's rows run along the panel's (TRANSPOSED), else unused.
FA_DEVICE uint64_t descriptor(uint32_t address, uint32_t stride) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(stride >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}
FA_DEVICE uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// The warpgroup's 64 x N of c = a b^T: a's rows and b's with k along panels of 64 columns that lie `..._panel` bytes
// apart. One group of multiplies, left in flight.
template <class T, int N, int K>
FA_DEVICE void multiply_panels(float (&c)[N / 2], uint32_t a, uint32_t a_panel, uint32_t b, uint32_t b_panel) {
  const uint64_t left = descriptor(a, 0), right = descriptor(b, 0);
  FA_UNROLL
  for (int step = 0; step < K / 16; ++step) {
    Wgmma<N>::template shared<T, false, false>(c, advance(left, step / 4 * a_panel + step % 4 * 32),
                                               advance(right, step / 4 * b_panel + step % 4 * 32), step > 0);
  }
  wgmma_commit();
}

// Likewise with a's rows in registers, as they have been since the last wgmma_fence().
template <class T, int N, int K>
FA_DEVICE void multiply_panels(float (&c)[N / 2], const uint32_t (&a)[K / 16][4], uint32_t b, uint32_t b_panel) {
  const uint64_t right = descriptor(b, 0);
  FA_UNROLL
  for (int step = 0; step < K / 16; ++step) {
    Wgmma<N>::template registers<T, false>(c, a[step], advance(right, step / 4 * b_panel + step % 4 * 32), step > 0);
  }
  wgmma_commit();
}

// c += a b, or c = a b, a in registers, b's rows along k, its columns in panels `b_panel` bytes apart. Likewise.
template <class T, int N, int K>
FA_DEVICE void multiply_registers(float (&c)[N / 2], uint32_t (&a)[K / 16][4], uint32_t b, uint32_t b_panel,
                                  bool adds = true) {
  const uint64_t right = descriptor(b, b_panel);
  if (adds) hold(c);
  FA_UNROLL
  for (int step = 0; step < K / 16; ++step) hold(a[step]);
  wgmma_fence();
  FA_UNROLL
  for (int step = 0; step < K / 16; ++step) {
    Wgmma<N>::template registers<T, true>(c, a[step], advance(right, step * 16 * 128), adds || step > 0);
  }
  wgmma_commit();
}

}  // namespace sm90
}  // namespace flash_attn
