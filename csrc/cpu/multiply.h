// Matrix multiply of blocks that lie in cache: c[i][j] += sum_k a[i][k] b[k][j], vectors along j.
//
// Every element of c gets chains of kChain multiply-adds with k upward, each from zero and then added, whatever its
// position: a row's result does not depend on where in the tile it is, nor on how many others there are.
#pragma once

#include "simd.h"

namespace flash_attn {
namespace FA_ISA {

// A factor element as the multiply-add takes it: T widened, or pairs of bf16 neighbouring in k.
template <class T>
struct Factor {
  using Scalar = AccumOf<T>;
  using Unit = Scalar;
  static constexpr int kPerUnit = 1;  // elements along k
  // Short for fp32, where it halves the error: 1.8e-6 at head_dim 128 with one chain, 0.8e-6 with 16, for 2% of the
  // time.
  static constexpr int kChain = std::is_same_v<T, float> ? 16 : 256;
  static FA_INLINE Vector<Scalar> multiply_add(Vector<Scalar> c, Vector<Unit> a, Vector<Unit> b) {
    return FA_ISA::multiply_add(a, b, c);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Factor<BFloat16> {
  using Scalar = float;
  using Unit = uint32_t;
  static constexpr int kPerUnit = 2;
  static constexpr int kChain = 256;
  static FA_INLINE Vector<float> multiply_add(Vector<float> c, Vector<uint32_t> a, Vector<uint32_t> b) {
    return Vector<float>(_mm512_dpbf16_ps(__m512(c), (__m512bh)a, (__m512bh)b));
  }
};
#endif

// Extents of tiles in use are rounded up to this, the rest being zero: so no loop has a remainder.
constexpr int kExtent = 16;

// 8 x 2 vectors of c in registers: 16 chains cover the multiply-add's latency, and with two vectors of b and a splat
// they fit the 32 registers of AVX-512 and Arm. Machines with 16 registers hold 4 x 2 and 3 others.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanelRows = 8;
#else
constexpr int kPanelRows = 4;
#endif

// One panel of c. Strides in units; a_row or a_step is 1.
template <class T, int VECTORS, bool ROWS_CONTIGUOUS>
FA_INLINE void multiply_panel(AccumOf<T>* __restrict c, int64_t c_stride, const typename Factor<T>::Unit* a,
                              int64_t a_stride, const typename Factor<T>::Unit* b, int64_t b_stride, int steps) {
  using Scalar = AccumOf<T>;
  constexpr int kWidth = kLanes<Scalar>;
  const int64_t a_row = ROWS_CONTIGUOUS ? 1 : a_stride, a_step = ROWS_CONTIGUOUS ? a_stride : 1;
  while (steps > 0) {
    Vector<Scalar> sums[kPanelRows][VECTORS];
    FA_UNROLL_FULLY
    for (int r = 0; r < kPanelRows; ++r) {
      FA_UNROLL_FULLY
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = splat(Scalar(0));
    }
    int chain = steps < Factor<T>::kChain ? steps : Factor<T>::kChain;
    steps -= chain;
    for (; chain > 0; --chain) {
      Vector<typename Factor<T>::Unit> right[VECTORS];
      FA_UNROLL_FULLY
      for (int v = 0; v < VECTORS; ++v) right[v] = load(b + v * kWidth);
      FA_UNROLL_FULLY
      for (int r = 0; r < kPanelRows; ++r) {
        const auto left = splat(a[r * a_row]);
        FA_UNROLL_FULLY
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = Factor<T>::multiply_add(sums[r][v], left, right[v]);
      }
      a += a_step;
      b += b_stride;
    }
    FA_UNROLL_FULLY
    for (int r = 0; r < kPanelRows; ++r) {
      FA_UNROLL_FULLY
      for (int v = 0; v < VECTORS; ++v) {
        Scalar* at = c + r * c_stride + v * kWidth;
        store(at, load(at) + sums[r][v]);
      }
    }
  }
}

// Rows of a tensor that will be loaded soon. Fetched a few lines at a time between panels: in one go they would fill
// the processor's miss buffers, and short rows far apart are not what its own prefetcher foresees.
struct Upcoming {
  const void* const* row;  // the next one
  int rows;                // left
  int lines;               // of 64 bytes in a row
  int line;                // next in this row

  FA_INLINE void fetch(int count) {
    for (; count > 0 && rows > 0; --count) {
      __builtin_prefetch(static_cast<const char*>(*row) + 64 * line, 0, 2);
      if (++line == lines) line = 0, ++row, --rows;
    }
  }
};

// rows, cols: extents of c. a is [rows][steps] with a row's units contiguous, or (ROWS_CONTIGUOUS) [steps][rows].
template <class T, bool ROWS_CONTIGUOUS>
__attribute__((noinline)) void multiply_block(AccumOf<T>* c, int64_t c_stride, const typename Factor<T>::Unit* a,
                                              int64_t a_stride, const typename Factor<T>::Unit* b, int64_t b_stride,
                                              int rows, int cols, int steps, Upcoming upcoming) {
  constexpr int kWidth = kLanes<AccumOf<T>>;
  const int64_t a_row = ROWS_CONTIGUOUS ? 1 : a_stride;
  const int panels = (cols + 2 * kWidth - 1) / (2 * kWidth) * (rows / kPanelRows);
  const int fetches = panels == 0 ? 0 : upcoming.rows * upcoming.lines / panels + 1;
  for (int col = 0; col < cols; col += 2 * kWidth) {
    for (int row = 0; row < rows; row += kPanelRows) {
      upcoming.fetch(fetches);
      if (col + 2 * kWidth <= cols) {
        multiply_panel<T, 2, ROWS_CONTIGUOUS>(c + row * c_stride + col, c_stride, a + row * a_row, a_stride, b + col,
                                              b_stride, steps);
      } else {
        multiply_panel<T, 1, ROWS_CONTIGUOUS>(c + row * c_stride + col, c_stride, a + row * a_row, a_stride, b + col,
                                              b_stride, steps);
      }
    }
  }
}

}  // namespace FA_ISA
}  // namespace flash_attn
