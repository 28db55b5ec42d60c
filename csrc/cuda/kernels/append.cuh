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
    if (row.turns && col < 2 * p.rotary_pairs) turn(p, row, col, piece);
    *reinterpret_cast<Piece<COLS>*>(row.to + col) = piece;
  }

  // A row's elements from `col` on. A pair's elements are neighbours, or lie half the rotary dimension apart.
  template <int COLS>
  static FA_DEVICE void turn(const Params& p, const Row& row, int col, Piece<COLS>& piece) {
    const int pairs = p.rotary_pairs;
    if constexpr (COLS > 1) {
      const bool is_whole = (p.interleaved ? 2 * pairs : pairs) % COLS == 0;
      if (is_whole && table_is_aligned(p, p.rotary_cos, p.cos_stride) &&
          table_is_aligned(p, p.rotary_sin, p.sin_stride)) {
        return p.interleaved ? turn_neighbours(p, row, col, piece) : turn_halves(p, row, col, piece);
      }
    }
    FA_UNROLL
    for (int i = 0; i < COLS; ++i) {
      const int at = col + i;
      if (at >= 2 * pairs) break;
      const bool is_first = p.interleaved ? at % 2 == 0 : at < pairs;
      const int pair = p.interleaved ? at / 2 : is_first ? at : at - pairs;
      const int other = p.interleaved ? at ^ 1 : is_first ? at + pairs : pair;
      const Angles<1> angles(p, row, pair);
      piece.element[i] = turned(is_first, piece.element[i], row.from[other], angles.cos[0], angles.sin[0]);
    }
  }
  // With as few accesses as can be: tables of rows that allow 16-byte access, pieces that turn as a whole.
  template <int COLS>
  static FA_DEVICE void turn_neighbours(const Params& p, const Row& row, int col, Piece<COLS>& piece) {
    const Angles<COLS / 2> angles(p, row, col / 2);
    FA_UNROLL
    for (int i = 0; i < COLS / 2; ++i) {
      const T first = piece.element[2 * i], second = piece.element[2 * i + 1];
      piece.element[2 * i] = turned(true, first, second, angles.cos[i], angles.sin[i]);
      piece.element[2 * i + 1] = turned(false, second, first, angles.cos[i], angles.sin[i]);
    }
  }
  template <int COLS>
  static FA_DEVICE void turn_halves(const Params& p, const Row& row, int col, Piece<COLS>& piece) {
    const bool is_first = col < p.rotary_pairs;
    const int pair = is_first ? col : col - p.rotary_pairs, other = is_first ? col + p.rotary_pairs : pair;
    const Piece<COLS> others = *reinterpret_cast<const Piece<COLS>*>(row.from + other);
    const Angles<COLS> angles(p, row, pair);
    const auto turn_all = [&](bool first) {  // a loop each, rather than a choice for every element
      FA_UNROLL
      for (int i = 0; i < COLS; ++i) {
        piece.element[i] = turned(first, piece.element[i], others.element[i], angles.cos[i], angles.sin[i]);
      }
    };
    return is_first ? turn_all(true) : turn_all(false);
  }
  static FA_DEVICE T turned(bool is_first, T x, T other, Scalar cos, Scalar sin) {
    const Scalar mine = widen(x) * cos, others = widen(other) * sin;
    return narrow<T>(is_first ? mine - others : mine + others);
  }

  // Of a row's pairs from `pair` on.
  template <int COUNT>
  struct Angles {
    Scalar cos[COUNT], sin[COUNT];

    FA_DEVICE Angles(const Params& p, const Row& row, int pair) {
      // Queries may be more than the new keys, and then run past the tables.
      const int64_t position = max_int(0, min_int(row.position, p.rotary_positions - 1));
      const int64_t cos_at = position * p.cos_stride + pair, sin_at = position * p.sin_stride + pair;
      if (p.tables_are_accum) {
        read(static_cast<const Scalar*>(p.rotary_cos) + cos_at, cos);
        read(static_cast<const Scalar*>(p.rotary_sin) + sin_at, sin);
      } else {
        read(static_cast<const T*>(p.rotary_cos) + cos_at, cos);
        read(static_cast<const T*>(p.rotary_sin) + sin_at, sin);
      }
    }
    template <class Number>
    static FA_DEVICE void read(const Number* from, Scalar (&to)[COUNT]) {
      constexpr int kBytes = COUNT * int(sizeof(Number));
      struct alignas(kBytes < 16 ? kBytes : 16) Numbers {
        Number number[COUNT];
      };
      const Numbers numbers = *reinterpret_cast<const Numbers*>(from);
      FA_UNROLL
      for (int i = 0; i < COUNT; ++i) to[i] = widen(numbers.number[i]);
    }
  };
  static FA_DEVICE bool table_is_aligned(const Params& p, const void* table, int64_t stride) {
    const uint64_t bytes = p.tables_are_accum ? sizeof(Scalar) : sizeof(T);
    return (reinterpret_cast<uintptr_t>(table) | uint64_t(stride) * bytes) % 16 == 0;
  }
};

}  // namespace flash_attn
