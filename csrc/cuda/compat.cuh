// The one file with vendor #if: qualifiers, 16-bit types, and scalar arithmetic whose rounding is spelled out.
//
// Everything is compiled with floating-point contraction off (-fmad=false, -ffp-contract=off), so that a*b+c
// rounds twice everywhere and fma_rn() once: the numerics contract depends on no compiler's taste.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#if defined(__HIPCC__)
#include <hip/hip_runtime.h>
#define FA_GRID_CONSTANT
#elif defined(__CUDACC__)
#include <cuda_runtime.h>
#define FA_GRID_CONSTANT __grid_constant__
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FA_GPU 1
#define FA_DEVICE __device__ __forceinline__
#define FA_HOST_DEVICE __host__ __device__ __forceinline__
#define FA_UNROLL _Pragma("unroll")
#else
#define FA_GPU 0
#define FA_DEVICE inline __attribute__((always_inline))
#define FA_HOST_DEVICE inline __attribute__((always_inline))
#define FA_UNROLL
#endif

namespace flash_attn {

#if defined(__HIPCC__)
constexpr const char* kRuntime = "HIP";

template <class Properties>
std::string arch_name(const Properties& device) {
  return device.gcnArchName;  // "gfx90a:sramecc+:xnack-"
}

// Whether a GPU runs the code for a machine of tools/build/instances.py.
template <class Properties>
bool runs_on(const std::string& machine, const Properties& device) {
  const std::string arch = arch_name(device);
  return arch.substr(0, arch.find(':')) == machine;
}
#elif FA_GPU
constexpr const char* kRuntime = "CUDA";

template <class Properties>
std::string arch_name(const Properties& device) {
  return "compute capability " + std::to_string(device.major) + "." + std::to_string(device.minor);
}

// Hopper's own instructions are no other's; the rest serves whatever came after Ampere.
template <class Properties>
bool runs_on(const std::string& machine, const Properties& device) {
  return machine == "sm90" ? device.major == 9 && device.minor == 0 : device.major >= 8;
}
#endif

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
using AccumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class Scalar>
FA_HOST_DEVICE constexpr Scalar infinity() {
  return Scalar(__builtin_huge_val());
}

// How far apart a matrix's rows may lie: AMD's descriptors of device memory hold 32 bits, for as many as 128 rows.
#if defined(__HIPCC__)
constexpr int64_t kMaxRowBytes = (int64_t(1) << 24) - 1;
#else
constexpr int64_t kMaxRowBytes = std::numeric_limits<int64_t>::max();
#endif

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// ---- arithmetic, rounding spelled out --------------------------------------------------------------------------

#if !FA_GPU && defined(__x86_64__) && !defined(__FMA__)
// An old host without the instruction, where software takes fifty times as long: rounds twice, but always.
FA_DEVICE float fma_rn(float a, float b, float c) { return a * b + c; }
FA_DEVICE double fma_rn(double a, double b, double c) { return a * b + c; }
#else
FA_DEVICE float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FA_DEVICE double fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif

#if defined(__HIP_DEVICE_COMPILE__)
extern "C" __device__ float __ocml_native_exp2_f32(float);
FA_DEVICE float exp2_fast(float x) {
#if __has_builtin(__builtin_amdgcn_exp2f)
  return __builtin_amdgcn_exp2f(x);
#else
  return __ocml_native_exp2_f32(x);
#endif
}
#elif defined(__CUDA_ARCH__)
FA_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#elif FA_GPU
FA_DEVICE float exp2_fast(float x) { return ::exp2f(x); }  // parsed by the host pass, never run
#else
// 2^x = scale * (1 + excess) for x in [-126, 127]: scale is 2 to the nearest integer, made from bits, and excess a
// minimax polynomial on [-1/2, 1/2] (1.6e-8 of 2^x before rounding; 0 at 0). Branch-free, so that loops over it
// vectorise.
struct Exp2Parts {
  float scale, excess;

  explicit FA_DEVICE Exp2Parts(float x) {
    const float shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, and leaves it in the low bits
    const float f = x - (shifted - 12582912.0f);
    float y = 1.5353362e-4f;
    y = fma_rn(y, f, 1.3398875e-3f);
    y = fma_rn(y, f, 9.61843692e-3f);
    y = fma_rn(y, f, 5.55033237e-2f);
    y = fma_rn(y, f, 2.40226477e-1f);
    y = fma_rn(y, f, 6.93147182e-1f);
    excess = y * f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits - (0x4b400000u - 127u)) << 23;
    std::memcpy(&scale, &bits, 4);
  }
};

// 2^x for x <= 127; below -126 it gives 0 (the GPUs flush there too); NaN stays NaN.
FA_DEVICE float exp2_fast(float x) {
  const bool flushed = x < -126.0f;
  const Exp2Parts parts(flushed ? -126.0f : x);
  return flushed ? 0.0f : fma_rn(parts.excess, parts.scale, parts.scale);
}
#endif
FA_DEVICE double exp2_fast(double x) { return ::exp2(x); }

FA_DEVICE float log2_accurate(float x) { return ::log2f(x); }
FA_DEVICE double log2_accurate(double x) { return ::log2(x); }

#if defined(__HIP_DEVICE_COMPILE__)
// tanh(x) for |x| <= kTanhSeriesEnd: x + x^3 times a minimax polynomial of x^2; within 1.1e-7 of the result.
constexpr float kTanhSeriesEnd = 0.75f;
FA_DEVICE float tanh_series(float x) {
  const float square = x * x;
  float y = -4.76949057e-3f;
  y = fma_rn(y, square, 1.96649134e-2f);
  y = fma_rn(y, square, -5.33902571e-2f);
  y = fma_rn(y, square, 1.33265212e-1f);
  y = fma_rn(y, square, -3.33330691e-1f);
  return fma_rn(y * square, x, x);
}

// Without branches; 1 - 2 / (e^2x + 1) would cancel where the series does not.
FA_DEVICE float tanh_accurate(float x) {
  const float magnitude = __builtin_fabsf(x), small = tanh_series(x);
  const float capped = magnitude > 10.0f ? 10.0f : magnitude;  // tanh(10) rounds to 1; a NaN stays one
  const float large = 1.0f - 2.0f * __builtin_amdgcn_rcpf(exp2_fast(capped * float(2 * kLog2E)) + 1.0f);
  return magnitude <= kTanhSeriesEnd ? small : __builtin_copysignf(large, x);
}
#elif FA_GPU
FA_DEVICE float tanh_accurate(float x) { return ::tanhf(x); }
#else
// (e^2x - 1) / (e^2x + 1) of the magnitude, the numerator without cancellation; vectorises, a few units in the last
// place.
FA_DEVICE float tanh_accurate(float x) {
  const float magnitude = x < 0 ? -x : x;
  const Exp2Parts parts((magnitude > 10.0f ? 10.0f : magnitude) * float(2 * kLog2E));  // tanh(10) rounds to 1
  const float excess = fma_rn(parts.excess, parts.scale, parts.scale - 1.0f);
  const float y = excess / (excess + 2.0f);
  return x < 0 ? -y : y;
}
#endif
FA_DEVICE double tanh_accurate(double x) { return ::tanh(x); }

FA_DEVICE float absolute(float x) { return __builtin_fabsf(x); }
FA_DEVICE double absolute(double x) { return __builtin_fabs(x); }

FA_DEVICE double reciprocal(double x) { return 1.0 / x; }
FA_DEVICE float reciprocal(float x) {  // on a GPU within a unit in the last place
#if defined(__HIP_DEVICE_COMPILE__)
  return __builtin_amdgcn_rcpf(x);
#elif defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// tanh(x) from 2 log2(e) x. For 16-bit elements: within 2e-7 of 1, rather than of the result; on a GPU a fraction of
// the instructions.
FA_DEVICE float tanh_fast(float x) {
#if FA_GPU
  return fma_rn(-2.0f, reciprocal(exp2_fast(x) + 1.0f), 1.0f);
#else
  return tanh_accurate(x * float(0.5 / kLog2E));
#endif
}

// NVIDIA's special functions run at an eighth of an fma's rate: there the series pays, if none of a tile's elements
// needs anything else.
#if defined(__CUDACC__) && !defined(__HIPCC__)
constexpr bool kTanhBySeries = true;
FA_DEVICE bool any_lane(bool x) {
  int any;
  asm volatile(
      "{\n.reg .pred x;\n setp.ne.s32 x, %1, 0;\n vote.sync.any.pred x, x, 0xffffffff;\n selp.s32 %0, 1, 0, x;\n}"
      : "=r"(any)
      : "r"(int(x)));
  return any != 0;
}
#else
constexpr bool kTanhBySeries = false;
FA_DEVICE bool any_lane(bool x) { return x; }
#endif

// The same value, said to be equal in all lanes of a wave: on AMD it then needs no vector register.
FA_DEVICE double uniform(double x) { return x; }
FA_DEVICE int uniform(int x) {
#if defined(__HIP_DEVICE_COMPILE__)
  x = __builtin_amdgcn_readfirstlane(x);
#endif
  return x;
}
FA_DEVICE uint32_t uniform(uint32_t x) { return uint32_t(uniform(int(x))); }
FA_DEVICE float uniform(float x) {
#if defined(__HIP_DEVICE_COMPILE__)
  int bits;
  memcpy(&bits, &x, 4);
  bits = __builtin_amdgcn_readfirstlane(bits);
  memcpy(&x, &bits, 4);
#endif
  return x;
}

// *p, which is the same in all lanes and written by no one meanwhile: on AMD without a vector register.
FA_DEVICE int read_uniform(const int32_t* p) {
#if defined(__HIP_DEVICE_COMPILE__)
  return *(const __attribute__((address_space(4))) int32_t*)p;
#else
  return *p;
#endif
}

// The same value, unknown to the compiler: what is computed from it stays inside the loop it stands in, where a
// register held across the loop would cost more than the additions.
FA_DEVICE int unhoisted(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#elif defined(__HIP_DEVICE_COMPILE__)
  asm volatile("" : "+v"(x));
#endif
  return x;
}
// Likewise: one of two that a select will take is computed before it, rather than in a branch.
FA_DEVICE float unhoisted(float x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+f"(x));
#endif
  return x;
}

// A kernel's parameters where the launch put them. On AMD that is constant memory: scalar registers are few there.
template <class Params>
FA_DEVICE const Params& launched(const Params& p) {
#if defined(__HIP_DEVICE_COMPILE__)
  return *(const Params*)(const __attribute__((address_space(4))) Params*)__builtin_amdgcn_kernarg_segment_ptr();
#else
  return p;
#endif
}

// Declares `name` to be the shared memory that a launch gives a block. On AMD it begins at address 0, as no kernel has
// any of fixed size (a test sees to it): the compiler then makes the tiles' offsets part of the instructions.
#if defined(__HIPCC__)
__device__ __forceinline__ char* first_of_shared_memory() {
  const uint32_t begin = 0;
  return (char*)(__attribute__((address_space(3))) char*)begin;
}
#define FA_SHARED_MEMORY(name) char* const name = first_of_shared_memory()
#else
#define FA_SHARED_MEMORY(name) extern __shared__ __align__(128) char name[]
#endif

// launched() parameters, to be read again: what was read before need not be held in registers until now.
template <class Params>
FA_DEVICE const Params& reread(const Params& p) {
#if defined(__HIP_DEVICE_COMPILE__)
  auto* at = (const __attribute__((address_space(4))) Params*)&p;
  asm volatile("" : "+s"(at));
  return *(const Params*)at;
#else
  return p;
#endif
}

FA_DEVICE uint32_t reread(uint32_t launched) {
#if defined(__HIP_DEVICE_COMPILE__)
  asm volatile("" : "+s"(launched));
#else
  launched = uint32_t(unhoisted(int(launched)));
#endif
  return launched;
}

// Values that are the same in all lanes, said to be new: what is derived from them is worked out again where it is
// needed, rather than held across a loop. On AMD a wave has 102 scalar registers.
template <class... Ints>
FA_DEVICE void renew(Ints&... x) {
#if defined(__HIP_DEVICE_COMPILE__)
  (..., [](auto& one) { asm volatile("" : "+s"(one)); }(x));
#else
  (..., void(x));
#endif
}

// A condition that is held across a loop. On AMD a bool would take two scalar registers, and its opposite two more.
#if defined(__HIPCC__)
class HeldFlag {
 public:
  FA_DEVICE HeldFlag(bool x) : flag_(uniform(int(x))) {}
  FA_DEVICE operator bool() const {
    int flag = flag_;
    renew(flag);
    return flag != 0;
  }

 private:
  int flag_;
};
#else
using HeldFlag = bool;
#endif

// ---- 16-bit conversions ------------------------------------------------------------------------------------------

enum class Rounding { kNearestEven, kTowardZero };

FA_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
FA_HOST_DEVICE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

FA_HOST_DEVICE float widen(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
FA_HOST_DEVICE float widen(float x) { return x; }
FA_HOST_DEVICE double widen(double x) { return x; }

template <class T, Rounding R = Rounding::kNearestEven>
FA_HOST_DEVICE T narrow(AccumOf<T> x);

template <>
FA_HOST_DEVICE BFloat16 narrow<BFloat16, Rounding::kTowardZero>(float x) {
  const uint32_t bits = float_to_bits(x);
  return BFloat16{uint16_t(x == x ? bits >> 16 : (bits >> 16) | 0x40)};  // a NaN stays one
}
template <>
FA_HOST_DEVICE BFloat16 narrow<BFloat16, Rounding::kNearestEven>(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return BFloat16{uint16_t(x == x ? rounded : (bits >> 16) | 0x40)};
}
template <>
FA_HOST_DEVICE float narrow<float>(float x) { return x; }
template <>
FA_HOST_DEVICE double narrow<double>(double x) { return x; }
template <>
FA_HOST_DEVICE float narrow<float, Rounding::kTowardZero>(float x) { return x; }
template <>
FA_HOST_DEVICE double narrow<double, Rounding::kTowardZero>(double x) { return x; }

#if defined(__HIPCC__) || (!FA_GPU && defined(__F16C__) && (defined(__FLT16_MAX__) || defined(__clang__)))
using NativeHalf = _Float16;
#define FA_NATIVE_HALF 1
#elif !FA_GPU && defined(__aarch64__)
using NativeHalf = __fp16;
#define FA_NATIVE_HALF 1
#else
#define FA_NATIVE_HALF 0
#endif

// fp16 to and from fp32 in integer arithmetic where the compiler has no 16-bit float of its own: exact, denormals kept.
FA_HOST_DEVICE float widen(Half x) {
#if FA_NATIVE_HALF
  NativeHalf h;
  memcpy(&h, &x, 2);
  return float(h);
#elif defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  if ((x.bits & 0x7c00) == 0x7c00) return bits_to_float(sign | 0x7f800000 | magnitude);
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * bits_to_float(0x77800000)));  // * 2^112
#endif
}
template <>
FA_HOST_DEVICE Half narrow<Half, Rounding::kNearestEven>(float x) {
#if FA_NATIVE_HALF
  const NativeHalf h = NativeHalf(x);
  Half y;
  memcpy(&y, &h, 2);
  return y;
#elif defined(__CUDA_ARCH__)
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return Half{uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return Half{uint16_t(sign | 0x7c00)};  // rounds to infinity
  if (magnitude < 0x38800000) {                                       // denormal or zero: let an addition round
    const float shifted = bits_to_float(magnitude) + 0.5f;            // ulp of [0.5, 1) is 2^-24
    return Half{uint16_t(sign | (float_to_bits(shifted) - 0x3f000000))};
  }
  return Half{uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
#endif
}
template <>
FA_HOST_DEVICE Half narrow<Half, Rounding::kTowardZero>(float x) {
  const Half nearest = narrow<Half>(x);
  const float y = widen(nearest);
  const bool overshot = (y < 0 ? -y : y) > (x < 0 ? -x : x);  // one step back toward zero; false for NaN
  return Half{uint16_t(nearest.bits - (overshot ? 1 : 0))};
}

}  // namespace flash_attn
