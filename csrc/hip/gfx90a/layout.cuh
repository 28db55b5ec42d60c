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

// Columns of ROWS 16-bit elements. Of every 32 rows, those that are 16 apart lie side by side in fours, so that a lane
// finds two of its quads in one chunk, whichever the shape of the matrix instruction: see step_of().
template <int ROWS>
struct TransposedLayout {
  static constexpr int kChunks = ROWS * 2 / 16;
  static constexpr bool kPaired = ROWS % 32 == 0;
  static constexpr int kPeriod = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;

  // The eight columns that one thread writes differ in col / 8 from lane to lane, so both parts count.
  static FA_HOST_DEVICE constexpr int key(int col) {
    if (kChunks % 8 == 0) return (col ^ (col / 8)) % 8;
    return kChunks % 4 == 0 ? (col / 2 ^ col / 8) % 4 : (col / 4 ^ col / 8) % 2;
  }

  // Position of a row within its column.
  static FA_HOST_DEVICE constexpr int position(int row) {
    return kPaired ? row / 32 * 32 + row / 4 % 4 * 8 + row / 16 % 2 * 4 + row % 4 : row;
  }

  static FA_HOST_DEVICE int quad_offset(int col, int row) {
    const int at = position(row);
    return col * (ROWS * 2) + ((at / 8) ^ key(col)) * 16 + at % 8 * 2;
  }

  // Which step of k quad q (0 or 1) of a lane's chunk `pair` belongs to.
  template <int TILE>
  static FA_HOST_DEVICE constexpr int step_of(int pair, int q) {
    return TILE == 32 ? pair / 2 * 4 + pair % 2 + 2 * q : 2 * pair + q;
  }

  // From the offset of a column that is a multiple of 8 to that of the c-th from it.
  static FA_HOST_DEVICE int next_column(int offset, int c) { return (offset ^ (key(c) * 16)) + c * (ROWS * 2); }

  // As in StraightLayout, for columns col0..col0 + TILE - 1; col0 is a multiple of 16.
  template <int TILE>
  static FA_DEVICE int lane_part() {
    const int col = Shape<TILE>::lane_row();
    return col * (ROWS * 2) + (Shape<TILE>::group() ^ key(col)) * 16;
  }
  template <int TILE>
  static FA_DEVICE int chunk_offset(int lane_part, int col0, int pair) {
    const int first = Shape<TILE>::kGroups * pair;
    return (lane_part ^ ((first % kPeriod ^ key(col0)) * 16)) + col0 * (ROWS * 2) + first / kPeriod * (kPeriod * 16);
  }
};

// What one thread moves at a time: one chunk, or, where a transposed copy is written, the same chunk of two or four
// neighbouring rows, so that its columns can be written in words. A pass of all threads covers `kPassRows` whole rows
// where it can, so that only the first row of a pass differs between passes.
template <int ROWS, int COLS, int ELEMENTS, int THREADS, bool TRANSPOSED>
struct LoadUnit {
  static constexpr int kChunks = COLS / ELEMENTS;
  static constexpr int kRows = !TRANSPOSED ? 1 : (ROWS / 4 * kChunks >= THREADS ? 4 : 2);
  static constexpr int kCount = ROWS / kRows * kChunks;
  static constexpr int kIterations = (kCount + THREADS - 1) / THREADS;
  static constexpr bool kWholeRows = THREADS % kChunks == 0;
  static_assert(ROWS % kRows == 0);

  int unit, uniform_row, row, col;

  FA_DEVICE explicit LoadUnit(int pass) {
    const int thread = int(threadIdx.x);
    unit = thread + pass * THREADS;
    if (kWholeRows) {
      uniform_row = pass * (THREADS / kChunks) * kRows;
      row = thread / kChunks * kRows;
      col = thread % kChunks * ELEMENTS;
    } else {
      uniform_row = 0;
      row = unit / kChunks * kRows;
      col = unit % kChunks * ELEMENTS;
    }
  }
  FA_DEVICE bool exists() const { return kCount % THREADS == 0 || unit < kCount; }
};

}  // namespace flash_attn::gfx90a
