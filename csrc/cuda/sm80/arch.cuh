// Arch for Ampere and every later NVIDIA GPU without main loops of its own: mma.sync, ldmatrix, cp.async.
// The vocabulary is described in tile/tile.cuh.
#pragma once

#include "../tile/tile.cuh"
#include "multiply.cuh"
#include "tuning.cuh"

namespace flash_attn {

struct Sm80 {
  template <Kernel KERNEL, class T, int D, bool MODIFIED>
  using Tuning = sm80::Tuning<KERNEL, T, D, MODIFIED>;

  template <int WARPS>
  struct Block {
    static constexpr int kThreads = WARPS * 32;
    static constexpr bool kLoadsThroughRegisters = false, kFindsRows = true;

    template <class T, int ROWS, int COLS, unsigned USES>
    using Tile = sm80::Tile<T, ROWS, COLS, kThreads>;  // ldmatrix serves every use from one layout
    template <class Scalar, int M, int N, int WARPS_M>
    using Accumulator = sm80::Accumulator<Scalar, M, N, WARPS_M, WARPS>;
    template <class Scalar, int M, int WARPS_M>
    using Rows = sm80::Rows<Scalar, M, WARPS_M>;
    template <class T, int M, int K, int WARPS_M>
    using Operand = sm80::Operand<T, M, K, WARPS_M>;

    static FA_DEVICE int lane() { return int(threadIdx.x); }
    static FA_DEVICE void sync() { __syncthreads(); }
    static FA_DEVICE void commit() { sm80::commit_copies(); }
    template <int PENDING>
    static FA_DEVICE void wait() {
      sm80::wait_copies<PENDING>();
    }

    template <class C, class TileA, class TileB>
    static FA_DEVICE void multiply_nt(C& c, const TileA& a, const TileB& b) {
      sm80::multiply_nt(c, a, b);
    }
    template <class C, class Left, class TileB>
    static FA_DEVICE void multiply_nn(C& c, const Left& a, const TileB& b) {
      sm80::multiply_nn(c, a, b);
    }
    template <class C, class TileA, class TileB>
    static FA_DEVICE void multiply_tn(C& c, const TileA& a, const TileB& b) {
      sm80::multiply_tn(c, a, b);
    }

    // In shared memory: registers are full.
    template <class C>
    struct Stash {
      static constexpr int kBytes = C::M * C::N * 4;
      float* const mine;

      explicit FA_DEVICE Stash(char* shared) : mine(reinterpret_cast<float*>(shared) + threadIdx.x) {}
      FA_DEVICE void clear() {
        FA_UNROLL
        for (int reg = 0; reg < C::kRegs; ++reg) mine[reg * kThreads] = 0;
      }
      template <class R>
      FA_DEVICE void fold(const C& c, R& keep, R& add) {
        C::for_each([&](int slot, int, int, int reg) {
          mine[reg * kThreads] = fma_rn(c[reg], add[slot], mine[reg * kThreads] * keep[slot]);
        });
      }
      FA_DEVICE void take(C& c) const {
        FA_UNROLL
        for (int reg = 0; reg < C::kRegs; ++reg) c[reg] = mine[reg * kThreads];
      }
    };

    // Fragment order: register groups of one reduction instruction, neighbouring threads side by side.
    template <class C>
    static FA_DEVICE void accumulate(const C& c, float* dst) {
      FA_UNROLL
      for (int reg = 0; reg < C::kRegs; reg += sm80::kReduceVector) {
        sm80::reduce_add(dst + reg * kThreads + int(threadIdx.x) * sm80::kReduceVector, c.value + reg);
      }
    }
    template <class C>
    static FA_DEVICE void restore(C& c, const float* src) {
      FA_UNROLL
      for (int reg = 0; reg < C::kRegs; reg += sm80::kReduceVector) {
        sm80::load_global(c.value + reg, src + reg * kThreads + int(threadIdx.x) * sm80::kReduceVector);
      }
    }

    // Eight lanes share a row, each taking every eighth 16-byte chunk.
    template <class T, int ROWS, int D, class F>
    static FA_DEVICE void dot_rows(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int rows, int cols,
                                   bool aligned, F&& f) {
      constexpr int kPerChunk = 16 / int(sizeof(T));
      struct alignas(16) Chunk {
        T element[kPerChunk];
      };
      constexpr int kAtOnce = kThreads / 8, kSteps = (ROWS + kAtOnce - 1) / kAtOnce;
      const int part = lane() % 8, first = lane() / 8;
      float sums[kSteps];  // of all rows, so that no store separates the loads
      FA_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        const int row = first + step * kAtOnce;
        float sum = 0;
        if (row < rows) {
          FA_UNROLL
          for (int col = part * kPerChunk; col < D; col += 8 * kPerChunk) {
            if (col >= cols) break;
            const T *x = a + row * a_stride + col, *y = b + row * b_stride + col;
            Chunk xs, ys;
            if (aligned && col + kPerChunk <= cols) {
              xs = *reinterpret_cast<const Chunk*>(x);
              ys = *reinterpret_cast<const Chunk*>(y);
            } else {
              FA_UNROLL
              for (int i = 0; i < kPerChunk; ++i) {
                xs.element[i] = col + i < cols ? x[i] : T{};
                ys.element[i] = col + i < cols ? y[i] : T{};
              }
            }
            FA_UNROLL
            for (int i = 0; i < kPerChunk; ++i) sum = fma_rn(widen(xs.element[i]), widen(ys.element[i]), sum);
          }
        }
        sums[step] = sum;
      }
      FA_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        const int row = first + step * kAtOnce;
        float sum = sums[step];
        FA_UNROLL
        for (int distance = 1; distance < 8; distance *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (part == 0 && row < rows) f(row, sum);
      }
    }

    static FA_DEVICE int peek_turn(const int32_t* turn) { return threadIdx.x == 0 ? sm80::load_acquire(turn) : 0; }
    static FA_DEVICE void wait_turn(int32_t* turn, int value, int peeked) {
      if (threadIdx.x == 0) {
        while (peeked != value) peeked = sm80::load_acquire(turn);
      }
      __syncthreads();
    }
    static FA_DEVICE void pass_turn(int32_t* turn) {
      __syncthreads();  // the release below is cumulative: it covers what the other threads wrote before the barrier
      if (threadIdx.x == 0) sm80::add_release(turn, 1);
    }
  };
};

}  // namespace flash_attn
