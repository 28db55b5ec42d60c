// Arch for Hopper: main loops of its own where they cover a problem, sm80's everywhere else.
#pragma once

#include "../kernels/backward.cuh"
#include "../kernels/finish_dq.cuh"
#include "../kernels/forward.cuh"
#include "../sm80/arch.cuh"
#include "backward.cuh"
#include "backward_fp32.cuh"
#include "backward_wide.cuh"
#include "forward.cuh"
#include "forward_fp32.cuh"
#include "tuning.cuh"

namespace flash_attn {
namespace sm90 {

struct Mma : Sm80 {
  template <Kernel KERNEL, class T, int D, bool MODIFIED>
  using Tuning = sm90::Tuning<KERNEL, T, D, MODIFIED>;
};

template <class T, int D>
constexpr bool kCoversForward = sizeof(T) == 2 && ForwardTuning<D>::kCovered;
template <class T, int D>
constexpr bool kCoversBackward = sizeof(T) == 2 && BackwardTuning<D, Modifiers::kNone>::kCovered;
template <class T, int D>
constexpr bool kCoversWideBackward = sizeof(T) == 2 && (D == 192 || D == 256);
template <class T, int D>
constexpr bool kCoversFp32 = std::is_same_v<T, float> && D >= 64;

// The backward's dQ lies in device memory as FinishDq takes it, whichever loops added to it.
template <int D, class Own = Fp32Backward<D, Modifiers::kNone>, class Row = Tuning<Kernel::kBackward, float, D, false>>
constexpr bool kAddsAsSm80 = std::is_same_v<typename Own::QueryGradient,
                                            sm80::Accumulator<float, Row::kBlockM, D, Row::kWarpsQ, Row::kWarps>>;
static_assert(kAddsAsSm80<64> && kAddsAsSm80<96> && kAddsAsSm80<128> && kAddsAsSm80<192> && kAddsAsSm80<256>);

// The loops of its own that cover a problem, or those of `Else`.
template <class T, int D, Modifiers MODIFIERS, class Else = void>
using OwnForward = std::conditional_t<kCoversForward<T, D>, Forward<T, D, MODIFIERS>,
                                      std::conditional_t<kCoversFp32<T, D>, Fp32Forward<D, MODIFIERS>, Else>>;
template <class T, int D, Modifiers MODIFIERS, class Else = void>
using OwnBackward = std::conditional_t<
    kCoversBackward<T, D>, Backward<T, D, MODIFIERS>,
    std::conditional_t<kCoversWideBackward<T, D>, WideBackward<T, D, MODIFIERS>,
                       std::conditional_t<kCoversFp32<T, D>, Fp32Backward<D, MODIFIERS>, Else>>>;

}  // namespace sm90

struct Sm90 : sm90::Mma {};

template <class T, int D>
struct Forward<Sm90, Problem<T, D, false>>
    : sm90::OwnForward<T, D, Modifiers::kNone, Forward<sm90::Mma, Problem<T, D, false>>> {};

template <class T, int D>
struct Backward<Sm90, Problem<T, D, false>>
    : sm90::OwnBackward<T, D, Modifiers::kNone, Backward<sm90::Mma, Problem<T, D, false>>> {};

// Hopper's own 16-bit backward needs none.
template <class P>
struct FinishDq<Sm90, P> : FinishDq<sm90::Mma, P> {};

// Softcap alone, or with ALiBi and dropout, in Hopper's own loops. What they do not know besides (16-bit rows of any
// alignment, s_dmask) is left to the modified instances of Sm90.
template <Modifiers MODIFIERS>
struct Sm90Scored {};

template <Modifiers MODIFIERS, class T, int D>
struct Forward<Sm90Scored<MODIFIERS>, Problem<T, D, true>> : sm90::OwnForward<T, D, MODIFIERS> {};

template <Modifiers MODIFIERS, class T, int D>
struct Backward<Sm90Scored<MODIFIERS>, Problem<T, D, true>> : sm90::OwnBackward<T, D, MODIFIERS> {};

}  // namespace flash_attn
