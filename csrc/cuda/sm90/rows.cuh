// A warp's 16 rows of an accumulator, on their way to device memory.
#pragma once

#include "../sm80/ptx.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace flash_attn {
namespace sm90 {

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
FA_DEVICE void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

// Writes the first `rows` of 16 rows of D columns to dst. They pass through `scratch`, the warp's own 16 rows of each
// panel of 128 bytes a row, `panel_bytes` apart, so that device memory sees whole rows.
template <class T, int D>
FA_DEVICE void write_rows(const float* value, char* scratch, int panel_bytes, T* dst, int64_t row_stride,
                          int rows, int head_dim) {
  const int lane = int(threadIdx.x) % 32;
  const uint32_t base = sm80::shared_address(scratch);
  __syncwarp();  // what the memory held is no longer read
  FA_UNROLL
  for (int n = 0; n < D / 8; n += 2) {
    const float *left = value + 4 * n, *right = left + 4;
    const uint32_t x[4] = {sm80::pack(T{}, left[0], left[1]), sm80::pack(T{}, left[2], left[3]),
                           sm80::pack(T{}, right[0], right[1]), sm80::pack(T{}, right[2], right[3])};
    const int row = lane % 16, chunk = n + lane / 16;
    store_matrices(base + chunk / 8 * panel_bytes + row * 128 + ((chunk ^ row) % 8) * 16, x);
  }
  __syncwarp();
  FA_UNROLL
  for (int i = lane; i < 16 * D / 8; i += 32) {
    const int row = i / (D / 8), chunk = i % (D / 8), col = chunk * 8;
    if (row >= rows) continue;
    const uint4 x = *reinterpret_cast<const uint4*>(scratch + chunk / 8 * panel_bytes + row * 128 +
                                                    ((chunk ^ row) % 8) * 16);
    T* to = dst + row * row_stride + col;
    if (col + 8 <= head_dim) {
      *reinterpret_cast<uint4*>(to) = x;
    } else {
      FA_UNROLL
      for (int e = 0; e < 8; ++e) {
        if (col + e < head_dim) to[e] = reinterpret_cast<const T*>(&x)[e];
      }
    }
  }
}

// Zeros in a tile of panels of 128-byte rows, from row `begin` on. Every warpgroup clears for itself.
template <int PANELS>
FA_DEVICE void clear_rows(char* tile, int panel_bytes, int begin) {
  for (int panel = 0; panel < PANELS; ++panel) {
    for (int at = begin * 128 + int(threadIdx.x) % 128 * 16; at < panel_bytes; at += 128 * 16) {
      *reinterpret_cast<uint4*>(tile + panel * panel_bytes + at) = uint4{};
    }
  }
  fence_async_proxy();
  sync_named(1 + warpgroup(), 128);  // 0 is __syncthreads
}

}  // namespace sm90
}  // namespace flash_attn
