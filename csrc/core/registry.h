// What was compiled: one KernelInfo for every instance, one KernelTable for every machine code the build holds.
// Instance files and the list of tables are generated from tools/build/instances.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "params.h"

namespace flash_attn {

enum class KernelKind : int8_t { kForward, kCombine, kPreprocess, kBackward, kFinishDq, kAppend };
constexpr int kKernelKinds = int(KernelKind::kAppend) + 1;

// What an instance is compiled for. A kind that does not depend on a field has its default there.
struct KernelKey {
  KernelKind kind;
  DType dtype;
  int head_dim = 0;          // padded up to a compiled size
  bool modified = false;     // softcap, ALiBi, dropout, s_dmask or an unusual scale are compiled in
  bool performance = false;  // the performance mode's arithmetic
  Modifiers scored = Modifiers::kNone;  // modified by these alone, in loops of the machine's own

  bool differs_in_size_alone(const KernelKey& other) const {
    return kind == other.kind && dtype == other.dtype && modified == other.modified &&
           performance == other.performance && scored == other.scored;
  }
  bool operator==(const KernelKey& other) const { return head_dim == other.head_dim && differs_in_size_alone(other); }
};

// A kernel on the host: one thread block's work, run by one thread in `scratch` (aligned to 128).
using HostKernel = void (*)(const void* params, int64_t block, char* scratch);

struct KernelInfo {
  static constexpr int kNoStash = -1;  // folds no chunks, nor has the bits of a kernel that does

  KernelKey key;
  int block_m, block_n;  // query rows and keys of a block; 0 where the kind has none
  int threads;           // of a GPU thread block
  int shared_bytes;      // the host: of scratch
  int stash_bytes;       // more of them, where a row has several chunks; or kNoStash
  int stash_device_bytes;  // and device memory, for each thread block
  int64_t (*blocks)(const void* params);  // how many blocks these params make
  HostKernel host;       // null on a GPU
  const void* device;    // the __global__ function; null on the host
  // Launches it where that takes more than its params, `blocks` of them and `shared_bytes`; null elsewhere. Throws.
  void (*launch)(const void* params, int64_t blocks, int shared_bytes, void* stream);
  bool persistent;      // its thread blocks take one block of work after another
  bool takes_any_rows;  // of any alignment, by an arithmetic of its own; others leave such to modified kernels
  Pages pages;          // the host's modified kernels read any
  // Up to how many shares of their keys it folds itself for rows like these, without Combine; null where it never does.
  int (*most_shares)(const void* params);
};

// The instances of one machine code: "sm80", "gfx90a", "x86-64-v3", ...
struct KernelTable {
  const char* machine;
  const KernelInfo* const* kernels;
  int count;
  bool has_performance_mode;  // the mode changes 16-bit arithmetic on this machine, be it compiled or not

  // Null where that key was not compiled.
  const KernelInfo* find(const KernelKey& key) const {
    for (int i = 0; i < count; ++i) {
      if (kernels[i]->key == key) return kernels[i];
    }
    return nullptr;
  }

  // Likewise with the smallest compiled size that holds key.head_dim.
  const KernelInfo* find_padded(const KernelKey& key) const {
    const KernelInfo* best = nullptr;
    for (int i = 0; i < count; ++i) {
      const KernelKey& candidate = kernels[i]->key;
      const bool fits = candidate.differs_in_size_alone(key) && candidate.head_dim >= key.head_dim;
      if (fits && (best == nullptr || candidate.head_dim < best->key.head_dim)) best = kernels[i];
    }
    return best;
  }
};

// Every table in this binary, best machine first within a backend.
struct KernelTables {
  const KernelTable* const* tables;
  int count;

  // Null where that machine was not built.
  const KernelTable* find(const char* machine) const {
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(tables[i]->machine, machine) == 0) return tables[i];
    }
    return nullptr;
  }
};
KernelTables kernel_tables();

}  // namespace flash_attn
