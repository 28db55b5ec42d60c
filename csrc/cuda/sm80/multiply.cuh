// Block-wide matrix multiplies over fragments: k ascends in steps of one instruction, for every output alike.
#pragma once

#include "tile.cuh"

namespace flash_attn {
namespace sm80 {

// x = hi + lo with hi and lo representable in tf32 (11 significant bits each), so that
// hi*hi' + hi*lo' + lo*hi' misses x*x' by about 2^-22 (Ootomo and Yokota, arXiv 2203.03341).
struct SplitFloat {
  uint32_t hi, lo;

  FA_DEVICE SplitFloat() {}
  explicit FA_DEVICE SplitFloat(uint32_t bits) {
    hi = (bits + 0x1000u) & 0xffffe000u;
    lo = float_to_bits(bits_to_float(bits) - bits_to_float(hi));
  }
};

template <class T>
struct Instruction {
  static constexpr int kStepK = 16;

  // One step: c[m][n] += a[m] b[n] for all tiles of the warp; load_a(fragment, m), load_b(fragment, pair of n tiles).
  template <class C, class LoadA, class LoadB>
  static FA_DEVICE void step(C& c, LoadA&& load_a, LoadB&& load_b) {
    uint32_t a[C::kTilesM][4];
    FA_UNROLL
    for (int m = 0; m < C::kTilesM; ++m) load_a(a[m], m);
    FA_UNROLL
    for (int pair = 0; pair < C::kTilesN / 2; ++pair) {
      uint32_t b[4];
      load_b(b, pair);
      FA_UNROLL
      for (int m = 0; m < C::kTilesM; ++m) {
        mma(T{}, c.tile(m, 2 * pair), a[m], b[0], b[1]);
        mma(T{}, c.tile(m, 2 * pair + 1), a[m], b[2], b[3]);
      }
    }
  }
};

template <>
struct Instruction<float> {
  static constexpr int kStepK = 8;

  template <class C, class LoadA, class LoadB>
  static FA_DEVICE void step(C& c, LoadA&& load_a, LoadB&& load_b) {
    uint32_t a_hi[C::kTilesM][4], a_lo[C::kTilesM][4];
    FA_UNROLL
    for (int m = 0; m < C::kTilesM; ++m) {
      uint32_t a[4];
      load_a(a, m);
      split(a, a_hi[m], a_lo[m]);
    }
    FA_UNROLL
    for (int pair = 0; pair < C::kTilesN / 2; ++pair) {
      uint32_t b[4], b_hi[4], b_lo[4];
      load_b(b, pair);
      split(b, b_hi, b_lo);
      FA_UNROLL
      for (int half = 0; half < 2; ++half) {
        FA_UNROLL
        for (int m = 0; m < C::kTilesM; ++m) {  // small terms first
          float* tile = c.tile(m, 2 * pair + half);
          mma_tf32(tile, a_lo[m], b_hi[2 * half], b_hi[2 * half + 1]);
          mma_tf32(tile, a_hi[m], b_lo[2 * half], b_lo[2 * half + 1]);
          mma_tf32(tile, a_hi[m], b_hi[2 * half], b_hi[2 * half + 1]);
        }
      }
    }
  }

 private:
  static FA_DEVICE void split(const uint32_t (&x)[4], uint32_t (&hi)[4], uint32_t (&lo)[4]) {
    FA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const SplitFloat s(x[i]);
      hi[i] = s.hi;
      lo[i] = s.lo;
    }
  }
};

template <class T, class C, int M, int N, int K, int THREADS>
FA_DEVICE void multiply_nt(C& c, const Tile<T, M, K, THREADS>& a, const Tile<T, N, K, THREADS>& b) {
  FA_UNROLL
  for (int step = 0; step < K / Instruction<T>::kStepK; ++step) {
    Instruction<T>::step(
        c, [&](uint32_t(&f)[4], int m) { a.load_mk(f, c.warp_row(), 16 * m, step); },
        [&](uint32_t(&f)[4], int pair) { b.load_nk(f, c.warp_col(), 16 * pair, step); });
  }
}

template <class T, class C, int M, int N, int K, int THREADS>
FA_DEVICE void multiply_nn(C& c, const Tile<T, M, K, THREADS>& a, const Tile<T, K, N, THREADS>& b) {
  FA_UNROLL
  for (int step = 0; step < K / Instruction<T>::kStepK; ++step) {
    Instruction<T>::step(
        c,
        [&](uint32_t(&f)[4], int m) {
          if constexpr (std::is_same_v<T, float>) {
            a.load_mk_interleaved(f, c.warp_row(), 16 * m, step);
          } else {
            a.load_mk(f, c.warp_row(), 16 * m, step);
          }
        },
        [&](uint32_t(&f)[4], int pair) { b.load_kn(f, c.warp_col(), 16 * pair, step); });
  }
}

template <class T, class C, int M, int N, int K, int WARPS, int THREADS>
FA_DEVICE void multiply_nn(C& c, const Operand<T, M, K, WARPS>& a, const Tile<T, K, N, THREADS>& b) {
  FA_UNROLL
  for (int step = 0; step < K / Instruction<T>::kStepK; ++step) {
    Instruction<T>::step(
        c, [&](uint32_t(&f)[4], int m) { a.load(f, m, step); },
        [&](uint32_t(&f)[4], int pair) { b.load_kn(f, c.warp_col(), 16 * pair, step); });
  }
}

template <class T, class C, int M, int N, int K, int THREADS>
FA_DEVICE void multiply_tn(C& c, const Tile<T, K, M, THREADS>& a, const Tile<T, K, N, THREADS>& b) {
  FA_UNROLL
  for (int step = 0; step < K / Instruction<T>::kStepK; ++step) {
    Instruction<T>::step(
        c, [&](uint32_t(&f)[4], int m) { a.load_km(f, c.warp_row(), 16 * m, step); },
        [&](uint32_t(&f)[4], int pair) { b.load_kn(f, c.warp_col(), 16 * pair, step); });
  }
}

}  // namespace sm80
}  // namespace flash_attn
