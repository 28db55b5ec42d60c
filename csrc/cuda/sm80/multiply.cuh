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

// c += a b for one left fragment per m tile and one right fragment of two n tiles. `Sum` is what the multiplies of
// PAIRS pairs of n tiles, from c's pair FIRST on, add into, until finish().
template <class T>
struct Instruction {
  static constexpr int kStepK = 16;
  static constexpr int kMaxRegs = 1 << 30;  // of c that are summed at once

  template <class C, int FIRST, int PAIRS, bool PRECISE>
  struct Sum {
    C& c;
    explicit FA_DEVICE Sum(C& c) : c(c) {}
    FA_DEVICE void carry(int) {}
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
  static constexpr int kMaxRegs = 24;

  // Tensor cores add with truncation. So sums are kept short and then added with rounding to nearest; the forward's
  // (PRECISE) are the shortest, and have their small products apart.
  template <class C, int FIRST, int PAIRS, bool PRECISE>
  struct Sum {
    static constexpr int kRegs = C::kTilesM * PAIRS * 8, kCarrySteps = 4;
    C& c;
    float large[C::kTilesM][2 * PAIRS][4], small[PRECISE ? C::kTilesM : 1][2 * PAIRS][4];

    explicit FA_DEVICE Sum(C& c) : c(c) {
      clear(large);
      if (PRECISE) clear(small);
    }
    FA_DEVICE float* large_tile(int m, int n) { return large[m][n]; }
    FA_DEVICE float* small_tile(int m, int n) { return PRECISE ? small[m][n] : large[m][n]; }
    FA_DEVICE void carry(int step) {
      if (!PRECISE || step == 0 || step % kCarrySteps != 0) return;
      add(false);
      clear(large);
    }
    FA_DEVICE void finish() { add(PRECISE); }

   private:
    template <int M>
    static FA_DEVICE void clear(float (&sum)[M][2 * PAIRS][4]) {
      FA_UNROLL
      for (int i = 0; i < M * 2 * PAIRS * 4; ++i) (&sum[0][0][0])[i] = 0;
    }
    FA_DEVICE void add(bool with_small) {
      FA_UNROLL
      for (int i = 0; i < kRegs; ++i) {
        const int m = i / (8 * PAIRS), n = i / 4 % (2 * PAIRS), e = i % 4;
        c.tile(m, 2 * FIRST + n)[e] += with_small ? large[m][n][e] + small[m][n][e] : large[m][n][e];
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
        float* small = sum.small_tile(m, 2 * pair + half);
        mma_tf32(small, a_lo, b_hi[2 * half], b_hi[2 * half + 1]);
        mma_tf32(small, a_hi, b_lo[2 * half], b_lo[2 * half + 1]);
        mma_tf32(sum.large_tile(m, 2 * pair + half), a_hi, b_hi[2 * half], b_hi[2 * half + 1]);
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

// All steps of K for c's columns from pair FIRST on, as many as are summed at once, then the others. Each fragment is
// loaded one multiply ahead of its use: load_a(fragment, m, step) and load_b(fragment, pair of n tiles, step). Loads
// and multiplies are volatile, so the order written is the order kept.
template <class T, int K, bool PRECISE = false, int FIRST = 0, class C, class LoadA, class LoadB>
FA_DEVICE void multiply_pipelined(C& c, LoadA&& load_a, LoadB&& load_b) {
  constexpr int kSteps = K / Instruction<T>::kStepK, kAllPairs = C::kTilesN / 2;
  constexpr int kMost = Instruction<T>::kMaxRegs / (8 * C::kTilesM), kRest = kAllPairs - FIRST;
  constexpr int kPairs = kRest < kMost ? kRest : kMost;
  uint32_t a[2][C::kTilesM][4], b[2][4];
  typename Instruction<T>::template Sum<C, FIRST, kPairs, PRECISE> sum(c);
  FA_UNROLL
  for (int m = 0; m < C::kTilesM; ++m) load_a(a[0][m], m, 0);
  load_b(b[0], FIRST, 0);
  FA_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    sum.carry(step);
    FA_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      const int now = step * kPairs + pair;
      if (pair + 1 < kPairs) {
        load_b(b[(now + 1) % 2], FIRST + pair + 1, step);
      } else if (step + 1 < kSteps) {
        load_b(b[(now + 1) % 2], FIRST, step + 1);
      }
      if (pair == kPairs - 1 && step + 1 < kSteps) {
        FA_UNROLL
        for (int m = 0; m < C::kTilesM; ++m) load_a(a[(step + 1) % 2][m], m, step + 1);
      }
      Instruction<T>::multiply(sum, a[step % 2], b[now % 2], pair);
    }
  }
  sum.finish();
  if constexpr (kPairs < kRest) multiply_pipelined<T, K, PRECISE, FIRST + kPairs>(c, load_a, load_b);
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
  multiply_pipelined<T, K, (C::kRegs <= 32)>(
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
