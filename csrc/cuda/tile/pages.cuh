// Keys or values of a sequence and head that lie in pages: which page a row is in, and where in it.
#pragma once

#include "../../core/params.h"
#include "../compat.cuh"

namespace flash_attn {

template <class T>
class PagedRows {
 public:
  // From the sequence's row `first` on, which is row 0 here.
  FA_DEVICE PagedRows(const ForwardParams& p, const TensorRef& pages, int batch, int head, int first)
      : data_(static_cast<const T*>(pages.data) + head * pages.head_stride),
        page_stride_(pages.batch_stride),
        row_stride_(pages.row_stride),
        table_(p.block_table + batch * p.block_table_stride),
        pages_(p.pages),
        page_size_(p.page_size),
        page_inverse_(p.page_inverse),
        first_(first) {}

  // Null where the table names a page that is not there: its rows read as zero.
  FA_DEVICE const T* find(int row) const {
    const Place place(*this, row);
    return find(table_[place.page], place.row);
  }
  // Row 0, where its page holds all that are wanted.
  FA_DEVICE const T* find_block() const {
    const Place place(*this, 0);
    return find(read_uniform(table_ + place.page), place.row);
  }
  FA_DEVICE const T* any() const { return data_; }  // an address that is there

 private:
  struct Place {
    int page, row;  // page of the sequence, row of the page
    FA_DEVICE Place(const PagedRows& in, int row) {
      const int in_sequence = in.first_ + row;
      page = int(uint64_t(in_sequence) * in.page_inverse_ >> 32);
      this->row = in_sequence - page * in.page_size_;
      if (this->row >= in.page_size_) ++page, this->row -= in.page_size_;
    }
  };
  FA_DEVICE const T* find(int page, int row) const {
    return uint32_t(page) < uint32_t(pages_) ? data_ + page * page_stride_ + row * row_stride_ : nullptr;
  }

  const T* data_;
  int64_t page_stride_, row_stride_;
  const int32_t* table_;
  int pages_, page_size_;
  uint32_t page_inverse_;
  int first_;
};

}  // namespace flash_attn
