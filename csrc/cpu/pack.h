// From rows of elements to lines of units, as multiply_block reads them.
#pragma once

#include "multiply.h"

namespace flash_attn {
namespace FA_ISA {

// Two lines of accumulators, narrowed, to one line of units: dst[i] = {even[i], odd[i]}.
template <Rounding R>
FA_INLINE void pack_pair(const float* even, const float* odd, uint32_t* dst, int count) {
  int i = 0;
#if defined(__AVX512BF16__)
  if constexpr (R == Rounding::kNearestEven) {
    alignas(64) static constexpr uint16_t kInterleaved[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
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

// Lines of accumulators, k from line to line: units [lines / kPerUnit][count].
template <class T, Rounding R>
FA_INLINE void pack_lines(const AccumOf<T>* src, typename Factor<T>::Unit* dst, int lines, int count) {
  if constexpr (Factor<T>::kPerUnit == 2) {
    for (int line = 0; line < lines; line += 2, src += 2 * count, dst += count) {
      pack_pair<R>(src, src + count, dst, count);
    }
  } else {
    round_row<T, R>(src, dst, lines * count);
  }
}

// Rows of elements, k along a row: count elements to units, the rest of the line zero.
template <class T>
FA_INLINE void convert_row(const T* src, typename Factor<T>::Unit* dst, int count, int extent) {
  if constexpr (Factor<T>::kPerUnit == 2) {
    __builtin_memcpy(dst, src, count * sizeof(T));
    __builtin_memset(reinterpret_cast<T*>(dst) + count, 0, (extent - count) * sizeof(T));
  } else {
    widen_row<T>(src, dst, count);
    for (int i = count; i < extent; ++i) dst[i] = 0;
  }
}

// Two rows of elements, k from row to row, to one line of units; `odd` null: a row of zeros.
FA_INLINE void interleave_rows(const BFloat16* even, const BFloat16* odd, uint32_t* dst, int count, int extent) {
  if (odd == nullptr) {
    FA_VECTORISE
    for (int i = 0; i < count; ++i) dst[i] = even[i].bits;
  } else {
    FA_VECTORISE
    for (int i = 0; i < count; ++i) dst[i] = even[i].bits | uint32_t(odd[i].bits) << 16;
  }
  for (int i = count; i < extent; ++i) dst[i] = 0;
}

// A row of elements, k along it, to column `column` of lines that are `stride` apart.
template <class T>
FA_INLINE void transpose_row(const T* src, typename Factor<T>::Unit* dst, int64_t stride, int count, int extent) {
  constexpr int kPer = Factor<T>::kPerUnit;
  int unit = 0;
  if constexpr (kPer == 2) {
    for (; 2 * unit + 1 < count; ++unit) {
      dst[unit * stride] = src[2 * unit].bits | uint32_t(src[2 * unit + 1].bits) << 16;
    }
    if (count % 2) dst[unit++ * stride] = src[count - 1].bits;
  } else {
    for (; unit < count; ++unit) dst[unit * stride] = widen(src[unit]);
  }
  for (; unit < extent / kPer; ++unit) dst[unit * stride] = 0;
}

}  // namespace FA_ISA
}  // namespace flash_attn
