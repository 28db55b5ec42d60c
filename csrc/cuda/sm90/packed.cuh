// Which block of a packed batch a number stands for, where sequences have the blocks that their own lengths make. If
// each has those of the longest, thread blocks may spend their time on passing by what is not there.
#pragma once

#include "../attention/schedule.cuh"

namespace flash_attn {
namespace sm90 {

// Of blocks of BLOCK rows. For a warp that asks for ascending numbers.
template <int BLOCK>
class PackedBlocks {
 public:
  // Whether they are worth looking for: where otherwise more than two thirds of the blocks visited would not be there.
  // Passing one of those by takes 0.4 us; looking for all takes sequences of one length 3 to 10% of their time.
  static bool pay(int batch, int total, int longest) {
    return int64_t(batch) * ceil_div(longest, BLOCK) > 3 * (int64_t(batch) + total / BLOCK);
  }

  // `ends`, `total` and `longest`: of the sequences whose rows these are. A head has a block of rows `times` over.
  FA_DEVICE PackedBlocks(const AttentionParams& p, const int32_t* ends, int total, int longest, int heads, int times)
      : p_(p), ends_(ends), total_(total), longest_(longest), heads_(heads), times_(times) {}

  // Returns whether there is a block of that number. `blocks`: of the sequence's rows.
  FA_DEVICE bool find(uint32_t number, HeadItem& item, int& blocks) {
    const int lane = int(threadIdx.x) % 32;
    for (; first_ < p_.batch; first_ += 32) {
      const int mine = first_ + lane < p_.batch ? ceil_div(rows_of(first_ + lane), BLOCK) : 0;
      uint32_t sum = uint32_t(mine) * times_ * heads_;
      FA_UNROLL
      for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t others = __shfl_sync(0xffffffffu, sum, max_int(0, lane - offset));
        if (lane >= offset) sum += others;
      }
      const int found = __popc(__ballot_sync(0xffffffffu, before_ + sum <= number));
      if (found < 32) {
        blocks = __shfl_sync(0xffffffffu, mine, found);
        const uint32_t items = uint32_t(blocks) * times_, end = before_ + __shfl_sync(0xffffffffu, sum, found);
        item = HeadItem(number - (end - items * heads_), items, heads_, 1, min_int(p_.head_group, heads_));
        item.batch = first_ + found;
        return true;
      }
      before_ += __shfl_sync(0xffffffffu, sum, 31);
    }
    return false;
  }

 private:
  // Of the last sequence as many as of the longest, where rows are no sequence's: its blocks clear them.
  FA_DEVICE int rows_of(int batch) const {
    int64_t first;
    int length;
    Sequence::read(ends_ + batch, total_, longest_, first, length);
    return batch == p_.batch - 1 && first + length < total_ ? longest_ : length;
  }

  const AttentionParams& p_;
  const int32_t* const ends_;
  const int total_, longest_, heads_, times_;
  int first_ = 0;        // the sequence of lane 0
  uint32_t before_ = 0;  // blocks of the sequences before it
};

}  // namespace sm90
}  // namespace flash_attn
