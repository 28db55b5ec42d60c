// wgmma: a warpgroup's 64 x N += 64 x 16 * 16 x N, both factors or the right one in shared memory, fp32 accumulation.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
#pragma once

#include "../compat.cuh"

namespace flash_attn {
namespace sm90 {

// The shuffle tells the compiler that all lanes have the same.
FA_DEVICE int warpgroup() { return __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0); }
FA_DEVICE bool first_lane() { return threadIdx.x % 32 == 0; }

// For a warp: the next of a launch's blocks that no thread block has taken, each having begun with its own.
FA_DEVICE uint32_t take_block(uint32_t* taken) {
  uint32_t before = 0;
  if (first_lane()) before = atomicAdd(taken, 1);
  return gridDim.x + __shfl_sync(0xffffffffu, before, 0);
}

FA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
FA_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving what it does with these registers across a multiply in flight.
template <int COUNT, class Register>
FA_DEVICE void hold(Register (&registers)[COUNT]) {
  FA_UNROLL
  for (int i = 0; i < COUNT; ++i) {
    if constexpr (std::is_same_v<Register, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

// A matrix in shared memory in panels of 128-byte rows, swizzled over eight of them (the copy engine's 128-byte mode).
// `stride` is in bytes: between panels where the multiply's rows run along the panel's (TRANSPOSED), else unused.
FA_DEVICE uint64_t descriptor(uint32_t address, uint32_t stride) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(stride >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}
FA_DEVICE uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

template <int N>
struct Wgmma;

// (N, register list, the list's operands, numbers of the operands that follow)
#define FA_WGMMA(N, LIST, REGS, I0, I1, I2, I3, I4, I5, I6)                                                          \
  template <>                                                                                                        \
  struct Wgmma<N> {                                                                                                  \
    /* c = a b (+ c), a and b in shared memory */                                                                    \
    template <class T, bool TRANSPOSED_A, bool TRANSPOSED_B>                                                         \
    static FA_DEVICE void shared(float (&c)[N / 2], uint64_t a, uint64_t b, int add) {                               \
      if constexpr (std::is_same_v<T, Half>) {                                                                       \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " I2 ", 0;\n"                                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 " LIST ", " I0 ", " I1                  \
                     ", p, 1, 1, " I3 ", " I4 ";\n}"                                                                 \
                     : REGS(c)                                                                                       \
                     : "l"(a), "l"(b), "r"(add), "n"(int(TRANSPOSED_A)), "n"(int(TRANSPOSED_B)));                    \
      } else {                                                                                                       \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " I2 ", 0;\n"                                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 " LIST ", " I0 ", " I1                \
                     ", p, 1, 1, " I3 ", " I4 ";\n}"                                                                 \
                     : REGS(c)                                                                                       \
                     : "l"(a), "l"(b), "r"(add), "n"(int(TRANSPOSED_A)), "n"(int(TRANSPOSED_B)));                    \
      }                                                                                                              \
    }                                                                                                                \
    /* likewise, a in registers */                                                                                   \
    template <class T, bool TRANSPOSED_B>                                                                            \
    static FA_DEVICE void registers(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) {                \
      if constexpr (std::is_same_v<T, Half>) {                                                                       \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " I5 ", 0;\n"                                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 " LIST ", {" I0 ", " I1 ", " I2 ", " I3 \
                     "}, " I4 ", p, 1, 1, " I6 ";\n}"                                                                \
                     : REGS(c)                                                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(int(TRANSPOSED_B)));        \
      } else {                                                                                                       \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " I5 ", 0;\n"                                                 \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 " LIST ", {" I0 ", " I1 ", " I2 ", " I3\
                     "}, " I4 ", p, 1, 1, " I6 ";\n}"                                                                \
                     : REGS(c)                                                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(int(TRANSPOSED_B)));        \
      }                                                                                                              \
    }                                                                                                                \
  };

#define FA_REGS_4(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define FA_REGS_16_AT(c, i) FA_REGS_4(c, i), FA_REGS_4(c, i + 4), FA_REGS_4(c, i + 8), FA_REGS_4(c, i + 12)
#define FA_REGS_16(c) FA_REGS_16_AT(c, 0)
#define FA_REGS_32(c) FA_REGS_16(c), FA_REGS_16_AT(c, 16)
#define FA_REGS_48(c) FA_REGS_32(c), FA_REGS_16_AT(c, 32)
#define FA_REGS_64(c) FA_REGS_48(c), FA_REGS_16_AT(c, 48)
#define FA_REGS_96(c) FA_REGS_64(c), FA_REGS_16_AT(c, 64), FA_REGS_16_AT(c, 80)
#define FA_REGS_128(c) FA_REGS_96(c), FA_REGS_16_AT(c, 96), FA_REGS_16_AT(c, 112)

FA_WGMMA(32, "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}", FA_REGS_16, "%16", "%17", "%18",
         "%19", "%20", "%21", "%22")
FA_WGMMA(64,
         "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
         "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}",
         FA_REGS_32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
FA_WGMMA(96,
         "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
         "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
         "%41, %42, %43, %44, %45, %46, %47}",
         FA_REGS_48, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
FA_WGMMA(128,
         "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
         "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
         "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, "
         "%61, %62, %63}",
         FA_REGS_64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
FA_WGMMA(192,
         "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
         "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
         "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, "
         "%61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, "
         "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}",
         FA_REGS_96, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
FA_WGMMA(256,
         "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
         "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
         "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, "
         "%61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, "
         "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "
         "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, "
         "%116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}",
         FA_REGS_128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

// The warpgroup's 64 x N of c = a b^T: a's rows and b's with k along panels of 64 columns that lie `..._panel` bytes
// apart. One group of multiplies, left in flight.
template <class T, int N, int K>
FA_DEVICE void multiply_panels(float (&c)[N / 2], uint32_t a, uint32_t a_panel, uint32_t b, uint32_t b_panel) {
  const uint64_t left = descriptor(a, 0), right = descriptor(b, 0);
  FA_UNROLL
  for (int step = 0; step < K / 16; ++step) {
    Wgmma<N>::template shared<T, false, false>(c, advance(left, step / 4 * a_panel + step % 4 * 32),
                                               advance(right, step / 4 * b_panel + step % 4 * 32), step > 0);
  }
  wgmma_commit();
}

// Likewise with a's rows in registers, as they have been since the last wgmma_fence().
template <class T, int N, int K>
FA_DEVICE void multiply_panels(float (&c)[N / 2], const uint32_t (&a)[K / 16][4], uint32_t b, uint32_t b_panel) {
  const uint64_t right = descriptor(b, 0);
  FA_UNROLL
  for (int step = 0; step < K / 16; ++step) {
    Wgmma<N>::template registers<T, false>(c, a[step], advance(right, step / 4 * b_panel + step % 4 * 32), step > 0);
  }
  wgmma_commit();
}

// c += a b, a in registers, b's rows along k, its columns in panels `b_panel` bytes apart. Likewise.
template <class T, int N, int K>
FA_DEVICE void multiply_registers(float (&c)[N / 2], uint32_t (&a)[K / 16][4], uint32_t b, uint32_t b_panel) {
  const uint64_t right = descriptor(b, b_panel);
  hold(c);
  FA_UNROLL
  for (int step = 0; step < K / 16; ++step) hold(a[step]);
  wgmma_fence();
  FA_UNROLL
  for (int step = 0; step < K / 16; ++step) {
    Wgmma<N>::template registers<T, true>(c, a[step], advance(right, step * 16 * 128), 1);
  }
  wgmma_commit();
}

#undef FA_WGMMA
#undef FA_REGS_4
#undef FA_REGS_16_AT
#undef FA_REGS_16
#undef FA_REGS_32
#undef FA_REGS_48
#undef FA_REGS_64
#undef FA_REGS_96
#undef FA_REGS_128

}  // namespace sm90
}  // namespace flash_attn
