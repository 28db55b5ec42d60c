// From a kernel template to a registry entry. Included by the generated instance files only.
#pragma once

#include "../core/registry.h"

namespace flash_attn {

template <class K>
void run_on_host(const void* params, int64_t block, char* scratch) {
  K::run(*static_cast<const typename K::Params*>(params), block, scratch);
}

template <class K>
int64_t blocks_of(const void* params) {
  return K::blocks(*static_cast<const typename K::Params*>(params));
}

// A constant expression: a table entry is initialised without running code of its machine.
template <class K>
constexpr KernelInfo kernel_info(KernelKey key) {
  return {key, K::kBlockM, K::kBlockN, K::kThreads, K::kSharedBytes, K::kStashBytes, 0, &blocks_of<K>, &run_on_host<K>,
          nullptr, nullptr, false, false, Pages::kNone, nullptr};
}

}  // namespace flash_attn
