// Accumulators and what belongs to them. The one lane owns every element.
//
// A layout says which way the vectors lie. kRowsInVectors: element (row, col) at col * M + row, so that what is one
// value per row (maxima, sums, scales) is a vector too; kColsInVectors: at row * N + col.
#pragma once

#include "../cuda/tile/performance.cuh"
#include "pack.h"

namespace flash_attn {
namespace FA_ISA {

enum Layout : int { kRowsInVectors = 1, kColsInVectors = 2 };

template <class S, int M>
class Rows {
 public:
  static constexpr int kSlots = M;

  FA_INLINE void fill(S x) {
    for (int i = 0; i < M; ++i) values_[i] = x;
  }
  FA_INLINE S& operator[](int slot) { return values_[slot]; }

  template <class F>
  static FA_INLINE void for_each(F&& f) {
    FA_VECTORISE
    for (int row = 0; row < M; ++row) f(row, row, true);
  }
  FA_INLINE void read(const S* src, int count, S beyond) {
    for (int row = 0; row < M; ++row) values_[row] = row < count ? src[row] : beyond;
  }
  FA_INLINE void finish_sum() {}  // sum_rows left nothing to do

 private:
  alignas(64) S values_[M];
};

template <class S, int ROWS, int COLS, Layout LAYOUT>
class Accumulator {
 public:
  using Scalar = S;
  static constexpr int kM = ROWS, kN = COLS, kCount = ROWS * COLS;
  static constexpr bool kRowMajor = LAYOUT == kColsInVectors;
  static constexpr int kStride = kRowMajor ? COLS : ROWS;  // between vectors' lines

  FA_INLINE void fill(S x) {
    for (int i = 0; i < kCount; ++i) values_[i] = x;
  }
  FA_INLINE S& operator[](int reg) { return values_[reg]; }
  FA_INLINE S* data() { return values_; }
  FA_INLINE const S* data() const { return values_; }

  // What multiply_nt has filled: that much of it is multiplied further, whatever the rest holds.
  FA_INLINE void set_extents(int rows, int cols) { rows_ = rows, cols_ = cols; }
  FA_INLINE int rows() const { return rows_; }
  FA_INLINE int cols() const { return cols_; }

  static constexpr FA_INLINE int reg(int row, int col) { return kRowMajor ? row * COLS + col : col * ROWS + row; }

  template <class F>
  static FA_INLINE void for_each(F&& f) {
    for (int line = 0; line < kCount / kStride; ++line) {
      FA_VECTORISE
      for (int i = 0; i < kStride; ++i) {
        const int row = kRowMajor ? line : i, col = kRowMajor ? i : line;
        f(row, row, col, line * kStride + i);
      }
    }
  }

  template <class F>
  static FA_INLINE void for_each_patch(F&& f) {
    static_assert(ROWS % 16 == 0 && COLS % 16 == 0, "patches are cut from 16 x 16 squares");
    for (int square = 0; square < kCount / 256; ++square) {
      const int row0 = square / (COLS / 16) * 16, col0 = square % (COLS / 16) * 16;
      for (int col = col0; col < col0 + 8; col += 2) {
        FA_VECTORISE
        for (int row = row0; row < row0 + 8; ++row) {
          int regs[8];
          FA_UNROLL_FULLY
          for (int e = 0; e < 8; ++e) regs[e] = reg(row + 8 * (e / 4), col + 8 * (e / 2 % 2) + e % 2);
          f(row, col, regs);
        }
      }
    }
  }

  FA_INLINE void max_rows(Rows<S, ROWS>& rows) const {
    reduce_rows(rows, [](Vector<S> most, Vector<S> x) { return x > most ? x : most; });  // passes over NaN
  }
  FA_INLINE void sum_rows(Rows<S, ROWS>& rows) const {
    reduce_rows(rows, [](Vector<S> sum, Vector<S> x) { return sum + x; });
  }

 private:
  // Columns in ascending order; four vectors of rows at a time cover the latency.
  template <class F>
  FA_INLINE void reduce_rows(Rows<S, ROWS>& rows, F&& f) const {
    static_assert(!kRowMajor, "a line is a column");
    constexpr int kWidth = kLanes<S>, kAtOnce = ROWS % (4 * kWidth) == 0 ? 4 : 1;
    for (int row = 0; row < ROWS; row += kAtOnce * kWidth) {
      Vector<S> sums[kAtOnce];
      FA_UNROLL_FULLY
      for (int v = 0; v < kAtOnce; ++v) sums[v] = load(&rows[row + v * kWidth]);
      for (int col = 0; col < COLS; ++col) {
        FA_UNROLL_FULLY
        for (int v = 0; v < kAtOnce; ++v) sums[v] = f(sums[v], load(values_ + col * ROWS + row + v * kWidth));
      }
      FA_UNROLL_FULLY
      for (int v = 0; v < kAtOnce; ++v) store(&rows[row + v * kWidth], sums[v]);
    }
  }

  int rows_ = ROWS, cols_ = COLS;
  alignas(64) S values_[kCount];
};

// An accumulator narrowed to T, as the left factor of multiply_nn: lines are columns, in units along them.
template <class T, int ROWS, int COLS>
class Operand {
 public:
  using Scalar = AccumOf<T>;
  using Unit = typename Factor<FactorOf<T>>::Unit;

  explicit FA_INLINE Operand(const Accumulator<Scalar, ROWS, COLS, kRowsInVectors>& from) : rows_(from.rows()) {
    if constexpr (kNarrows) {
      pack_lines<FactorOf<T>, kNarrowing<T>>(from.data(), narrowed_, ROWS, from.cols(), rows_);
      units_ = narrowed_;
    } else {
      units_ = from.data();
    }
  }
  Operand(const Operand&) = delete;

  FA_INLINE const Unit* units() const { return units_; }
  FA_INLINE int rows() const { return rows_; }

 private:
  static constexpr bool kNarrows = !std::is_same_v<T, Scalar>;
  const Unit* units_;
  int rows_;
  alignas(64) Unit narrowed_[kNarrows ? ROWS * COLS / Factor<FactorOf<T>>::kPerUnit : 1];
};

// A second accumulator, in the block's scratch.
template <class A>
class Stash {
 public:
  using Scalar = typename A::Scalar;
  static constexpr int kBytes = A::kCount * int(sizeof(Scalar));

  explicit FA_INLINE Stash(char* shared) : values_(reinterpret_cast<Scalar*>(shared)) {}

  FA_INLINE void clear() {
    for (int i = 0; i < A::kCount; ++i) values_[i] = 0;
  }
  FA_INLINE void fold(A& from, Rows<Scalar, A::kM>& keep, Rows<Scalar, A::kM>& add) {
    A::for_each([&](int slot, int, int, int reg) {
      values_[reg] = fma_rn(from[reg], add[slot], values_[reg] * keep[slot]);
    });
  }
  FA_INLINE void take(A& to) {
    A::for_each([&](int, int, int, int reg) { to[reg] = values_[reg]; });
  }

 private:
  Scalar* values_;
};

}  // namespace FA_ISA
}  // namespace flash_attn
