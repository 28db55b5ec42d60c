// csrc/cuda/sm80/ptx.cuh on the host: what Hopper's own loops use of it.
#pragma once

#include "../compat.cuh"

namespace flash_attn {
namespace sm80 {

FA_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const char*>(p) - host::self->block->shared);
}

FA_DEVICE void ldmatrix(uint32_t (&x)[4], uint32_t address) {
  const int lane = int(threadIdx.x) % 32;
  host::exchange([&](uint32_t(&mine)[4]) { mine[0] = address; },
                 [&](uint32_t(&all)[32][4]) {
                   for (int i = 0; i < 4; ++i) {
                     memcpy(&x[i], host::shared_memory(all[i * 8 + lane / 4][0] + lane % 4 * 4), 4);
                   }
                 });
}
void ldmatrix_transposed(uint32_t (&)[4], uint32_t);
uint32_t load_shared(uint32_t);
void load_shared(uint32_t&, uint32_t&, uint32_t);
void copy_async(uint32_t, const void*, bool);
void commit_copies();
template <int PENDING>
void wait_copies();
template <class T>
void mma(T, float*, const uint32_t (&)[4], uint32_t, uint32_t);
void mma_tf32(float*, const uint32_t (&)[4], uint32_t, uint32_t);

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
