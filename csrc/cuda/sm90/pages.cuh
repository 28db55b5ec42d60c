// Keys and values in pages: which part of which page the copy engine brings for rows of a sequence.
#pragma once

#include "../attention/schedule.cuh"

namespace flash_attn {
namespace sm90 {

// Rows that lie together for sure, of `most`, a power of two: those that a box of the copy engine may have.
FA_HOST_DEVICE int rows_of_page_box(const ForwardParams& p, int most) {
  return p.seqlen_k <= p.page_size ? most : min_int(most, p.page_size & -p.page_size);
}

// Where a box of rows from `row` of a sequence on lies. No page, which reads as zeros, behind the last key; likewise
// where the table names one that is not there.
struct PageBox {
  int page = -1, row = 0;
  PageBox() = default;
  FA_DEVICE PageBox(const ForwardParams& p, int batch, int row) {
    if (row >= p.seqlen_k) return;
    page = p.block_table[batch * p.block_table_stride + row / p.page_size];
    this->row = row % p.page_size;
  }
};

}  // namespace sm90
}  // namespace flash_attn
