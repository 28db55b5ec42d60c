// The performance mode (docs/numerics.md, "Modes"): 16-bit data is multiplied in bf16, and what is narrowed between two
// products, P and dS, is narrowed toward zero. Kernels do not know of it: PerformanceMode<Arch> is an Arch whose tiles
// and operands are made of Quick<T> where the kernel says T.
#pragma once

#include "../compat.cuh"
#include "tile.cuh"

namespace flash_attn {

// An element of a tile or operand in the mode: T, a 16-bit type, in device memory.
template <class T>
struct Quick {
  uint16_t bits;
};

template <class T>
struct Format {
  using Stored = T;
  using Factor = T;
  static constexpr Rounding kNarrowing = Rounding::kNearestEven;
};
template <class T>
struct Format<Quick<T>> {
  using Stored = T;
  using Factor = BFloat16;
  static constexpr Rounding kNarrowing = Rounding::kTowardZero;
};

template <class T>
using StoredOf = typename Format<T>::Stored;  // in device memory
template <class T>
using FactorOf = typename Format<T>::Factor;  // in products
template <class T>
constexpr Rounding kNarrowing = Format<T>::kNarrowing;  // of a product that becomes a factor

template <class Arch>
struct PerformanceMode {
  template <Kernel KERNEL, class T, int D, bool MODIFIED>
  using Tuning = typename Arch::template Tuning<KERNEL, T, D, MODIFIED>;

  template <int WARPS>
  struct Block : Arch::template Block<WARPS> {
    using Base = typename Arch::template Block<WARPS>;
    template <class T, int ROWS, int COLS, unsigned USES>
    using Tile = typename Base::template Tile<Quick<T>, ROWS, COLS, USES>;
    template <class T, int M, int K, int WARPS_M>
    using Operand = typename Base::template Operand<Quick<T>, M, K, WARPS_M>;

    template <class T, int ROWS, int D, class F>
    static FA_DEVICE void dot_rows(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int rows, int cols,
                                   bool aligned, F&& f) {
      Base::template dot_rows<Quick<T>, ROWS, D>(a, a_stride, b, b_stride, rows, cols, aligned, f);
    }
  };
};

}  // namespace flash_attn
