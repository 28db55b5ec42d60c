// From a kernel template to a __global__ function and its entry in the registry.
#pragma once

#include "../core/registry.h"
#include "compat.cuh"

namespace flash_attn {

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kMinBlocks) run_kernel(const FA_GRID_CONSTANT typename K::Params p) {
  FA_SHARED_MEMORY(shared);
  K::run(launched(p), int64_t(blockIdx.x), shared);
}

template <class K>
int64_t blocks_of(const void* params) {
  return K::blocks(*static_cast<const typename K::Params*>(params));
}

// A kernel may bring its own way to be launched: K::launch(params, blocks, shared_bytes, stream).
template <class K, class = void>
struct Launcher {
  static constexpr auto kLaunch = nullptr;
  static const void* device() { return reinterpret_cast<const void*>(&run_kernel<K>); }
};
template <class K>
struct Launcher<K, std::void_t<decltype(K::launch)>> {
  static constexpr auto kLaunch = &K::launch;
  static const void* device() { return K::device(); }
};

// And may keep running folds in device memory.
template <class K, class = void>
constexpr int kStashDeviceBytes = 0;
template <class K>
constexpr int kStashDeviceBytes<K, std::void_t<decltype(K::kStashDeviceBytes)>> = K::kStashDeviceBytes;

// And may launch only as many thread blocks as run at a time, each of which takes one block after another.
template <class K, class = void>
constexpr bool kPersistent = false;
template <class K>
constexpr bool kPersistent<K, std::void_t<decltype(K::kPersistent)>> = K::kPersistent;

// And may take rows that do not allow 16-byte access, which else modified instances do: so may one of an arithmetic of
// its own.
template <class K, class = void>
constexpr bool kTakesAnyRows = false;
template <class K>
constexpr bool kTakesAnyRows<K, std::void_t<decltype(K::kTakesAnyRows)>> = K::kTakesAnyRows;

// And may read keys and values by a block table.
template <class K, class = void>
constexpr Pages kPages = Pages::kNone;
template <class K>
constexpr Pages kPages<K, std::void_t<decltype(K::kReadsPages)>> = K::kReadsPages;

// And may fold up to K::most_shares(params) of a row's shares itself.
template <class K, class = void>
struct ShareFolder {
  static constexpr int (*kMost)(const void*) = nullptr;
};
template <class K>
struct ShareFolder<K, std::void_t<decltype(K::most_shares)>> {
  static constexpr auto kMost = &K::most_shares;
};

template <class K>
KernelInfo kernel_info(const KernelKey& key) {
  KernelInfo info{};
  info.key = key;
  info.block_m = K::kBlockM;
  info.block_n = K::kBlockN;
  info.threads = K::kThreads;
  info.shared_bytes = K::kSharedBytes;
  info.stash_bytes = K::kStashBytes;
  info.stash_device_bytes = kStashDeviceBytes<K>;
  info.persistent = kPersistent<K>;
  info.takes_any_rows = kTakesAnyRows<K>;
  info.pages = kPages<K>;
  info.most_shares = ShareFolder<K>::kMost;
  info.blocks = blocks_of<K>;
  info.device = Launcher<K>::device();
  info.launch = Launcher<K>::kLaunch;
  return info;
}

}  // namespace flash_attn
