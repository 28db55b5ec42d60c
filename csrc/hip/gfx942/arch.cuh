// The gfx942 (MI300) Arch: MI200's, whose matrix instructions, registers and LDS it has. A type of its own, so that one
// library can hold both machines' kernels.
#pragma once

#include "../gfx90a/arch.cuh"

namespace flash_attn {

struct Gfx942 : Gfx90a {};

}  // namespace flash_attn
