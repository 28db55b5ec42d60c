// The LDS addresses that the layouts of csrc/hip/gfx90a give each lane, for test_layout.py: one line of 256 offsets for
// every access that a wave makes.
#include "hip/gfx90a/layout.cuh"

using namespace flash_attn;
using namespace flash_attn::gfx90a;

struct Lines {
  int* out;
  int count;
  __device__ void put(int offset) { out[count++ * 256 + threadIdx.x] = offset; }
};

// Rows of COLS elements: loads (16-byte writes), operands with k along the columns (16-byte reads).
template <class T, int ROWS, int COLS, bool TRANSPOSED>
__device__ void straight(Lines& writes, Lines& reads32, Lines& reads16) {
  using Layout = StraightLayout<T, COLS>;
  using Unit = LoadUnit<ROWS, COLS, kChunkElements<T>, 256, TRANSPOSED>;
  for (int pass = 0; pass < Unit::kIterations; ++pass) {
    const Unit unit(pass);
    for (int r = 0; r < Unit::kRows; ++r) {
      writes.put(unit.exists() ? Layout::offset(unit.uniform_row + unit.row + r, unit.col / kChunkElements<T>) : -1);
    }
  }
  for (int row0 = 0; row0 < ROWS; row0 += 16) {
    if (row0 % 32 == 0 && ROWS % 32 == 0) {
      for (int g = 0; g < Layout::kChunks / 2; ++g) {
        reads32.put(Layout::template chunk_offset<32>(Layout::template lane_part<32>(), row0, g));
      }
    }
    for (int g = 0; g < Layout::kChunks / 4; ++g) {
      reads16.put(Layout::template chunk_offset<16>(Layout::template lane_part<16>(), row0, g));
    }
  }
}

// Columns of ROWS 16-bit elements: loads (8- or 4-byte writes), operands with k along the rows (16- or 8-byte reads).
template <int ROWS, int COLS>
__device__ void transposed(Lines& writes, Lines& reads32, Lines& reads16) {
  using Layout = TransposedLayout<ROWS>;
  using Unit = LoadUnit<ROWS, COLS, 8, 256, true>;
  for (int pass = 0; pass < Unit::kIterations; ++pass) {
    const Unit unit(pass);
    const int offset = Layout::quad_offset(unit.col, unit.uniform_row + unit.row);
    for (int c = 0; c < 8; ++c) writes.put(unit.exists() ? Layout::next_column(offset, c) : -1);
  }
  for (int col0 = 0; col0 < COLS; col0 += 16) {
    if constexpr (Layout::kPaired) {
      if (col0 % 32 == 0) {
        for (int pair = 0; pair < ROWS / 16; ++pair) {
          reads32.put(Layout::template chunk_offset<32>(Layout::template lane_part<32>(), col0, pair));
        }
      }
      for (int pair = 0; pair < ROWS / 32; ++pair) {
        reads16.put(Layout::template chunk_offset<16>(Layout::template lane_part<16>(), col0, pair));
      }
    } else {
      reads16.put(Layout::template chunk_offset<16>(Layout::template lane_part<16>(), col0, 0));
    }
  }
}

// Single elements of ROWS x COLS: an accumulator written for dS, or fp32 operands with k along the rows.
template <class T, int ROWS, int COLS, int TILE>
__device__ void elements(Lines& lines) {
  using Layout = StraightLayout<T, COLS>;
  const int lane_part = Layout::template element_lane_part<TILE>(Shape<TILE>::lane_row());
  for (int step = 0; step < ROWS / Shape<TILE>::kStep; ++step) {
    for (int col0 = 0; col0 < COLS; col0 += TILE) {
      for (int i = 0; i < 4; ++i) lines.put(Layout::template element_offset<TILE>(lane_part, step, i, col0));
    }
  }
}

#define STRAIGHT(NAME, T, ROWS, COLS, TRANSPOSED)                                                           \
  extern "C" __global__ void __launch_bounds__(256) straight_##NAME(int* writes, int* reads32, int* reads16, int* counts) { \
    Lines w{writes, 0}, r32{reads32, 0}, r16{reads16, 0};                                                   \
    straight<T, ROWS, COLS, TRANSPOSED>(w, r32, r16);                                                       \
    if (threadIdx.x == 0) counts[0] = w.count, counts[1] = r32.count, counts[2] = r16.count;                \
  }
#define TRANSPOSED(NAME, ROWS, COLS)                                                                          \
  extern "C" __global__ void __launch_bounds__(256) transposed_##NAME(int* writes, int* reads32, int* reads16, int* counts) { \
    Lines w{writes, 0}, r32{reads32, 0}, r16{reads16, 0};                                                     \
    transposed<ROWS, COLS>(w, r32, r16);                                                                      \
    if (threadIdx.x == 0) counts[0] = w.count, counts[1] = r32.count, counts[2] = r16.count;                  \
  }
#define ELEMENTS(NAME, T, ROWS, COLS, TILE)                                                          \
  extern "C" __global__ void __launch_bounds__(256) elements_##NAME(int* lines, int* counts) { \
    Lines l{lines, 0};                                                                               \
    elements<T, ROWS, COLS, TILE>(l);                                                                \
    if (threadIdx.x == 0) counts[0] = l.count;                                                       \
  }
#include "probes.inc"
