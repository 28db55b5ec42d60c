// The gfx90a (MI200) Arch: what csrc/cuda/tile/tile.cuh asks for.
//
// Products are computed with their factors swapped where that makes a lane own a row (accumulator.cuh). Of the two
// factors of every product one lies in registers for the whole kernel or comes straight from an accumulator, and one is
// read from LDS, 16 bytes a lane.
#pragma once

#include "accumulator.cuh"
#include "owned_tile.cuh"
#include "shared_tile.cuh"
#include "tuning.cuh"

namespace flash_attn {

struct Gfx90a {
  template <Kernel KERNEL, class T, int D, bool MODIFIED>
  using Tuning = gfx90a::Tuning<KERNEL, T, D, MODIFIED>;

  template <int WARPS>
  struct Block;
};

namespace gfx90a {

// Which of the tiles suits the uses.
template <class T, int WARPS, int ROWS, int COLS, unsigned USES>
struct TileFor {
  static constexpr bool kOwned = USES == (kMK | kStaging) || USES == (kNK | kStaging) || USES == (kNK | kKN | kStaging);
  static constexpr bool kProduct = USES == kKM || USES == (kKM | kMK);
  using Type = std::conditional_t<
      kOwned, OwnedTile<T, WARPS, ROWS, COLS, USES>,
      std::conditional_t<kProduct, ProductTile<T, WARPS, ROWS, COLS, USES>, SharedTile<T, WARPS, ROWS, COLS, USES>>>;
};

// One matrix instruction's worth of tile (m, n).
template <class T, class C>
FA_DEVICE void multiply_tile(C& c, int m, int n, const Quad<T>& left, const Quad<T>& right) {
  if constexpr (C::kLaneOwnsRow) {
    matrix_step<T, C::kTile>(right, left, c.tiles[m][n]);
  } else {
    matrix_step<T, C::kTile>(left, right, c.tiles[m][n]);
  }
}

// k along both factors' rows in chunks: left(m, g) and right(n, g) give chunk g of a row.
template <class T, int K, class C, class Left, class Right>
FA_DEVICE void multiply_chunks(C& c, Left&& left, Right&& right) {
  constexpr int kChunks = K / kChunkElements<T> / C::S::kGroups;
  FA_UNROLL
  for (int g = 0; g < kChunks; ++g) {
    Chunk<T> a[C::kTilesM], b[C::kTilesN];
    FA_UNROLL
    for (int m = 0; m < C::kTilesM; ++m) a[m] = left(m, g);
    FA_UNROLL
    for (int n = 0; n < C::kTilesN; ++n) b[n] = right(n, g);
    FA_UNROLL
    for (int q = 0; q < kQuadsOfChunk<T>; ++q) {
      FA_UNROLL
      for (int m = 0; m < C::kTilesM; ++m) {
        FA_UNROLL
        for (int n = 0; n < C::kTilesN; ++n) multiply_tile<T>(c, m, n, quad_of<T>(a[m], q), quad_of<T>(b[n], q));
      }
    }
  }
}

// k in the order in which an accumulator holds it: left(m, step) gives a quad, the right factor is in LDS.
template <class T, int K, class C, class Left, class Right>
FA_DEVICE void multiply_products(C& c, Left&& left, const Right& right) {
  constexpr int kQuads = Right::kColumnQuads, kAccesses = K / C::S::kStep / kQuads;
  constexpr int kTogether = C::kTilesN % 4 == 0 ? 4 : C::kTilesN % 3 == 0 ? 3 : 2;  // tiles: 16 registers of operands
  static_assert(C::kTilesN % kTogether == 0 || C::kTilesN == 1);
  const int lane_part = unhoisted(Right::template column_lane_part<C::kTile>());
  FA_UNROLL
  for (int access = 0; access < kAccesses; ++access) {
    FA_UNROLL
    for (int first = 0; first < C::kTilesN; first += kTogether) {
      constexpr int kTiles = C::kTilesN < kTogether ? C::kTilesN : kTogether;
      Quad<T> b[kTiles][kQuads];
      FA_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        right.template column_quads<C::kTile>(lane_part, C::first_col() + (first + n) * C::kTile, access, b[n]);
      }
      FA_UNROLL
      for (int q = 0; q < kQuads; ++q) {
        const int step = Right::template column_step<C::kTile>(access, q);
        FA_UNROLL
        for (int m = 0; m < C::kTilesM; ++m) {
          FA_UNROLL
          for (int n = 0; n < kTiles; ++n) multiply_tile<T>(c, m, first + n, left(m, step), b[n][q]);
        }
      }
    }
  }
}

}  // namespace gfx90a

template <int WARPS>
struct Gfx90a::Block {
  static constexpr int kThreads = WARPS * gfx90a::kLanes;
  // A load may be started while the tile is still being read: it arrives in registers and reaches the tile in land().
  static constexpr bool kLoadsThroughRegisters = true;
  static constexpr bool kFindsRows = false;  // the registers that hold where they lie are not there

  template <class T, int ROWS, int COLS, unsigned USES>
  using Tile = typename gfx90a::TileFor<T, WARPS, ROWS, COLS, USES>::Type;
  template <class Scalar, int M, int N, int WARPS_M>
  using Accumulator = gfx90a::Accumulator<Scalar, WARPS, M, N, WARPS_M>;
  template <class Scalar, int M, int WARPS_M>
  using Rows = gfx90a::Rows<Scalar, WARPS, M, WARPS_M>;
  template <class T, int M, int K, int WARPS_M>
  using Operand = gfx90a::Operand<T, WARPS, M, K, WARPS_M>;
  template <class Source>
  using Stash = gfx90a::Stash<Source>;

  static FA_DEVICE int lane() { return int(threadIdx.x); }
  static FA_DEVICE void sync() { __syncthreads(); }
  static FA_DEVICE void commit() {}
  template <int PENDING>
  static FA_DEVICE void wait() {}

  // Q (owned) times K in LDS.
  template <class C, class T, int M, int N, int K, unsigned USES_A, unsigned USES_B>
  static FA_DEVICE void multiply_nt(C& c, const gfx90a::OwnedTile<T, WARPS, M, K, USES_A>& a,
                                    const gfx90a::SharedTile<T, WARPS, N, K, USES_B>& b) {
    static_assert(C::kM == M && C::kN == N && C::kWarpsM == WARPS);
    const int lane_part = unhoisted(b.template row_lane_part<C::kTile>());
    gfx90a::multiply_chunks<T, K>(
        c, [&](int m, int g) { return a.template row_chunk<C::kTile>(m, g); },
        [&](int n, int g) { return b.template row_chunk<C::kTile>(lane_part, C::first_col() + n * C::kTile, g); });
  }

  // Q or dO in LDS times K or V (owned).
  template <class C, class T, int M, int N, int K, unsigned USES_A, unsigned USES_B>
  static FA_DEVICE void multiply_nt(C& c, const gfx90a::SharedTile<T, WARPS, M, K, USES_A>& a,
                                    const gfx90a::OwnedTile<T, WARPS, N, K, USES_B>& b) {
    static_assert(C::kM == M && C::kN == N && C::kWarpsN == WARPS);
    // What follows the second of two products is not begun, and waited for, before the first.
    __builtin_amdgcn_sched_barrier(0);
    const int lane_part = unhoisted(a.template row_lane_part<C::kTile>());
    gfx90a::multiply_chunks<T, K>(
        c, [&](int m, int g) { return a.template row_chunk<C::kTile>(lane_part, C::first_row() + m * C::kTile, g); },
        [&](int n, int g) { return b.template row_chunk<C::kTile>(n, g); });
  }

  // P times V in LDS.
  template <class C, class T, int M, int N, int K, int WARPS_M, unsigned USES_B>
  static FA_DEVICE void multiply_nn(C& c, const gfx90a::Operand<T, WARPS, M, K, WARPS_M>& a,
                                    const gfx90a::SharedTile<T, WARPS, K, N, USES_B>& b) {
    static_assert(C::kM == M && C::kN == N && C::kWarpsM == WARPS_M);
    gfx90a::multiply_products<T, K>(c, [&](int m, int step) { return a.quad(m, step); }, b);
  }

  // dS through LDS times K (owned).
  template <class C, class T, int M, int N, int K, unsigned USES_A, unsigned USES_B>
  static FA_DEVICE void multiply_nn(C& c, const gfx90a::ProductTile<T, WARPS, M, K, USES_A>& a,
                                    const gfx90a::OwnedTile<T, WARPS, K, N, USES_B>& b) {
    static_assert(C::kM == M && C::kN == N && C::kWarpsN == gfx90a::OwnedTile<T, WARPS, K, N, USES_B>::kColumnWaves);
    const auto& shared = a.shared();
    const int lane_part = unhoisted(shared.template row_lane_part<C::kTile>());
    gfx90a::multiply_chunks<T, K>(
        c,
        [&](int m, int g) { return shared.template row_chunk<C::kTile>(lane_part, C::first_row() + m * C::kTile, g); },
        [&](int n, int g) { return b.template column_chunk<C::kTile>(n, g); });
  }

  // P or dS from the lanes' own registers times dO or Q in LDS.
  template <class C, class T, int M, int N, int K, unsigned USES_A, unsigned USES_B>
  static FA_DEVICE void multiply_tn(C& c, const gfx90a::ProductTile<T, WARPS, K, M, USES_A>& a,
                                    const gfx90a::SharedTile<T, WARPS, K, N, USES_B>& b) {
    static_assert(C::kM == M && C::kN == N && C::kWarpsM == WARPS);
    gfx90a::multiply_products<T, K>(c, [&](int m, int step) { return a.quad(m, step); }, b);
  }

  template <class C>
  static FA_DEVICE void accumulate(const C& c, float* dst) {
    constexpr int kRegBytes = kThreads * int(sizeof(float));
    const gfx90a::Buffer buffer(dst, C::kRegs * kRegBytes);
    const int at = unhoisted(lane() * int(sizeof(float)));
    FA_UNROLL
    for (int reg = 0; reg < C::kRegs; ++reg) {
      buffer.add(at + reg % 4 * kRegBytes, reg / 4 * 4 * kRegBytes, c[reg]);
    }
  }
  template <class C>
  static FA_DEVICE void restore(C& c, const float* src) {
    FA_UNROLL
    for (int reg = 0; reg < C::kRegs; ++reg) c[reg] = src[reg * kThreads + lane()];
  }

  // Eight lanes share a row, each its chunks in ascending order.
  template <class T, int ROWS, int D, class F>
  static FA_DEVICE void dot_rows(const StoredOf<T>* a, int64_t a_stride, const StoredOf<T>* b, int64_t b_stride,
                                 int rows, int cols, bool aligned, F&& f) {
    using Stored = StoredOf<T>;
    constexpr int kLanesOfRow = 8, kElements = gfx90a::kChunkElements<T>, kRowsAtOnce = kThreads / kLanesOfRow;
    static_assert(ROWS % kRowsAtOnce == 0);
    const gfx90a::MemoryRows<Stored> a_rows(a, a_stride, rows, cols), b_rows(b, b_stride, rows, cols);
    for (int first = 0; first < ROWS; first += kRowsAtOnce) {
      const int row = first + lane() / kLanesOfRow;
      float sum = 0;
      for (int col = lane() % kLanesOfRow * kElements; col < D; col += kLanesOfRow * kElements) {
        gfx90a::with_constant(aligned, [&](auto is_aligned) {
          const auto x = gfx90a::factors_of<T>(a_rows.template read<is_aligned>(0, row, col));
          const auto y = b_rows.template read<is_aligned>(0, row, col);
          FA_UNROLL
          for (int i = 0; i < kElements; ++i) {
            sum = fma_rn(gfx90a::widen_bits<FactorOf<T>>(x[i]), gfx90a::widen_bits<Stored>(y[i]), sum);
          }
        });
      }
      FA_UNROLL
      for (int mask = 1; mask < kLanesOfRow; mask *= 2) sum += gfx90a::exchange(sum, mask);
      if (lane() % kLanesOfRow == 0 && row < rows) f(row, sum);
    }
  }

  static FA_DEVICE int peek_turn(const int32_t* turn) {
    return lane() == 0 ? __hip_atomic_load(turn, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT) : 0;
  }
  static FA_DEVICE void wait_turn(int32_t* turn, int value, int peeked) {
    if (lane() == 0 && peeked != value) {
      while (__hip_atomic_load(turn, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT) != value) __builtin_amdgcn_s_sleep(1);
    }
    sync();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent");
  }
  static FA_DEVICE void pass_turn(int32_t* turn) {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");  // every wave waits for its own additions
    sync();
    if (lane() == 0) __hip_atomic_fetch_add(turn, 1, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_AGENT);
  }
};

}  // namespace flash_attn
