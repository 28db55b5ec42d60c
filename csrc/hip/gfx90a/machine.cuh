// The machine: 64-lane waves, matrix instructions, and the 16-byte pieces in which operands travel.
//
// Both shapes used, 32 x 32 and 16 x 16, take four consecutive k of one row from each lane (a *quad*): lane l holds
// row l % kTile and k = 4 * (l / kTile) + 0..3 of the kStep = 4 * 64 / kTile that one step covers. The result has its
// column in lane l % kTile and rows 4 * (l / kTile) + i % 4 + kStep * (i / 4) in registers i: again quads. So the
// registers of one product, narrowed, are an operand of the next.
#pragma once

#include "../../cuda/compat.cuh"
#include "../../cuda/tile/performance.cuh"

namespace flash_attn::gfx90a {

template <class E, int N>
using Vector = E __attribute__((ext_vector_type(N)));

using SharedPointer = __attribute__((address_space(3))) char*;

constexpr int kLanes = 64;

FA_DEVICE int lane_of_wave() { return int(threadIdx.x) % kLanes; }
FA_DEVICE int wave_of_block() { return __builtin_amdgcn_readfirstlane(int(threadIdx.x) / kLanes); }

// A matrix instruction's shape: TILE x TILE results.
template <int TILE>
struct Shape {
  static constexpr int kGroups = kLanes / TILE;        // lane groups that share the k of a step
  static constexpr int kStep = 4 * kGroups;            // k of a step
  static constexpr int kRegs = TILE * TILE / kLanes;   // results of a lane
  using Result = Vector<float, kRegs>;

  static FA_DEVICE int lane_row() { return lane_of_wave() % TILE; }
  static FA_DEVICE int group() { return lane_of_wave() / TILE; }
  // The row of the result in register i.
  static FA_DEVICE int result_row(int i) { return kStep * (i / 4) + 4 * group() + i % 4; }
};

// The tile for an extent that one wave covers.
constexpr int tile_for(int extent) { return extent % 32 == 0 ? 32 : 16; }

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, float, uint16_t>;  // an element, as it is moved

// Four consecutive k of a row.
template <class T>
using Quad = Vector<Bits<T>, 4>;

// Quads that one 16-byte access brings.
template <class T>
constexpr int kQuadsOfChunk = 4 / sizeof(T);

template <class T>
constexpr int kChunkElements = 16 / sizeof(T);

template <class T>
using Chunk = Vector<Bits<T>, kChunkElements<T>>;

template <class T>
FA_DEVICE Quad<T> quad_of(const Chunk<T>& chunk, int q) {
  if constexpr (sizeof(T) == 4) {
    return chunk;
  } else {
    return q == 0 ? chunk.lo : chunk.hi;
  }
}

// result[i][j] += sum_k a[i][k] b[j][k] for one step of k; j in the lanes, i in the registers.
template <class T, int TILE>
FA_DEVICE void matrix_step(const Quad<T>& a, const Quad<T>& b, typename Shape<TILE>::Result& result) {
  if constexpr (std::is_same_v<FactorOf<T>, Half>) {
    using Native = Vector<_Float16, 4>;
    const Native x = __builtin_bit_cast(Native, a), y = __builtin_bit_cast(Native, b);
    if constexpr (TILE == 32) {
      result = __builtin_amdgcn_mfma_f32_32x32x8f16(x, y, result, 0, 0, 0);
    } else {
      result = __builtin_amdgcn_mfma_f32_16x16x16f16(x, y, result, 0, 0, 0);
    }
  } else if constexpr (std::is_same_v<FactorOf<T>, BFloat16>) {
    using Native = Vector<short, 4>;
    const Native x = __builtin_bit_cast(Native, a), y = __builtin_bit_cast(Native, b);
    if constexpr (TILE == 32) {
      result = __builtin_amdgcn_mfma_f32_32x32x8bf16_1k(x, y, result, 0, 0, 0);
    } else {
      result = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(x, y, result, 0, 0, 0);
    }
  } else {
    FA_UNROLL
    for (int i = 0; i < 4; ++i) {  // instruction i takes the i-th k of every lane group
      if constexpr (TILE == 32) {
        result = __builtin_amdgcn_mfma_f32_32x32x2f32(a[i], b[i], result, 0, 0, 0);
      } else {
        result = __builtin_amdgcn_mfma_f32_16x16x4f32(a[i], b[i], result, 0, 0, 0);
      }
    }
  }
}

// The same value, kept in an accumulation register: half of a lone wave's registers are of that kind, and matrix
// instructions read their operands from either.
template <class V>
FA_DEVICE V kept_aside(V x) {
#if defined(__HIP_DEVICE_COMPILE__)
  asm("" : "+a"(x));
#endif
  return x;
}

// The 16-bit halves of two words: (low of a, low of b) or (high of a, high of b), a first in memory.
FA_DEVICE uint32_t pack_low(uint32_t a, uint32_t b) { return __builtin_amdgcn_perm(b, a, 0x05040100); }
FA_DEVICE uint32_t pack_high(uint32_t a, uint32_t b) { return __builtin_amdgcn_perm(b, a, 0x07060302); }

// To nearest, ties to even. Unlike compat.cuh's narrow() it has no branch for NaN: the NaNs of 16-bit inputs and of the
// hardware (0x7fc00000) have the low half of their payload clear, so the rounding cannot carry out of it.
FA_DEVICE uint32_t round_to_bfloat16(float x, uint32_t below_half = 0x7fff) {
  const uint32_t bits = float_to_bits(x);
  return bits + below_half + ((bits >> 16) & 1);
}

template <class T>
FA_DEVICE Quad<T> narrow_quad(float x0, float x1, float x2, float x3) {
  if constexpr (std::is_same_v<T, float>) {
    return Quad<T>{x0, x1, x2, x3};
  } else if constexpr (std::is_same_v<FactorOf<T>, Half>) {
    const Vector<_Float16, 4> h = {_Float16(x0), _Float16(x1), _Float16(x2), _Float16(x3)};
    return __builtin_bit_cast(Quad<T>, h);
  } else if constexpr (kNarrowing<T> == Rounding::kTowardZero) {
    const Vector<uint32_t, 2> words = {pack_high(float_to_bits(x0), float_to_bits(x1)),
                                       pack_high(float_to_bits(x2), float_to_bits(x3))};
    return __builtin_bit_cast(Quad<T>, words);
  } else {
    const Vector<uint32_t, 2> words = {pack_high(round_to_bfloat16(x0), round_to_bfloat16(x1)),
                                       pack_high(round_to_bfloat16(x2), round_to_bfloat16(x3))};
    return __builtin_bit_cast(Quad<T>, words);
  }
}

// fp16 to bf16, to nearest. NaNs get a small payload first, which rounding cannot carry out of. With a sign they are
// the largest of unsigned numbers, without one the largest of signed ones.
FA_DEVICE Chunk<BFloat16> to_bfloat16(const Chunk<Half>& x) {
  using Signed = Vector<int16_t, 8>;
  uint32_t limit = 0xfc08fc08, signed_limit = 0x7c087c08, below_half = 0x7fff;
  renew(limit, signed_limit, below_half);
  const auto most = __builtin_bit_cast(Chunk<Half>, Vector<uint32_t, 4>(limit));
  const auto most_signed = __builtin_bit_cast(Signed, Vector<uint32_t, 4>(signed_limit));
  const auto capped = __builtin_bit_cast(Signed, x < most ? x : most);
  const auto halves = __builtin_bit_cast(Vector<_Float16, 8>, capped < most_signed ? capped : most_signed);
  Vector<uint32_t, 4> words;
  FA_UNROLL
  for (int i = 0; i < 4; ++i) {
    words[i] = pack_high(round_to_bfloat16(float(halves[2 * i]), below_half),
                         round_to_bfloat16(float(halves[2 * i + 1]), below_half));
  }
  return __builtin_bit_cast(Chunk<BFloat16>, words);
}

// What memory held, as it is multiplied.
template <class T>
FA_DEVICE Chunk<T> factors_of(const Chunk<T>& stored) {
  if constexpr (std::is_same_v<StoredOf<T>, FactorOf<T>>) {
    return stored;
  } else {
    return to_bfloat16(stored);
  }
}

// The value of the lane whose number differs in the bits of `mask`.
FA_DEVICE float exchange(float x, int mask) {
  const int from = (lane_of_wave() ^ mask) * 4;
  return bits_to_float(uint32_t(__builtin_amdgcn_ds_bpermute(from, int(float_to_bits(x)))));
}

// The larger of two numbers; a NaN is passed over. One instruction: the median of x, y and infinity, where
// fmaxf would first make signalling NaNs quiet.
FA_DEVICE float max_number(float x, float y) { return __builtin_amdgcn_fmed3f(x, y, infinity<float>()); }

// f(std::true_type) or f(std::false_type): one branch round a loop rather than one in each of its turns.
template <class F>
FA_DEVICE void with_constant(bool condition, F&& f) {
  if (condition) {
    f(std::true_type());
  } else {
    f(std::false_type());
  }
}

// Device memory from `base` (the same in every lane), read through a descriptor: what lies at `bytes` and beyond reads
// as zero, and no branch is needed for it. Offsets are in bytes.
class Buffer {
 public:
  FA_DEVICE Buffer(const void* base, uint32_t bytes) {
    const uint64_t at = reinterpret_cast<uint64_t>(base);
    descriptor_ = Vector<int, 4>{
        __builtin_amdgcn_readfirstlane(int(at)),
        __builtin_amdgcn_readfirstlane(int(at >> 32) & 0xffff),  // stride 0: bytes, not records
        __builtin_amdgcn_readfirstlane(int(bytes)),
        0x00020000,  // 32-bit data
    };
  }
  FA_DEVICE Vector<float, 4> read_four(uint32_t offset) const { return load_four(descriptor_, int(offset), 0, 0); }
  FA_DEVICE float read(uint32_t offset) const { return load_one(descriptor_, int(offset), 0, 0); }
  FA_DEVICE uint16_t read_half(uint32_t offset) const { return uint16_t(load_half(descriptor_, int(offset), 0, 0)); }
  // Adds x at offset + uniform_offset, at the memory's own adders and in no particular order.
  FA_DEVICE void add(uint32_t offset, uint32_t uniform_offset, float x) const {
    add_one(x, descriptor_, int(offset), int(uniform_offset), 0);
  }

 private:
  static __device__ Vector<float, 4> load_four(Vector<int, 4> descriptor, int offset, int uniform_offset,
                                               int policy) __asm("llvm.amdgcn.raw.buffer.load.v4f32");
  static __device__ float load_one(Vector<int, 4> descriptor, int offset, int uniform_offset,
                                   int policy) __asm("llvm.amdgcn.raw.buffer.load.f32");
  static __device__ int16_t load_half(Vector<int, 4> descriptor, int offset, int uniform_offset,
                                      int policy) __asm("llvm.amdgcn.raw.buffer.load.i16");
  static __device__ float add_one(float x, Vector<int, 4> descriptor, int offset, int uniform_offset,
                                  int policy) __asm("llvm.amdgcn.raw.buffer.atomic.fadd.f32");

  Vector<int, 4> descriptor_;
};

// Rows of a matrix in device memory, at most kMaxRowBytes apart, read in 16-byte chunks. Rows and columns that do not
// exist read as zero.
template <class T>
class MemoryRows {
 public:
  FA_DEVICE MemoryRows(const T* src, int64_t row_stride, int rows, int cols)
      : base_(reinterpret_cast<const char*>(src)),
        rows_(rows),
        cols_(cols),
        row_bytes_(rows > 1 ? uint32_t(row_stride) * uint32_t(sizeof(T)) & kMaxRowBytes : kMaxRowBytes),
        bytes_(rows > 0 ? (rows - 1) * row_bytes_ + cols * uint32_t(sizeof(T)) : 0) {}

  // Row first_row + row; first_row is the same in every lane. ALIGNED: rows and columns allow 16-byte access.
  template <bool ALIGNED>
  FA_DEVICE Chunk<T> read(int first_row, int row, int col) const {
    if constexpr (ALIGNED) {
      const uint32_t skipped = first_row * row_bytes_;
      const Buffer buffer(base_ + skipped, bytes_ > skipped ? bytes_ - skipped : 0);
      return __builtin_bit_cast(Chunk<T>, buffer.read_four(col < cols_ ? offset(row, col) : kBehindTheEnd));
    } else {
      const Buffer buffer(base_, bytes_);
      row += first_row;
      Chunk<T> x;
      FA_UNROLL
      for (int i = 0; i < kChunkElements<T>; ++i) x[i] = read_one(buffer, offset(row, col) + i * sizeof(T));
      return first_of(x, row < rows_ ? cols_ - col : 0);
    }
  }

  // The same of a column: rows row, row + 1, ...
  FA_DEVICE Chunk<T> read_column(int row, int col) const {
    const Buffer buffer(base_, bytes_);
    Chunk<T> x;
    FA_UNROLL
    for (int i = 0; i < kChunkElements<T>; ++i) x[i] = read_one(buffer, offset(row + i, col));
    return first_of(x, col < cols_ ? rows_ - row : 0);
  }

 private:
  static constexpr uint32_t kBehindTheEnd = uint32_t(-16);  // an inline constant

  FA_DEVICE uint32_t offset(int row, int col) const {
    return uint32_t(row) * row_bytes_ + col * uint32_t(sizeof(T));
  }
  static FA_DEVICE Bits<T> read_one(const Buffer& buffer, uint32_t offset) {
    if constexpr (sizeof(T) == 4) {
      return buffer.read(offset);
    } else {
      return buffer.read_half(offset);
    }
  }
  // The others zero. One after the other, since the conditions of all would not fit in the scalar registers.
  static FA_DEVICE Chunk<T> first_of(Chunk<T> x, int count) {
    count = unhoisted(count);
    FA_UNROLL
    for (int i = 0; i < kChunkElements<T>; ++i) {
      x[i] = i < count ? x[i] : Bits<T>(0);
      __builtin_amdgcn_sched_barrier(0);
    }
    return x;
  }

  const char* base_;
  int rows_, cols_;
  uint32_t row_bytes_, bytes_;
};

// The first `count` of N elements. With `vectors` dst is aligned, and count is 0 or less or at least N.
template <class T, int N>
FA_DEVICE void write_elements(T* dst, const Vector<Bits<T>, N>& x, int count, bool vectors) {
  if (vectors) {
    if (count > 0) *reinterpret_cast<Vector<Bits<T>, N>*>(dst) = x;
  } else {
    FA_UNROLL
    for (int i = 0; i < N; ++i) {
      if (i < count) reinterpret_cast<Bits<T>*>(dst)[i] = x[i];
    }
  }
}

template <class T>
FA_DEVICE float widen_bits(Bits<T> x) {
  return widen(__builtin_bit_cast(T, x));
}

}  // namespace flash_attn::gfx90a
