// A block-wide M x N matrix of products in the lanes' registers, and the rows and operands that go with it.
//
// Where all waves go along M a lane owns rows and its registers run along n: softmax reduces a row with one or two
// shuffles, and the narrowed registers are a left factor. Otherwise a lane owns columns and its registers run along m:
// the narrowed registers are a left factor of the transpose, which is what the backward needs of P and dS.
#pragma once

#include "machine.cuh"

namespace flash_attn::gfx90a {

template <int WARPS, int M, int WARPS_M>
struct RowLayout {
  static constexpr bool kLaneOwnsRow = WARPS_M == WARPS;
  static constexpr int kWaveRows = M / WARPS_M;
  static constexpr int kTile = tile_for(kWaveRows);
  static constexpr int kTiles = kWaveRows / kTile;
  static constexpr int kSlotsOfTile = kLaneOwnsRow ? 1 : Shape<kTile>::kRegs;
  static constexpr int kSlots = kTiles * kSlotsOfTile;
  static_assert(M % WARPS_M == 0 && kWaveRows % 16 == 0);

  static FA_DEVICE int wave_m() { return wave_of_block() / (WARPS / WARPS_M); }
  static FA_DEVICE int wave_n() { return wave_of_block() % (WARPS / WARPS_M); }
};

template <class Scalar, int WARPS, int M, int WARPS_M>
class Rows {
 public:
  using Layout = RowLayout<WARPS, M, WARPS_M>;
  using S = Shape<Layout::kTile>;
  static constexpr int kSlots = Layout::kSlots;

  FA_DEVICE void fill(Scalar x) {
    FA_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) values_[slot] = x;
  }
  FA_DEVICE Scalar& operator[](int slot) { return values_[slot]; }

  template <class F>
  static FA_DEVICE void for_each(F&& f) {
    const int across = Layout::kLaneOwnsRow ? S::lane_row() : unhoisted(4 * S::group());  // see Accumulator::for_each
    FA_UNROLL
    for (int tile = 0; tile < Layout::kTiles; ++tile) {
      const int first = Layout::wave_m() * Layout::kWaveRows + tile * Layout::kTile;
      FA_UNROLL
      for (int i = 0; i < Layout::kSlotsOfTile; ++i) {
        if constexpr (Layout::kLaneOwnsRow) {
          f(tile, first + across, S::group() == 0 && Layout::wave_n() == 0);
        } else {
          f(tile * S::kRegs + i, first + S::kStep * (i / 4) + i % 4 + across,
            S::lane_row() == 0 && Layout::wave_n() == 0);
        }
      }
    }
  }

  FA_DEVICE void read(const Scalar* src, int count, Scalar beyond) {
    static_assert(sizeof(Scalar) == 4);
    const Buffer buffer(src, count > 0 ? uint32_t(count < M ? count : M) * 4 : 0);
    const int lane_row = Layout::wave_m() * Layout::kWaveRows + (Layout::kLaneOwnsRow ? S::lane_row() : 4 * S::group());
    const int across = unhoisted(lane_row);
    if (!Layout::kLaneOwnsRow && count >= M) {
      FA_UNROLL
      for (int slot = 0; slot < kSlots; slot += 4) {
        const Vector<float, 4> four = buffer.read_four(4 * (across + along(slot)));
        values_[slot] = four.x, values_[slot + 1] = four.y, values_[slot + 2] = four.z, values_[slot + 3] = four.w;
      }
    } else {  // four rows may lie across the end
      FA_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) {
        const Scalar x = buffer.read(4 * (across + along(slot)));
        values_[slot] = along(slot) < count - across ? x : beyond;
      }
    }
  }

  FA_DEVICE void finish_sum() {
    static_assert(Layout::kLaneOwnsRow, "rows are reduced where lanes own them");
    reduce([](Scalar x, Scalar y) { return x + y; });
  }

  template <class F>
  FA_DEVICE void reduce(F&& f) {
    FA_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
      FA_UNROLL
      for (int mask = Layout::kTile; mask < kLanes; mask *= 2)
        values_[slot] = f(values_[slot], exchange(values_[slot], mask));
    }
  }

 private:
  // A slot's row, counted from the lane's first.
  static FA_DEVICE constexpr int along(int slot) {
    const int i = slot % Layout::kSlotsOfTile;
    return slot / Layout::kSlotsOfTile * Layout::kTile + S::kStep * (i / 4) + i % 4;
  }

  Scalar values_[kSlots];
};

template <class Scalar, int WARPS, int M, int N, int WARPS_M>
class Accumulator {
 public:
  static_assert(std::is_same_v<Scalar, float>);
  using Layout = RowLayout<WARPS, M, WARPS_M>;
  static constexpr bool kLaneOwnsRow = Layout::kLaneOwnsRow;
  static constexpr int kM = M, kN = N, kWarpsM = WARPS_M, kWarpsN = WARPS / WARPS_M;
  static constexpr int kWaveM = Layout::kWaveRows, kWaveN = N / kWarpsN;
  static constexpr int kTile = tile_for(kWaveM) < tile_for(kWaveN) ? tile_for(kWaveM) : tile_for(kWaveN);
  static constexpr int kTilesM = kWaveM / kTile, kTilesN = kWaveN / kTile;
  static constexpr int kRegs = kTilesM * kTilesN * Shape<kTile>::kRegs;
  static_assert(N % kWarpsN == 0 && kWaveN % 16 == 0);
  using S = Shape<kTile>;
  using RowsOf = Rows<Scalar, WARPS, M, WARPS_M>;

  typename S::Result tiles[kTilesM][kTilesN];

  FA_DEVICE void fill(Scalar x) {
    FA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      FA_UNROLL
      for (int n = 0; n < kTilesN; ++n) tiles[m][n] = x;
    }
  }

  FA_DEVICE Scalar& operator[](int reg) { return reinterpret_cast<Scalar*>(tiles)[reg]; }
  FA_DEVICE const Scalar& operator[](int reg) const { return reinterpret_cast<const Scalar*>(tiles)[reg]; }

  static FA_DEVICE int first_row() { return Layout::wave_m() * kWaveM; }
  static FA_DEVICE int first_col() { return Layout::wave_n() * kWaveN; }

  template <class F>
  static FA_DEVICE void for_each(F&& f) {
    const int across = unhoisted(4 * S::group());  // a loop would keep a register for every sum with a constant
    FA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      FA_UNROLL
      for (int n = 0; n < kTilesN; ++n) {
        const int row = first_row() + m * kTile, col = first_col() + n * kTile;
        FA_UNROLL
        for (int i = 0; i < S::kRegs; ++i) {
          const int reg = (m * kTilesN + n) * S::kRegs + i, along = S::kStep * (i / 4) + i % 4;
          if constexpr (kLaneOwnsRow) {
            f(m, row + S::lane_row(), col + along + across, reg);
          } else {
            f(m * S::kRegs + i, row + along + across, col + S::lane_row(), reg);
          }
        }
      }
    }
  }

  template <class F>
  static FA_DEVICE void for_each_patch(F&& f) {
    FA_UNROLL
    for (int m = 0; m < kWaveM / 16; ++m) {
      FA_UNROLL
      for (int n = 0; n < kWaveN / 16; ++n) square(m, n, f);
    }
  }

  FA_DEVICE void max_rows(RowsOf& rows) const {
    static_assert(kLaneOwnsRow && kTile == Layout::kTile && kWarpsN == 1);
    FA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      FA_UNROLL
      for (int n = 0; n < kTilesN; ++n) {
        FA_UNROLL
        for (int i = 0; i < S::kRegs; ++i) rows[m] = max_number(rows[m], tiles[m][n][i]);
      }
    }
    rows.reduce([](Scalar x, Scalar y) { return max_number(x, y); });
  }

  FA_DEVICE void sum_rows(RowsOf& rows) const {
    static_assert(kLaneOwnsRow && kTile == Layout::kTile && kWarpsN == 1);
    FA_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      Vector<float, 2> sums = {tiles[m][0][0], tiles[m][0][1]};  // two at once: one packed addition for two elements
      FA_UNROLL
      for (int n = 0; n < kTilesN; ++n) {
        FA_UNROLL
        for (int i = n == 0 ? 2 : 0; i < S::kRegs; i += 2) sums += Vector<float, 2>{tiles[m][n][i], tiles[m][n][i + 1]};
      }
      rows[m] += sums.x + sums.y;
    }
  }

  // Quad s of the lane's row or column in tile (m, n): four consecutive columns or rows.
  template <class T>
  FA_DEVICE Quad<T> quad(int m, int n, int s) const {
    const typename S::Result& x = tiles[m][n];
    return narrow_quad<T>(x[4 * s], x[4 * s + 1], x[4 * s + 2], x[4 * s + 3]);
  }

 private:
  static FA_DEVICE int reg_of(int m, int n, int i) { return (m * kTilesN + n) * S::kRegs + i; }

  // The patches that the lane has a part in, of the 16 x 16 square at (16 m, 16 n) of the wave's matrix.
  template <class F>
  static FA_DEVICE void square(int m, int n, F&& f) {
    const int row = first_row() + 16 * m, col = first_col() + 16 * n;
    constexpr int kSquares = kTile / 16;
    const int tile_m = m / kSquares, tile_n = n / kSquares;
    if constexpr (kTile == 32 && kLaneOwnsRow) {
      if (m % 2 == 1) return;  // the lane's one row belongs to either square
      FA_UNROLL
      for (int i = 0; i < 4; i += 2) {
        const int r = reg_of(tile_m, tile_n, 8 * (n % 2) + i);
        const int regs[8] = {r, r + 1, r + 4, r + 5, -1, -1, -1, -1};
        f(row + S::lane_row(), col + 4 * S::group() + i, regs);
      }
    } else if constexpr (kTile == 32) {
      if (n % 2 == 1) return;
      FA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int r = reg_of(tile_m, tile_n, 8 * (m % 2) + i);
        const int regs[8] = {r, -1, -1, -1, r + 4, -1, -1, -1};
        f(row + 4 * S::group() + i, col + S::lane_row(), regs);
      }
    } else if constexpr (kLaneOwnsRow) {
      FA_UNROLL
      for (int i = 0; i < 4; i += 2) {
        const int r = reg_of(tile_m, tile_n, i);
        const int regs[8] = {r, r + 1, -1, -1, -1, -1, -1, -1};
        f(row + S::lane_row(), col + 4 * S::group() + i, regs);
      }
    } else {
      FA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int regs[8] = {reg_of(tile_m, tile_n, i), -1, -1, -1, -1, -1, -1, -1};
        f(row + 4 * S::group() + i, col + S::lane_row(), regs);
      }
    }
  }
};

// An accumulator narrowed to T, as a left factor: row in the lane, k in quads of the order the products left them in.
template <class T, int WARPS, int M, int K, int WARPS_M>
class Operand {
 public:
  using Source = Accumulator<float, WARPS, M, K, WARPS_M>;
  static constexpr int kTile = Source::kTile, kSteps = K / Shape<kTile>::kStep;
  static_assert(Source::kLaneOwnsRow);

  FA_DEVICE Operand(const Source& x) {
    FA_UNROLL
    for (int m = 0; m < Source::kTilesM; ++m) {
      FA_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        constexpr int kOfTile = Shape<kTile>::kRegs / 4;
        quads_[m][s] = x.template quad<T>(m, s / kOfTile, s % kOfTile);
      }
    }
  }
  FA_DEVICE const Quad<T>& quad(int m, int step) const { return quads_[m][step]; }

 private:
  Quad<T> quads_[Source::kTilesM][kSteps];
};

// A second accumulator: in registers, since fp32 of a whole block would not fit beside the tiles in shared memory.
template <class Source>
class Stash {
 public:
  static constexpr int kBytes = 0;
  FA_DEVICE explicit Stash(char*) {}
  FA_DEVICE void clear() { sum_.fill(0.0f); }

  FA_DEVICE void fold(const Source& x, typename Source::RowsOf& keep, typename Source::RowsOf& add) {
    Source::for_each(
        [&](int slot, int, int, int reg) { sum_[reg] = fma_rn(x[reg], add[slot], sum_[reg] * keep[slot]); });
  }
  FA_DEVICE void take(Source& x) const { x = sum_; }

 private:
  Source sum_;
};

}  // namespace flash_attn::gfx90a
