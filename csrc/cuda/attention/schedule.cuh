// Which rows and keys a block works on: sequences of a batch, visible key ranges, and the order of blocks.
#pragma once

#include "../../core/params.h"
#include "../compat.cuh"

namespace flash_attn {

FA_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
FA_HOST_DEVICE int min_int(int a, int b) { return a < b ? a : b; }
FA_HOST_DEVICE int max_int(int a, int b) { return a > b ? a : b; }

// One sequence of the batch: its lengths and the row its tensors start at.
struct Sequence {
  int len_q, len_k;
  int stored_k;              // keys in the tensor; seqused_k may leave the last of them out
  int64_t first_q, first_k;  // rows; 0 when padded

  FA_DEVICE Sequence(const AttentionParams& p, int batch) {
    if (p.cu_seqlens_q != nullptr) {
      read(p.cu_seqlens_q + batch, p.total_q, p.seqlen_q, first_q, len_q);
      read(p.cu_seqlens_k + batch, p.total_k, p.seqlen_k, first_k, len_k);
    } else {
      first_q = first_k = 0;
      len_q = p.seqlen_q;
      len_k = p.seqlen_k;
    }
    stored_k = len_k;
    if (p.seqused_k != nullptr) len_k = max_int(0, min_int(len_k, uniform(p.seqused_k[batch])));
  }

  // Boundaries on a device cannot be checked without waiting for it: whatever they hold, no row outside is touched.
  static FA_DEVICE void read(const int32_t* ends, int total, int longest, int64_t& first, int& length) {
    const int begin = max_int(0, min_int(uniform(ends[0]), total)), end = min_int(uniform(ends[1]), total);
    first = begin;
    length = max_int(0, min_int(end - begin, longest));
  }
};

template <class T>
FA_DEVICE T* head_rows(const TensorRef& t, int batch, int head, int64_t first_row) {
  return static_cast<T*>(t.data) + batch * t.batch_stride + head * t.head_stride + first_row * t.row_stride;
}

template <class Scalar>
FA_DEVICE Scalar* head_rows(const RowsRef& t, int batch, int head, int64_t first_row) {
  return static_cast<Scalar*>(t.data) + batch * t.batch_stride + head * t.head_stride + first_row;
}

// Rows of a packed tensor behind the last sequence. They are no one's, and become zero: what a kernel leaves behind
// must not depend on what the memory held. Each of a head's `items` blocks of the last sequence clears its share.
template <class A, class Clear>
FA_DEVICE void clear_spare_rows(const AttentionParams& p, const int32_t* ends, int total, int batch, int item,
                                int items, Clear&& clear) {
  if (ends == nullptr || batch != p.batch - 1) return;
  const int first = max_int(0, min_int(ends[p.batch], total));
  for (int row = first + item; row < total; row += items) {
    for (int col = A::lane(); col < p.head_dim; col += A::kThreads) clear(int64_t(row), col);
  }
}

// Mask semantics: key j is visible to query i iff j < len_k and i + shift - left <= j <= i + shift + right,
// shift = len_k - len_q (bottom-right alignment), a negative bound meaning none.
struct Mask {
  int len_q, len_k, shift, left, right;

  FA_DEVICE Mask(const AttentionParams& p, const Sequence& s)
      : len_q(s.len_q), len_k(s.len_k), shift(s.len_k - s.len_q), left(p.window_left), right(p.window_right) {}

  // Keys [begin, end) visible to query i.
  FA_DEVICE int row_begin(int i) const { return left < 0 ? 0 : i + shift - left; }
  FA_DEVICE int row_end(int i) const { return right < 0 ? len_k : min_int(len_k, i + shift + right + 1); }

  // Keys [begin, end) visible to at least one of the queries [i_begin, i_end); empty when end <= begin.
  FA_DEVICE int keys_begin(int i_begin) const { return max_int(0, row_begin(i_begin)); }
  FA_DEVICE int keys_end(int i_end) const { return row_end(i_end - 1); }

  // Queries [begin, end) that see at least one of the keys [j_begin, j_end).
  FA_DEVICE int queries_begin(int j_begin) const { return right < 0 ? 0 : max_int(0, j_begin - shift - right); }
  FA_DEVICE int queries_end(int j_end) const { return left < 0 ? len_q : min_int(len_q, j_end - 1 - shift + left + 1); }

  // Whether every query of [i_begin, i_end) sees every key of [j_begin, j_end).
  FA_DEVICE bool all_visible(int i_begin, int i_end, int j_begin, int j_end) const {
    return j_end <= row_end(i_begin) && j_begin >= row_begin(i_end - 1);
  }
};

// Calls f(reg) for every element of an accumulator, its element (0, 0) being (query, key), that the mask hides.
template <class Accumulator, class IntRows, class F>
FA_DEVICE void for_each_hidden(const Mask& mask, int query, int key, F&& f) {
  const int first_begin = unhoisted(query + mask.shift - mask.left - key);
  const int first_end = unhoisted(query + mask.shift + mask.right + 1 - key), last_end = mask.len_k - key;
  IntRows begin, count;
  IntRows::for_each([&](int slot, int row, bool) {
    begin[slot] = mask.left < 0 ? -key : first_begin + row;
    const int end = mask.right < 0 ? last_end : min_int(last_end, first_end + row);
    count[slot] = max_int(0, end - begin[slot]);
  });
  Accumulator::for_each([&](int slot, int, int col, int reg) {
    if (uint32_t(col - begin[slot]) >= uint32_t(count[slot])) f(reg);  // one comparison for both ends
  });
}

// One block of a launch in which `items` blocks belong to each of heads * batch heads: which item of which head. Heads
// are taken one after the other, or in groups; within a group, item 0 of every head comes first.
struct HeadItem {
  int item, head, batch;

  HeadItem() = default;
  FA_DEVICE HeadItem(uint32_t block, uint32_t items, uint32_t heads)
      : item(int(block % items)), head(int(block / items % heads)), batch(int(block / items / heads)) {}

  FA_DEVICE HeadItem(uint32_t block, uint32_t items, uint32_t heads, uint32_t batches, uint32_t head_group) {
    const uint32_t group = block / (items * head_group);  // 32-bit divisions: a launch has fewer than 2^31 blocks
    const uint32_t first = group * head_group, within = block - first * items;
    const uint32_t size = head_group < heads * batches - first ? head_group : heads * batches - first;
    item = int(within / size);
    const uint32_t flat = first + within % size;
    head = int(flat % heads);
    batch = int(flat / heads);
  }
};

// One query a sequence: the heads that share a KV head become the rows of one, and a block reads their keys once. A
// row's bits do not depend on the rows beside it.
inline void make_rows_of_heads(ForwardParams& p) {
  const int group = p.heads_q / p.heads_kv;
  const bool sees_all = p.window_left < 0 || p.window_left >= p.seqlen_k;
  const bool alike = p.alibi_slopes == nullptr && p.dropout_p == 0 && p.s_dmask == nullptr;
  if (p.seqlen_q != 1 || group == 1 || p.cu_seqlens_q != nullptr || p.lse.head_stride != 1 || !sees_all || !alike) {
    return;
  }
  for (TensorRef* rows : {&p.q, &p.out}) {
    rows->row_stride = rows->head_stride;
    rows->head_stride *= group;
  }
  p.lse.head_stride = group;
  p.heads_q = p.heads_kv;
  p.seqlen_q = group;
  p.total_q *= group;
  p.window_left = p.window_right = -1;
  p.rows_are_heads = true;
}

// A block of the forward: which query rows of which head, and which share of their keys.
template <int BLOCK_M>
struct ForwardWork {
  int query_begin, split, head, batch;

  static FA_HOST_DEVICE int64_t blocks(const ForwardParams& p) {
    return int64_t(ceil_div(p.seqlen_q, BLOCK_M)) * p.num_splits * p.heads_q * p.batch;
  }

  // Where every sequence has `query_blocks`.
  static FA_DEVICE HeadItem item_of(const ForwardParams& p, uint32_t block, uint32_t query_blocks) {
    return HeadItem(block, query_blocks * p.num_splits, p.heads_q, p.batch, p.head_group);
  }

  FA_DEVICE ForwardWork(int query_begin, int split, int head, int batch)
      : query_begin(query_begin), split(split), head(head), batch(batch) {}
  FA_DEVICE ForwardWork(const ForwardParams& p, uint32_t block)
      : ForwardWork(p, ceil_div(p.seqlen_q, BLOCK_M), item_of(p, block, ceil_div(p.seqlen_q, BLOCK_M)), BLOCK_M) {}
  // Of a sequence of `query_blocks`, of `rows` each. The longest blocks of a causal mask come first, so that the short
  // ones fill the gaps at the end.
  FA_DEVICE ForwardWork(const ForwardParams& p, uint32_t query_blocks, const HeadItem& item, int rows) {
    const int query_block = p.num_splits == 1 ? item.item : int(item.item % query_blocks);
    query_begin = (p.window_right >= 0 ? int(query_blocks) - 1 - query_block : query_block) * rows;
    split = p.num_splits == 1 ? 0 : int(item.item / query_blocks);
    head = item.head;
    batch = item.batch;
  }
};

// Whether a block's rows may have several chunks, which it folds as it goes; it then has a stash.
FA_HOST_DEVICE bool may_fold(const ForwardParams& p) {
  return p.split_size > 0 && p.num_splits == 1 && p.seqlen_k > p.split_size;
}

// Whether a head's blocks may differ in the keys they see, and so in length.
FA_HOST_DEVICE bool blocks_differ(const AttentionParams& p) {
  return p.window_left >= 0 || p.window_right >= 0 || p.cu_seqlens_q != nullptr || p.seqused_k != nullptr;
}

// Keys [begin, end) that the queries [query_begin, query_end) see of a split; begin is a multiple of block_n.
struct VisibleKeys {
  int begin, end;

  FA_DEVICE VisibleKeys(const ForwardParams& p, const Mask& mask, int split, int query_begin, int query_end,
                        int block_n)
      : begin(mask.keys_begin(query_begin) / block_n * block_n),
        end(mask.keys_end(min_int(query_end, mask.len_q))) {
    if (p.num_splits > 1) {
      begin = max_int(begin, split * p.split_size);
      if (end > int64_t(split + 1) * p.split_size) end = (split + 1) * p.split_size;
    }
  }
};

// A block of the backward: which keys of which KV head. Under determinism blocks are numbered from the last keys down.
template <int BLOCK_N>
struct BackwardWork {
  int key_begin, kv_head, batch;

  BackwardWork() = default;
  FA_DEVICE BackwardWork(const BackwardParams& p, uint32_t block)
      : BackwardWork(p, ceil_div(p.seqlen_k, BLOCK_N),
                     HeadItem(block, ceil_div(p.seqlen_k, BLOCK_N), p.heads_kv, p.batch, p.head_group)) {}
  // Of a sequence of `key_blocks`.
  FA_DEVICE BackwardWork(const BackwardParams& p, int key_blocks, const HeadItem& item) {
    key_begin = (p.deterministic ? key_blocks - 1 - item.item : item.item) * BLOCK_N;
    kv_head = item.head;
    batch = item.batch;
  }
};

// The query blocks that such a block visits for each of its heads.
template <int BLOCK_M, int BLOCK_N>
struct QueryWalk {
  int begin, steps;  // begin: a row, a multiple of BLOCK_M

  FA_DEVICE QueryWalk(const Mask& mask, int key_begin) {
    const int key_end = min_int(key_begin + BLOCK_N, mask.len_k);
    begin = mask.queries_begin(key_begin) / BLOCK_M * BLOCK_M;
    steps = key_begin >= key_end ? 0 : max_int(0, ceil_div(mask.queries_end(key_end) - begin, BLOCK_M));
  }
  FA_DEVICE int query(int step) const { return begin + step * BLOCK_M; }

  // How many blocks add to a query block's dQ before this one: those with later keys that the queries see.
  static FA_DEVICE int blocks_before(const Mask& mask, int key_begin, int query) {
    const int last = (mask.keys_end(min_int(query + BLOCK_M, mask.len_q)) - 1) / BLOCK_N;
    return last - key_begin / BLOCK_N;
  }
};

// Query blocks of a sequence inside per-head workspace that is laid out block by block. Sequences of a packed batch
// start at floor((first_q + batch * block) / block), which leaves every one room without knowing the others' lengths.
FA_HOST_DEVICE int64_t first_query_block(const AttentionParams& p, int batch, int64_t first_q, int block_m) {
  if (p.cu_seqlens_q == nullptr) return int64_t(batch) * ceil_div(p.seqlen_q, block_m);
  return (first_q + int64_t(batch) * block_m) / block_m;
}

// Query blocks per head in that workspace.
FA_HOST_DEVICE int64_t query_blocks(const AttentionParams& p, int block_m) {
  if (p.cu_seqlens_q == nullptr) return int64_t(p.batch) * ceil_div(p.seqlen_q, block_m);
  return (int64_t(p.total_q) + int64_t(p.batch) * block_m) / block_m;
}

// The place there of the block that query `query` of a sequence begins, among those of all heads.
template <class Index>
FA_DEVICE Index place_of_queries(const AttentionParams& p, int batch, int head, int64_t first_q, int query,
                                 int block_m) {
  return head * Index(query_blocks(p, block_m)) + Index(first_query_block(p, batch, first_q, block_m)) +
         query / block_m;
}

}  // namespace flash_attn
