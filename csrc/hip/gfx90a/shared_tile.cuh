// A tile in LDS, filled from device memory through registers: load() starts the reads, land() writes them to LDS, so
// that the next tile can be on its way while this one is multiplied.
//
// It is kept row by row for uses with k along the columns, and, where 16-bit elements are wanted with k along the rows,
// transposed as well: the transposition is done once, in registers, between the read and the write. fp32 needs no
// second copy, since one element is one bank. 16-byte chunks are swizzled so that no access has bank conflicts (see
// layout.cuh).
#pragma once

#include "../../cuda/tile/tile.cuh"
#include "layout.cuh"
#include "machine.cuh"

namespace flash_attn::gfx90a {

template <class T, int WARPS, int ROWS, int COLS, unsigned USES>
class SharedTile {
 public:
  using Stored = StoredOf<T>;
  static constexpr int kRows = ROWS, kCols = COLS;
  static constexpr bool kTransposed = sizeof(T) == 2 && (USES & (kKM | kKN)) != 0;
  static constexpr bool kStraight = !kTransposed || (USES & (kMK | kNK | kStaging)) != 0;
  static constexpr int kCopyBytes = ROWS * COLS * int(sizeof(T));
  static constexpr int kBytes = kCopyBytes * (int(kStraight) + int(kTransposed));

  FA_DEVICE explicit SharedTile(char* shared)
      : straight_((SharedPointer)shared), transposed_(straight_ + (kStraight ? kCopyBytes : 0)) {}

  FA_DEVICE void load(const Stored* src, int64_t row_stride, int rows, int cols, bool aligned) {
    const MemoryRows<Stored> from(src, row_stride, rows < ROWS ? rows : ROWS, cols);
    with_constant(aligned, [&](auto is_aligned) {
      for_each_vector([&](const Unit& where, int uniform_row, int row, int v) {
        staged_[v] = from.template read<is_aligned>(uniform_row, row, where.col);
      });
    });
  }

  FA_DEVICE void land() {
    FA_UNROLL
    for (Chunk<T>& chunk : staged_) chunk = factors_of<T>(chunk);
    // A loop would keep a register for the address of every row, and of every column.
    if constexpr (kStraight) {
      const int offset = unhoisted(Straight::offset(Unit(0).row, Unit(0).col / kElements));
      for_each_vector([&](const Unit& where, int uniform_row, int row, int v) {
        const int at_row = Unit::kUniform ? Straight::next_row(offset, uniform_row)
                                          : Straight::offset(uniform_row + row, where.col / kElements);
        at<Chunk<T>>(straight_ + at_row) = staged_[v];
      });
    }
    if constexpr (kTransposed) {
      FA_UNROLL
      for (int i = 0; i < kIterations; ++i) {
        const Unit where(i);
        if (!where.exists()) break;
        const int offset = unhoisted(Transposed::quad_offset(where.col, where.uniform_row + where.row));
        FA_UNROLL
        for (int c = 0; c < 8; ++c)
          write_column(transposed_ + Transposed::next_column(offset, c), staged_ + i * kUnitRows, c);
      }
    }
  }

  // The lane's part of the addresses that row_chunk() and column_quads() read, worked out once for a multiply.
  template <int TILE>
  static FA_DEVICE int row_lane_part() {
    return Straight::template lane_part<TILE>();
  }
  // Chunk g of the lane's row of those from row0, k along the columns.
  template <int TILE>
  FA_DEVICE Chunk<T> row_chunk(int lane_part, int row0, int g) const {
    static_assert(kStraight);
    return at<Chunk<T>>(straight_ + Straight::template chunk_offset<TILE>(lane_part, row0, g));
  }

  // Quads of the lane's column of those from col0, k along the rows: column_step<TILE>(access, q) is the step of k of
  // quad q.
  static constexpr int kColumnQuads = sizeof(T) == 2 && ROWS % 32 == 0 ? 2 : 1;
  template <int TILE>
  static constexpr int column_step(int access, int q) {
    return kColumnQuads == 2 ? Transposed::template step_of<TILE>(access, q) : access;
  }
  template <int TILE>
  static FA_DEVICE int column_lane_part() {
    if constexpr (sizeof(T) == 4) {
      return Straight::template element_lane_part<TILE>(Shape<TILE>::lane_row());
    } else {
      return Transposed::template lane_part<TILE>();
    }
  }
  template <int TILE>
  FA_DEVICE void column_quads(int lane_part, int col0, int access, Quad<T> (&quads)[kColumnQuads]) const {
    static_assert((USES & (kKM | kKN)) != 0);
    if constexpr (sizeof(T) == 4) {
      FA_UNROLL
      for (int i = 0; i < 4; ++i) {
        quads[0][i] = at<float>(straight_ + Straight::template element_offset<TILE>(lane_part, access, i, col0));
      }
    } else if constexpr (kColumnQuads == 2) {
      const auto chunk = at<Chunk<T>>(transposed_ + Transposed::template chunk_offset<TILE>(lane_part, col0, access));
      quads[0] = chunk.lo;
      quads[1] = chunk.hi;
    } else {
      static_assert(ROWS == Shape<TILE>::kStep);
      quads[0] = at<Quad<T>>(transposed_ + Transposed::template chunk_offset<TILE>(lane_part, col0, 0));
    }
  }

  template <class Source>
  FA_DEVICE void put(const Source& x) {
    static_assert(kStraight && Source::kM == ROWS && Source::kN == COLS);
    Source::for_each(
        [&](int, int row, int col, int reg) { set(row, col, __builtin_bit_cast(Bits<T>, narrow<Stored>(x[reg]))); });
  }

  FA_DEVICE void set(int row, int col, Bits<T> x) {
    at<Bits<T>>(straight_ + Straight::offset(row, col / kElements) + col % kElements * int(sizeof(T))) = x;
  }

  // Quads of an accumulator's lane whose column is `col`: rows 4 * group + i of each step.
  template <int TILE, int STEPS>
  FA_DEVICE void set_quads(int col, const Quad<T> (&quads)[STEPS]) {
    const int lane_part = unhoisted(Straight::template element_lane_part<TILE>(col));
    FA_UNROLL
    for (int s = 0; s < STEPS; ++s) {
      FA_UNROLL
      for (int i = 0; i < 4; ++i) {
        at<Bits<T>>(straight_ + Straight::template element_offset<TILE>(lane_part, s, i, 0)) = quads[s][i];
      }
    }
  }

  FA_DEVICE void write(Stored* dst, int64_t row_stride, int rows, int cols, bool aligned) const {
    static_assert(kStraight);
    for_each_vector([&](const Unit& where, int uniform_row, int row, int) {
      const auto x = at<Chunk<T>>(straight_ + Straight::offset(uniform_row + row, where.col / kElements));
      row += uniform_row;
      const int count = row < rows ? cols - where.col : 0;
      write_elements<Stored, kElements>(dst + row * row_stride + where.col, x, count, aligned);
    });
  }

 private:
  template <class V>
  static FA_DEVICE __attribute__((address_space(3))) V& at(SharedPointer p) {
    return *reinterpret_cast<__attribute__((address_space(3))) V*>(p);
  }

  static constexpr int kElements = kChunkElements<T>;
  static constexpr int kThreads = WARPS * kLanes;
  using Straight = StraightLayout<T, COLS>;
  using Transposed = TransposedLayout<ROWS>;
  using Unit = LoadUnit<ROWS, COLS, kElements, kThreads, kTransposed>;
  static constexpr int kUnitRows = Unit::kRows, kIterations = Unit::kIterations;

  // f(unit, uniform_row, row, v) for the chunks this thread moves: the row's number is in two parts, of which the first
  // is the same in every lane.
  template <class F>
  static FA_DEVICE void for_each_vector(F&& f) {
    FA_UNROLL
    for (int i = 0; i < kIterations; ++i) {
      const Unit where(i);
      if (!where.exists()) break;
      FA_UNROLL
      for (int r = 0; r < kUnitRows; ++r) f(where, where.uniform_row + r, where.row, i * kUnitRows + r);
    }
  }

  // Column c of the rows x, packed.
  static FA_DEVICE void write_column(SharedPointer to, const Chunk<T>* x, int c) {
    const auto pack = [c](const Chunk<T>& upper, const Chunk<T>& lower) {
      const uint32_t a = __builtin_bit_cast(Words, upper)[c / 2], b = __builtin_bit_cast(Words, lower)[c / 2];
      return c % 2 == 0 ? pack_low(a, b) : pack_high(a, b);
    };
    if constexpr (kUnitRows == 4) {
      at<Vector<uint32_t, 2>>(to) = Vector<uint32_t, 2>{pack(x[0], x[1]), pack(x[2], x[3])};
    } else {
      at<uint32_t>(to) = pack(x[0], x[1]);
    }
  }

  using Words = Vector<uint32_t, 4>;
  SharedPointer straight_, transposed_;
  Chunk<T> staged_[kIterations * kUnitRows];
};

}  // namespace flash_attn::gfx90a
