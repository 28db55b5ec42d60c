// Which keys a tile of the forward visits, and which of them each of its warpgroups of 64 query rows.
#pragma once

#include "../attention/schedule.cuh"

namespace flash_attn {
namespace sm90 {

template <int BLOCK_M, int BLOCK_N>
struct ForwardTile {
  using Work = ForwardWork<BLOCK_M>;
  Work work;
  Sequence seq;
  VisibleKeys keys;

  FA_DEVICE ForwardTile(const ForwardParams& p, const Work& work)
      : work(work),
        seq(p, work.batch),
        keys(p, Mask(p, seq), work.split, work.query_begin, work.query_begin + BLOCK_M, BLOCK_N) {}
  FA_DEVICE bool has_rows(int group = 0) const { return work.query_begin + group * 64 < seq.len_q; }
  FA_DEVICE bool has_keys() const { return has_rows() && keys.begin < keys.end; }
  // Rows behind the last sequence fall to its tiles, those without rows of their own included.
  FA_DEVICE bool clears(const ForwardParams& p) const {
    return p.cu_seqlens_q != nullptr && work.batch == p.batch - 1;
  }
  FA_DEVICE bool is_last() const { return work.query_begin < 0; }
};

// A warpgroup's keys: what some of its rows see, and what all do. Empty where it has no rows.
template <int BLOCK_M, int BLOCK_N>
struct KeyShare {
  using Tile = ForwardTile<BLOCK_M, BLOCK_N>;
  int begin, end, all_begin, all_end;
  int blocks_before, blocks_after;  // of the tile's keys
  int values;  // of the last block that are the sequence's own; BLOCK_N where those behind it do no harm

  FA_DEVICE KeyShare(const ForwardParams& p, const Tile& tile, int group) {
    const Mask mask(p, tile.seq);
    const int row = tile.work.query_begin + group * 64;
    const VisibleKeys keys(p, mask, tile.work.split, row, row + 64, BLOCK_N);
    const bool none = row >= mask.len_q || keys.begin >= keys.end;
    begin = none ? tile.keys.end : keys.begin;
    end = none ? tile.keys.end : keys.end;
    all_begin = mask.row_begin(row + 63);
    all_end = mask.row_end(row);
    blocks_before = tile.has_keys() ? ceil_div(begin - tile.keys.begin, BLOCK_N) : 0;
    blocks_after = tile.has_keys() ? ceil_div(tile.keys.end, BLOCK_N) - ceil_div(end, BLOCK_N) : 0;
    const bool foreign = p.cu_seqlens_q != nullptr || p.seqused_k != nullptr || p.block_table != nullptr;
    values = foreign ? min_int(BLOCK_N, mask.len_k - (end - 1) / BLOCK_N * BLOCK_N) : BLOCK_N;
  }
  // Of the blocks, every `groups`th from the `group`th on.
  FA_DEVICE void deal(int group, int groups) {
    const int blocks = ceil_div(end - begin, BLOCK_N);
    if (group >= groups || group >= blocks) {
      begin = end;
      return;
    }
    if ((blocks - 1) % groups != group) values = BLOCK_N;
    begin += group * BLOCK_N;
  }
  FA_DEVICE bool has_keys() const { return begin < end; }
  FA_DEVICE bool all_see(int key) const { return key >= all_begin && key + BLOCK_N <= all_end; }
  FA_DEVICE bool has_chunks(const ForwardParams& p) const {
    return may_fold(p) && begin / p.split_size != (end - 1) / p.split_size;
  }

  // Scores of keys that a row does not see become -inf. Ends are relative to a lane's first column: one comparison with
  // a constant for each element, but for columns, by 32, that all of the warp's 16 rows see.
  template <class IntRows, class Scores>
  FA_DEVICE void hide(const ForwardParams& p, const Tile& tile, int key, Scores& scores) const {
    constexpr int kColumns = 32;
    const Mask mask(p, tile.seq);
    const int lane_col = int(threadIdx.x) % 4 * 2, origin = key + lane_col, query = tile.work.query_begin;
    int first_row = 0;
    IntRows::for_each([&](int slot, int row, bool) { first_row = slot == 0 ? query + row : first_row; });
    first_row = __shfl_sync(0xffffffffu, first_row, 0);
    const auto hide_where = [&](IntRows& bound, auto&& hides_none, auto&& hides) {
      FA_UNROLL
      for (int first = 0; first < BLOCK_N; first += kColumns) {
        if (hides_none(first)) continue;
        Scores::for_each([&](int slot, int, int col, int reg) {
          if (reg / 4 * 8 / kColumns * kColumns == first && hides(col - lane_col, bound[slot])) {
            scores[reg] = -infinity<float>();
          }
        });
      }
    };
    if (key < all_begin) {
      IntRows begin;
      IntRows::for_each([&](int slot, int row, bool) { begin[slot] = mask.row_begin(query + row) - origin; });
      const int last = mask.row_begin(first_row + 15) - key;
      hide_where(begin, [&](int first) { return first >= last; }, [](int col, int bound) { return col < bound; });
    }
    if (key + BLOCK_N > all_end) {
      IntRows end;
      IntRows::for_each([&](int slot, int row, bool) { end[slot] = mask.row_end(query + row) - origin; });
      const int least = mask.row_end(first_row) - key;
      hide_where(
          end, [&](int first) { return first + kColumns <= least; }, [](int col, int bound) { return col >= bound; });
    }
  }
};

}  // namespace sm90
}  // namespace flash_attn
