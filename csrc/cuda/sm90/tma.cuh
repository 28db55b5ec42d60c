// The copy engine and the barriers in shared memory that its copies complete on. PTX ISA, "Asynchronous copy",
// "mbarrier".
#pragma once

#include <cuda.h>

#include "../compat.cuh"

namespace flash_attn {
namespace sm90 {

FA_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// A barrier whose phases alternate: wait(phase) returns once phase number `phase` (0, 1, 0, ...) has completed.
class Barrier {
 public:
  FA_DEVICE void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state_)), "r"(arrivals) : "memory");
  }
  FA_DEVICE void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state_)) : "memory");
  }
  FA_DEVICE void expect(int bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state_)), "r"(bytes)
                 : "memory");
  }
  FA_DEVICE void arrive_expecting(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state_)), "r"(bytes)
                 : "memory");
  }
  FA_DEVICE void wait(uint32_t phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @done bra.uni "
        "finished;\n bra.uni again;\nfinished:\n}" ::"r"(shared_address(&state_)),
        "r"(phase)
        : "memory");
  }

 private:
  uint64_t state_;
};

// Where the cluster's thread block `rank` has what this one has at `address`.
FA_DEVICE uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
// Arrives at a barrier of any thread block of the cluster. Orders no memory accesses: for multiplies that have read.
FA_DEVICE void arrive_in_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

FA_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Makes this thread's ordinary accesses to shared memory visible to the copy engine and the tensor cores.
FA_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Likewise those to device memory, and those of others that it knows of.
FA_DEVICE void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

FA_DEVICE void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// For how long the L2 cache is to keep what is read or written, against what else it holds. What is usual is not the
// same as a policy of evict_normal, under which it fetches no more than it is asked for.
enum class Keep { kUsual, kBriefly, kLong };
template <Keep KEEP>
FA_DEVICE uint64_t cache_policy() {
  static_assert(KEEP != Keep::kUsual);
  uint64_t policy;
  if (KEEP == Keep::kBriefly) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy));
  }
  return policy;
}

// A box of [batch, head, row, column] to shared memory; counts its bytes on `barrier`.
template <Keep KEEP = Keep::kUsual>
FA_DEVICE void load_box(uint32_t dst, const CUtensorMap& map, Barrier& barrier, int column, int row, int head,
                        int batch) {
  if constexpr (KEEP != Keep::kUsual) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, "
        "%4, %5, %6}], [%2], %7;" ::"r"(dst),
        "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "r"(head), "r"(batch),
        "l"(cache_policy<KEEP>())
        : "memory");
    return;
  }
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(dst),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Likewise to the same place of every thread block of a cluster of two, on that thread block's barrier.
template <Keep KEEP = Keep::kUsual>
FA_DEVICE void load_box_to_both(uint32_t dst, const CUtensorMap& map, Barrier& barrier, int column, int row, int head,
                                int batch) {
  if constexpr (KEEP != Keep::kUsual) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(dst),
        "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "r"(head), "r"(batch), "h"(uint16_t(3)),
        "l"(cache_policy<KEEP>())
        : "memory");
    return;
  }
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4, %5, %6}], [%2], %7;" ::"r"(dst),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "r"(head), "r"(batch), "h"(uint16_t(3))
      : "memory");
}

// A box back to [batch, head, row, column], as it lies in shared memory; what is outside is not written.
template <Keep KEEP = Keep::kUsual>
FA_DEVICE void store_box(const CUtensorMap& map, uint32_t src, int column, int row, int head, int batch) {
  if constexpr (KEEP != Keep::kUsual) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5}], [%1], %6;" ::"l"(
            &map),
        "r"(src), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(cache_policy<KEEP>())
        : "memory");
    return;
  }
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(src), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}
FA_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// dst[i] = src[i] in device memory, `bytes` of floats in shared memory.
FA_DEVICE void store(float* dst, uint32_t src, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes)
               : "memory");
  commit_stores();
}
// Likewise dst[i] += src[i], each element atomically.
FA_DEVICE void reduce_add(float* dst, uint32_t src, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst), "r"(src),
               "r"(bytes)
               : "memory");
  commit_stores();
}
// Waits until this thread's stores and additions have read their source, or else have landed.
template <bool READ>
FA_DEVICE void wait_written() {
  if (READ) {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  } else {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

FA_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of the cluster that have not ended wait for each other, or say first that they have come.
template <bool ORDERS = true>  // memory accesses
FA_DEVICE void arrive_at_cluster() {
  if (ORDERS) {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
}
FA_DEVICE void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
FA_DEVICE void sync_cluster() {
  arrive_at_cluster();
  wait_for_cluster();
}
// To shared memory of any thread block of the cluster, counted on a barrier there.
FA_DEVICE void store_in_cluster(uint32_t address, float2 x, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address),
               "f"(x.x), "f"(x.y), "r"(barrier)
               : "memory");
}
FA_DEVICE void store_in_cluster(uint32_t address, float4 x, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
      : "memory");
}

// A named barrier of a thread block: `threads` wait for each other.
FA_DEVICE void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Moves registers between warpgroups: all warps of a warpgroup together.
template <int REGISTERS>
FA_DEVICE void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
FA_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

}  // namespace sm90
}  // namespace flash_attn
