// The vocabulary the kernels are written in. A kernel sees one *block* of cooperating lanes (a GPU thread block, or
// one host thread) and says what happens to whole tiles; an Arch supplies these types and functions.
//
//   Arch::Tuning<Kernel, T, D, MODIFIED>   kBlockM, kBlockN, kWarps ... of a kernel family (data, in the arch's
//   tuning.cuh;
//                                     kBlockM and the fragments of the backward must not depend on MODIFIED)
//   using A = Arch::Block<WARPS>      everything below; kThreads lanes cooperate, all calls are made by all lanes
//
//   A::Tile<T, ROWS, COLS, USES>      block-shared memory, row-major in meaning, laid out as the uses need
//       kBytes, Tile(char* shared)
//       load(const T* src, int64_t row_stride, int rows, int cols, bool aligned)
//                                     starts filling from device memory; rows beyond `rows` and columns beyond `cols`
//                                     become zero and are never read. Complete after commit(), wait<N>(), land(),
//                                     sync().
//       load(const PagedRows<T>&, int rows, int cols, bool aligned)
//                                     the same of rows in pages (tile/pages.cuh), where A::kFindsRows; else a tile is
//                                     loaded from one page alone
//       land()                        second half of a load, for machines that load through registers: there
//                                     (A::kLoadsThroughRegisters) the tile may be read until then, and the object
//                                     carries the load
//       put(const Accumulator&)       narrows an accumulator of the same shape into the tile (sync() before reading)
//       write(T* dst, int64_t row_stride, int rows, int cols, bool aligned)   tile to device memory
//   A::commit(), A::wait<PENDING>()   close a group of loads; wait until at most PENDING groups are in flight
//   A::sync()                         barrier over the block's lanes
//
//   A::Accumulator<Scalar, M, N, WARPS_M>   a block-wide M x N matrix, spread over the lanes' registers; WARPS_M warps
//                                     along M, the others along N. Elements a lane owns are numbered by `reg`,
//                                     the rows it touches by `slot` (slots depend on M and WARPS_M only).
//       fill(x), Scalar& operator[](int reg)
//       static for_each(f(slot, row, col, reg))         every element the lane owns
//       static for_each_patch(f(row, col, const int (&reg)[8]))
//                                     the same in groups that share one random number (attention/dropout.cuh): element
//                                     e of the patch seen from (row, col) is (row ^ 8 * (e / 4),
//                                     col ^ (8 * (e / 2 % 2) + e % 2)), whichever of its eight (row, col) is; a reg of
//                                     -1 is an element that this lane does not own
//       max_rows(Rows&)               rows[slot] = max(rows[slot], row), complete in every lane; NaN is passed over
//       sum_rows(Rows&)               rows[slot] += the lane's part of the row's sum
//   A::Rows<Scalar, M, WARPS_M>       one value per row, replicated over the lanes that share it; Scalar may be int
//       kSlots, fill(x), Scalar& operator[](int slot)
//       static for_each(f(slot, row, bool owner))       owner: true in exactly one lane for each row
//       read(const Scalar* src, int count, Scalar beyond)   rows[slot] = src[row]; from row `count` on `beyond`, unread
//       finish_sum()                  completes sums started with sum_rows
//   A::Operand<T, M, K, WARPS_M>      an accumulator narrowed to T, as a left factor in registers
//       Operand(const Accumulator&)
//   A::multiply_nt(c, a, b)           c[m][n] += sum_k a[m][k] b[n][k]       a: Tile kMK             b: Tile kNK
//   A::multiply_nn(c, a, b)           c[m][n] += sum_k a[m][k] b[k][n]       a: Tile kMK or Operand  b: Tile kKN
//   A::multiply_tn(c, a, b)           c[m][n] += sum_k a[k][m] b[k][n]       a: Tile kKM             b: Tile kKN
//                                     k runs upward in one fixed order, for every position of a row in the tile
//
//   A::Stash<Accumulator>             a second accumulator kept out of the way (kBytes of block-shared memory)
//       Stash(char* shared), clear(), fold(acc, Rows keep, Rows add): stash = fma(acc, add, stash * keep)
//       take(acc): acc = stash
//   A::accumulate(acc, Scalar* dst)   dst[i] += acc, M * N values in the arch's own fragment order; atomic
//   A::restore(acc, const Scalar* src)                the inverse: acc = src
//   A::dot_rows<T, ROWS, D>(a, a_stride, b, b_stride, rows, cols, aligned, f(row, Scalar sum))   f: one lane per row;
//                                     a as products take it, so that dO is the same to delta and to dP
//   A::peek_turn(const int32_t* turn), A::wait_turn(int32_t* turn, int value, int peeked), A::pass_turn(int32_t* turn)
//                                     blocks take turns: wait until *turn == value, unless it was so when
//                                     peek_turn read it a while ago, off the critical path; make the block's
//                                     device-memory writes visible, then ++*turn. Both include the barriers they need.
#pragma once

namespace flash_attn {

// How a tile takes part in multiplications: named after how it is stored, reduction dimension k.
enum Use : unsigned {
  kMK = 1,   // left factor, rows m
  kNK = 2,   // right factor, rows n
  kKM = 4,   // left factor, rows k
  kKN = 8,   // right factor, rows k
  kStaging = 16,  // only put() and write()
};

enum class Kernel { kForward, kBackward };

// What a kernel is compiled for. MODIFIED: softcap, ALiBi, dropout, s_dmask or a scale that is not positive.
template <class T, int HEAD_DIM, bool MODIFIED>
struct Problem {
  using Element = T;
  static constexpr int kHeadDim = HEAD_DIM;  // padded up to a compiled size
  static constexpr bool kModified = MODIFIED;
};

}  // namespace flash_attn
