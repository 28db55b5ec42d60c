// Where a ring of shared memory is.
#pragma once

#include "../compat.cuh"

namespace flash_attn {
namespace sm90 {

// A place among `count` that are used in turn, and the phase of its barriers.
struct Place {
  int at = 0;
  uint32_t phase = 0;
  FA_DEVICE void step(int count) {
    if (++at == count) {
      at = 0;
      phase ^= 1;
    }
  }
  FA_DEVICE void skip(int count, int by) {
    at += by;
    if (at >= count) {
      at -= count;
      phase ^= 1;
    }
  }
};

}  // namespace sm90
}  // namespace flash_attn
