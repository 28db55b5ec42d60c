// Accumulators, row vectors and left operands in the registers of a block of WARPS warps.
//
// mma.m16n8 accumulators: lane l holds rows l/4 and l/4 + 8, columns 2*(l%4) and 2*(l%4) + 1, so a row is spread over
// the four lanes that differ in bits 0 and 1.
#pragma once

#include "ptx.cuh"

namespace flash_attn {
namespace sm80 {

FA_DEVICE uint32_t lane_of_warp() { return threadIdx.x % 32; }
FA_DEVICE uint32_t warp_of_block() { return threadIdx.x / 32; }

template <class Scalar, int M, int WARPS_M>
struct Rows {
  static constexpr int kSlots = M / WARPS_M / 8;
  Scalar value[kSlots];

  FA_DEVICE Scalar& operator[](int slot) { return value[slot]; }
  FA_DEVICE void fill(Scalar x) {
    FA_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) value[slot] = x;
  }

  template <class F>
  static FA_DEVICE void for_each(F&& f) {
    const int first = int(warp_of_block() % WARPS_M * (M / WARPS_M) + lane_of_warp() / 4);
    const bool owner = lane_of_warp() % 4 == 0 && warp_of_block() < WARPS_M;
    FA_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) f(slot, first + slot * 8, owner);
  }

  FA_DEVICE void read(const Scalar* src, int count, Scalar beyond) {
    for_each([&](int slot, int row, bool) { value[slot] = row < count ? src[row] : beyond; });
  }

  FA_DEVICE void finish_sum() {
    FA_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      value[slot] += __shfl_xor_sync(0xffffffffu, value[slot], 1);
      value[slot] += __shfl_xor_sync(0xffffffffu, value[slot], 2);
    }
  }
};

template <class Scalar, int M_, int N_, int WARPS_M, int WARPS>
struct Accumulator {
  static constexpr int M = M_, N = N_;
  static constexpr int kWarpsM = WARPS_M, kWarpsN = WARPS / WARPS_M;
  static constexpr int kWarpRows = M / kWarpsM, kWarpCols = N / kWarpsN;
  static constexpr int kTilesM = kWarpRows / 16, kTilesN = kWarpCols / 8;
  static constexpr int kRegs = kTilesM * kTilesN * 4;
  static_assert(kTilesM * 16 * kWarpsM == M && kTilesN * 8 * kWarpsN == N && kTilesN % 2 == 0,
                "warps must divide the matrix into 16 x 16 tiles");

  Scalar value[kRegs];

  static FA_DEVICE int warp_row() {
    return int((kWarpsN == 1 ? warp_of_block() : warp_of_block() % kWarpsM) * kWarpRows);
  }
  static FA_DEVICE int warp_col() { return kWarpsN == 1 ? 0 : int(warp_of_block() / kWarpsM * kWarpCols); }

  FA_DEVICE Scalar& operator[](int reg) { return value[reg]; }
  FA_DEVICE const Scalar& operator[](int reg) const { return value[reg]; }
  FA_DEVICE Scalar* tile(int m, int n) { return value + (m * kTilesN + n) * 4; }
  FA_DEVICE const Scalar* tile(int m, int n) const { return value + (m * kTilesN + n) * 4; }

  FA_DEVICE void fill(Scalar x) {
    FA_UNROLL
    for (int reg = 0; reg < kRegs; ++reg) value[reg] = x;
  }

  template <class F>
  static FA_DEVICE void for_each(F&& f) {
    const int row0 = warp_row() + int(lane_of_warp() / 4), col0 = warp_col() + int(lane_of_warp() % 4 * 2);
    FA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      FA_UNROLL
      for (int n = 0; n < kTilesN; ++n) {
        FA_UNROLL
        for (int e = 0; e < 4; ++e) {
          f(2 * m + e / 2, row0 + 16 * m + e / 2 * 8, col0 + 8 * n + e % 2, (m * kTilesN + n) * 4 + e);
        }
      }
    }
  }

  template <class F>
  static FA_DEVICE void for_each_patch(F&& f) {
    const int row0 = warp_row() + int(lane_of_warp() / 4), col0 = warp_col() + int(lane_of_warp() % 4 * 2);
    FA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      FA_UNROLL
      for (int n = 0; n < kTilesN; n += 2) {
        const int a = (m * kTilesN + n) * 4, b = a + 4;
        const int reg[8] = {a, a + 1, b, b + 1, a + 2, a + 3, b + 2, b + 3};
        f(row0 + 16 * m, col0 + 8 * n, reg);
      }
    }
  }

  FA_DEVICE void max_rows(Rows<Scalar, M, WARPS_M>& rows) const {
    static_assert(kWarpsN == 1, "a row must lie in one warp");
    for_each([&](int slot, int, int, int reg) { rows[slot] = fmaxf(rows[slot], value[reg]); });
    FA_UNROLL
    for (int slot = 0; slot < rows.kSlots; ++slot) {
      rows[slot] = fmaxf(rows[slot], __shfl_xor_sync(0xffffffffu, rows[slot], 1));
      rows[slot] = fmaxf(rows[slot], __shfl_xor_sync(0xffffffffu, rows[slot], 2));
    }
  }

  FA_DEVICE void sum_rows(Rows<Scalar, M, WARPS_M>& rows) const {
    static_assert(kWarpsN == 1, "a row must lie in one warp");
    for_each([&](int slot, int, int, int reg) { rows[slot] += value[reg]; });
  }
};

// An accumulator as the left factor of the next multiply: two neighbouring C tiles are one A operand.
template <class T, int M, int K, int WARPS>
struct Operand {
  static constexpr int kTilesM = M / WARPS / 16, kSteps = K / 16;
  uint32_t value[kTilesM][kSteps][4];

  FA_DEVICE Operand() {}
  explicit FA_DEVICE Operand(const Accumulator<float, M, K, WARPS, WARPS>& c) { narrow(c); }
  FA_DEVICE void narrow(const Accumulator<float, M, K, WARPS, WARPS>& c) {
    FA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      FA_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        const float *left = c.tile(m, 2 * step), *right = c.tile(m, 2 * step + 1);
        value[m][step][0] = pack(T{}, left[0], left[1]);
        value[m][step][1] = pack(T{}, left[2], left[3]);
        value[m][step][2] = pack(T{}, right[0], right[1]);
        value[m][step][3] = pack(T{}, right[2], right[3]);
      }
    }
  }
  FA_DEVICE void load(uint32_t (&a)[4], int m, int step) const {
    FA_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = value[m][step][i];
  }
};

// fp32: one C tile is one A operand of m16n8k8, if k = t stands for column 2t and k = t + 4 for column 2t + 1. Right
// factors are read in the same order of k (see tile.cuh, load_kn).
template <int M, int K, int WARPS>
struct Operand<float, M, K, WARPS> {
  using Source = Accumulator<float, M, K, WARPS, WARPS>;
  const Source& source;

  explicit FA_DEVICE Operand(const Source& c) : source(c) {}
  FA_DEVICE void load(uint32_t (&a)[4], int m, int step) const {
    const float* c = source.tile(m, step);
    a[0] = float_to_bits(c[0]);
    a[1] = float_to_bits(c[2]);
    a[2] = float_to_bits(c[1]);
    a[3] = float_to_bits(c[3]);
  }
};

}  // namespace sm80
}  // namespace flash_attn
