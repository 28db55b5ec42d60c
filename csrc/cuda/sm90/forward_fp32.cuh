// The fp32 forward on Hopper. Eight warps load keys and values and split them into fp16 parts (parts.cuh); two
// warpgroups of 64 query rows multiply those, three products for one, and each's softmax runs under the other's
// multiplies. Tensor cores add with truncation: large and small products of a score are summed apart, and a block's
// values apart from those before.
//
// A row's weights P take the exponents of V's rows with them, and are scaled to fp16's range by the largest of those
// that the row has seen. So its bits depend on no key that it does not see.
#pragma once

#include "../attention/dropout.cuh"
#include "../attention/epilogue.cuh"
#include "../attention/score.cuh"
#include "../sm80/fragment.cuh"
#include "maps.cuh"
#include "parts.cuh"
#include "place.cuh"
#include "share.cuh"
#include "wgmma.cuh"

namespace flash_attn {
namespace sm90 {

template <int D, Modifiers MODIFIERS>
struct Fp32Forward {
  using T = float;
  using Params = ForwardParams;
  static constexpr bool kScored = MODIFIERS == Modifiers::kAny;
  static constexpr bool kWide = D > 128;
  static constexpr int kM = 128, kN = kWide ? 32 : 64, kBlockM = kM, kBlockN = kN;
  static constexpr int kGroups = 2, kWarps = 4 * kGroups, kLoaders = 8;  // warps that compute, and that load
  static constexpr int kThreads = (kWarps + kLoaders) * 32;
  static constexpr int kLoaderRegisters = D == 192 ? 64 : 56, kConsumerRegisters = 256 - kLoaderRegisters;
  static constexpr bool kTakesAnyRows = true;  // of any alignment
  static constexpr Pages kReadsPages = Pages::kBoxes;

  using Work = ForwardWork<kM>;
  using Tile = ForwardTile<kM, kN>;
  using Share = KeyShare<kM, kN>;
  using Parts = PartsTile<D, kN>;  // of K or V
  using QueryParts = PartsTile<D>;  // of a warpgroup
  static constexpr int kShare = kN / kLoaders, kBatch = kWide ? 2 : kShare;  // rows of a warp that loads; at once
  using Batch = WarpRows<D, kBatch>;
  using Scores = sm80::Accumulator<float, kM, kN, kWarps, kWarps>;
  using Output = sm80::Accumulator<float, kM, D, kWarps, kWarps>;
  using Rows = sm80::Rows<float, kM, kWarps>;
  using IntRows = sm80::Rows<int, kM, kWarps>;

  // A ring of tiles, K's and V's in turn; before it, copies of what they will be made from. A row with several chunks
  // has the running fold behind fewer of both, where there is room.
  struct Ring {
    int raws, slots;
    constexpr int bytes() const { return raws * kRawBytes + slots * Parts::kBytes; }
  };
  static constexpr int kRawBytes = kN * D * 4;
  static constexpr Ring kRing = D == 64 ? Ring{2, 6} : D == 256 ? Ring{1, 2} : Ring{2, 3};
  static constexpr Ring kFoldRing = D == 64 ? kRing : Ring{1, 2};
  struct Control {
    Barrier full[kRing.slots], free[kRing.slots], copied[kRing.raws][kLoaders];
    float from_parts[kRing.slots][kN], queries_from_parts[kM];
  };
  static constexpr int kQBytes = kGroups * QueryParts::kBytes;
  static constexpr int kControlBytes = (int(sizeof(Control)) + 1023) / 1024 * 1024;
  static constexpr int kRawAt = kQBytes + kControlBytes, kSharedBytes = kRawAt + kRing.bytes();
  static constexpr int kFoldAt = kRawAt + kFoldRing.bytes();
  // Where there is none, sm80's loops have all calls with a split_size: no other instance has these bits.
  static constexpr bool kFolds = !kWide;
  static constexpr int kStashBytes = kFolds ? kFoldAt + (kM * D + 2 * kM) * 4 - kSharedBytes : KernelInfo::kNoStash;
  static_assert(kSharedBytes + (kFolds ? kStashBytes : 0) <= 227 * 1024);

  struct Launched {
    Params p;
    CUtensorMap k, v;  // where rows are aligned

    explicit Launched(const Params& p)
        : p(p),
          k(p.aligned ? map_keys(p, p.k, kShare, D) : CUtensorMap{}),
          v(p.aligned ? map_keys(p, p.v, kShare, D) : CUtensorMap{}) {}
  };

  static int64_t blocks(const Params& p) { return Work::blocks(p); }
  static void launch(const void* params, int64_t blocks, int shared_bytes, void* stream) {
    launch_blocks<Fp32Forward>(Launched(*static_cast<const Params*>(params)), blocks, 1, shared_bytes, stream);
  }
  static const void* device() { return reinterpret_cast<const void*>(&run_blocks<Fp32Forward>); }

  struct Lanes {
    static constexpr int kThreads = Fp32Forward::kThreads;
    static FA_DEVICE int lane() { return int(threadIdx.x); }
  };

  const Launched& launched;
  const Params& p;
  char* const shared;
  Control& control;
  const Tile tile;
  const Ring ring;

  FA_DEVICE Fp32Forward(const Launched& launched, char* shared)
      : launched(launched),
        p(launched.p),
        shared(shared),
        control(*reinterpret_cast<Control*>(shared + kQBytes)),
        tile(p, Work(p, blockIdx.x)),
        ring(may_fold(p) ? kFoldRing : kRing) {}

  FA_DEVICE void run() {
    if (tile.clears(p)) clear_rows_of_no_sequence<T, Lanes>(p, tile.work);
    if (!tile.has_rows()) return;
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < kRing.slots; ++slot) {
        control.full[slot].init(kLoaders * 32);  // every lane that has written, and read: racecheck follows that
        control.free[slot].init(kWarps * 32);
      }
      for (auto& of_raw : control.copied) {
        for (Barrier& copied : of_raw) copied.init(1);
      }
      fence_barrier_init();
    }
    __syncthreads();
    if (warpgroup() >= kGroups) {
      keep_registers<kLoaderRegisters>();
      load();
    } else {
      take_registers<kConsumerRegisters>();
      Consumer(*this).run();
    }
  }

  FA_DEVICE char* slot_tile(const Place& place) const {
    return shared + kRawAt + ring.raws * kRawBytes + place.at * Parts::kBytes;
  }

  // ---- loading: a warp has eight rows of every tile; while it splits them, the next are on their way --------------

  // A warp's rows, from `key` on, of tiles in the order of the ring: keys and values of one block, then of the next.
  struct Source {
    int key;
    bool values = false;
    FA_DEVICE void step() {
      if (values) key += kN;
      values = !values;
    }
  };

  FA_DEVICE void load() {
    const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0) - kWarps, first = warp * kShare;
    const int kv_head = tile.work.head / (p.heads_q / p.heads_kv), end = tile.keys.end + first;
    const int first_k = int(tile.seq.first_k);
    Source source{tile.keys.begin + first}, ahead = source;
    Place slot, raw, raw_ahead;
    const auto fetch = [&] {
      if (p.aligned && ahead.key < end && first_lane()) {
        Barrier& copied = control.copied[raw_ahead.at][warp];
        copied.arrive_expecting(kShare * D * 4);
        const uint32_t dst = shared_address(raw_rows(raw_ahead.at, first));
        const CUtensorMap& map = ahead.values ? launched.v : launched.k;
        if (p.block_table == nullptr) {
          load_box(dst, map, copied, 0, first_k + ahead.key, kv_head, p.cu_seqlens_k ? 0 : tile.work.batch);
        } else {
          const PageBox box(p, tile.work.batch, ahead.key);
          load_box(dst, map, copied, 0, box.row, kv_head, box.page);
        }
      }
      ahead.step();
      raw_ahead.step(ring.raws);
    };
    for (int i = 0; i < ring.raws; ++i) fetch();
    for (; source.key < end; slot.step(ring.slots)) {
      control.free[slot.at].wait(slot.phase ^ 1);
      if (p.aligned) control.copied[raw.at][warp].wait(raw.phase);
      FA_UNROLL
      for (int done = 0; done < kShare; done += kBatch) {
        const int rows = tile.seq.len_k - source.key - done;
        Batch batch;
        if (p.aligned) {
          batch.read(raw_rows(raw.at, first + done), rows, p.head_dim);
        } else {
          const TensorRef& tensor = source.values ? p.v : p.k;
          batch.template load<false>(head_rows<const T>(tensor, tile.work.batch, kv_head, first_k + source.key + done),
                                     tensor.row_stride, rows, p.head_dim);
        }
        Parts::put(slot_tile(slot), control.from_parts[slot.at], first + done, batch, RowExponents<Batch>(batch));
      }
      fence_async_proxy();
      control.full[slot.at].arrive();
      __syncwarp();  // the copies have been read
      fetch();
      source.step();
      raw.step(ring.raws);
    }
  }

  FA_DEVICE char* raw_rows(int raw, int row) const { return shared + kRawAt + raw * kRawBytes + row * D * 4; }

  // ---- computing --------------------------------------------------------------------------------------------------

  struct Consumer {
    const Fp32Forward& block;
    const Params& p;
    const Tile& tile;
    const int group;
    const Share share;
    Place place;
    Output output;  // of the chunk, from_parts undone
    OnlineSoftmax<float, Rows> softmax;
    Rows largest;  // of the values' from_parts that the row has seen in the chunk
    Rows scale;  // of scores of Q's parts: to log2 units; scored, to raw ones
    const ScoreModifier<T, MODIFIERS> modifier;
    const Dropout dropout;

    explicit FA_DEVICE Consumer(const Fp32Forward& block)
        : block(block),
          p(block.p),
          tile(block.tile),
          group(warpgroup()),
          share(block.p, block.tile, group),
          modifier(p, tile.work.batch, tile.work.head, Mask(p, tile.seq).shift),
          dropout(p, tile.work.batch, tile.work.head) {}

    FA_DEVICE void run() {
      const int rows = min_int(kM, tile.seq.len_q - tile.work.query_begin);
      const bool folds = kFolds && share.has_keys() && share.has_chunks(p);
      start_chunk();
      if (share.has_keys()) {
        if (p.aligned) {
          load_queries<true>(rows);
        } else {
          load_queries<false>(rows);
        }
      }
      if (folds) clear_stash();
      pass_by(share.blocks_before);
      for (int key = share.begin; key < share.end; key += kN) {
        if (folds && key != share.begin && key % p.split_size == 0) fold();
        visit(key);
      }
      pass_by(share.blocks_after);
      if (!tile.has_rows(group)) return;
      end_chunk();
      if (folds) fold_last();
      // Worked out again rather than held across the loop.
      write(Tile(p, Work(p, uint32_t(unhoisted(int(blockIdx.x))))));
    }

    // Each warp its own.
    template <bool ALIGNED>
    FA_DEVICE void load_queries(int rows) {
      constexpr int kAtOnce = 2;  // batches
      const T* q = head_rows<const T>(p.q, tile.work.batch, tile.work.head, tile.seq.first_q + tile.work.query_begin);
      const int warp_row = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0) * 16;
      FA_UNROLL
      for (int done = 0; done < 16; done += kAtOnce * kBatch) {
        Batch batches[kAtOnce];
        FA_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int row = warp_row + done + i * kBatch;
          batches[i].template load<ALIGNED>(q + row * p.q.row_stride, p.q.row_stride, rows - row, p.head_dim);
        }
        FA_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          QueryParts::put(queries(), block.control.queries_from_parts + group * 64, warp_row % 64 + done + i * kBatch,
                          batches[i], RowExponents<Batch>(batches[i]));
        }
      }
      fence_async_proxy();
      sync_named(1 + group, 128);
      const float scale_log2 = modifier.scale_log2();
      Rows::for_each([&](int slot, int row, bool) {
        scale[slot] = block.control.queries_from_parts[row] * (kScored ? 1.0f : scale_log2);
      });
    }
    FA_DEVICE char* queries() const { return block.shared + group * QueryParts::kBytes; }

    FA_DEVICE void await() const { block.control.full[place.at].wait(place.phase); }
    FA_DEVICE void release() {
      block.control.free[place.at].arrive();
      place.step(block.ring.slots);
    }
    // Blocks of keys that none of the warpgroup's rows sees.
    FA_DEVICE void pass_by(int blocks) {
#pragma unroll 1
      for (int tiles = 2 * blocks; tiles > 0; --tiles) {
        await();
        release();
      }
    }

    FA_DEVICE void visit(int key) {
      Scores scores;
      score(scores);
      if (kScored) {
        Scores::for_each([&](int slot, int, int, int reg) { scores[reg] *= scale[slot]; });
        modifier.apply(scores, tile.work.query_begin, key);
      }
      const bool hides = !share.all_see(key);
      if (hides) share.template hide<IntRows>(p, tile, key, scores);
      Rows rescale;
      softmax.raise_max(scores, softmax_scale(), rescale);

      await();
      float from_parts[kN / 4];  // of the lane's columns
      read_columns(block.control.from_parts[place.at], from_parts);
      raise_largest(scores, from_parts, hides, rescale);
      if (__any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) softmax.apply(rescale, output);
      softmax.exponentiate(scores, softmax_scale());
      if (kScored && dropout.enabled()) dropout.drop(scores, tile.work.query_begin, key);

      uint32_t high[kN / 16][4], low[kN / 16][4];
      const float to_parts[2] = {weights_to_parts(0), weights_to_parts(1)};
      FA_UNROLL
      for (int i = 0; i < Scores::kRegs / 2; ++i) {  // pairs of columns, of the first row and the second in turn
        const float scale = to_parts[i % 2], *of_column = from_parts + i / 2 * 2;
        // In this order: the power of a value that the row does not see may be any, times the scale infinite.
        split(scores[2 * i] * of_column[0] * scale, scores[2 * i + 1] * of_column[1] * scale, high[i / 4][i % 4],
              low[i / 4][i % 4]);
      }
      Parts::multiply(
          high, low, shared_address(block.slot_tile(place)), [&] { release(); },
          [&](int reg, float sum) { output[reg] += sum; });  // with rounding to nearest
    }

    FA_DEVICE auto softmax_scale() const {
      if constexpr (kScored) {
        return modifier.scale_log2();
      } else {
        return scale;
      }
    }

    // scores = Q K^T, of Q's parts
    FA_DEVICE void score(Scores& scores) {
      await();
      float from_parts[kN / 4];
      uint32_t q = shared_address(queries());
      if constexpr (D == 256) q = uint32_t(unhoisted(int(q)));  // lest all descriptors be kept across the loop
      Parts::multiply_rows(
          scores.value, q, shared_address(block.slot_tile(place)),
          [&] { read_columns(block.control.from_parts[place.at], from_parts); });
      release();
      FA_UNROLL
      for (int reg = 0; reg < Scores::kRegs; ++reg) scores[reg] *= from_parts[reg / 4 * 2 + reg % 2];
    }

    // P <= 2^8, times a value's from_parts, which is at most `largest`.
    FA_DEVICE float weights_to_parts(int slot) { return inverse_power(largest[slot]) * 128.0f; }
    FA_DEVICE void raise_largest(const Scores& scores, const float (&from_parts)[kN / 4], bool hides, Rows& rescale) {
      Rows seen;
      seen.fill(0);
      if (hides) {
        Scores::for_each([&](int slot, int, int, int reg) {
          const float of_column = from_parts[reg / 4 * 2 + reg % 2];
          seen[slot] = fmaxf(seen[slot], scores[reg] == -infinity<float>() ? 0.0f : of_column);
        });
      } else {
        FA_UNROLL
        for (int i = 0; i < kN / 4; ++i) seen[0] = fmaxf(seen[0], from_parts[i]);
        seen[1] = seen[0];
      }
      FA_UNROLL
      for (int slot = 0; slot < Rows::kSlots; ++slot) {
        seen[slot] = fmaxf(seen[slot], __shfl_xor_sync(0xffffffffu, seen[slot], 1));
        seen[slot] = fmaxf(seen[slot], __shfl_xor_sync(0xffffffffu, seen[slot], 2));
        const float former = largest[slot];
        largest[slot] = fmaxf(former, seen[slot]);
        rescale[slot] *= former * inverse_power(largest[slot]);
      }
    }

    FA_DEVICE void start_chunk() {
      softmax.clear();
      output.fill(0);
      largest.fill(RowExponents<Batch>::least_from_parts());
    }
    FA_DEVICE void end_chunk() {
      softmax.finish();
      Rows scale;
      Rows::for_each([&](int slot, int, bool) { scale[slot] = largest[slot] * (1 / 128.0f); });
      softmax.apply(scale, output);
    }

    // The running fold of chunks, a warp's rows its own.
    FA_DEVICE float* stash() const { return reinterpret_cast<float*>(block.shared + kFoldAt); }
    FA_DEVICE float& stashed(int reg) const { return stash()[reg * (kWarps * 32) + int(threadIdx.x)]; }
    FA_DEVICE float& stashed_max(int row) const { return stash()[kM * D + row]; }
    FA_DEVICE float& stashed_sum(int row) const { return stashed_max(kM + row); }

    FA_DEVICE void clear_stash() {
      OnlineSoftmax<float, Rows> none;
      none.clear();
      none.finish();
      keep_rows(none);
      FA_UNROLL
      for (int reg = 0; reg < Output::kRegs; ++reg) stashed(reg) = 0;
    }
    FA_DEVICE void fold() {
      end_chunk();
      Rows keep, add;
      fold_rows(keep, add);
      keep_rows(softmax);
      Output::for_each([&](int slot, int, int, int reg) {
        stashed(reg) = fma_rn(output[reg], add[slot], stashed(reg) * keep[slot]);
      });
      start_chunk();
    }
    FA_DEVICE void fold_last() {
      Rows keep, add;
      fold_rows(keep, add);
      Output::for_each([&](int slot, int, int, int reg) {
        output[reg] = fma_rn(output[reg], add[slot], stashed(reg) * keep[slot]);
      });
    }
    FA_DEVICE void fold_rows(Rows& keep, Rows& add) {
      Rows::for_each([&](int slot, int row, bool) {
        float max = stashed_max(row), sum = stashed_sum(row);
        fold_weights(max, sum, softmax.max[slot], softmax.sum[slot], keep[slot], add[slot]);
        softmax.max[slot] = max;
        softmax.sum[slot] = sum;
      });
      __syncwarp();  // all lanes have read
    }
    FA_DEVICE void keep_rows(OnlineSoftmax<float, Rows>& softmax) {
      Rows::for_each([&](int slot, int row, bool owner) {
        if (!owner) return;
        stashed_max(row) = softmax.max[slot];
        stashed_sum(row) = softmax.sum[slot];
      });
      __syncwarp();
    }

    FA_DEVICE void write(const Tile& tile) {
      const Work& work = tile.work;
      const int rows = min_int(kM, tile.seq.len_q - work.query_begin);
      if (p.num_splits > 1) return write_partial(p, work, rows, softmax, output);
      Rows scale;
      finish_rows(p, work, tile.seq, rows, kScored ? kept_scale<float>(p) : 1.0f, softmax, scale);
      softmax.apply(scale, output);
      const int first = group * 64;
      T* const out = head_rows<T>(p.out, work.batch, work.head, tile.seq.first_q + work.query_begin + first);
      write_rows<D>(output.value, out, p.out.row_stride, rows - first, p.head_dim, p.aligned);
    }
  };
};

}  // namespace sm90
}  // namespace flash_attn
