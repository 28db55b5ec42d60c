// csrc/cuda/sm90/tma.cuh on the host.
#pragma once

#include "../compat.cuh"

// Of [batch, head, row, column].
struct CUtensorMap {
  const char* data;
  int64_t sizes[4], strides[4];  // column first
  int box_rows, box_cols, element_bytes;
};

namespace flash_attn {
namespace sm90 {

FA_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const char*>(p) - host::self->block->shared);
}

class Barrier {
 public:
  void init(int arrivals) {
    arrivals_ = left_ = uint16_t(arrivals);
    phase_ = bytes_ = 0;
  }
  void arrive() {
    if (left_ == 0) {
      printf("more arrivals than the barrier counts\n");
      _Exit(1);
    }
    --left_;
    turn();
  }
  void expect(int bytes) { bytes_ += uint32_t(bytes); }
  void arrive_expecting(int bytes) {
    expect(bytes);
    arrive();
  }
  void complete(int bytes) {
    bytes_ -= uint32_t(bytes);
    turn();
  }
  void wait(uint32_t phase) {
    host::self->waits_for = "a barrier";
    while (phase_ == phase % 2) host::yield();
  }

 private:
  void turn() {
    if (left_ != 0 || bytes_ != 0) return;
    left_ = arrivals_;
    phase_ ^= 1;
  }

  uint16_t arrivals_, left_;
  uint32_t phase_ : 1, bytes_ : 31;
};
static_assert(sizeof(Barrier) == 8);

FA_DEVICE void fence_barrier_init() {}
FA_DEVICE void fence_async_proxy() {}
FA_DEVICE void fence_async_proxy_global() {}
FA_DEVICE void prefetch(const CUtensorMap&) {}

FA_DEVICE uint32_t cluster_rank() { return host::self->block->rank; }
FA_DEVICE uint32_t cluster_address(uint32_t address, uint32_t rank) { return address | (rank + 1) << host::kRankBit; }
FA_DEVICE void arrive_in_cluster(uint32_t barrier) {
  reinterpret_cast<Barrier*>(host::shared_memory(barrier))->arrive();
}
template <bool ORDERS = true>
FA_DEVICE void arrive_at_cluster() { host::arrive_at_cluster(); }
FA_DEVICE void wait_for_cluster() { host::wait_for_cluster(); }
FA_DEVICE void sync_cluster() {
  arrive_at_cluster();
  wait_for_cluster();
}
template <class T>
FA_DEVICE void store_in_cluster(uint32_t address, T x, uint32_t barrier) {
  memcpy(host::shared_memory(address), &x, sizeof x);
  reinterpret_cast<Barrier*>(host::shared_memory(barrier))->complete(sizeof x);
}

enum class Keep { kUsual, kBriefly, kLong };

// f(device memory or null, shared memory) for each element of a box.
template <class F>
void over_box(const CUtensorMap& map, uint32_t shared, int column, int row, int head, int batch, F&& f) {
  const int bytes = map.element_bytes;
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < map.box_cols; ++c) {
      const int64_t at[4] = {column + c, row + r, head, batch};
      bool inside = true;
      int64_t offset = 0;
      for (int i = 0; i < 4; ++i) {
        inside = inside && at[i] >= 0 && at[i] < map.sizes[i];
        offset += at[i] * map.strides[i];
      }
      const uint32_t there = shared + uint32_t((r * map.box_cols + c) * bytes);
      f(inside ? map.data + offset * bytes : nullptr, bytes == 2 ? host::swizzled(there) : host::shared_memory(there));
    }
  }
}

template <Keep = Keep::kUsual>
FA_DEVICE void load_box(uint32_t dst, const CUtensorMap& map, Barrier& barrier, int column, int row, int head,
                        int batch) {
  host::copy_later([=, &map, &barrier] {
    over_box(map, dst, column, row, head, batch, [&](const char* device, char* shared) {
      if (device == nullptr) memset(shared, 0, size_t(map.element_bytes));
      if (device != nullptr) memcpy(shared, device, size_t(map.element_bytes));
    });
    barrier.complete(map.box_rows * map.box_cols * map.element_bytes);
  });
}
template <Keep = Keep::kUsual>
FA_DEVICE void load_box_to_both(uint32_t dst, const CUtensorMap& map, Barrier& barrier, int column, int row, int head,
                                int batch) {
  for (uint32_t rank = 0; rank < 2; ++rank) {
    auto& its_barrier = *reinterpret_cast<Barrier*>(host::shared_memory(cluster_address(shared_address(&barrier), rank)));
    load_box(cluster_address(dst, rank), map, its_barrier, column, row, head, batch);
  }
}
template <class F>
void store_later(F&& store) {
  ++host::self->stores;
  host::copy_later([store] {
    store();
    --host::self->stores;
  });
}
template <Keep = Keep::kUsual>
FA_DEVICE void store_box(const CUtensorMap& map, uint32_t src, int column, int row, int head, int batch) {
  store_later([=, &map] {
    over_box(map, src, column, row, head, batch, [&](const char* device, char* shared) {
      if (device != nullptr) memcpy(const_cast<char*>(device), shared, size_t(map.element_bytes));
    });
  });
}
FA_DEVICE void commit_stores() {}

FA_DEVICE void store(float* dst, uint32_t src, int bytes) {
  store_later([=] { memcpy(dst, host::shared_memory(src), size_t(bytes)); });
}
FA_DEVICE void reduce_add(float* dst, uint32_t src, int bytes) {
  store_later([=] {
    const float* const x = reinterpret_cast<const float*>(host::shared_memory(src));
    for (int i = 0; i < bytes / 4; ++i) dst[i] += x[i];
  });
}
template <bool READ>
FA_DEVICE void wait_written() {
  host::self->waits_for = "its stores";
  while (host::self->stores > 0) host::yield();
}

FA_DEVICE void sync_named(int id, int threads) { host::meet(host::self->block->named[id], threads); }

template <int REGISTERS>
FA_DEVICE void keep_registers() {}
template <int REGISTERS>
FA_DEVICE void take_registers() {}

}  // namespace sm90
}  // namespace flash_attn
