// A block of a tensor in scratch, in the forms that its uses multiply it in. What the multiplies do not need, rows
// beyond the tensor's end and columns beyond head_dim, is neither stored nor multiplied, but for rounding up to
// kExtent.
#pragma once

#include "../cuda/tile/pages.cuh"
#include "fragment.h"

namespace flash_attn {
namespace FA_ISA {

template <class T, int ROWS, int COLS, unsigned USES, Layout LAYOUT>
class Tile {
 public:
  using Stored = StoredOf<T>;
  using Unit = typename Factor<FactorOf<T>>::Unit;
  using Scalar = AccumOf<T>;
  static constexpr int kPer = Factor<FactorOf<T>>::kPerUnit;

  // The side that lies in vectors wants its k from line to line, the other reads k (or its rows) unit by unit.
  static constexpr unsigned kInVectors = LAYOUT == kRowsInVectors ? kMK : kNK;
  static constexpr bool kHasColumns = USES & kInVectors;               // [COLS / kPer][ROWS], k = the columns
  static constexpr bool kHasPlain = USES & (kMK | kNK) & ~kInVectors;  // [ROWS][COLS / kPer], k = the columns
  static constexpr bool kHasPaired = USES & (kKM | kKN);               // [ROWS / kPer][COLS], k = the rows
  static constexpr bool kOneForm = kPer == 1 && kHasPlain && kHasPaired;  // those two are the same then

  static constexpr int kFormBytes = ROWS * COLS / kPer * int(sizeof(Unit));
  static constexpr int kForms = int(kHasColumns) + int(kHasPlain) + int(kHasPaired) - int(kOneForm);
  static constexpr int kHeaderBytes = 128 + ROWS * int(sizeof(void*));  // extents, upcoming rows
  static constexpr int kStagingBytes = USES & kStaging ? ROWS * COLS * int(sizeof(T)) : 0;
  static constexpr int kBytes =
      kHeaderBytes + (kForms * kFormBytes > kStagingBytes ? kForms * kFormBytes : kStagingBytes);
  static_assert(kFormBytes % 64 == 0 && ROWS % kExtent == 0 && COLS % kExtent == 0, "vectors are whole");

  explicit FA_INLINE Tile(char* shared) : shared_(shared) {}

  FA_INLINE void load(const Stored* src, int64_t row_stride, int rows, int cols, bool) {
    load_rows([=](int row) { return src + row * row_stride; }, rows, cols);
  }
  FA_INLINE void load(const PagedRows<Stored>& from, int rows, int cols, bool) {
    load_rows([&](int row) { return from.find(row); }, rows, cols);
  }
  FA_INLINE void land() {}

  // A staging tile keeps elements for write(); another one takes part in multiplies.
  FA_INLINE void put(const Accumulator<Scalar, ROWS, COLS, LAYOUT>& from) {
    if constexpr (bool(USES & kStaging)) {
      stage(from);
    } else {
      static_assert(LAYOUT == kColsInVectors && !kHasColumns, "lines of the accumulator are the tile's rows");
      set_extents(from.rows(), from.cols());
      if constexpr (kPer == 2 && kHasPlain) {
        for (int row = 0; row < rows(); ++row) {
          narrow_row<FactorOf<T>, kNarrowing<T>>(from.data() + row * COLS,
                                                 reinterpret_cast<FactorOf<T>*>(plain()) + row * COLS, cols());
        }
      }
      if constexpr (kHasPaired || kPer == 1) {
        pack_lines<FactorOf<T>, kNarrowing<T>>(from.data(), kHasPaired ? paired() : plain(), COLS, rows(), cols());
      }
    }
  }

  FA_INLINE void write(Stored* dst, int64_t row_stride, int rows, int cols, bool) const {
    for (int row = 0; row < rows && row < ROWS; ++row) {
      __builtin_memcpy(dst + row * row_stride, staging() + row * COLS, cols * sizeof(T));
    }
  }

  FA_INLINE int rows() const { return extents()[0]; }  // rounded up to kExtent
  FA_INLINE int cols() const { return extents()[1]; }

  // Where the rows after these lie: for a multiply to prefetch, once.
  FA_INLINE Upcoming take_upcoming() const {
    const Upcoming upcoming = *header_upcoming();
    header_upcoming()->rows = 0;
    return upcoming;
  }

  FA_INLINE Unit* columns() const { return form(0); }
  FA_INLINE Unit* plain() const { return form(kHasColumns); }
  FA_INLINE Unit* paired() const { return form(int(kHasColumns) + int(kHasPlain && !kOneForm)); }

 private:
  static FA_INLINE int min_of(int a, int b) { return a < b ? a : b; }
  static FA_INLINE int round_up(int extent) { return (extent + kExtent - 1) / kExtent * kExtent; }
  FA_INLINE int32_t* extents() const { return reinterpret_cast<int32_t*>(shared_); }
  FA_INLINE void set_extents(int rows, int cols) { extents()[0] = rows, extents()[1] = cols; }
  FA_INLINE Upcoming* header_upcoming() const { return reinterpret_cast<Upcoming*>(shared_ + 16); }
  FA_INLINE const void** upcoming_rows() const { return reinterpret_cast<const void**>(shared_ + 128); }
  FA_INLINE Unit* form(int index) const { return reinterpret_cast<Unit*>(shared_ + kHeaderBytes + index * kFormBytes); }
  FA_INLINE Stored* staging() const { return reinterpret_cast<Stored*>(shared_ + kHeaderBytes); }

  // find(row): where a row lies, or null for zeros.
  template <class Find>
  FA_INLINE void load_rows(Find&& find, int rows, int cols) {
    const int upcoming = min_of(rows - ROWS, ROWS), lines = (cols * int(sizeof(T)) + 63) / 64;
    for (int row = 0; row < upcoming; ++row) upcoming_rows()[row] = find(ROWS + row);
    *header_upcoming() = {upcoming_rows(), upcoming, lines, 0};
    rows = min_of(rows, ROWS);
    set_extents(round_up(rows), round_up(cols));
    const auto find_inside = [&](int row) { return row < rows ? find(row) : nullptr; };
    if constexpr (kHasColumns) load_columns(find_inside, cols);
    if constexpr (kHasPlain || (kHasPaired && kPer == 1)) load_plain(find_inside, cols);
    if constexpr (kHasPaired && kPer == 2) load_paired(find_inside, cols);
  }

  template <class Find>
  FA_INLINE void load_columns(Find&& find, int col_count) {
    constexpr int kSide = kLanes<Unit>, kLine = COLS / kPer;
    alignas(64) Unit lines[kSide * kLine];
    const int extent = (cols() / kPer + kSide - 1) / kSide * kSide;  // in units
    for (int row = 0; row < rows(); row += kSide) {
      for (int i = 0; i < kSide; ++i) {
        const Stored* const src = find(row + i);
        convert_row<FactorOf<T>>(src, lines + i * kLine, src != nullptr ? col_count : 0, extent * kPer);
      }
      for (int unit = 0; unit < extent; unit += kSide) {
        transpose_square(lines + unit, kLine, columns() + unit * ROWS + row, ROWS);
      }
    }
  }
  template <class Find>
  FA_INLINE void load_plain(Find&& find, int col_count) {
    for (int row = 0; row < rows(); ++row) {
      Unit* const line = (kHasPlain ? plain() : paired()) + row * (COLS / kPer);
      const Stored* const src = find(row);
      convert_row<FactorOf<T>>(src, line, src != nullptr ? col_count : 0, cols());
    }
  }
  template <class Find>
  FA_INLINE void load_paired(Find&& find, int col_count) {
    for (int row = 0; row < rows(); row += 2) {
      interleave_rows(find(row), find(row + 1), paired() + row / 2 * COLS, col_count, cols());
    }
  }

  FA_INLINE void stage(const Accumulator<Scalar, ROWS, COLS, LAYOUT>& from) {
    if constexpr (LAYOUT == kColsInVectors) {
      narrow_row<Stored, Rounding::kNearestEven>(from.data(), staging(), ROWS * COLS);
    } else {
      constexpr int kSide = kLanes<Scalar>;
      alignas(64) Scalar lines[kSide * COLS];
      for (int row = 0; row < ROWS; row += kSide) {
        for (int col = 0; col < COLS; col += kSide) {
          transpose_square(from.data() + col * ROWS + row, ROWS, lines + col, COLS);
        }
        narrow_row<Stored, Rounding::kNearestEven>(lines, staging() + row * COLS, kSide * COLS);
      }
    }
  }

  char* shared_;
};

}  // namespace FA_ISA
}  // namespace flash_attn
