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

// c += a b for one left fragment per m tile and one right fragment of two n tiles. `Sum` is what a block-wide multiply
// adds into, until finish().
template <class T>
struct Instruction {
  static constexpr int kStepK = 16;

  template <class C, bool PRECISE>
  struct Sum {
    C& c;
    explicit FA_DEVICE Sum(C& c) : c(c) {}
    FA_DEVICE void finish() {}
  };

  template <class S, int M>
  static FA_DEVICE void multiply(S& sum, const uint32_t (&a)[M][4], const uint32_t (&b)[4], int pair) {
    FA_UNROLL
    for (int m = 0; m < M; ++m) {
      mma(T{}, sum.c.tile(m, 2 * pair), a[m], b[0], b[1]);
      mma(T{}, sum.c.tile(m, 2 * pair + 1), a[m], b[2], b[3]);
    }
  }
};

template <>
struct Instruction<float> {
  static constexpr int kStepK = 8;

  // Tensor cores add with truncation. So, as far as registers go, sums are kept short, scores (PRECISE, since they are
  // exponentiated) have their small products apart, and what a multiply gave is added with rounding to nearest.
  template <class C, bool PRECISE>
  struct Sum {
    static constexpr bool kShort = C::kRegs <= 64, kApart = PRECISE && C::kRegs <= 32;
    C& c;
    C short_sum, small_sum;

    explicit FA_DEVICE Sum(C& c) : c(c) {
      if (kShort) short_sum.fill(0);
      if (kApart) small_sum.fill(0);
    }
    FA_DEVICE C& large() { return kShort ? short_sum : c; }
    FA_DEVICE C& small() { return kApart ? small_sum : large(); }
    FA_DEVICE void finish() {
      FA_UNROLL
      for (int reg = 0; kShort && reg < C::kRegs; ++reg) {
        c[reg] += kApart ? short_sum[reg] + small_sum[reg] : short_sum[reg];
      }
    }
  };

  template <class S, int M>
  static FA_DEVICE void multiply(S& sum, const uint32_t (&a)[M][4], const uint32_t (&b)[4], int pair) {
    uint32_t b_hi[4], b_lo[4];
    split(b, b_hi, b_lo);
    FA_UNROLL
    for (int m = 0; m < M; ++m) {
      uint32_t a_hi[4], a_lo[4];
      split(a[m], a_hi, a_lo);
      FA_UNROLL
      for (int half = 0; half < 2; ++half) {
        float* small = sum.small().tile(m, 2 * pair + half);
        mma_tf32(small, a_lo, b_hi[2 * half], b_hi[2 * half + 1]);
        mma_tf32(small, a_hi, b_lo[2 * half], b_lo[2 * half + 1]);
        mma_tf32(sum.large().tile(m, 2 * pair + half), a_hi, b_hi[2 * half], b_hi[2 * half + 1]);
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

// All steps of K, each fragment loaded one multiply ahead of its use: load_a(fragment, m, step) and
// load_b(fragment, pair of n tiles, step). Loads and multiplies are volatile, so the order written is the order kept.
template <class T, int K, bool PRECISE = false, class C, class LoadA, class LoadB>
FA_DEVICE void multiply_pipelined(C& c, LoadA&& load_a, LoadB&& load_b) {
  constexpr int kSteps = K / Instruction<T>::kStepK, kPairs = C::kTilesN / 2;
  uint32_t a[2][C::kTilesM][4], b[2][4];
  typename Instruction<T>::template Sum<C, PRECISE> sum(c);
  FA_UNROLL
  for (int m = 0; m < C::kTilesM; ++m) load_a(a[0][m], m, 0);
  load_b(b[0], 0, 0);
  FA_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    FA_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      const int now = step * kPairs + pair;
      if (pair + 1 < kPairs) {
        load_b(b[(now + 1) % 2], pair + 1, step);
      } else if (step + 1 < kSteps) {
        load_b(b[(now + 1) % 2], 0, step + 1);
      }
      if (pair == kPairs - 1 && step + 1 < kSteps) {
        FA_UNROLL
        for (int m = 0; m < C::kTilesM; ++m) load_a(a[(step + 1) % 2][m], m, step + 1);
      }
      Instruction<T>::multiply(sum, a[step % 2], b[now % 2], pair);
    }
  }
  sum.finish();
}

template <class T, class C, int M, int N, int K, int THREADS>
FA_DEVICE void multiply_nt(C& c, const Tile<T, M, K, THREADS>& a, const Tile<T, N, K, THREADS>& b) {
  multiply_pipelined<T, K, true>(
      c, [&](uint32_t(&f)[4], int m, int step) { a.load_mk(f, c.warp_row(), 16 * m, step); },
      [&](uint32_t(&f)[4], int pair, int step) { b.load_nk(f, c.warp_col(), 16 * pair, step); });
}

template <class T, class C, int M, int N, int K, int THREADS>
FA_DEVICE void multiply_nn(C& c, const Tile<T, M, K, THREADS>& a, const Tile<T, K, N, THREADS>& b) {
  multiply_pipelined<T, K>(
      c,
      [&](uint32_t(&f)[4], int m, int step) {
        if constexpr (std::is_same_v<T, float>) {
          a.load_mk_interleaved(f, c.warp_row(), 16 * m, step);
        } else {
          a.load_mk(f, c.warp_row(), 16 * m, step);
        }
      },
      [&](uint32_t(&f)[4], int pair, int step) { b.template load_kn<C::kWarpCols>(f, c.warp_col(), 16 * pair, step); });
}

template <class T, class C, int M, int N, int K, int WARPS, int THREADS>
FA_DEVICE void multiply_nn(C& c, const Operand<T, M, K, WARPS>& a, const Tile<T, K, N, THREADS>& b) {
  multiply_pipelined<T, K>(
      c, [&](uint32_t(&f)[4], int m, int step) { a.load(f, m, step); },
      [&](uint32_t(&f)[4], int pair, int step) { b.template load_kn<C::kWarpCols>(f, c.warp_col(), 16 * pair, step); });
}

template <class T, class C, int M, int N, int K, int THREADS>
FA_DEVICE void multiply_tn(C& c, const Tile<T, K, M, THREADS>& a, const Tile<T, K, N, THREADS>& b) {
  multiply_pipelined<T, K>(
      c, [&](uint32_t(&f)[4], int m, int step) { a.template load_km<C::kWarpRows>(f, c.warp_row(), 16 * m, step); },
      [&](uint32_t(&f)[4], int pair, int step) { b.template load_kn<C::kWarpCols>(f, c.warp_col(), 16 * pair, step); });
}

}  // namespace sm80
}  // namespace flash_attn
