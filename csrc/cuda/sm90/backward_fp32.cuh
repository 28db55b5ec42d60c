// The fp32 backward on Hopper, in fp16 parts as forward_fp32.cuh. A thread block has 64 keys. Eight warps load: K and V
// once, then blocks of 64 queries' dO and Q in turn. One warpgroup has dV, the other dK, over all columns: the first
// works out P^T from S^T = K Q^T, for dV += P^T dO, and hands it on; the second dS^T from dP^T = V dO^T, for
// dK += dS^T Q and, through shared memory, for dQ = dS K, of which either does half of the columns. What is a left
// factor is scaled to fp16's range anew in each step: rows for dK, a tile for dQ.
//
// Wide heads leave room for tiles of 32 queries, two a step. wgmma multiplies 64 rows at least, so dQ is worked out
// transposed, dQ^T = K^T dS^T, and lanes exchange halves of it on the way to device memory; so too at 96, where half of
// the columns are no multiple of a panel's.
#pragma once

#include "../attention/score.cuh"
#include "../sm80/arch.cuh"
#include "key_block.cuh"
#include "maps.cuh"
#include "parts.cuh"
#include "place.cuh"

namespace flash_attn {
namespace sm90 {

template <int D, Modifiers MODIFIERS>
struct Fp32Backward : KeyBlock<64, 64> {
  using Keys = KeyBlock<64, 64>;
  using T = float;
  using Params = BackwardParams;
  static constexpr int kBlockM = kM, kBlockN = kN;
  static constexpr int kComputing = 256, kLoaders = 8;  // threads that compute, warps that load
  static constexpr int kThreads = kComputing + kLoaders * 32, kStashBytes = 0;
  static constexpr int kLoaderRegisters = D == 256 ? 48 : D == 192 ? 72 : 56;
  static constexpr int kConsumerRegisters = 256 - kLoaderRegisters;
  static constexpr bool kTakesAnyRows = true;  // of any alignment

  static constexpr bool kScored = MODIFIERS == Modifiers::kAny;
  static constexpr bool kWide = D > 128;
  static constexpr int kRows = kWide ? 32 : 64, kTiles = kM / kRows;  // queries of a tile; tiles of a step
  static constexpr bool kTransposes = kWide || D == 96;  // dQ
  using Parts = PartsTile<D>;  // of K or V
  using QueryParts = PartsTile<D, kRows>;  // of dO or Q
  static constexpr int kDsBytes = kN * 128 * (kWide ? 1 : 2);  // of dS^T: wide, low parts behind a row's high ones
  static constexpr int kDsLow = kWide ? kRows * 2 : kN * 128;  // from high parts to low ones
  using Scores = sm80::Accumulator<float, kN, kRows, 4, 4>;  // [keys, queries], of a warpgroup
  using KeyGradient = sm80::Accumulator<float, kN, D, 4, 4>;
  using QueryGradient = sm80::Accumulator<float, kM, D, 4, 8>;  // of both warpgroups
  using Rows = sm80::Rows<float, kN, 4>;
  using IntRows = sm80::Rows<int, kN, 4>;
  static constexpr int kBatch = kWide ? 2 : 8;  // rows that a loading warp has at once
  using Batch = WarpRows<D, kBatch>;

  static constexpr int kSlots = D == 64 || D == 192 ? 4 : D == 256 ? 2 : 3;  // of a ring of dO's and Q's tiles in turn
  static constexpr int kColumns = kRows / 4;  // of a lane: queries
  struct Control {
    Barrier keys_full[2], full[kSlots], free[kSlots], copied[kLoaders];
    Barrier p_full[4], p_free[4];  // of a warp that computes P, and of the one that needs it
    Barrier ds_full, ds_free;
    uint32_t largest_ds[2];
    float ds_from_parts;
    alignas(16) float keys_from_parts[2][kN], from_parts[kSlots][kRows];
    float of_query[kSlots][kRows];  // dO's: -delta; Q's: -LSE, in log2 units
  };
  static constexpr int kVAt = Parts::kBytes, kRingAt = kVAt + Parts::kBytes;
  static constexpr int kDsAt = kRingAt + kSlots * QueryParts::kBytes, kPAt = kDsAt + kDsBytes;
  static constexpr int kRawAt = kPAt + kRows * kN * 4, kControlAt = kRawAt + kLoaders * Batch::kBytes;
  static constexpr int kSharedBytes = kControlAt + (int(sizeof(Control)) + 127) / 128 * 128;

  struct Launched {
    Params p;
    CUtensorMap q, k, v, dout;  // where rows are aligned

    explicit Launched(const Params& p) : p(p), q{}, k{}, v{}, dout{} {
      if (!p.aligned) return;
      q = map_queries(p, p.q, Batch::kCount, D);
      k = map_keys(p, p.k, Batch::kCount, D);
      v = map_keys(p, p.v, Batch::kCount, D);
      dout = map_queries(p, p.dout, Batch::kCount, D);
    }
  };

  static int64_t blocks(const Params& p) { return int64_t(ceil_div(p.seqlen_k, kN)) * p.heads_kv * p.batch; }
  static void launch(const void* params, int64_t blocks, int shared_bytes, void* stream) {
    launch_blocks<Fp32Backward>(Launched(*static_cast<const Params*>(params)), blocks, 1, shared_bytes, stream);
  }
  static const void* device() { return reinterpret_cast<const void*>(&run_blocks<Fp32Backward>); }

  struct Lanes {
    static constexpr int kThreads = Fp32Backward::kThreads;
    static FA_DEVICE int lane() { return int(threadIdx.x); }
  };

  const Launched& launched;
  char* const shared;
  Control& control;

  FA_DEVICE Fp32Backward(const Launched& launched, char* shared)
      : KeyBlock<64, 64>(launched.p, blockIdx.x),
        launched(launched),
        shared(shared),
        control(*reinterpret_cast<Control*>(shared + kControlAt)) {}

  FA_DEVICE void run() {
    this->template clear_spare_keys<T, Lanes>();
    if (work.key_begin >= seq.stored_k) return;
    if (threadIdx.x == 0) {
      for (Barrier& keys : control.keys_full) keys.init(kLoaders * 32);
      for (int slot = 0; slot < kSlots; ++slot) {
        control.full[slot].init(kLoaders * 32);  // every lane that has written, and read: racecheck follows that
        control.free[slot].init(kComputing);
      }
      for (Barrier& copied : control.copied) copied.init(1);
      for (int pair = 0; pair < 4; ++pair) {
        control.p_full[pair].init(32);
        control.p_free[pair].init(32);
      }
      control.ds_full.init(kComputing / 2);
      control.ds_free.init(kComputing);
      control.largest_ds[0] = control.largest_ds[1] = 0;
      fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x >= kComputing) {
      keep_registers<kLoaderRegisters>();
      load();
    } else {
      take_registers<kConsumerRegisters>();
      if (warpgroup() == 0) {
        compute<false>();
      } else {
        compute<true>();
      }
    }
  }

  // K at 0, V; not kept across the loop where there are registers for little else.
  FA_DEVICE uint32_t factor(int at) const {
    const uint32_t address = shared_address(shared) + at;
    return kWide ? uint32_t(unhoisted(int(address))) : address;
  }
  FA_DEVICE char* slot_tile(const Place& place) const { return shared + kRingAt + place.at * QueryParts::kBytes; }

  // ---- loading: a warp has an eighth of every tile; while it splits some rows, the next are on their way ----------

  // Tiles are numbered: K, V, then dO and Q of each step.
  template <class X>
  static FA_DEVICE const X& of_tile(int tile, const X& k, const X& v, const X& dout, const X& q) {
    return tile < 2 ? (tile == 0 ? k : v) : (tile % 2 == 0 ? dout : q);
  }
  static FA_DEVICE constexpr int share(int tile) { return (tile < 2 ? kN : kRows) / kLoaders; }  // a warp's rows
  // Rows of one, from `row` of the tensor on, and a value for each of the warp's: this lane's.
  struct Source {
    int row, head, rows;
    float value;
  };
  FA_DEVICE Source source_of_keys(int first) const {
    const int key = work.key_begin + first;
    return {int(seq.first_k) + key, work.kv_head, seq.len_k - key, 0.0f};
  }
  FA_DEVICE Source source_of_queries(const RowsRef& values, float scale, float beyond, int head, int query) const {
    const int lane = int(threadIdx.x) % 32, rows = seq.len_q - query;
    const float* const of_row = head_rows<const float>(values, work.batch, head, seq.first_q + query);
    const float value = lane < share(2) && lane < rows ? of_row[lane] : beyond;
    return {int(seq.first_q) + query, head, rows, value * scale};
  }

  FA_DEVICE void load() {
    const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0) - kComputing / 32;
    const int lane = int(threadIdx.x) % 32, tiles = steps() > 0 ? 2 + 2 * kTiles * steps() : 0;
    char* const raw = shared + kRawAt + warp * Batch::kBytes;
    Step step(work.kv_head * group);
    Source next{};
    // The rows of a tile from `done` of the warp's on.
    const auto fetch = [&](int tile, int done) {
      if (tile >= tiles) return;
      if (done > 0) {
        next.row += kBatch;
        next.rows -= kBatch;
      } else if (tile < 2) {
        next = source_of_keys(warp * share(tile));
      } else {
        const int query = walk.query(step.index) + (tile / 2 - 1) % kTiles * kRows + warp * share(tile);
        if (tile % 2 == 0) {
          next = source_of_queries(p.delta, -1.0f, 0.0f, step.head, query);
        } else {
          next = source_of_queries(p.lse, -float(kLog2E), infinity<float>(), step.head, query);
          if (tile / 2 % kTiles == 0) step.next(walk.steps);
        }
      }
      if (!p.aligned || !first_lane()) return;
      const CUtensorMap& map = of_tile(tile, launched.k, launched.v, launched.dout, launched.q);
      control.copied[warp].arrive_expecting(Batch::kBytes);
      load_box(shared_address(raw), map, control.copied[warp], 0, next.row, next.head, p.cu_seqlens_q ? 0 : work.batch);
    };
    fetch(0, 0);
    Place slot;
    uint32_t copies = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      const bool keys = tile < 2;
      char* const to = keys ? shared + tile * kVAt : slot_tile(slot);
      float* const from_parts = keys ? control.keys_from_parts[tile] : control.from_parts[slot.at];
      for (int done = 0; done < share(tile); done += kBatch) {
        Batch batch;
        if (p.aligned) {
          control.copied[warp].wait(copies++ % 2);
          batch.read(raw, next.rows, p.head_dim);
        } else {
          const TensorRef& tensor = of_tile(tile, p.k, p.v, p.dout, p.q);
          batch.template load<false>(head_rows<const T>(tensor, work.batch, next.head, next.row), tensor.row_stride,
                                     next.rows, p.head_dim);
        }
        const float value = next.value;
        const RowExponents<Batch> exponents(batch);
        __syncwarp();  // the copies have been read
        const bool last = done + kBatch == share(tile);
        fetch(last ? tile + 1 : tile, last ? 0 : done + kBatch);
        const int row = warp * share(tile) + done;
        if (keys) {
          Parts::put(to, from_parts, row, batch, exponents);
          continue;
        }
        if (done == 0) {
          control.free[slot.at].wait(slot.phase ^ 1);
          if (lane < share(tile)) control.of_query[slot.at][row + lane] = value;
        }
        QueryParts::put(to, from_parts, row, batch, exponents);
      }
      fence_async_proxy();
      if (keys) {
        control.keys_full[tile].arrive();
      } else {
        control.full[slot.at].arrive();
        slot.step(kSlots);
      }
    }
  }

  // ---- computing --------------------------------------------------------------------------------------------------

  // Powers of two of the rows of dQ, or of dQ^T's columns.
  struct Sizes {
    float value[kTransposes ? kColumns : 2];
    FA_DEVICE float of(int reg) const { return value[kTransposes ? column_of(reg) : reg / 2 % 2]; }
  };
  // Where a warpgroup is: its places of dO and of Q.
  struct State {
    Place dout, query;
    uint32_t phase = 0;  // of a step
    FA_DEVICE State() { query.step(kSlots); }
    FA_DEVICE void step() {
      for (Place* place : {&dout, &query}) place->step(kSlots), place->step(kSlots);
      phase ^= 1;
    }
  };

  // KEYS: dK, else dV.
  template <bool KEYS>
  FA_DEVICE void compute() {
    KeyGradient sum;
    sum.fill(0);
    if (steps() > 0) {
      const PlainQueries plain(mask, work.key_begin, false);
      control.keys_full[0].wait(0);
      control.keys_full[1].wait(0);
      Rows k_from_parts, v_from_parts;
      Rows::for_each([&](int slot, int row, bool) {
        k_from_parts[slot] = control.keys_from_parts[0][row];
        v_from_parts[slot] = control.keys_from_parts[1][row];
      });
      const int v_exponent = largest_exponent(control.keys_from_parts[1]);
      State state;
      Step step(work.kv_head * group);
      for (int left = steps(); left > 0; --left, step.next(walk.steps)) {
        const bool hides = !plain.holds(walk.query(step.index));
        for (int tile = 0; tile < kTiles; ++tile) {
          const int query = walk.query(step.index) + tile * kRows;
          Sizes sizes;
          if constexpr (KEYS) {
            differentiate(query, hides, k_from_parts, v_from_parts, v_exponent, state, sizes, sum);
          } else {
            exponentiate(step.head, query, hides, k_from_parts, v_exponent, state, sizes, sum);
          }
          add_queries(step.head, walk.query(step.index), tile, state.phase, sizes);
          state.step();
        }
      }
    }
    if (KEYS) {
      FA_UNROLL
      for (float& x : sum.value) x *= float(p.softmax_scale);
    }
    write(sum, KEYS ? p.dk : p.dv);
  }
  FA_DEVICE void write(const KeyGradient& sum, const TensorRef& dst) const {
    // Worked out again rather than held across the loop.
    const KeyBlock<64, 64> block(p, uint32_t(unhoisted(int(blockIdx.x))));
    const int key = block.work.key_begin;
    write_rows<D>(sum.value, head_rows<T>(dst, block.work.batch, block.work.kv_head, block.seq.first_k + key),
                  dst.row_stride, block.seq.stored_k - key, p.head_dim, p.aligned);
  }

  // P^T, and dV.
  FA_DEVICE void exponentiate(int head, int query, bool hides, const Rows& k_from_parts, int v_exponent,
                              const State& state, Sizes& sizes, KeyGradient& dv) {
    Scores x;
    control.full[state.query.at].wait(state.query.phase);
    QueryParts::multiply_rows(x.value, factor(0), shared_address(slot_tile(state.query)), [] {});
    float columns[kColumns];
    read_columns(control.from_parts[state.query.at], columns);
    scale_scores(x, columns, k_from_parts);
    // ALiBi's distance is the same seen from the key.
    const ScoreModifier<T, MODIFIERS> modifier(p, work.batch, head, -mask.shift);
    Scores slope;  // of the softcap
    if (kScored) {
      slope.fill(1);
      modifier.apply(x, work.key_begin, query, [&](int reg, float derivative) { slope[reg] = derivative; });
    }
    const float scale_log2 = modifier.scale_log2();
    read_columns(control.of_query[state.query.at], columns);
    control.free[state.query.at].arrive();
    for_columns([&](int reg, int column) { x[reg] = exp2_fast(fma_rn(x[reg], scale_log2, columns[column])); });
    if (hides) hide(query, x);
    if (kScored) {
      for_columns([&](int reg, int) { slope[reg] *= x[reg]; });
      const Dropout dropout(p, work.batch, head);
      if (dropout.enabled()) {
        typename Keys::template Kept<Scores> kept;
        this->find_kept(dropout, query, kept);
        for_columns([&](int reg, int) { slope[reg] = kept.keeps(reg) ? slope[reg] : -slope[reg]; });
        Keys::drop(kept, kept_scale<float>(p), x);
      }
      send(slope, state.phase);
    } else {
      send(x, state.phase);
    }

    control.full[state.dout.at].wait(state.dout.phase);
    read_columns(control.from_parts[state.dout.at], columns);
    read_sizes(state.dout, v_exponent, sizes);
    add_product(dv, x, columns, state.dout);
  }

  // dS^T, and dK.
  FA_DEVICE void differentiate(int query, bool hides, const Rows& k_from_parts, const Rows& v_from_parts,
                               int v_exponent, const State& state, Sizes& sizes, KeyGradient& dk) {
    Scores x;
    control.full[state.dout.at].wait(state.dout.phase);
    QueryParts::multiply_rows(x.value, factor(kVAt), shared_address(slot_tile(state.dout)), [] {});
    float columns[kColumns];
    read_columns(control.from_parts[state.dout.at], columns);
    read_sizes(state.dout, v_exponent, sizes);
    scale_scores(x, columns, v_from_parts);
    float negated_delta[kColumns];
    read_columns(control.of_query[state.dout.at], negated_delta);
    control.free[state.dout.at].arrive();
    if (kScored) {
      const float kept = kept_scale<float>(p);
      receive(state.phase, [&](int reg, float of_p) {
        const float dp = int(float_to_bits(of_p)) < 0 ? 0.0f : x[reg] * kept;
        x[reg] = (dp + negated_delta[column_of(reg)]) * absolute(of_p);
      });
    } else {
      for_columns([&](int reg, int column) { x[reg] += negated_delta[column]; });
      receive(state.phase, [&](int reg, float of_p) { x[reg] *= of_p; });
    }
    if (hides) hide(query, x);

    // For dQ, whose rows take their sizes back.
    FA_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      columns[i] = inverse_power(size_of(columns[i], v_exponent, negated_delta[i]));
    }
    put_ds(x, columns, k_from_parts, state.phase);

    control.full[state.query.at].wait(state.query.phase);
    read_columns(control.from_parts[state.query.at], columns);
    add_product(dk, x, columns, state.query);
  }

  // What is below 1 becomes parts below 2^15.
  static constexpr float kToParts = 32768.0f;
  // A power of two, of an exponent as it stands in a float: within 2^-100 and 2^110, so that its inverse times kToParts
  // is normal.
  static FA_DEVICE float power_of(int exponent) {
    return bits_to_float(uint32_t(min_int(max_int(exponent, 27), 237)) << 23);
  }
  // The one above a positive float, given as bits.
  static FA_DEVICE float power_above(uint32_t bits) { return power_of(int(bits >> 23) + 1); }

  // sum += x y, x's columns times `columns`, y the tile at `place`, which is released.
  FA_DEVICE void add_product(KeyGradient& sum, Scores& x, const float (&columns)[kColumns], const Place& place) {
    float from_parts[2];
    scale_rows(x, columns, from_parts);
    uint32_t high[kRows / 16][4], low[kRows / 16][4];
    split_all(x, high, low);
    QueryParts::multiply(
        high, low, shared_address(slot_tile(place)), [&] { control.free[place.at].arrive(); },
        [&](int reg, float product) { sum[reg] = fma_rn(product, from_parts[reg / 2 % 2], sum[reg]); });
  }
  static FA_DEVICE void split_all(const Scores& x, uint32_t (&high)[kRows / 16][4], uint32_t (&low)[kRows / 16][4]) {
    FA_UNROLL
    for (int i = 0; i < Scores::kRegs / 2; ++i) split(x[2 * i], x[2 * i + 1], high[i / 4][i % 4], low[i / 4][i % 4]);
  }

  // Which of the lane's columns a register is in, of a product of a warpgroup; and f(reg, it) for all of the scores'.
  static FA_DEVICE constexpr int column_of(int reg) { return reg / 4 * 2 + reg % 2; }
  template <class F>
  static FA_DEVICE void for_columns(F&& f) {
    FA_UNROLL
    for (int reg = 0; reg < Scores::kRegs; ++reg) f(reg, column_of(reg));
  }
  // About how large dP - delta may be in a query's row, as a power of two: as dO's row times V's largest is, or as
  // delta, which the LSE's gradient may make as large as it likes.
  static FA_DEVICE float size_of(float dout_from_parts, int v_exponent, float delta) {
    const int of_products = int(float_to_bits(dout_from_parts) >> 23) + v_exponent;
    return power_of(max_int(of_products, int(float_to_bits(absolute(delta)) >> 23) + 1));
  }
  FA_DEVICE void read_sizes(const Place& dout, int v_exponent, Sizes& sizes) const {
    if constexpr (kTransposes) {
      float from_parts[kColumns], negated_delta[kColumns];
      read_columns(control.from_parts[dout.at], from_parts);
      read_columns(control.of_query[dout.at], negated_delta);
      FA_UNROLL
      for (int i = 0; i < kColumns; ++i) sizes.value[i] = size_of(from_parts[i], v_exponent, negated_delta[i]);
    } else {
      Rows::for_each([&](int slot, int row, bool) {
        sizes.value[slot] = size_of(control.from_parts[dout.at][row], v_exponent, control.of_query[dout.at][row]);
      });
    }
  }
  // Of a tile's powers, for size_of(): as an exponent that is added to one as it stands in a float.
  static FA_DEVICE int largest_exponent(const float* from_parts) {
    const int lane = int(threadIdx.x) % 32;
    const float largest = ::fmaxf(from_parts[lane], from_parts[lane + 32]);
    constexpr int kBoth = 127 - 2 * 15;  // 2^15 times either is what it stands for
    return int(__reduce_max_sync(0xffffffffu, float_to_bits(largest)) >> 23) - kBoth;
  }
  static FA_DEVICE void scale_scores(Scores& x, const float (&columns)[kColumns], const Rows& rows) {
    for_columns([&](int reg, int column) { x[reg] *= columns[column] * rows.value[reg / 2 % 2]; });
  }
  // x, its columns times `columns`, to the range of parts, each row by a power of two of its own, which `from_parts`
  // takes back.
  static FA_DEVICE void scale_rows(Scores& x, const float (&columns)[kColumns], float (&from_parts)[2]) {
    float largest[2] = {};
    for_columns([&](int reg, int column) {
      x[reg] *= columns[column];
      largest[reg / 2 % 2] = ::fmaxf(largest[reg / 2 % 2], absolute(x[reg]));
    });
    FA_UNROLL
    for (int slot = 0; slot < 2; ++slot) {
      largest[slot] = ::fmaxf(largest[slot], __shfl_xor_sync(0xffffffffu, largest[slot], 1));
      largest[slot] = ::fmaxf(largest[slot], __shfl_xor_sync(0xffffffffu, largest[slot], 2));
      from_parts[slot] = power_above(float_to_bits(largest[slot])) * (1 / kToParts);
    }
    const float to_parts[2] = {inverse_power(from_parts[0]), inverse_power(from_parts[1])};
    for_columns([&](int reg, int) { x[reg] *= to_parts[reg / 2 % 2]; });
  }
  FA_DEVICE void hide(int query, Scores& x) const {
    for_each_hidden<Scores, IntRows>(query, [&](int reg) { x[reg] = 0; });
  }

  // P^T from one warpgroup to the other, lane by lane; scored, times the softcap's slope, and negative where dropped.
  static FA_DEVICE int pair() { return int(threadIdx.x) / 32 % 4; }
  FA_DEVICE float4* exchanged(int n) const {
    return reinterpret_cast<float4*>(shared + kPAt + pair() * (kRows * kN)) + n * 32 + int(threadIdx.x) % 32;
  }
  FA_DEVICE void send(const Scores& x, uint32_t phase) {
    control.p_free[pair()].wait(phase ^ 1);
    FA_UNROLL
    for (int n = 0; n < Scores::kRegs / 4; ++n) {
      *exchanged(n) = float4{x[4 * n], x[4 * n + 1], x[4 * n + 2], x[4 * n + 3]};
    }
    control.p_full[pair()].arrive();
  }
  // f(reg, what was sent)
  template <class F>
  FA_DEVICE void receive(uint32_t phase, F&& f) {
    control.p_full[pair()].wait(phase);
    FA_UNROLL
    for (int n = 0; n < Scores::kRegs / 4; ++n) {
      const float4 p = *exchanged(n);
      f(4 * n, p.x), f(4 * n + 1, p.y), f(4 * n + 2, p.z), f(4 * n + 3, p.w);
    }
    control.p_free[pair()].arrive();
  }

  // dS^T to shared memory, its columns times `columns`, its rows times `rows`, as parts of one scale.
  FA_DEVICE void put_ds(const Scores& ds, const float (&columns)[kColumns], const Rows& rows, uint32_t phase) {
    Scores x;
    float largest = 0;
    for_columns([&](int reg, int column) {
      x[reg] = ds[reg] * columns[column] * rows.value[reg / 2 % 2];  // in this order: what is 0 stays 0
      largest = ::fmaxf(largest, absolute(x[reg]));
    });
    uint32_t& of_tile = control.largest_ds[phase];
    const uint32_t of_warp = __reduce_max_sync(0xffffffffu, float_to_bits(largest));
    if (first_lane()) atomicMax(&of_tile, of_warp);
    sync_named(3, kComputing / 2);
    const float from_parts = power_above(of_tile) * (1 / kToParts), to_parts = inverse_power(from_parts);
    FA_UNROLL
    for (float& value : x.value) value *= to_parts;
    uint32_t parts[2][kRows / 16][4];
    split_all(x, parts[0], parts[1]);
    control.ds_free.wait(phase ^ 1);
    if (threadIdx.x == kComputing / 2) {
      control.largest_ds[phase ^ 1] = 0;
      control.ds_from_parts = from_parts;
    }
    const uint32_t to = shared_address(shared) + kDsAt;
    if constexpr (kWide) {
      uint32_t side_by_side[kM / 16][4];
      FA_UNROLL
      for (int i = 0; i < kM / 16 * 4; ++i) side_by_side[i / 4][i % 4] = parts[i / 8][i / 4 % 2][i % 4];
      store_rows(side_by_side, to, pair() * 16);
    } else {
      store_rows(parts[0], to, pair() * 16);
      store_rows(parts[1], to + kDsLow, pair() * 16);
    }
    fence_async_proxy();
    control.ds_full.arrive();
  }

  // A warpgroup's half of dQ's columns, of a tile of the block of queries from `query` on.
  FA_DEVICE void add_queries(int head, int query, int tile, uint32_t phase, const Sizes& sizes) {
    const int half = warpgroup();
    control.ds_full.wait(phase);
    const float from_parts = control.ds_from_parts;
    const int64_t block = place_of_queries<int64_t>(p, work.batch, head, seq.first_q, query, kM);
    int32_t* const turn = p.dq_turn + block;
    const auto await = [&] {
      if (!p.deterministic || tile > 0) return;
      await_turn(turn, QueryWalk<kM, kN>::blocks_before(mask, work.key_begin, query), half);
    };
    float* const to = static_cast<float*>(p.dq_accum) + block * (kM * D);
    if constexpr (kTransposes) {
      // Of three panels the warpgroups take turns with the middle one.
      const bool has_second = D == 256 || (D == 192 && half == tile);
      const int first = D == 96 ? half : half * 2, second = D == 256 ? first + 1 : 1;
      float dq[kRows / 2];
      multiply_queries(dq, first);
      if (!has_second) control.ds_free.arrive();
      scale(dq, from_parts, sizes);
      await();
      add(dq, first, tile, to);
      if (has_second) {
        multiply_queries(dq, second);
        control.ds_free.arrive();
        scale(dq, from_parts, sizes);
        add(dq, second, tile, to);
      }
    } else {
      QueryGradient dq;
      multiply_queries(dq, half);
      control.ds_free.arrive();
      scale(dq.value, from_parts, sizes);
      await();
      Sm80::Block<kComputing / 32>::accumulate(dq, to);
    }
    if (p.deterministic && tile == kTiles - 1) pass_turn(turn, half);
  }
  template <int REGS>
  static FA_DEVICE void scale(float (&dq)[REGS], float from_parts, const Sizes& sizes) {
    FA_UNROLL
    for (int reg = 0; reg < REGS; ++reg) dq[reg] = dq[reg] * from_parts * sizes.of(reg);
  }
  // The product of parts, small ones first; `multiply` takes where dS's and K's are.
  template <class Multiply>
  FA_DEVICE void multiply_parts(uint32_t k, Multiply&& multiply) const {
    const uint32_t ds = shared_address(shared) + kDsAt;
    wgmma_fence();
    multiply(ds + kDsLow, k, false);
    multiply(ds, k + Parts::kLow, true);
    multiply(ds, k, true);
    wgmma_commit();
    wgmma_wait<0>();
  }
  FA_DEVICE void multiply_queries(QueryGradient& dq, int half) const {
    const uint32_t columns = factor(D == 64 ? half * 64 : half * Parts::kPanelBytes);
    multiply_parts(columns, [&](uint32_t ds, uint32_t k, bool adds) {
      const uint64_t a = descriptor(ds, 0), b = descriptor(k, Parts::kPanelBytes);
      FA_UNROLL
      for (int step = 0; step < kN / 16; ++step) {
        Wgmma<D / 2>::template shared<Half, true, true>(dq.value, advance(a, step * 16 * 128),
                                                        advance(b, step * 16 * 128), adds || step > 0);
      }
    });
    hold(dq.value);
  }
  // dQ^T, of a panel of columns.
  FA_DEVICE void multiply_queries(float (&dq)[kRows / 2], int panel) const {
    multiply_parts(factor(panel * Parts::kPanelBytes), [&](uint32_t ds, uint32_t k, bool adds) {
      const uint64_t a = descriptor(k, 0), b = descriptor(ds, 0);
      FA_UNROLL
      for (int step = 0; step < kN / 16; ++step) {
        Wgmma<kRows>::template shared<Half, true, true>(dq, advance(a, step * 16 * 128), advance(b, step * 16 * 128),
                                                        adds || step > 0);
      }
    });
    hold(dq);
  }
  // A panel of dQ^T to QueryGradient's fragments. Those are of pairs of columns, which neighbours hold: the lane of the
  // even one gives its odd queries for the other's even ones.
  FA_DEVICE void add(const float (&dq)[kRows / 2], int panel, int tile, float* to) const {
    const int lane = int(threadIdx.x) % 32, odd = lane / 4 % 2;
    const int first_col = panel * 64 + int(threadIdx.x) % 128 / 32 * 16;
    if (D % 64 != 0 && first_col >= D) return;
    FA_UNROLL
    for (int n = 0; n < kRows / 8; n += 2) {  // eight queries and the eight after
      FA_UNROLL
      for (int below = 0; below < 2; ++below) {  // a lane's column, and the eighth after it
        const float *first = dq + 4 * n + 2 * below, *second = first + 4;
        const float kept[2] = {odd ? first[1] : first[0], odd ? second[1] : second[0]};
        const float got[2] = {__shfl_xor_sync(0xffffffffu, odd ? first[0] : first[1], 4),
                              __shfl_xor_sync(0xffffffffu, odd ? second[0] : second[1], 4)};
        const float x[4] = {odd ? got[0] : kept[0], odd ? kept[0] : got[0], odd ? got[1] : kept[1],
                            odd ? kept[1] : got[1]};
        const int col = first_col + below * 8;  // of eight
        const int warp = tile * (kRows / 16) + n / 2 + col / (D / 2) * 4, reg = col % (D / 2) / 8 * 4;
        const int thread = warp * 32 + (lane % 4 * 2 + odd) * 4 + lane / 8;
        sm80::reduce_add(to + reg * kComputing + thread * 4, x);
      }
    }
  }

  // Both halves of dQ count.
  FA_DEVICE void await_turn(const int32_t* turn, int before, int half) const {
    if (threadIdx.x % 128 == 0) {
      while (sm80::load_acquire(turn) / 2 != before) {
      }
    }
    sync_named(1 + half, 128);
  }
  FA_DEVICE void pass_turn(int32_t* turn, int half) const {
    sync_named(1 + half, 128);
    if (threadIdx.x % 128 == 0) sm80::add_release(turn, 1);
  }
};

}  // namespace sm90
}  // namespace flash_attn
