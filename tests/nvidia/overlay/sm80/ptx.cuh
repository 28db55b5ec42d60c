// csrc/cuda/sm80/ptx.cuh on the host. A multiply is done when it is issued.
#pragma once

#include "../compat.cuh"

namespace flash_attn {
namespace sm80 {

FA_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const char*>(p) - host::self->block->shared);
}

// Calls f(i, memory of its row r) for the four matrices and every row of each.
template <class F>
FA_DEVICE void of_matrices(uint32_t address, F&& f) {
  host::exchange([&](uint32_t(&mine)[4]) { mine[0] = address; },
                 [&](uint32_t(&all)[32][4]) {
                   for (int i = 0; i < 32; ++i) f(i / 8, i % 8, host::shared_memory(all[i][0]));
                 });
}
FA_DEVICE void ldmatrix(uint32_t (&x)[4], uint32_t address) {
  const int lane = int(threadIdx.x) % 32;
  of_matrices(address, [&](int i, int row, const char* memory) {
    if (row == lane / 4) memcpy(&x[i], memory + lane % 4 * 4, 4);
  });
}
FA_DEVICE void ldmatrix_transposed(uint32_t (&x)[4], uint32_t address) {
  const int lane = int(threadIdx.x) % 32;
  of_matrices(address, [&](int i, int row, const char* memory) {
    if (row / 2 == lane % 4) memcpy(reinterpret_cast<char*>(&x[i]) + row % 2 * 2, memory + lane / 4 * 2, 2);
  });
}

FA_DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t x;
  memcpy(&x, host::shared_memory(address), 4);
  return x;
}
FA_DEVICE void load_shared(uint32_t& x, uint32_t& y, uint32_t address) {
  x = load_shared(address);
  y = load_shared(address + 4);
}

// Done at once, or as late as may be.
FA_DEVICE void copy_async(uint32_t dst, const void* src, bool inside) {
  char* const to = host::shared_memory(dst);
  const auto copy = [=] { inside ? memcpy(to, src, 16) : memset(to, 0, 16); };
  if (host::random_below(2) == 0) return void(copy());
  host::self->own_copies.push_back({host::self->copy_groups, copy});
}
FA_DEVICE void commit_copies() { ++host::self->copy_groups; }
template <int PENDING>
FA_DEVICE void wait_copies() {
  host::Thread& thread = *host::self;
  const auto late = [&](const host::OwnCopy& copy) { return copy.group + PENDING >= thread.copy_groups; };
  for (const host::OwnCopy& copy : thread.own_copies) {
    if (!late(copy)) copy.run();
  }
  auto& left = thread.own_copies;
  left.erase(std::remove_if(left.begin(), left.end(), [&](const auto& copy) { return !late(copy); }), left.end());
}

// c += a b of a warp, K steps deep: a(row, k) and b(k, col) of what the lanes hold.
template <int K, class Left, class Right>
FA_DEVICE void multiply(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Left&& left, Right&& right) {
  const int row = int(threadIdx.x) % 32 / 4, col = int(threadIdx.x) % 4 * 2;
  float rows[2][K], cols[2][K];
  host::exchange([&](uint32_t(&mine)[4]) { memcpy(mine, a, sizeof a); },
                 [&](uint32_t(&all)[32][4]) {
                   for (int k = 0; k < K; ++k) rows[0][k] = left(all, row, k), rows[1][k] = left(all, row + 8, k);
                 });
  host::exchange([&](uint32_t(&mine)[4]) { mine[0] = b0, mine[1] = b1; },
                 [&](uint32_t(&all)[32][4]) {
                   for (int k = 0; k < K; ++k) cols[0][k] = right(all, k, col), cols[1][k] = right(all, k, col + 1);
                 });
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < K; ++k) c[i] += rows[i / 2][k] * cols[i % 2][k];
  }
}
template <class T>
FA_DEVICE void mma(T, float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto half = [](uint32_t pair, int which) {
    T x[2];
    memcpy(x, &pair, 4);
    return widen(x[which]);
  };
  multiply<16>(
      c, a, b0, b1,
      [&](auto& all, int row, int k) { return half(all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2); },
      [&](auto& all, int k, int col) { return half(all[col * 4 + k % 8 / 2][k / 8], k % 2); });
}
FA_DEVICE void mma_tf32(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto tf32 = [](uint32_t bits) { return bits_to_float(bits & 0xffffe000u); };
  multiply<8>(
      c, a, b0, b1, [&](auto& all, int row, int k) { return tf32(all[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]); },
      [&](auto& all, int k, int col) { return tf32(all[col * 4 + k % 4][k / 4]); });
}

template <class T>
FA_DEVICE uint32_t pack(T, float low, float high) {
  const T halves[2] = {narrow<T>(low), narrow<T>(high)};
  uint32_t x;
  memcpy(&x, halves, 4);
  return x;
}

constexpr int kReduceVector = 4;
FA_DEVICE void reduce_add(float* dst, const float* x) {
  for (int i = 0; i < 4; ++i) dst[i] += x[i];
}
FA_DEVICE void load_global(float* x, const float* src) { memcpy(x, src, 16); }

FA_DEVICE int32_t load_acquire(const int32_t* p) {
  host::self->waits_for = "a turn";
  host::yield();
  return *p;
}
FA_DEVICE int32_t add_acquire(int32_t* p, int32_t x) {
  host::yield();
  *p += x;
  return *p - x;
}
FA_DEVICE void add_release(int32_t* p, int32_t x) {
  host::yield();
  *p += x;
}

}  // namespace sm80
}  // namespace flash_attn
