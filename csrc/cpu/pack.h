// From rows of elements to lines of units, as multiply_block reads them.
#pragma once

#include <utility>

#include "../core/params.h"
#include "multiply.h"

namespace flash_attn {
namespace FA_ISA {

// Two lines of accumulators, narrowed, to one line of units: dst[i] = {even[i], odd[i]}.
template <Rounding R>
FA_INLINE void pack_pair(const float* even, const float* odd, uint32_t* dst, int count) {
  int i = 0;
#if defined(__AVX512BF16__)
  if constexpr (R == Rounding::kNearestEven) {
    alignas(64) static constexpr uint16_t kInterleaved[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                              21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                              11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(kInterleaved);
    for (; i + 16 <= count; i += 16) {
      const __m512bh halves = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(odd + i), _mm512_loadu_ps(even + i));
      _mm512_storeu_si512(dst + i, _mm512_permutexvar_epi16(order, (__m512i)halves));
    }
  }
#endif
  FA_VECTORISE
  for (; i < count; ++i) {
    dst[i] = (float_to_bits(round_to<BFloat16, R>(even[i])) >> 16) | float_to_bits(round_to<BFloat16, R>(odd[i]));
  }
}

// Lines of accumulators, k from line to line: units [lines / kPerUnit][count], `stride` apart on both sides.
template <class T, Rounding R>
FA_INLINE void pack_lines(const AccumOf<T>* src, typename Factor<T>::Unit* dst, int64_t stride, int lines, int count) {
  constexpr int kPer = Factor<T>::kPerUnit;
  for (int line = 0; line < lines; line += kPer, src += kPer * stride, dst += stride) {
    if constexpr (kPer == 2) {
      pack_pair<R>(src, src + stride, dst, count);
    } else {
      round_row<T, R>(src, dst, count);
    }
  }
}

// Rows of elements stored as T and multiplied as F, k along a row: count elements to units, the rest of the line zero.
template <class F, class T>
FA_INLINE void convert_row(const T* src, typename Factor<F>::Unit* dst, int count, int extent) {
  if constexpr (Factor<F>::kPerUnit == 2) {
    F* elements = reinterpret_cast<F*>(dst);
    if constexpr (std::is_same_v<T, F>) {
      __builtin_memcpy(elements, src, count * sizeof(T));
    } else {
      AccumOf<T> widened[kMaxHeadDim];
      widen_row<T>(src, widened, count);
      narrow_row<F, Rounding::kNearestEven>(widened, elements, count);
    }
    __builtin_memset(elements + count, 0, (extent - count) * sizeof(F));
  } else {
    widen_row<T>(src, dst, count);
    if constexpr (!std::is_same_v<T, F>) round_row<F, Rounding::kNearestEven>(dst, dst, count);
    for (int i = count; i < extent; ++i) dst[i] = 0;
  }
}

// Two rows of elements, k from row to row, to one line of units of bf16; null: a row of zeros.
FA_INLINE void interleave_rows(const Half* even, const Half* odd, uint32_t* dst, int count, int extent) {
  float widened[2][kMaxHeadDim];
  const auto widen = [count](const Half* src, float* to) {
    if (src != nullptr) return widen_row<Half>(src, to, count);
    for (int i = 0; i < count; ++i) to[i] = 0;
  };
  widen(even, widened[0]);
  widen(odd, widened[1]);
  pack_pair<Rounding::kNearestEven>(widened[0], widened[1], dst, count);
  for (int i = count; i < extent; ++i) dst[i] = 0;
}
FA_INLINE void interleave_rows(const BFloat16* even, const BFloat16* odd, uint32_t* dst, int count, int extent) {
  if (even != nullptr && odd != nullptr) {
    FA_VECTORISE
    for (int i = 0; i < count; ++i) dst[i] = even[i].bits | uint32_t(odd[i].bits) << 16;
  } else {  // at a sequence's end, or a page that is not there
    for (int i = 0; i < count; ++i) {
      const uint32_t low = even != nullptr ? even[i].bits : 0, high = odd != nullptr ? odd[i].bits : 0;
      dst[i] = low | high << 16;
    }
  }
  for (int i = count; i < extent; ++i) dst[i] = 0;
}

template <int STEP, class V, size_t... I>
FA_INLINE void swap_blocks(V& a, V& b, std::index_sequence<I...>) {
  constexpr int kSide = sizeof...(I);
#if defined(__clang__) || __GNUC__ >= 12
  const V upper = __builtin_shufflevector(a, b, (I & STEP ? kSide + I - STEP : I)...);
  b = __builtin_shufflevector(a, b, (I & STEP ? kSide + I : I + STEP)...);
#else
  using Mask = Vector<std::conditional_t<kVectorBytes / kSide == 8, int64_t, int32_t>>;
  const V upper = __builtin_shuffle(a, b, Mask{(I & STEP ? kSide + I - STEP : I)...});
  b = __builtin_shuffle(a, b, Mask{(I & STEP ? kSide + I : I + STEP)...});
#endif
  a = upper;
}

template <int STEP, class V, size_t SIDE>
FA_INLINE void transpose_blocks(V (&rows)[SIDE]) {
  if constexpr (STEP < int(SIDE)) {
    FA_UNROLL_FULLY
    for (int i = 0; i < int(SIDE); ++i) {
      if (!(i & STEP)) swap_blocks<STEP>(rows[i], rows[i + STEP], std::make_index_sequence<SIDE>());
    }
    transpose_blocks<2 * STEP>(rows);
  }
}

// dst[j][i] = src[i][j] for a square of as many rows as a vector has lanes: log2 of that many rounds of exchanging
// off-diagonal blocks.
template <class S>
FA_INLINE void transpose_square(const S* src, int64_t src_stride, S* dst, int64_t dst_stride) {
  Vector<S> rows[kLanes<S>];
  FA_UNROLL_FULLY
  for (int i = 0; i < kLanes<S>; ++i) rows[i] = load(src + i * src_stride);
  transpose_blocks<1>(rows);
  FA_UNROLL_FULLY
  for (int i = 0; i < kLanes<S>; ++i) store(dst + i * dst_stride, rows[i]);
}

}  // namespace FA_ISA
}  // namespace flash_attn
