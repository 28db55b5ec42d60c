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
  FA_DEVICE const Message& receive(uint32_t n) {
    full[n % COUNT].wait(n / COUNT % 2);
    return at(n);
  }
  FA_DEVICE const Message& at(uint32_t n) const { return message[n % COUNT]; }
  FA_DEVICE void release(uint32_t n) { free[n % COUNT].arrive(); }
};

// The block that a thread block does next: its number, and the work that the number means.
template <class Work>
struct Announcement {
  uint32_t block;
  Work work;

  static constexpr uint32_t kNone = 0xffffffffu;
  FA_DEVICE bool is_none() const { return block == kNone; }
};

// From the warp that loads to everyone else. `work` is worked out once, by divisions that take hundreds of cycles.
template <class Work>
struct Announcements : Messages<Announcement<Work>, 2> {
  FA_DEVICE void tell(uint32_t n, const Announcement<Work>& next) {
    this->await_free(n);
    __syncwarp();  // once it is told, a lane that is late would wait for the phase after
    if (first_lane()) this->send(n, next);
  }
  FA_DEVICE Announcement<Work> told(uint32_t n) {
    const Announcement<Work> next = this->receive(n);
    this->release(n);
    return next;
  }
};

}  // namespace sm90
}  // namespace flash_attn
