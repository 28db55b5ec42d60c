// Where elements lie in LDS, and which thread moves which: plain index arithmetic, checked for bank conflicts by a
// test.
//
// LDS has 32 banks of 4 bytes. A 16-byte read is served eight lanes at a time, lanes {4i..4i+3} together with another
// four (gfx90a: 0-3 with 20-23, 4-7 with 16-19, ...); a chunk of a row or column is therefore moved to another 16-byte
// slot of its 128-byte line, by the exclusive or with a few bits of the row's or column's index.
#pragma once

#include "machine.cuh"

namespace flash_attn::gfx90a {

// A matrix of lines, each a row of `LINE_CHUNKS` 16-byte chunks.
template <int LINE_CHUNKS>
struct Swizzle {
  static_assert(LINE_CHUNKS % 4 == 0 || LINE_CHUNKS == 2);
  // Bits by which line `line` permutes its chunks. Where a line is no multiple of 128 bytes, neighbours in the same
  // 128 bytes already differ in their position.
  static FA_HOST_DEVICE constexpr int key(int line) {
    if (LINE_CHUNKS % 8 == 0) return line % 8;
    return LINE_CHUNKS % 4 == 0 ? line / 2 % 4 : line / 4 % 2;
  }
};

// Rows of COLS elements.
template <class T, int COLS>
struct StraightLayout {
  static constexpr int kChunks = COLS * int(sizeof(T)) / 16;
  static constexpr int kPeriod = kChunks % 8 == 0 ? 8 : 4;

  static FA_HOST_DEVICE int offset(int row, int chunk) {
    return row * (kChunks * 16) + (chunk ^ Swizzle<kChunks>::key(row)) * 16;
  }

  // From an offset in row `row` to the same in row + r, which have no bits in common.
  static FA_HOST_DEVICE constexpr int next_row(int offset, int r) {
    return (offset ^ (Swizzle<kChunks>::key(r) * 16)) + r * (kChunks * 16);
  }

  // The chunk that this lane needs of rows row0..row0 + TILE - 1 (row0 a multiple of 16) for step group g, in two
  // parts: what depends on the lane alone, and what is the same in all. A loop then needs few addresses.
  template <int TILE>
  static FA_DEVICE int lane_part() {
    const int row = Shape<TILE>::lane_row();
    return row * (kChunks * 16) + (Shape<TILE>::group() ^ Swizzle<kChunks>::key(row)) * 16;
  }
  template <int TILE>
  static FA_DEVICE int chunk_offset(int lane_part, int row0, int g) {
    const int first = Shape<TILE>::kGroups * g;
    return (lane_part ^ (first % kPeriod * 16)) + row0 * (kChunks * 16) + first / kPeriod * (kPeriod * 16);
  }

  // The same for single elements: this lane's of column `col`, rows 4 * group + i of each step.
  template <int TILE>
  static FA_DEVICE int element_lane_part(int col) {
    static_assert(kPeriod == 8);
    constexpr int kElements = kChunkElements<T>;
    const int row = 4 * Shape<TILE>::group();
    return row * (kChunks * 16) + (col / kElements ^ Swizzle<kChunks>::key(row)) * 16 +
           col % kElements * int(sizeof(T));
  }
  // col0: columns to the right of those, a multiple of 16.
  template <int TILE>
  static FA_DEVICE int element_offset(int lane_part, int step, int i, int col0) {
    const int row = Shape<TILE>::kStep * step + i, chunk = col0 / kChunkElements<T>;
    return (lane_part ^ ((chunk % 8 ^ i) * 16)) + row * (kChunks * 16) + chunk / 8 * 128;
  }
};

// Columns of ROWS 16-bit elements, in lines of 128 bytes: 64 rows of one column, 32 of two or 16 of four. Of every 32
// rows, those that are 16 apart lie side by side in fours, so that a lane finds two of its quads in one chunk,
// whichever the shape of the matrix instruction: see step_of().
//
// Reads go through consecutive columns; a thread writes eight columns in turn while its neighbours write those eight
// further on. So both col and col / 8 must take part in the swizzle, in bits that do not meet.
template <int ROWS>
struct TransposedLayout {
  static constexpr int kColumnBytes = ROWS * 2;
  static constexpr bool kPaired = ROWS % 32 == 0;
  static constexpr int kColsOfLine = ROWS % 64 == 0 ? 1 : 64 / ROWS;
  static constexpr int kUnitBytes = kPaired ? 16 : 8;  // what the swizzle moves
  static_assert(ROWS % 64 == 0 || ROWS == 32 || ROWS == 16);

  // The units' permutation within column col's line. The key of a sum of columns with no bits in common is the
  // exclusive or of their keys.
  static FA_HOST_DEVICE constexpr int key(int col) {
    if (kColsOfLine == 1) return (col ^ (col / 8)) % 8;
    if (kColsOfLine == 2) return (col / 2 % 4) ^ (col / 8 % 2 * 2) ^ (col / 16 % 2) ^ (col / 32 % 2 * 4);
    return (col / 4 % 4) ^ (col / 8 % 4 * 4);
  }
  // Where column col begins, as far as the exclusive or with its first unit is concerned, and what is added.
  static FA_HOST_DEVICE constexpr int permutation(int col) {
    return (col % kColsOfLine * (kColumnBytes / kUnitBytes)) ^ key(col);
  }
  static FA_HOST_DEVICE constexpr int line(int col) {
    return col / kColsOfLine * (kColsOfLine * kColumnBytes);
  }

  // Position of a row within its column.
  static FA_HOST_DEVICE constexpr int position(int row) {
    return kPaired ? row / 32 * 32 + row / 4 % 4 * 8 + row / 16 % 2 * 4 + row % 4 : row;
  }

  static FA_HOST_DEVICE int quad_offset(int col, int row) {
    const int at = position(row) * 2;
    return line(col) + ((at / kUnitBytes) ^ permutation(col)) * kUnitBytes + at % kUnitBytes;
  }

  // From an offset in column col to the same in column col + c, which have no bits in common.
  static FA_HOST_DEVICE constexpr int next_column(int offset, int c) {
    return (offset ^ (permutation(c) * kUnitBytes)) + line(c);
  }

  // Which step of k quad q (0 or 1) of a lane's chunk `pair` belongs to.
  template <int TILE>
  static FA_HOST_DEVICE constexpr int step_of(int pair, int q) {
    return TILE == 32 ? pair / 2 * 4 + pair % 2 + 2 * q : 2 * pair + q;
  }

  // As in StraightLayout, for columns col0..col0 + TILE - 1; col0 is a multiple of TILE.
  template <int TILE>
  static FA_DEVICE int lane_part() {
    return quad_offset(Shape<TILE>::lane_row(), 4 * Shape<TILE>::group());
  }
  template <int TILE>
  static FA_DEVICE int chunk_offset(int lane_part, int col0, int pair) {
    const int first = Shape<TILE>::kGroups * pair;
    return (lane_part ^ ((first % 8 ^ permutation(col0)) * kUnitBytes)) + line(col0) + first / 8 * 128;
  }
};

// What one thread moves at a time: one chunk, or, where a transposed copy is written, the same chunk of two or four
// neighbouring rows, so that its columns can be written in words (and the same for a tile without such a copy, where
// that costs nothing: K's addresses are then V's). A pass of all threads covers whole rows where it can, so that only
// the first row differs between passes.
template <int ROWS, int COLS, int ELEMENTS, int THREADS, bool TRANSPOSED>
struct LoadUnit {
  static constexpr int kChunks = COLS / ELEMENTS;
  static constexpr bool kGrouped = TRANSPOSED || (ELEMENTS == 8 && kChunks % 8 == 0 && ROWS % 32 == 0);
  static constexpr int kRows = !kGrouped ? 1 : (ROWS / 4 * kChunks >= THREADS ? 4 : 2);
  static constexpr int kCount = ROWS / kRows * kChunks;
  static constexpr int kIterations = (kCount + THREADS - 1) / THREADS;
  static constexpr bool kWholeRows = !kGrouped && THREADS % kChunks == 0;
  static constexpr bool kUniform = kWholeRows || kIterations == 1;  // the passes differ in uniform_row alone
  static constexpr int kNear = kChunks % 8 == 0 && ROWS % 32 == 0 ? 8 : 4;  // chunks of a row that neighbours read
  static_assert(ROWS % kRows == 0 && kChunks % kNear == 0);

  int unit, uniform_row, row, col;

  FA_DEVICE explicit LoadUnit(int pass) {
    const int thread = int(threadIdx.x);
    unit = thread + pass * THREADS;
    uniform_row = 0;
    if (kWholeRows) {
      uniform_row = pass * (THREADS / kChunks);
      row = thread / kChunks;
      col = thread % kChunks * ELEMENTS;
    } else if (!kGrouped) {
      row = unit / kChunks;
      col = unit % kChunks * ELEMENTS;
    } else {
      // The rows of lanes that write at once are those that fill a line of the transposed copy.
      int rest = unit / kNear;
      const auto next = [&rest](int count) {
        const int digit = rest % count;
        rest /= count;
        return digit;
      };
      if (ROWS % 32 == 0) {
        row = next(2) * 16;
        row += next(4 / kRows) * kRows;
        row += next(ROWS / 32) * 32;
        row += next(4) * 4;
      } else {
        row = next(ROWS / kRows) * kRows;
      }
      col = (rest * kNear + unit % kNear) * ELEMENTS;
    }
  }
  FA_DEVICE bool exists() const { return kCount % THREADS == 0 || unit < kCount; }
};

}  // namespace flash_attn::gfx90a
