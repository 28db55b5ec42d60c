#include "machine.h"

#include <cstring>

namespace flash_attn {
namespace {

#if defined(__x86_64__)
bool runs_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
}
bool runs_v4() {
  return runs_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Whether this processor runs a machine's code; a GPU's it never does.
bool runs(const char* machine) {
#if defined(__x86_64__)
  if (std::strcmp(machine, "x86-64-v4-bf16") == 0) return runs_v4() && __builtin_cpu_supports("avx512bf16");
  if (std::strcmp(machine, "x86-64-v4") == 0) return runs_v4();
  if (std::strcmp(machine, "x86-64-v3") == 0) return runs_v3();
#endif
  return std::strcmp(machine, "generic") == 0;
}

// The host's tables that this processor runs, best first.
struct HostTables {
  static constexpr int kMost = 8;
  const KernelTable* tables[kMost];
  int count = 0;

  HostTables() {
    const KernelTables all = kernel_tables();
    for (int i = 0; i < all.count && count < kMost; ++i) {
      if (runs(all.tables[i]->machine)) tables[count++] = all.tables[i];
    }
  }
};

const HostTables& host_tables() {
  static const HostTables tables;
  return tables;
}

}  // namespace

const KernelInfo* find_host_kernel(const KernelKey& key) {
  const HostTables& host = host_tables();
  for (int i = 0; i < host.count; ++i) {
    if (const KernelInfo* info = host.tables[i]->find_padded(key)) return info;
  }
  return nullptr;
}

const char* host_machine() { return host_tables().count > 0 ? host_tables().tables[0]->machine : "no machine"; }

}  // namespace flash_attn
