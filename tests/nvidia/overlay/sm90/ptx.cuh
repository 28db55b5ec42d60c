// csrc/cuda/sm90/ptx.cuh on the host. A multiply is done when it is issued.
#pragma once

#include "../compat.cuh"

namespace flash_attn {
namespace sm90 {

FA_DEVICE void wgmma_fence() { host::meet_warp(); }
FA_DEVICE void wgmma_commit() { host::meet_warp(); }
template <int PENDING>
FA_DEVICE void wgmma_wait() {
  if (host::random_below(4) == 0) host::yield();
  host::meet_warp();
}
template <int COUNT, class Register>
FA_DEVICE void hold(Register (&)[COUNT]) {}

// A factor in shared memory, as its descriptor says.
template <class T>
struct SharedFactor {
  uint32_t address, panel;
  explicit SharedFactor(uint64_t descriptor)
      : address(uint32_t(descriptor & 0x3fff) << 4), panel(uint32_t(descriptor >> 16 & 0x3fff) << 4) {}
  // Element k of row (of column) i; `transposed` where neighbours along i, not along k, lie side by side.
  float operator()(int i, int k, bool transposed) const {
    const int row = transposed ? k : i, col = transposed ? i : k;
    T x;
    memcpy(&x, host::swizzled(address + col / 64 * panel + row / 8 * 1024 + row % 8 * 128 + col % 64 * 2), 2);
    return widen(x);
  }
};

template <int N>
struct Wgmma {
  template <class T, bool TRANSPOSED_A, bool TRANSPOSED_B>
  static void shared(float (&c)[N / 2], uint64_t a, uint64_t b, int add) {
    const SharedFactor<T> left(a);
    const int row = int(threadIdx.x) % 128 / 32 * 16 + int(threadIdx.x) % 32 / 4;
    multiply<T, TRANSPOSED_B>(c, b, add, [&](int half, int k) { return left(row + 8 * half, k, TRANSPOSED_A); });
  }
  template <class T, bool TRANSPOSED_B>
  static void registers(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) {
    const int first = int(threadIdx.x) % 32 / 4 * 4;  // of the four lanes that share the rows
    host::exchange([&](uint32_t(&mine)[4]) { memcpy(mine, a, sizeof a); },
                   [&](uint32_t(&all)[32][4]) {
                     multiply<T, TRANSPOSED_B>(c, b, add, [&](int half, int k) {
                       T x[2];
                       memcpy(x, &all[first + k % 8 / 2][half + k / 8 * 2], 4);
                       return widen(x[k % 2]);
                     });
                   });
  }

 private:
  template <class T, bool TRANSPOSED_B, class Left>
  static void multiply(float (&c)[N / 2], uint64_t b, int add, Left&& left) {
    const SharedFactor<T> right(b);
    float a[2][16];
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 16; ++k) a[half][k] = left(half, k);
    }
    for (int reg = 0; reg < N / 2; ++reg) {
      const int col = reg / 4 * 8 + int(threadIdx.x) % 4 * 2 + reg % 2;
      float sum = add ? c[reg] : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[reg / 2 % 2][k] * right(col, k, TRANSPOSED_B);
      c[reg] = sum;
    }
  }
};

FA_DEVICE void store_shared(uint32_t address, uint32_t x, uint32_t y) {
  const uint32_t both[2] = {x, y};
  memcpy(host::shared_memory(address), both, 8);
}

FA_DEVICE void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
  const int lane = int(threadIdx.x) % 32;
  host::exchange([&](uint32_t(&mine)[4]) { mine[0] = address; },
                 [&](uint32_t(&all)[32][4]) {
                   for (int i = 0; i < 4; ++i) {
                     memcpy(host::shared_memory(all[i * 8 + lane / 4][0] + lane % 4 * 4), &x[i], 4);
                   }
                 });
}

}  // namespace sm90
}  // namespace flash_attn
