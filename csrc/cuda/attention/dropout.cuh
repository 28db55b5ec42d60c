// Dropout regenerated, not stored: a keep bit is a function of (seed, offset, batch, head, query, key) alone.
//
// Philox-4x32-7 (Salmon et al., SC 2011: the fewest rounds that pass BigCrush) gives 128 bits for a patch of eight
// elements, 16 bits each. The patch is shaped after the matrix instructions' accumulators: rows {r, r + 8}, columns
// {c, c + 1, c + 8, c + 9} of a 16 x 16 square.
#pragma once

#include "../../core/params.h"
#include "../compat.cuh"

namespace flash_attn {

FA_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }

// What a probability that is kept is multiplied by.
template <class Scalar>
FA_DEVICE Scalar kept_scale(const AttentionParams& p) {
  return p.dropout_p > 0 ? Scalar(1) / (Scalar(1) - Scalar(p.dropout_p)) : Scalar(1);
}

class Dropout {
 public:
  FA_DEVICE Dropout(const AttentionParams& p, int batch, int head)
      : enabled_(p.dropout_p > 0), threshold_(uint32_t((1.0f - p.dropout_p) * 65536.0f + 0.5f)) {
    if (!enabled_) return;
    const uint64_t seed = uint64_t(p.rng_state[0]), offset = uint64_t(p.rng_state[1]);
    key_[0] = uniform(uint32_t(seed) ^ uint32_t(offset >> 32));
    key_[1] = uniform(uint32_t(seed >> 32));
    offset_ = uniform(uint32_t(offset));
    sequence_ = uniform(uint32_t(batch * p.heads_q + head));
  }

  FA_DEVICE bool enabled() const { return enabled_; }

  // Calls f(reg, keep) for every element of an accumulator whose element (0, 0) is (query, key) = (row0, col0),
  // both multiples of 16.
  template <class Accumulator, class F>
  FA_DEVICE void for_each(int row0, int col0, F&& f) const {
    const uint32_t key[2] = {reread(key_[0]), reread(key_[1])};  // a loop would hold all the rounds' keys
    uint32_t sequence = sequence_;
    renew(sequence);  // and its first product
    Accumulator::for_each_patch([&](int row, int col, const int(&reg)[8]) {
      uint32_t bits[4];
      random(key, sequence, uint32_t(row0 + row), uint32_t(col0 + col), bits);
      const int corner = (row & 8 ? 2 : 0) + (col & 8 ? 1 : 0);  // which of the patch's four pairs the lane begins with
      uint32_t pair[4];
      FA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const uint32_t low = corner & 1 ? bits[i ^ 1] : bits[i], high = corner & 1 ? bits[i ^ 3] : bits[i ^ 2];
        pair[i] = corner & 2 ? high : low;
      }
      FA_UNROLL
      for (int e = 0; e < 8; ++e) {
        if (reg[e] >= 0) f(reg[e], keeps(pair[e / 2] >> (16 * ((e ^ col) & 1))));
      }
    });
  }

  // Likewise: what is not kept becomes 0.
  template <class Accumulator>
  FA_DEVICE void drop(Accumulator& probabilities, int row0, int col0) const {
    for_each<Accumulator>(row0, col0, [&](int reg, bool keep) {
      if (!keep) probabilities[reg] = 0;
    });
  }

  // The bits of the patch that (row, col) lies in: its pairs from left to right and from top to bottom, a pair's left
  // element in the lower half.
  FA_DEVICE void patch(int row, int col, uint32_t (&bits)[4]) const {
    random(key_, sequence_, uint32_t(row), uint32_t(col), bits);
  }
  // What an element's bits, the lower half of these, decide.
  FA_DEVICE bool keeps(uint32_t bits) const { return (bits & 0xffff) < threshold_; }

 private:
  // patch(), with the keys in the caller's registers.
  FA_DEVICE void random(const uint32_t (&key)[2], uint32_t sequence, uint32_t row, uint32_t col,
                        uint32_t (&out)[4]) const {
    uint32_t c0 = (row / 16) * 8 + row % 8, c1 = (col / 16) * 4 + (col % 8) / 2, c2 = sequence, c3 = offset_;
    uint32_t k0 = key[0], k1 = key[1];
    FA_UNROLL
    for (int round = 0; round < 7; ++round) {
      const uint32_t h0 = multiply_high(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
      const uint32_t h1 = multiply_high(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
      c0 = h1 ^ c1 ^ k0;
      c1 = l1;
      c2 = h0 ^ c3 ^ k1;
      c3 = l0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
  }

  HeldFlag enabled_;
  uint32_t threshold_, key_[2] = {}, offset_ = 0, sequence_ = 0;
};

}  // namespace flash_attn
