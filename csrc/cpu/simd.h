// Vector registers of the instruction set this file is compiled for, and the conversions between storage and
// arithmetic types. Included by instance files only; FA_ISA names the instruction set and keeps its code apart.
#pragma once

#include "../cuda/compat.cuh"

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef FA_ISA
#define FA_ISA generic
#endif

#define FA_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#pragma clang diagnostic ignored "-Wpass-failed"  // FA_VECTORISE permits, it does not insist
#define FA_UNROLL_FULLY _Pragma("clang loop unroll(full)")
#define FA_VECTORISE _Pragma("clang loop vectorize(assume_safety)")
#else
#define FA_UNROLL_FULLY _Pragma("GCC unroll 32")
#define FA_VECTORISE _Pragma("GCC ivdep")
#endif

namespace flash_attn {
namespace FA_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class Scalar>
struct VectorOf {
  typedef Scalar Type __attribute__((vector_size(kVectorBytes)));
};
template <class Scalar>
using Vector = typename VectorOf<Scalar>::Type;
template <class Scalar>
constexpr int kLanes = kVectorBytes / int(sizeof(Scalar));

template <class Scalar>
FA_INLINE Vector<Scalar> load(const Scalar* src) {
  Vector<Scalar> v;
  __builtin_memcpy(&v, src, sizeof(v));
  return v;
}
template <class Scalar>
FA_INLINE void store(Scalar* dst, Vector<Scalar> v) {
  __builtin_memcpy(dst, &v, sizeof(v));
}
template <class Scalar>
FA_INLINE Vector<Scalar> splat(Scalar x) {
  return x - Vector<Scalar>{};  // a scalar operand is repeated, and x - 0 is x
}

// a * b + c, rounded once where the machine has the instruction.
FA_INLINE Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return Vector<float>(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  return Vector<float>(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__aarch64__)
  return Vector<float>(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  return a * b + c;
#endif
}
FA_INLINE Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
#if defined(__AVX512F__)
  return Vector<double>(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  return Vector<double>(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(c)));
#elif defined(__aarch64__)
  return Vector<double>(vfmaq_f64(float64x2_t(c), float64x2_t(a), float64x2_t(b)));
#else
  return a * b + c;
#endif
}

#if defined(__AVX512F__)
constexpr __mmask16 kAll = 0xffff;  // the unmasked conversions make GCC 12 warn of its own headers
#endif

// ---- storage types -------------------------------------------------------------------------------------------

// widened[i] = src[i] for i < count; both may be unaligned.
template <class T>
FA_INLINE void widen_row(const T* src, AccumOf<T>* widened, int count) {
  int i = 0;
  if constexpr (std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16) {
      _mm512_storeu_ps(widened + i,
                       _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i))));
    }
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(widened + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
    }
#endif
  }
  FA_VECTORISE
  for (; i < count; ++i) widened[i] = widen(src[i]);
}

// dst[i] = src[i] rounded to T.
template <class T, Rounding R>
FA_INLINE void narrow_row(const AccumOf<T>* src, T* dst, int count) {
  int i = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16> && R == Rounding::kNearestEven) {
    for (; i + 16 <= count; i += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(src + i)));
    }
  }
#endif
  if constexpr (std::is_same_v<T, Half> && R == Rounding::kNearestEven) {
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16) {
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(dst + i),
          _mm512_maskz_cvtps_ph(kAll, _mm512_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
#endif
  }
  FA_VECTORISE
  for (; i < count; ++i) dst[i] = narrow<T, R>(src[i]);
}

// x rounded to T, as the multiplies see it.
template <class T, Rounding R>
FA_INLINE AccumOf<T> round_to(AccumOf<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = float_to_bits(x);  // narrow() and widen(), all in 32 bits
    const uint32_t rounded = R == Rounding::kNearestEven ? bits + 0x7fff + ((bits >> 16) & 1) : bits;
    return bits_to_float((x == x ? rounded : bits | 0x400000) & 0xffff0000u);
  } else {
    return widen(narrow<T, R>(x));
  }
}

// dst[i] = src[i] rounded to T and widened again.
template <class T, Rounding R>
FA_INLINE void round_row(const AccumOf<T>* src, AccumOf<T>* dst, int count) {
  int i = 0;
  if constexpr (std::is_same_v<T, Half> && R == Rounding::kNearestEven) {
#if defined(__AVX512F__)
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    for (; i + 16 <= count; i += 16) {
      _mm512_storeu_ps(dst + i,
                       _mm512_maskz_cvtph_ps(kAll, _mm512_maskz_cvtps_ph(kAll, _mm512_loadu_ps(src + i), kNearest)));
    }
#elif defined(__F16C__)
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    for (; i + 8 <= count; i += 8) {
      _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm256_cvtps_ph(_mm256_loadu_ps(src + i), kNearest)));
    }
#endif
  }
  FA_VECTORISE
  for (; i < count; ++i) dst[i] = round_to<T, R>(src[i]);
}

}  // namespace FA_ISA
}  // namespace flash_attn
