// Which of the compiled instruction sets this processor runs.
#pragma once

#include "../core/registry.h"

namespace flash_attn {

// The best machine's kernel for the key, its head_dim padded up; null where none was compiled.
const KernelInfo* find_host_kernel(const KernelKey& key);

// The best machine's name: "x86-64-v4", "generic", ...
const char* host_machine();

}  // namespace flash_attn
