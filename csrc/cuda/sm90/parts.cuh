// fp32 on tensor cores that multiply fp16: a row is 2^e times (high + low), both fp16 of 11 significant bits, so that
// high * high' + high * low' + low * high' misses x * x' by about 2^-22 (Ootomo and Yokota, arXiv 2203.03341). A power
// of two for each row, its largest element's, keeps both parts in fp16's range; it depends on nothing but the row.
#pragma once

#include "../sm80/ptx.cuh"
#include "ptx.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace flash_attn {
namespace sm90 {

// COUNT rows of D columns in the registers of a warp: of each of a lane's rows four columns, or four of each half.
template <int D, int COUNT>
struct WarpRows {
  static constexpr int kCount = COUNT, kBytes = COUNT * D * 4;
  static constexpr int kAtOnce = D == 64 ? 2 : 1, kRows = COUNT / kAtOnce, kHalves = D > 128 ? 2 : 1;
  static constexpr int kLanesOfRow = 32 / kAtOnce;
  float x[kRows][4 * kHalves];

  static FA_DEVICE int lane() { return int(threadIdx.x) % kLanesOfRow; }  // of its row
  static FA_DEVICE int col(int half) { return half * 128 + lane() * 4; }
  static FA_DEVICE int first_row() { return kAtOnce == 1 ? 0 : int(threadIdx.x) % 32 / kLanesOfRow; }
  static FA_DEVICE int row(int i) { return i * kAtOnce + first_row(); }

  // Rows from `rows` on and columns from `cols` on are zero, and not read. From shared memory, 16 bytes at a time:
  FA_DEVICE void read(const char* src, int rows, int cols) {
    for_each([&](int i, int half, float* to) {
      const auto* at = reinterpret_cast<const float4*>(src + row(i) * D * 4) + col(half) / 4;
      set(to, row(i) < rows && col(half) < cols ? *at : float4{});
    });
  }
  // From device memory, where rows allow 16-byte access or not:
  template <bool ALIGNED>
  FA_DEVICE void load(const float* src, int64_t row_stride, int rows, int cols) {
    for_each([&](int i, int half, float* to) {
      const float* const at = src + row(i) * row_stride + col(half);
      if constexpr (ALIGNED) {
        set(to, row(i) < rows && col(half) < cols ? __ldg(reinterpret_cast<const float4*>(at)) : float4{});
      } else {
        FA_UNROLL
        for (int part = 0; part < 4; ++part) {
          to[part] = row(i) < rows && col(half) + part < cols ? __ldg(at + part) : 0.0f;
        }
      }
    });
  }

 private:
  template <class F>
  FA_DEVICE void for_each(F&& f) {
    FA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      FA_UNROLL
      for (int half = 0; half < kHalves; ++half) f(i, half, x[i] + 4 * half);
    }
  }
  static FA_DEVICE void set(float* to, const float4& v) { to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w; }
};

// Exponents of a lane's rows as they stand in a float. Parts are scaled below 2^15; rows below 2^-105 are scaled as
// those are, so that what scales them back, and its inverse, are normal.
template <class Rows>
struct RowExponents {
  static constexpr int kParts = 15, kLeast = 21;
  int biased[Rows::kRows];  // a row is below 2^(biased - 126)

  explicit FA_DEVICE RowExponents(const Rows& rows) {
    float all = 0;
    FA_UNROLL
    for (int i = 0; i < Rows::kRows; ++i) {
      float most = 0;
      FA_UNROLL
      for (int half = 0; half < Rows::kHalves; ++half) {
        const float* const x = rows.x[i] + 4 * half;
        most = ::fmaxf(most, ::fmaxf(::fmaxf(absolute(x[0]), absolute(x[1])), ::fmaxf(absolute(x[2]), absolute(x[3]))));
      }
      all = ::fmaxf(all, most);
      set(i, most);
    }
    if (__any_sync(0xffffffffu, all == infinity<float>())) set_of_finite(rows);
  }
  FA_DEVICE float to_parts(int i) const { return bits_to_float(uint32_t(126 + kParts + 127 - biased[i]) << 23); }
  FA_DEVICE float from_parts(int i) const { return bits_to_float(uint32_t(biased[i] - 126 - kParts + 127) << 23); }
  static FA_DEVICE float least_from_parts() { return bits_to_float(uint32_t(kLeast - 126 - kParts + 127) << 23); }

 private:
  FA_DEVICE void set(int i, float largest) {
    uint32_t bits = float_to_bits(largest);
    if constexpr (Rows::kAtOnce == 1) {
      bits = __reduce_max_sync(0xffffffffu, bits);
    } else {
      FA_UNROLL
      for (int distance = Rows::kLanesOfRow / 2; distance > 0; distance /= 2) {
        bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, distance));
      }
    }
    biased[i] = max(int(bits >> 23), kLeast);
  }
  // What is not finite is no measure for the rest of its row.
  FA_DEVICE void set_of_finite(const Rows& rows) {
    FA_UNROLL
    for (int i = 0; i < Rows::kRows; ++i) {
      float most = 0;
      FA_UNROLL
      for (int part = 0; part < 4 * Rows::kHalves; ++part) {
        const float size = absolute(rows.x[i][part]);
        most = size < infinity<float>() ? ::fmaxf(most, size) : most;
      }
      set(i, most);
    }
  }
};

// Of a power of two.
FA_DEVICE float inverse_power(float x) { return bits_to_float((254u << 23) - float_to_bits(x)); }

// x and y as high and low parts, two to a register.
FA_DEVICE void split(float x, float y, uint32_t& high, uint32_t& low) {
  high = sm80::pack(Half{}, x, y);
  low = sm80::pack(Half{}, x - widen(Half{uint16_t(high & 0xffff)}), y - widen(Half{uint16_t(high >> 16)}));
}

// ROWS rows as a factor in shared memory: panels of 64 columns, in each the rows' high parts, then their low ones, 128
// bytes a row, swizzled as wgmma wants them.
template <int D, int ROWS = 64>
struct PartsTile {
  static constexpr int kRows = ROWS, kPanels = (D + 63) / 64;
  static constexpr int kLow = kRows * 128, kPanelBytes = 2 * kLow, kBytes = kPanels * kPanelBytes;

  // A warp's rows become those from `first` on, a multiple of COUNT. from_parts[row]: what scales a row back.
  template <int COUNT>
  static FA_DEVICE void put(char* tile, float* from_parts, int first, const WarpRows<D, COUNT>& rows,
                            const RowExponents<WarpRows<D, COUNT>>& exponents) {
    using Rows = WarpRows<D, COUNT>;
    static_assert(8 % COUNT == 0);
    const int row = first + Rows::first_row();
    FA_UNROLL
    for (int half = 0; half < Rows::kHalves; ++half) {
      const int col = Rows::col(half);
      const bool has_cols = D == 64 || D % 128 == 0 || col < D;
      const uint32_t at = shared_address(tile) + col / 64 * kPanelBytes + row * 128 + ((col % 64 / 8) ^ row % 8) * 16 +
                          col % 8 * 2;
      FA_UNROLL
      for (int i = 0; i < Rows::kRows; ++i) {
        const float scale = exponents.to_parts(i), *x = rows.x[i] + 4 * half;
        uint32_t high[2], low[2];
        split(x[0] * scale, x[1] * scale, high[0], low[0]);
        split(x[2] * scale, x[3] * scale, high[1], low[1]);
        const uint32_t row_at = (at ^ i * Rows::kAtOnce * 16) + i * Rows::kAtOnce * 128;
        if (has_cols) {
          store_shared(row_at, high[0], high[1]);
          store_shared(row_at + kLow, low[0], low[1]);
        }
        if (half == 0 && Rows::lane() == 0) from_parts[first + Rows::row(i)] = exponents.from_parts(i);
      }
    }
  }

  // x = a b^T, a of 64 rows, b a tile. `meanwhile` is called while they are multiplied. Tensor cores add with
  // truncation: of wide rows 128 columns at a time, whose sums are added with rounding to nearest.
  template <class Meanwhile>
  static FA_DEVICE void multiply_rows(float (&x)[kRows / 2], uint32_t a, uint32_t b, Meanwhile&& meanwhile) {
    constexpr int kChain = D > 128 ? 128 : D, kPanel = kChain / 64;
    multiply_columns<kChain, false>(x, a, b, meanwhile);
    if constexpr (kChain < D) {
      multiply_columns<D - kChain, true>(x, a + kPanel * PartsTile<D>::kPanelBytes, b + kPanel * kPanelBytes, [] {});
    }
  }
  // add(reg, x) for every register of x = a b, b a tile: of wide ones 64 columns at a time, for want of registers.
  // `done` is called when the tile has been read.
  template <class Done, class Add>
  static FA_DEVICE void multiply(uint32_t (&a_high)[kRows / 16][4], uint32_t (&a_low)[kRows / 16][4], uint32_t b,
                                 Done&& done, Add&& add) {
    constexpr int kCols = D > 128 ? 64 : D;
    FA_UNROLL
    for (int col = 0; col < D; col += kCols) {
      const uint32_t panel = b + col / 64 * kPanelBytes;
      float x[kCols / 2];
      multiply_registers<Half, kCols, kRows>(x, a_low, panel, kPanelBytes, false);
      multiply_registers<Half, kCols, kRows>(x, a_high, panel + kLow, kPanelBytes);
      multiply_registers<Half, kCols, kRows>(x, a_high, panel, kPanelBytes);
      wgmma_wait<0>();
      hold(x);
      if (col + kCols == D) done();
      FA_UNROLL
      for (int reg = 0; reg < kCols / 2; ++reg) add(col / 2 + reg, x[reg]);
    }
  }

 private:
  template <int COLS, bool ADDS, class Meanwhile>
  static FA_DEVICE void multiply_columns(float (&x)[kRows / 2], uint32_t a, uint32_t b, Meanwhile&& meanwhile) {
    using Left = PartsTile<D>;
    float high[kRows], low[kRows / 2];  // a's high parts by both of b's, side by side; a's low ones by b's high ones
    wgmma_fence();
    multiply_panels<Half, 2 * kRows, COLS>(high, a, Left::kPanelBytes, b, kPanelBytes);
    multiply_panels<Half, kRows, COLS>(low, a + Left::kLow, Left::kPanelBytes, b, kPanelBytes);
    meanwhile();
    wgmma_wait<0>();
    hold(high);
    hold(low);
    FA_UNROLL
    for (int reg = 0; reg < kRows / 2; ++reg) {
      const float sum = high[reg] + (high[kRows / 2 + reg] + low[reg]);
      x[reg] = ADDS ? x[reg] + sum : sum;
    }
  }
};

// A value for each column of a warpgroup's product: those of this lane's, whose register r is in the
// (r / 4 * 2 + r % 2)-th.
template <int COUNT>
FA_DEVICE void read_columns(const float* of_column, float (&columns)[COUNT]) {
  FA_UNROLL
  for (int n = 0; n < COUNT / 2; ++n) {
    const float2 pair = *reinterpret_cast<const float2*>(of_column + int(threadIdx.x) % 4 * 2 + 8 * n);
    columns[2 * n] = pair.x;
    columns[2 * n + 1] = pair.y;
  }
}

// Writes the first `rows` of a warpgroup's 64 rows of D columns, `cols` of which exist, to `dst`.
template <int D>
FA_DEVICE void write_rows(const float (&value)[D / 2], float* dst, int64_t row_stride, int rows, int cols,
                          bool aligned) {
  const int row = int(threadIdx.x) % 128 / 4, first = row / 8 * 16 + row % 8, col = int(threadIdx.x) % 4 * 2;
  FA_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (first + 8 * half >= rows) continue;
    float* const at = dst + (first + 8 * half) * row_stride + col;
    FA_UNROLL
    for (int n = 0; n < D / 8; ++n) {
      if (8 * n + col >= cols) continue;
      const float x = value[4 * n + 2 * half], y = value[4 * n + 2 * half + 1];
      if (aligned) {
        *reinterpret_cast<float2*>(at + 8 * n) = {x, y};
      } else {
        at[8 * n] = x;
        if (8 * n + col + 1 < cols) at[8 * n + 1] = y;
      }
    }
  }
}

}  // namespace sm90
}  // namespace flash_attn
