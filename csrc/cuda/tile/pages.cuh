// Rows of a matrix that lie in pages: which page a row is in, and where in it.
#pragma once

#include "../compat.cuh"

namespace flash_attn {

template <class T>
struct PagedRows {
  const T* data;  // the first page's first row
  int64_t page_stride, row_stride;
  const int32_t* table;  // the pages of the rows' sequence
  int pages, page_size;
  int first;  // row of the sequence that is row 0 here

  // The page of a row; not in [0, pages) where the table names one that is not there, whose rows read as zero.
  FA_DEVICE int page_of(int row) const { return table[uint32_t(first + row) / uint32_t(page_size)]; }
  FA_DEVICE int row_in_page(int row) const { return int(uint32_t(first + row) % uint32_t(page_size)); }
  FA_DEVICE bool has_page(int page) const { return uint32_t(page) < uint32_t(pages); }

  // Null where the page is not there.
  FA_DEVICE const T* find(int row) const {
    const int page = page_of(row);
    return has_page(page) ? data + page * page_stride + row_in_page(row) * row_stride : nullptr;
  }
};

}  // namespace flash_attn
