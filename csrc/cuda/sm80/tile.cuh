// Tiles in shared memory: panels of 128-byte rows (64-byte where the width asks for it), 16-byte chunks XOR-swizzled by
// row, so that ldmatrix, its transposed form, and the accumulators' stores all run without bank conflicts.
#pragma once

#include "../tile/pages.cuh"
#include "fragment.cuh"

namespace flash_attn {
namespace sm80 {

template <class T, int ROWS, int COLS, int THREADS>
class Tile {
 public:
  static constexpr int kBytes = ROWS * COLS * int(sizeof(T));

  explicit FA_DEVICE Tile(char* shared) : base_(shared_address(shared)), data_(shared) {}

  FA_DEVICE void load(const T* src, int64_t row_stride, int rows, int cols, bool aligned) {
    if (aligned) {
      const int row0 = int(threadIdx.x / kLanes), chunk0 = int(threadIdx.x % kLanes);
      const uint32_t dst = offset(row0, chunk0);
      const uint32_t lane_offset = (row0 * uint32_t(row_stride) + chunk0 * kPerChunk) * uint32_t(sizeof(T));
      FA_UNROLL
      for (int pass = 0; pass < kPasses; ++pass, src += kRowsOfPass * row_stride) {  // src is uniform: no registers
        const T* from = reinterpret_cast<const T*>(reinterpret_cast<const char*>(src) + lane_offset);
        const int row = row0 + pass * kRowsOfPass;
        if (ROWS % kRowsOfPass != 0 && row >= ROWS) break;
        FA_UNROLL
        for (int group = 0; group < kChunks; group += kLanes) {
          const bool inside = row < rows && (chunk0 + group) * kPerChunk < cols;
          copy_async(base_ + within_pass(dst, pass, group), from + group * kPerChunk, inside);
        }
      }
    } else {
      load_elements(rows, cols, [&](int row) { return src + row * row_stride; });
    }
  }
  FA_DEVICE void load(const PagedRows<T>& from, int rows, int cols, bool aligned) {
    if (!aligned) return load_elements(rows, cols, [&](int row) { return from.find(row); });
    const int row0 = int(threadIdx.x / kLanes), chunk0 = int(threadIdx.x % kLanes);
    const uint32_t dst = offset(row0, chunk0);
#pragma unroll 1  // pointers to all rows at a time are registers too many
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = row0 + pass * kRowsOfPass;
      if (ROWS % kRowsOfPass != 0 && row >= ROWS) break;
      const T* const found = row < rows ? from.find(row) : nullptr;
      const T* const src = (found == nullptr ? from.any() : found) + chunk0 * kPerChunk;
      FA_UNROLL
      for (int group = 0; group < kChunks; group += kLanes) {
        const bool inside = found != nullptr && (chunk0 + group) * kPerChunk < cols;
        copy_async(base_ + within_pass(dst, pass, group), src + group * kPerChunk, inside);
      }
    }
  }
  FA_DEVICE void land() {}

  template <int WARPS_M, int WARPS>
  FA_DEVICE void put(const Accumulator<float, ROWS, COLS, WARPS_M, WARPS>& c) {
    using C = Accumulator<float, ROWS, COLS, WARPS_M, WARPS>;
    const uint32_t row0 = C::warp_row() + lane_of_warp() / 4, col0 = C::warp_col() + lane_of_warp() % 4 * 2;
    FA_UNROLL
    for (int m = 0; m < C::kTilesM; ++m) {
      FA_UNROLL
      for (int n = 0; n < C::kTilesN; ++n) {
        const float* x = c.tile(m, n);
        put_pair(row0 + 16 * m, col0 + 8 * n, x[0], x[1]);
        put_pair(row0 + 16 * m + 8, col0 + 8 * n, x[2], x[3]);
      }
    }
  }

  FA_DEVICE void write(T* dst, int64_t row_stride, int rows, int cols, bool aligned) const {
    const int row0 = int(threadIdx.x / kLanes), chunk0 = int(threadIdx.x % kLanes);
    const uint32_t src = offset(row0, chunk0);
    T* to = dst + row0 * row_stride + chunk0 * kPerChunk;
    FA_UNROLL
    for (int pass = 0; pass < kPasses; ++pass, to += kRowsOfPass * row_stride) {
      const bool present = row0 + pass * kRowsOfPass < min(rows, ROWS);
      FA_UNROLL
      for (int group = 0; group < kChunks; group += kLanes) {
        const Chunk& x = *reinterpret_cast<const Chunk*>(data_ + within_pass(src, pass, group));
        const int left = cols - (chunk0 + group) * kPerChunk;
        if (present && aligned && left >= kPerChunk) {
          *reinterpret_cast<Chunk*>(to + group * kPerChunk) = x;
        } else if (present && !aligned) {
#pragma unroll 1
          for (int i = 0; i < min(left, kPerChunk); ++i) to[group * kPerChunk + i] = x.element[i];
        }
      }
    }
  }

  // ---- operands: one 16 x (16 or 8) left fragment, or two neighbouring n8 right fragments {b0, b1} {b2, b3}. Rows and
  // columns are the warp's first plus a constant below SPAN, the warp's extent, so that an address is one XOR with a
  // constant away from one that does not change in the loop.
  // -------------------------------------------------------------

  FA_DEVICE void load_mk(uint32_t (&a)[4], int warp_row, int row, int step) const {
    const uint32_t lane = lane_of_warp();
    ldmatrix(a, at<COLS>(warp_row + lane % 16, lane / 16, 0, 2 * step) + row * kRowBytes);
  }
  FA_DEVICE void load_nk(uint32_t (&b)[4], int warp_row, int row, int step) const {
    ldmatrix(b, at<COLS>(warp_row + lane_row(), lane_low(), 0, 2 * step) + row * kRowBytes);
  }
  template <int SPAN>
  FA_DEVICE void load_km(uint32_t (&a)[4], int warp_col, int col, int step) const {
    if constexpr (kIsFloat) {
      load_transposed_float<SPAN>(a, warp_col, col, step);
    } else {
      ldmatrix_transposed(a, at<SPAN>(lane_row(), lane_low(), warp_col / 8, col / 8) + step * 16 * kRowBytes);
    }
  }
  template <int SPAN>
  FA_DEVICE void load_kn(uint32_t (&b)[4], int warp_col, int col, int step) const {
    if constexpr (kIsFloat) {
      uint32_t x[4];
      load_km<SPAN>(x, warp_col, col, step);
      b[0] = x[0], b[1] = x[2], b[2] = x[1], b[3] = x[3];
    } else {
      const uint32_t lane = lane_of_warp();
      ldmatrix_transposed(b, at<SPAN>(lane % 16, lane / 16, warp_col / 8, col / 8) + step * 16 * kRowBytes);
    }
  }

  // fp32: a left fragment in the order of k that load_kn has.
  FA_DEVICE void load_mk_interleaved(uint32_t (&a)[4], int warp_row, int row, int step) const {
    const uint32_t lane = lane_of_warp();
    const uint32_t address = at<COLS>(warp_row + lane / 4, lane / 2 % 2, 0, 2 * step) + row * kRowBytes + lane % 2 * 8;
    load_shared(a[0], a[2], address);
    load_shared(a[1], a[3], address + 8 * kRowBytes);
  }

 private:
  static constexpr bool kIsFloat = std::is_same_v<T, float>;
  static constexpr int kPerChunk = 16 / int(sizeof(T));
  static constexpr int kChunks = COLS / kPerChunk;
  static constexpr uint32_t kRowBytes = kChunks % 8 == 0 ? 128 : 64;
  static constexpr uint32_t kPanelChunks = kRowBytes / 16;
  static constexpr uint32_t kPanelBytes = ROWS * kRowBytes;
  static constexpr int kPowerOfTwo = kChunks & -kChunks;
  static constexpr int kLanes = kPowerOfTwo < 32 ? kPowerOfTwo : 32;  // neighbouring threads on one row
  static constexpr int kRowsOfPass = THREADS / kLanes;
  static constexpr int kPasses = (ROWS + kRowsOfPass - 1) / kRowsOfPass;
  static_assert(kChunks % kPanelChunks == 0 && kLanes % kPanelChunks == 0, "columns must fill panels");
  static_assert((kRowsOfPass & (kRowsOfPass - 1)) == 0, "a pass must cover a power of two of rows");

  struct alignas(16) Chunk {
    T element[kPerChunk];
  };

  // Rows that do not start at a multiple of 16 bytes, find(row), or null for zeros.
  template <class Find>
  FA_DEVICE void load_elements(int rows, int cols, Find&& find) {
#pragma unroll 1
    for (int row = int(threadIdx.x / kLanes); row < ROWS; row += kRowsOfPass) {
      const T* const src = row < rows ? find(row) : nullptr;
#pragma unroll 1
      for (int chunk = int(threadIdx.x % kLanes); chunk < kChunks; chunk += kLanes) {
        Chunk x;
        FA_UNROLL
        for (int i = 0; i < kPerChunk; ++i) {
          const int col = chunk * kPerChunk + i;
          x.element[i] = src != nullptr && col < cols ? src[col] : T{};
        }
        *reinterpret_cast<Chunk*>(data_ + offset(row, chunk)) = x;
      }
    }
  }

  // The row and the lower bit of the chunk that a lane gives to ldmatrix: the same for every operand, so that tiles
  // share address registers. Matrices come as (rows 0-7, left), (rows 0-7, right), (rows 8-15, left), (rows 8-15,
  // right).
  static FA_DEVICE uint32_t lane_row() { return lane_of_warp() % 8 + lane_of_warp() / 16 * 8; }
  static FA_DEVICE uint32_t lane_low() { return lane_of_warp() / 8 % 2; }

  // Unsigned, so that remainders are masks and constants come out of them.
  static FA_DEVICE uint32_t swizzle(uint32_t row) { return kRowBytes == 128 ? row % 8 : row / 2 % 4; }
  static FA_DEVICE uint32_t offset(uint32_t row, uint32_t chunk) {
    return chunk / kPanelChunks * kPanelBytes + row * kRowBytes + ((chunk % kPanelChunks) ^ swizzle(row)) * 16;
  }
  // offset(row + pass * kRowsOfPass, chunk + group) from offset(row, chunk): rows of a pass are a power of two, groups
  // whole panels.
  static FA_DEVICE uint32_t within_pass(uint32_t first, uint32_t pass, uint32_t group) {
    const uint32_t rows = pass * kRowsOfPass;
    const uint32_t change = kRowBytes == 128 ? rows % 8 : rows / 2 % 4;
    return (first ^ (change * 16)) + rows * kRowBytes + group / kPanelChunks * kPanelBytes;
  }
  // The address of offset(row, warp_chunk + chunk + low): low in {0, 1}, chunk even and constant.
  template <int SPAN>
  FA_DEVICE uint32_t at(uint32_t row, uint32_t low, uint32_t warp_chunk, uint32_t chunk) const {
    const uint32_t lane_base = base_ + row * kRowBytes + (low ^ swizzle(row)) * 16;
    if constexpr ((SPAN & (SPAN - 1)) == 0) {  // the two chunks have no bit in common: move by one, then by the other
      return move(move(lane_base, warp_chunk), chunk);
    } else {
      return move(lane_base, warp_chunk + chunk);
    }
  }
  static FA_DEVICE uint32_t move(uint32_t address, uint32_t chunk) {
    return (address ^ (chunk % kPanelChunks * 16)) + chunk / kPanelChunks * kPanelBytes;
  }

  FA_DEVICE void put_pair(uint32_t row, uint32_t col, float low, float high) {
    char* dst = data_ + offset(row, col / kPerChunk) + col % kPerChunk * uint32_t(sizeof(T));
    if constexpr (kIsFloat) {
      *reinterpret_cast<float2*>(dst) = make_float2(low, high);
    } else {
      *reinterpret_cast<uint32_t*>(dst) = pack(T{}, low, high);
    }
  }

  // fp32 has no transposing ldmatrix: lane l reads rows 8*step + 2*(l%4) and the next (k = t and t + 4 in the order of
  // Operand<float>) at columns col + l/4 and col + 8 + l/4. The swizzle spreads the 32 lanes over all banks.
  template <int SPAN>
  FA_DEVICE void load_transposed_float(uint32_t (&x)[4], int warp_col, int col, int step) const {
    const uint32_t lane = lane_of_warp(), within = lane / 4 % 4 * 4 + step * 8 * kRowBytes;
    const uint32_t left = at<SPAN>(lane % 4 * 2, lane / 16, warp_col / 4, col / 4) + within;
    const uint32_t right = at<SPAN>(lane % 4 * 2, lane / 16, warp_col / 4, col / 4 + 2) + within;
    x[0] = load_shared(left);
    x[1] = load_shared(right);
    x[2] = load_shared((left ^ 16) + kRowBytes);  // the next row swizzles with one bit more
    x[3] = load_shared((right ^ 16) + kRowBytes);
  }

  uint32_t base_;
  char* data_;
};

}  // namespace sm80
}  // namespace flash_attn
