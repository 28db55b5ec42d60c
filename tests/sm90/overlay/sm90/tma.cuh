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
    if (host::random_below(8) == 0) host::yield();
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
    if (host::random_below(16) == 0) host::yield();
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

FA_DEVICE void load_box(uint32_t dst, const CUtensorMap& map, Barrier& barrier, int column, int row, int head,
                        int batch) {
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
      uint32_t x = 0;
      if (inside) memcpy(&x, map.data + offset * bytes, size_t(bytes));
      const uint32_t to = dst + uint32_t((r * map.box_cols + c) * bytes);
      memcpy(bytes == 2 ? host::swizzled(to) : host::shared_memory(to), &x, size_t(bytes));
    }
  }
  barrier.complete(map.box_rows * map.box_cols * bytes);
}

FA_DEVICE void store(float* dst, uint32_t src, int bytes) { memcpy(dst, host::shared_memory(src), size_t(bytes)); }
FA_DEVICE void reduce_add(float* dst, uint32_t src, int bytes) {
  const float* const x = reinterpret_cast<const float*>(host::shared_memory(src));
  for (int i = 0; i < bytes / 4; ++i) dst[i] += x[i];
}
template <bool READ>
FA_DEVICE void wait_written() {}

FA_DEVICE void sync_named(int id, int threads) { host::meet(host::self->block->named[id], threads); }

template <int REGISTERS>
FA_DEVICE void keep_registers() {}
template <int REGISTERS>
FA_DEVICE void take_registers() {}

}  // namespace sm90
}  // namespace flash_attn
