// The PTX of matrices on Hopper: wgmma, a warpgroup's 64 x N += 64 x 16 * 16 x N, both factors or the right one in
// shared memory, fp32 accumulation; stmatrix. PTX ISA, "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate Instructions".
#pragma once

#include "../compat.cuh"

namespace flash_attn {
namespace sm90 {

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

template <int N>
struct Wgmma;

// A multiply that adds to c, or does not read it: what it held need not be kept in registers until then.
// (N, types, register list, c as operands, whether it adds, numbers of the operands that follow)
#define FA_SHARED(N, TYPES, LIST, C, ADDS, I0, I1, I2, I3)                                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADDS ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES  \
               " " LIST ", " I0 ", " I1 ", p, 1, 1, " I2 ", " I3 ";\n}"                                                \
               : C                                                                                                     \
               : "l"(a), "l"(b), "n"(int(TRANSPOSED_A)), "n"(int(TRANSPOSED_B)))
#define FA_REGISTERS(N, TYPES, LIST, C, ADDS, I0, I1, I2, I3, I4, I5)                                                  \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADDS ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES  \
               " " LIST ", {" I0 ", " I1 ", " I2 ", " I3 "}, " I4 ", p, 1, 1, " I5 ";\n}"                              \
               : C                                                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(TRANSPOSED_B)))

// (N, register list, the list's operands, numbers of the operands that follow)
#define FA_WGMMA(N, LIST, REGS, I0, I1, I2, I3, I4, I5)                                                                \
  template <>                                                                                                          \
  struct Wgmma<N> {                                                                                                    \
    /* c = a b (+ c), a and b in shared memory */                                                                      \
    template <class T, bool TRANSPOSED_A, bool TRANSPOSED_B>                                                           \
    static FA_DEVICE void shared(float (&c)[N / 2], uint64_t a, uint64_t b, bool adds) {                               \
      if constexpr (std::is_same_v<T, Half>) {                                                                         \
        if (adds) FA_SHARED(N, "f16.f16", LIST, REGS("+f", c), "1", I0, I1, I2, I3);                                   \
        else FA_SHARED(N, "f16.f16", LIST, REGS("=f", c), "0", I0, I1, I2, I3);                                        \
      } else {                                                                                                         \
        if (adds) FA_SHARED(N, "bf16.bf16", LIST, REGS("+f", c), "1", I0, I1, I2, I3);                                 \
        else FA_SHARED(N, "bf16.bf16", LIST, REGS("=f", c), "0", I0, I1, I2, I3);                                      \
      }                                                                                                                \
    }                                                                                                                  \
    /* likewise, a in registers */                                                                                     \
    template <class T, bool TRANSPOSED_B>                                                                              \
    static FA_DEVICE void registers(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b, bool adds) {                \
      if constexpr (std::is_same_v<T, Half>) {                                                                         \
        if (adds) FA_REGISTERS(N, "f16.f16", LIST, REGS("+f", c), "1", I0, I1, I2, I3, I4, I5);                        \
        else FA_REGISTERS(N, "f16.f16", LIST, REGS("=f", c), "0", I0, I1, I2, I3, I4, I5);                             \
      } else {                                                                                                         \
        if (adds) FA_REGISTERS(N, "bf16.bf16", LIST, REGS("+f", c), "1", I0, I1, I2, I3, I4, I5);                      \
        else FA_REGISTERS(N, "bf16.bf16", LIST, REGS("=f", c), "0", I0, I1, I2, I3, I4, I5);                           \
      }                                                                                                                \
    }                                                                                                                  \
  };

#define FA_REGS_4(ACCESS, c, i) ACCESS(c[i]), ACCESS(c[i + 1]), ACCESS(c[i + 2]), ACCESS(c[i + 3])
#define FA_REGS_8(ACCESS, c, i) FA_REGS_4(ACCESS, c, i), FA_REGS_4(ACCESS, c, i + 4)
#define FA_REGS_16_AT(ACCESS, c, i) FA_REGS_8(ACCESS, c, i), FA_REGS_8(ACCESS, c, i + 8)
#define FA_REGS_16(ACCESS, c) FA_REGS_16_AT(ACCESS, c, 0)
#define FA_REGS_32(ACCESS, c) FA_REGS_16(ACCESS, c), FA_REGS_16_AT(ACCESS, c, 16)
#define FA_REGS_48(ACCESS, c) FA_REGS_32(ACCESS, c), FA_REGS_16_AT(ACCESS, c, 32)
#define FA_REGS_64(ACCESS, c) FA_REGS_48(ACCESS, c), FA_REGS_16_AT(ACCESS, c, 48)
#define FA_REGS_96(ACCESS, c) FA_REGS_64(ACCESS, c), FA_REGS_16_AT(ACCESS, c, 64), FA_REGS_16_AT(ACCESS, c, 80)
#define FA_REGS_128(ACCESS, c) FA_REGS_96(ACCESS, c), FA_REGS_16_AT(ACCESS, c, 96), FA_REGS_16_AT(ACCESS, c, 112)

FA_WGMMA(32, "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}", FA_REGS_16, "%16", "%17", "%18",
         "%19", "%20", "%21")
FA_WGMMA(64,
         "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
         "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}",
         FA_REGS_32, "%32", "%33", "%34", "%35", "%36", "%37")
FA_WGMMA(96,
         "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
         "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
         "%41, %42, %43, %44, %45, %46, %47}",
         FA_REGS_48, "%48", "%49", "%50", "%51", "%52", "%53")
FA_WGMMA(128,
         "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
         "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
         "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, "
         "%61, %62, %63}",
         FA_REGS_64, "%64", "%65", "%66", "%67", "%68", "%69")
FA_WGMMA(192,
         "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
         "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
         "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, "
         "%61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, "
         "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}",
         FA_REGS_96, "%96", "%97", "%98", "%99", "%100", "%101")
FA_WGMMA(256,
         "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
         "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, "
         "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, "
         "%61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, "
         "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "
         "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, "
         "%116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}",
         FA_REGS_128, "%128", "%129", "%130", "%131", "%132", "%133")

#undef FA_WGMMA
#undef FA_SHARED
#undef FA_REGISTERS
#undef FA_REGS_4
#undef FA_REGS_8
#undef FA_REGS_16_AT
#undef FA_REGS_16
#undef FA_REGS_32
#undef FA_REGS_48
#undef FA_REGS_64
#undef FA_REGS_96
#undef FA_REGS_128

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
FA_DEVICE void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

FA_DEVICE void store_shared(uint32_t address, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}

}  // namespace sm90
}  // namespace flash_attn
