// Tiles that waves own: every wave keeps its share in registers, as operands, and no other wave sees it.
//
// OwnedTile is loaded once and used all along: Q in the forward, K and V in the backward. Its rows are dealt out to the
// waves; its result (kStaging) has the same rows. ProductTile holds P or dS, straight from the accumulator.
#pragma once

#include "../../cuda/tile/tile.cuh"
#include "accumulator.cuh"
#include "layout.cuh"
#include "shared_tile.cuh"

namespace flash_attn::gfx90a {

// How many waves share the columns of a product with k along an owned tile's rows.
constexpr int column_waves(int cols, int waves) {
  return waves == 1 || (cols % waves == 0 && cols / waves % 16 == 0) ? waves : column_waves(cols, waves / 2);
}

template <class T, int WARPS, int ROWS, int COLS, unsigned USES>
class OwnedTile {
 public:
  using Stored = StoredOf<T>;
  static constexpr int kBytes = 0;
  static constexpr int kWaveRows = ROWS / WARPS, kTile = tile_for(kWaveRows), kTiles = kWaveRows / kTile;
  static constexpr int kRowChunks = COLS / kChunkElements<T> / Shape<kTile>::kGroups;
  static constexpr int kColumnWaves = column_waves(COLS, WARPS);
  static constexpr int kWaveCols = COLS / kColumnWaves;
  static constexpr int kColTile = tile_for(kWaveCols) < kTile ? tile_for(kWaveCols) : kTile;
  static constexpr int kColTiles = kWaveCols / kColTile;
  static constexpr int kColChunks = ROWS / kChunkElements<T> / Shape<kColTile>::kGroups;
  static constexpr bool kColumns = (USES & kKN) != 0;
  static constexpr int kColumnRegisters = 4 * kColTiles * kColChunks;

  FA_DEVICE explicit OwnedTile(char*) {}

  FA_DEVICE void load(const Stored* src, int64_t row_stride, int rows, int cols, bool aligned) {
    const MemoryRows<Stored> from(src, row_stride, rows < ROWS ? rows : ROWS, cols);
    with_constant(aligned, [&](auto is_aligned) {
      FA_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        FA_UNROLL
        for (int g = 0; g < kRowChunks; ++g) {
          const int col = (S::kGroups * g + S::group()) * kElements;
          rows_[t][g] = from.template read<is_aligned>(first_row(t), S::lane_row(), col);
        }
      }
    });
    if constexpr (kColumns) load_columns(from);
  }
  FA_DEVICE void land() {
    if constexpr (!std::is_same_v<Stored, FactorOf<T>>) {
      FA_UNROLL
      for (auto& row : rows_) {
        FA_UNROLL
        for (Chunk<T>& chunk : row) chunk = factors_of<T>(chunk);
      }
      FA_UNROLL
      for (int t = 0; kColumns && t < kColTiles; ++t) {
        FA_UNROLL
        for (int g = 0; g < kColChunks; ++g) columns_[t][g] = column_aside(factors_of<T>(columns_[t][g]));
      }
    }
  }

  template <int TILE>
  FA_DEVICE const Chunk<T>& row_chunk(int t, int g) const {
    static_assert(TILE == kTile);
    return rows_[t][g];
  }
  template <int TILE>
  FA_DEVICE const Chunk<T>& column_chunk(int t, int g) const {
    static_assert(kColumns && TILE == kColTile);
    return columns_[t][g];
  }

  template <class Source>
  FA_DEVICE void put(const Source& x) {
    static_assert(Source::kM == ROWS && Source::kN == COLS && Source::kWarpsM == WARPS && Source::kTile == kTile);
    FA_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      FA_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        constexpr int kOfTile = S::kRegs / 4;
        staged_[t][s] = x.template quad<Stored>(t, s / kOfTile, s % kOfTile);
      }
    }
  }

  FA_DEVICE void write(Stored* dst, int64_t row_stride, int rows, int cols, bool aligned) const {
    FA_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      const int row = first_row(t) + S::lane_row();
      FA_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        const int col = S::kStep * s + 4 * S::group();
        write_elements<Stored, 4>(dst + row * row_stride + col, staged_[t][s], row < rows ? cols - col : 0, aligned);
      }
    }
  }

 private:
  using S = Shape<kTile>;
  static constexpr int kElements = kChunkElements<T>;
  static constexpr int kSteps = COLS / S::kStep;

  static FA_DEVICE int first_row(int t) { return wave_of_block() * kWaveRows + t * kTile; }

  // Chunks with k along the rows, elements in ascending order, of the columns this wave multiplies.
  FA_DEVICE void load_columns(const MemoryRows<Stored>& from) {
    using C = Shape<kColTile>;
    FA_UNROLL
    for (int t = 0; t < kColTiles; ++t) {
      const int col = wave_of_block() % kColumnWaves * kWaveCols + t * kColTile + C::lane_row();
      FA_UNROLL
      for (int g = 0; g < kColChunks; ++g) {
        const int row = (C::kGroups * g + C::group()) * kElements;
        columns_[t][g] = column_aside(from.read_column(row, col));
      }
    }
  }
  static FA_DEVICE Chunk<T> column_aside(const Chunk<T>& x) {
    if constexpr (kColumnRegisters >= 48) return kept_aside(x);
    return x;
  }

  Chunk<T> rows_[kTiles][kRowChunks];
  Chunk<T> columns_[kColumns ? kColTiles : 1][kColumns ? kColChunks : 1];
  Quad<T> staged_[kTiles][kSteps];
};

// A tile that only ever comes from an accumulator whose lanes own columns: a left factor with k along its rows (kKM)
// from the lane's own registers, and, through LDS, with k along its columns (kMK).
template <class T, int WARPS, int ROWS, int COLS, unsigned USES>
class ProductTile {
 public:
  using Source = Accumulator<float, WARPS, ROWS, COLS, 1>;
  using Shared = SharedTile<T, WARPS, ROWS, COLS, kMK>;
  static constexpr bool kShared = (USES & kMK) != 0;
  static constexpr int kBytes = kShared ? Shared::kBytes : 0;
  static constexpr int kTile = Source::kTile, kSteps = ROWS / Shape<kTile>::kStep;

  FA_DEVICE explicit ProductTile(char* shared) : shared_(shared) {}

  FA_DEVICE void put(const Source& x) {
    FA_UNROLL
    for (int n = 0; n < Source::kTilesN; ++n) {
      FA_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        constexpr int kOfTile = Shape<kTile>::kRegs / 4;
        quads_[n][s] = x.template quad<T>(s / kOfTile, n, s % kOfTile);
      }
    }
    if constexpr (kShared) {
      FA_UNROLL
      for (int n = 0; n < Source::kTilesN; ++n) {
        shared_.template set_quads<kTile>(Source::first_col() + n * kTile + Shape<kTile>::lane_row(), quads_[n]);
      }
    }
  }

  FA_DEVICE const Quad<T>& quad(int n, int step) const { return quads_[n][step]; }
  FA_DEVICE const Shared& shared() const { return shared_; }

 private:
  Quad<T> quads_[Source::kTilesN][kSteps];
  Shared shared_;
};

}  // namespace flash_attn::gfx90a
