// The host as an Arch (cuda/tile/tile.cuh): one lane owns the whole tile, so barriers and asynchronous copies vanish.
// Host is a different type for every FA_ISA, hence so is every kernel made of it.
#pragma once

#include <sched.h>

#include "../cuda/tile/tile.cuh"
#include "tile.h"
#include "tuning.h"

namespace flash_attn {
namespace FA_ISA {

// What is WARPS on machines that have them is here the layout of the accumulators; kernels without any pass any number.
template <int LAYOUT>
struct Block {
  static constexpr int kThreads = 1;
  static constexpr bool kLoadsThroughRegisters = false, kFindsRows = true;
  static constexpr Layout kLayout = LAYOUT == kColsInVectors ? kColsInVectors : kRowsInVectors;
  static constexpr bool kRowMajor = kLayout == kColsInVectors;

  template <class T, int ROWS, int COLS, unsigned USES>
  using Tile = FA_ISA::Tile<T, ROWS, COLS, USES, kLayout>;
  template <class Scalar, int M, int N, int>
  using Accumulator = FA_ISA::Accumulator<Scalar, M, N, kLayout>;
  template <class Scalar, int M, int>
  using Rows = FA_ISA::Rows<Scalar, M>;
  template <class T, int M, int K, int>
  using Operand = FA_ISA::Operand<T, M, K>;
  template <class A>
  using Stash = FA_ISA::Stash<A>;

  static FA_INLINE int lane() { return 0; }
  static FA_INLINE void commit() {}
  template <int PENDING>
  static FA_INLINE void wait() {}
  static FA_INLINE void sync() {}

  template <class C, class T, int M, int N, int D, unsigned USES_A, unsigned USES_B>
  static FA_INLINE void multiply_nt(C& c, const FA_ISA::Tile<T, M, D, USES_A, kLayout>& a,
                                    const FA_ISA::Tile<T, N, D, USES_B, kLayout>& b) {
    constexpr int kPer = Factor<FactorOf<T>>::kPerUnit, kLine = D / kPer;
    c.set_extents(a.rows(), b.rows());
    if constexpr (kRowMajor) {
      multiply_block<FactorOf<T>, false>(c.data(), C::kStride, a.plain(), kLine, b.columns(), N, a.rows(), b.rows(),
                               a.cols() / kPer, a.take_upcoming());
    } else {
      multiply_block<FactorOf<T>, false>(c.data(), C::kStride, b.plain(), kLine, a.columns(), M, b.rows(), a.rows(),
                               a.cols() / kPer, b.take_upcoming());
    }
  }

  // The probabilities of keys beyond b's rows are zero.
  template <class C, class T, int M, int K, int N, unsigned USES>
  static FA_INLINE void multiply_nn(C& c, const FA_ISA::Operand<T, M, K>& a,
                                    const FA_ISA::Tile<T, K, N, USES, kLayout>& b) {
    static_assert(!kRowMajor, "the operand's lines are columns");
    multiply_block<FactorOf<T>, true>(c.data(), C::kStride, b.paired(), N, a.units(), M, b.cols(), a.rows(),
                            b.rows() / Factor<FactorOf<T>>::kPerUnit, b.take_upcoming());
  }
  template <class C, class T, int M, int K, int N, unsigned USES_A, unsigned USES_B>
  static FA_INLINE void multiply_nn(C& c, const FA_ISA::Tile<T, M, K, USES_A, kLayout>& a,
                                    const FA_ISA::Tile<T, K, N, USES_B, kLayout>& b) {
    static_assert(kRowMajor, "b lies in vectors");
    constexpr int kPer = Factor<FactorOf<T>>::kPerUnit;
    multiply_block<FactorOf<T>, false>(c.data(), C::kStride, a.plain(), K / kPer, b.paired(), N, a.rows(), b.cols(),
                             b.rows() / kPer, Upcoming{});
  }
  template <class C, class T, int M, int K, int N, unsigned USES_A, unsigned USES_B>
  static FA_INLINE void multiply_tn(C& c, const FA_ISA::Tile<T, K, M, USES_A, kLayout>& a,
                                    const FA_ISA::Tile<T, K, N, USES_B, kLayout>& b) {
    static_assert(kRowMajor, "b lies in vectors");
    multiply_block<FactorOf<T>, true>(c.data(), C::kStride, a.paired(), M, b.paired(), N, a.cols(), b.cols(),
                            b.rows() / Factor<FactorOf<T>>::kPerUnit, Upcoming{});
  }

  // Blocks of the host add in turn (see cpu.cpp), so this need not be atomic.
  template <class A, class Scalar>
  static FA_INLINE void accumulate(A& from, Scalar* dst) {
    FA_VECTORISE
    for (int i = 0; i < A::kCount; ++i) dst[i] += from[i];
  }
  template <class A, class Scalar>
  static FA_INLINE void restore(A& to, const Scalar* src) {
    FA_VECTORISE
    for (int i = 0; i < A::kCount; ++i) to[i] = src[i];
  }

  template <class T, int ROWS, int D, class F>
  static FA_INLINE void dot_rows(const StoredOf<T>* a, int64_t a_stride, const StoredOf<T>* b, int64_t b_stride,
                                 int rows, int cols, bool, F&& f) {
    using Stored = StoredOf<T>;
    using Scalar = AccumOf<T>;
    constexpr int kWidth = kLanes<Scalar>;
    for (int row = 0; row < rows; ++row) {
      alignas(64) Scalar x[D], y[D];
      widen_row<Stored>(a + row * a_stride, x, cols);
      if constexpr (!std::is_same_v<Stored, FactorOf<T>>) round_row<FactorOf<T>, Rounding::kNearestEven>(x, x, cols);
      widen_row<Stored>(b + row * b_stride, y, cols);
      Vector<Scalar> sums = splat(Scalar(0));
      int i = 0;
      for (; i + kWidth <= cols; i += kWidth) sums = multiply_add(load(x + i), load(y + i), sums);
      Scalar sum = 0;
      for (; i < cols; ++i) sum = fma_rn(x[i], y[i], sum);
      for (int l = 0; l < kWidth; ++l) sum += sums[l];
      f(row, sum);
    }
  }

  static FA_INLINE int peek_turn(const int32_t* turn) { return __atomic_load_n(turn, __ATOMIC_RELAXED); }
  static FA_INLINE void wait_turn(int32_t* turn, int value, int) {
    for (int tries = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != value; ++tries) {
      if (tries >= 64) sched_yield();
    }
  }
  static FA_INLINE void pass_turn(int32_t* turn) { __atomic_store_n(turn, *turn + 1, __ATOMIC_RELEASE); }
};

struct Host {
  template <Kernel KERNEL, class T, int D, bool>
  using Tuning = FA_ISA::Tuning<KERNEL, T, D>;
  template <int WARPS>
  using Block = FA_ISA::Block<WARPS>;
};

}  // namespace FA_ISA

using Host = FA_ISA::Host;

}  // namespace flash_attn
