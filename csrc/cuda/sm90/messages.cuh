// From one warp of a thread block to others, through shared memory.
#pragma once

#include "tma.cuh"
#include "wgmma.cuh"

namespace flash_attn {
namespace sm90 {

// Up to COUNT messages under way.
template <class Message, int COUNT>
struct Messages {
  Barrier full[COUNT], free[COUNT];
  Message message[COUNT];

  FA_DEVICE void init(int readers) {  // threads
    for (int buffer = 0; buffer < COUNT; ++buffer) {
      full[buffer].init(1);
      free[buffer].init(readers);
    }
  }
  // Waits until everyone has released the message whose place the n-th takes.
  FA_DEVICE void await_free(uint32_t n) { free[n % COUNT].wait(n / COUNT % 2 ^ 1); }
  // By one thread, then.
  FA_DEVICE void send(uint32_t n, const Message& next) {
    message[n % COUNT] = next;
    full[n % COUNT].arrive();
  }
  // Stays as it is until all readers have released it.
  FA_DEVICE const volatile Message& receive(uint32_t n) {
    full[n % COUNT].wait(n / COUNT % 2);
    return at(n);
  }
  FA_DEVICE const volatile Message& at(uint32_t n) const { return message[n % COUNT]; }
  FA_DEVICE void release(uint32_t n) { free[n % COUNT].arrive(); }
};

// The blocks that a thread block does, from the warp that loads to everyone else.
struct Announcements : Messages<uint32_t, 2> {
  static constexpr uint32_t kNone = 0xffffffffu;

  // The n-th is `next`, or kNone.
  FA_DEVICE void tell(uint32_t n, uint32_t next) {
    await_free(n);
    __syncwarp();  // once it is told, a lane that is late would wait for the phase after
    if (first_lane()) send(n, next);
  }
  FA_DEVICE uint32_t told(uint32_t n) {
    const uint32_t next = receive(n);
    release(n);
    return next;
  }
};

}  // namespace sm90
}  // namespace flash_attn
