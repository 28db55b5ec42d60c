// A warp's 16 rows of an accumulator, on their way to device memory.
#pragma once

#include "../sm80/ptx.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace flash_attn {
namespace sm90 {

// Shared memory in which a warp turns fragments of 16 rows into rows. Padding keeps banks apart, or where there is no
// room for it swizzling (COLS at least 64), at a few instructions more.
template <int COLS, bool SWIZZLED = false>
constexpr int kTurnPitch = COLS * 2 + (SWIZZLED ? 0 : 16);
template <int COLS, bool SWIZZLED = false>
constexpr int kTurnBytes = 16 * kTurnPitch<COLS, SWIZZLED>;

// Sixteen columns of a warp's 16 rows as store_matrices() takes them.
template <class T>
FA_DEVICE void pack_columns(const float* value, uint32_t (&x)[4]) {
  FA_UNROLL
  for (int i = 0; i < 4; ++i) x[i] = sm80::pack(T{}, value[2 * i], value[2 * i + 1]);
}

// Writes the first `rows` of a warp's 16 rows of COLS columns to dst, turned in `scratch`, the warp's own, so that
// device memory sees whole rows. `cols` of a row exist.
template <class T, int COLS, bool SWIZZLED = false>
FA_DEVICE void write_rows(const float* value, char* scratch, T* dst, int64_t row_stride, int rows, int cols) {
  constexpr int kPitch = kTurnPitch<COLS, SWIZZLED>, kChunks = COLS / 8, kRowsAtOnce = 32 / kChunks;
  const int lane = int(threadIdx.x) % 32;
  const auto place = [](int row, int chunk) { return row * kPitch + (SWIZZLED ? chunk ^ row % 8 : chunk) * 16; };
  const uint32_t base = sm80::shared_address(scratch);
  __syncwarp();  // what the memory held is no longer read
  FA_UNROLL
  for (int n = 0; n < kChunks; n += 2) {
    uint32_t x[4];
    pack_columns<T>(value + 4 * n, x);
    store_matrices(base + place(lane % 16, n + lane / 16), x);
  }
  __syncwarp();
  if (cols % 8 == 0) {
    const int first = lane / kChunks, chunk = lane % kChunks, col = chunk * 8;
    if (first >= kRowsAtOnce || col >= cols) return;
    T* to = dst + first * row_stride + col;
    FA_UNROLL
    for (int row = 0; row < 16; row += kRowsAtOnce) {
      if (first + row < rows) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(scratch + place(first + row, chunk));
      }
      to += kRowsAtOnce * row_stride;
    }
  } else {
#pragma unroll 1
    for (int i = lane; i < 16 * COLS; i += 32) {
      const int row = i / COLS, col = i % COLS;
      if (row < rows && col < cols) {
        dst[row * row_stride + col] = *reinterpret_cast<const T*>(scratch + place(row, col / 8) + col % 8 * 2);
      }
    }
  }
}

constexpr int kBoxBytes = 16 * 128;
// A warp's 16 rows of COLS columns, narrowed, as boxes of 64 columns that lie one behind the other from `room` on, a
// multiple of 1024: store_box() may have them then.
template <class T, int COLS>
FA_DEVICE void put_boxes(const float* value, uint32_t room) {
  const int lane = int(threadIdx.x) % 32, row = lane % 16;
  const uint32_t at = room + row * 128 + (lane / 16 ^ row % 8) * 16;
  FA_UNROLL
  for (int n = 0; n < COLS / 8; n += 2) {
    uint32_t x[4];
    pack_columns<T>(value + 4 * n, x);
    store_matrices((at ^ n % 8 * 16) + n / 8 * kBoxBytes, x);
  }
  fence_async_proxy();
  __syncwarp();
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
