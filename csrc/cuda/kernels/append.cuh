// Append: writes new keys and values behind those that a cache holds. With rotary tables (arXiv 2104.09864) keys are
// rotated to their positions on the way, and queries into a tensor of their own.
#pragma once

#include "../attention/schedule.cuh"
#include "../tile/tile.cuh"

namespace flash_attn {

template <class Arch, class P>
struct Append {
  using Params = AppendParams;
  using T = typename P::Element;
  using Scalar = AccumOf<T>;
  static constexpr int kWarps = 4;
  using A = typename Arch::template Block<kWarps>;
  static constexpr int kThreads = A::kThreads, kMinBlocks = 1, kSharedBytes = 0, kStashBytes = 0;
  static constexpr int kBlockM = 1, kBlockN = 1;

  // Of one head: a thread moves as many neighbours at once as alignment allows.
  template <int COLS>
  struct alignas(COLS * sizeof(T)) Piece {
    T element[COLS];
  };
  static constexpr int kMostCols = 16 / int(sizeof(T));
  static FA_HOST_DEVICE int pieces(const Params& p) { return p.aligned ? p.head_dim / kMostCols : p.head_dim; }

  // Rows of heads: those of the queries to rotate, then the new keys', then the new values'.
  static FA_HOST_DEVICE int query_rows(const Params& p) {
    return p.rotated_q.data == nullptr ? 0 : p.batch * p.seqlen_q * p.heads_q;
  }
  static FA_HOST_DEVICE int key_rows(const Params& p) { return p.batch * p.seqlen_new * p.heads_kv; }
  static FA_HOST_DEVICE int rows(const Params& p) { return query_rows(p) + 2 * key_rows(p); }
  static FA_HOST_DEVICE int rows_at_once(const Params& p) { return max_int(1, kThreads / pieces(p)); }
  static int64_t blocks(const Params& p) { return max_int(1, ceil_div(rows(p), rows_at_once(p))); }

  static FA_DEVICE void run(const Params& p, int64_t block, char*) {
    if (block == 0) {
      for (int batch = A::lane(); batch < p.batch; batch += kThreads) {
        p.seqlens_after[batch] = p.seqlens[batch] + p.seqlen_new;
      }
    }
    const int first = int(block) * rows_at_once(p), end = min_int(rows(p), first + rows_at_once(p));
    for (int e = A::lane(); e < (end - first) * pieces(p); e += kThreads) {
      const Row row(p, first + e / pieces(p));
      if (row.to == nullptr) continue;
      const int piece = e % pieces(p);
      p.aligned ? move<kMostCols>(p, row, piece * kMostCols) : move<1>(p, row, piece);
    }
  }

  // Where a row comes from and goes to. `to` is null where the cache has no such place.
  struct Row {
    const T* from;
    T* to;
    int position;
    bool turns;

    FA_DEVICE Row(const Params& p, int row) {
      const bool is_query = row < query_rows(p);
      if (!is_query) row -= query_rows(p);
      const bool is_value = !is_query && row >= key_rows(p);
      if (is_value) row -= key_rows(p);
      const int heads = is_query ? p.heads_q : p.heads_kv, seqlen = is_query ? p.seqlen_q : p.seqlen_new;
      const int head = row % heads, step = row / heads % seqlen, batch = row / heads / seqlen;
      position = p.seqlens[batch] + (is_query && !p.queries_advance ? 0 : step);
      turns = p.rotary_pairs > 0 && !is_value;
      from = head_rows<const T>(is_query ? p.q : is_value ? p.v : p.k, batch, head, step);
      if (is_query) {
        to = head_rows<T>(p.rotated_q, batch, head, step);
        return;
      }
      to = nullptr;
      const int of_sequence = position / p.page_size;
      if (position < 0 || of_sequence >= p.pages_of_sequence) return;
      const int page = p.block_table == nullptr ? batch : p.block_table[batch * p.block_table_stride + of_sequence];
      if (page < 0 || page >= p.pages) return;
      to = head_rows<T>(is_value ? p.v_cache : p.k_cache, page, head, position % p.page_size);
    }
  };

  template <int COLS>
  static FA_DEVICE void move(const Params& p, const Row& row, int col) {
    Piece<COLS> piece = *reinterpret_cast<const Piece<COLS>*>(row.from + col);
    if (row.turns) {
      FA_UNROLL
      for (int i = 0; i < COLS; ++i) piece.element[i] = turned(p, row, col + i, piece.element[i]);
    }
    *reinterpret_cast<Piece<COLS>*>(row.to + col) = piece;
  }

  // x is the row's element `col`. A pair's elements are neighbours, or lie half the rotary dimension apart.
  static FA_DEVICE T turned(const Params& p, const Row& row, int col, T x) {
    if (col >= 2 * p.rotary_pairs) return x;
    const bool is_first = p.interleaved ? col % 2 == 0 : col < p.rotary_pairs;
    const int pair = p.interleaved ? col / 2 : is_first ? col : col - p.rotary_pairs;
    const int other = p.interleaved ? col ^ 1 : is_first ? col + p.rotary_pairs : pair;
    // Queries may be more than the new keys, and then run past the tables.
    const int position = max_int(0, min_int(row.position, p.rotary_positions - 1));
    const Scalar cos = of_table(p, p.rotary_cos, p.cos_stride, position, pair);
    const Scalar sin = of_table(p, p.rotary_sin, p.sin_stride, position, pair);
    const Scalar mine = widen(x) * cos, others = widen(row.from[other]) * sin;
    return narrow<T>(is_first ? mine - others : mine + others);
  }
  static FA_DEVICE Scalar of_table(const Params& p, const void* table, int64_t stride, int position, int pair) {
    const int64_t at = position * stride + pair;
    return p.tables_are_accum ? static_cast<const Scalar*>(table)[at] : widen(static_cast<const T*>(table)[at]);
  }
};

}  // namespace flash_attn
