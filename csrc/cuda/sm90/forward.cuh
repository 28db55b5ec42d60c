// The forward on Hopper (FlashAttention-3, arXiv 2407.08608): a warp keeps the copy engine busy, and two or three
// warpgroups of 64 query rows each compute. A warpgroup issues the next block's Q K^T before this block's P V, and its
// softmax runs under its own multiplies and the others'. Thread blocks are persistent. Warpgroups share a tile's keys
// and nothing else: each has its own Q, leaves out the blocks that none of its rows sees, and goes on to the next tile
// while the others end the last. The arithmetic, and so every bit, is that of kernels/forward.cuh.
#pragma once

#include "../attention/dropout.cuh"
#include "../attention/epilogue.cuh"
#include "../attention/score.cuh"
#include "../sm80/fragment.cuh"
#include "../tile/tile.cuh"
#include "limits.cuh"
#include "maps.cuh"
#include "packed.cuh"
#include "place.cuh"
#include "rows.cuh"
#include "share.cuh"
#include "shares.cuh"
#include "tma.cuh"
#include "tuning.cuh"
#include "wgmma.cuh"

namespace flash_attn {
namespace sm90 {

// Packed sequences of very different lengths, keys and values in pages, and few rows whose keys are shared out have
// kernels of their own, beside that of the instance: what is done for them would slow others down.
enum class Layout { kUsual, kRagged, kPages, kShares };

template <class T_, int D, Modifiers MODIFIERS, Layout LAYOUT = Layout::kUsual>
struct Forward {
  using T = T_;
  using Params = ForwardParams;
  using Tuning = ForwardTuning<D>;
  static constexpr bool kPersistent = true;
  static constexpr bool kUsual = LAYOUT == Layout::kUsual, kPages = LAYOUT == Layout::kPages;
  static constexpr bool kShares = LAYOUT == Layout::kShares;  // a cluster has a tile, its thread blocks a share each
  static constexpr int kM = Tuning::kBlockM, kN = Tuning::kBlockN;
  static constexpr int kBlockM = kM, kBlockN = kN;
  static constexpr int kGroups = kM / 64, kWarps = 4 * kGroups;  // that compute; the producer is one more group
  static constexpr int kThreads = (kGroups + 1) * 128;
  // A share's blocks of keys are dealt out to the warpgroups, each of which has stages of its own: two of values, since
  // the next block's are awaited before the last one's are done.
  static constexpr bool kDeals = kShares && D <= 192;
  static constexpr int kStages = kDeals ? 2 * kGroups : Tuning::kStages;  // of V
  static constexpr int kKeyStages = kDeals && D > 64 ? kGroups : kStages;

  static constexpr bool kQueriesInRegisters = Tuning::kQueriesInRegisters;  // as a factor; else in shared memory
  static constexpr Pages kReadsPages = Pages::kBoxes;
  static constexpr bool kScored = MODIFIERS == Modifiers::kAny, kSoftcap = MODIFIERS == Modifiers::kSoftcap;
  static constexpr bool kPairs = Tuning::kPairs && MODIFIERS == Modifiers::kNone && kUsual;  // a scored one spills
  // Asks ScoreLimits, and awaits the values half-way through the softmax. Scored ones have no registers for it.
  static constexpr bool kHurries = !kScored, kRescalesAtOnce = kHurries && Tuning::kRescalesAtOnce;

  using Work = ForwardWork<kM>;
  using Scores = sm80::Accumulator<float, kM, kN, kWarps, kWarps>;
  using Output = sm80::Accumulator<float, kM, D, kWarps, kWarps>;
  using Queries = sm80::Operand<T, kM, D, kWarps>;
  using Probabilities = sm80::Operand<T, kM, kN, kWarps>;
  using Rows = sm80::Rows<float, kM, kWarps>;
  using IntRows = sm80::Rows<int, kM, kWarps>;

  // Tiles are panels of 64 columns, rows of 128 bytes.
  static constexpr int kPanels = (D + 63) / 64;
  static constexpr int kQPanel = (kShares ? 64 : kM) * 128, kKPanel = kN * 128;
  static constexpr int kQBytes = kPanels * kQPanel, kKBytes = kPanels * kKPanel;
  static constexpr int kTileBytes = kQBytes + (kKeyStages + kStages) * kKBytes;

  struct Barriers {
    Barrier q_full[kGroups], q_free[kGroups], k_full[kKeyStages], k_free[kKeyStages], v_full[kStages], v_free[kStages];
    Barrier shares_full;
  };
  static constexpr int kMessages = 4, kMessageBytes = 96, kBarrierBytes = 256;
  static_assert(sizeof(Barriers) <= kBarrierBytes);

  // Behind the tiles: room in which a warp turns its rows' fragments into rows. A row with several chunks has the
  // running fold's output there as well, and its maximum and sum; in device memory where it is too wide.
  static constexpr int kMessagesEnd = kTileBytes + kBarrierBytes + kMessages * kGroups * kMessageBytes;
  static constexpr int kRoomAt = (kMessagesEnd + 1023) / 1024 * 1024;
  static constexpr int kOutCols = D < 128 ? D : 128;  // that a warp turns at once
  static constexpr bool kStoresBoxes = Tuning::kStoresBoxes, kSwizzles = kStoresBoxes && kOutCols % 64 == 0;
  static constexpr int kTurned = kTurnBytes<kOutCols, kSwizzles>;
  static constexpr int kOutBytes = kStoresBoxes ? kPanels * kBoxBytes : kTurned, kStash = 16 * D * 4;  // of a warp
  static_assert(kTurned <= kOutBytes);
  using Exchange = ShareExchange<D, kGroups>;
  static constexpr int kSharedBytes = kRoomAt + (kShares ? Exchange::kBytes : kWarps * kOutBytes);
  static_assert(Exchange::kPartBytes <= kKBytes);
  static constexpr bool kStashIsShared = D <= 128;
  static constexpr int kStashBytes = kStashIsShared ? kWarps * (kStash - kOutBytes) + 2 * kM * 4 : 0;
  static constexpr int kStashDeviceBytes = kStashIsShared ? 0 : kWarps * kStash + 2 * kM * 4;

  // Where a head's tiles all see the same keys and there is an even number of them: two thread blocks, a cluster, take
  // neighbouring tiles, and each loads half of the keys' columns for both. That halves the traffic from the L2 cache.
  static bool in_pairs(const ForwardParams& p) {
    return kPairs && !blocks_differ(p) && ceil_div(p.seqlen_q, kM) % 2 == 0;
  }

  static bool is_ragged(const ForwardParams& p) {
    return p.cu_seqlens_q != nullptr && PackedBlocks<kM>::pay(p.batch, p.total_q, p.seqlen_q);
  }

  // Where a head has one tile its keys stream by, and memory is what is waited for.
  static bool streams_keys(const ForwardParams& p) { return p.seqlen_q <= kM; }

  // Up to how many shares of few rows' keys clusters fold, all of which are to run at once.
  static int most_shares(const void* params) {
    const Params& p = *static_cast<const Params*>(params);
    if constexpr (MODIFIERS != Modifiers::kNone) return 0;
    if (p.seqlen_q > Exchange::kRows) return 0;
    using InShares = Forward<T, D, Modifiers::kNone, Layout::kShares>;
    return clusters_at_once<InShares, Exchange::kMostShares>(InShares::kSharedBytes)
        .largest(int64_t(p.batch) * p.heads_q);
  }

  // Q and the output are asked for once, a pair's K and V by all pairs of a head: that keeps them in the L2 cache. Not
  // where a line of its is of two heads.
  static constexpr bool kWholeLines = D % 64 == 0;
  static constexpr Keep kKeepsRows = kWholeLines && D >= 128 ? Keep::kBriefly : Keep::kUsual;
  static constexpr Keep kKeepsPairsKeys = kWholeLines ? Keep::kLong : Keep::kUsual;

  struct Launched {
    ForwardParams p;
    CUtensorMap q, k, v, out;
    bool pairs, ragged;
    int dealt;                // to how many warpgroups a share's blocks of keys are dealt out
    uint32_t shares_inverse;  // inverse_of(num_splits)

    explicit Launched(const ForwardParams& p)
        : p(p),
          q(map_queries(p, p.q, 64)),
          k(map_keys(p, p.k, kN, 64, streams_keys(p))),
          v(map_keys(p, p.v, kN, 64, streams_keys(p))),
          out(kStoresBoxes && p.num_splits == 1 ? map_queries(p, p.out, 16) : CUtensorMap{}),
          pairs(in_pairs(p)),
          ragged(is_ragged(p)),
          dealt(p.deterministic ? 1 : kGroups),
          shares_inverse(inverse_of(p.num_splits)) {}
  };

  static int64_t blocks(const Params& p) { return Work::blocks(p); }
  static void launch(const void* params, int64_t blocks, int shared_bytes, void* stream) {
    const Params& p = *static_cast<const Params*>(params);
    if constexpr (kUsual) {
      using Ragged = Forward<T, D, MODIFIERS, Layout::kRagged>;
      using Pages = Forward<T, D, MODIFIERS, Layout::kPages>;
      if constexpr (MODIFIERS == Modifiers::kNone) {
        using InShares = Forward<T, D, MODIFIERS, Layout::kShares>;
        const bool folds = p.num_splits > 1 && p.num_splits <= most_shares(params);
        if (folds) return InShares::launch(params, blocks, InShares::kSharedBytes, stream);
      }
      if (p.block_table != nullptr) return Pages::launch(params, blocks, shared_bytes, stream);
      if (is_ragged(p)) return Ragged::launch(params, blocks, shared_bytes, stream);
    }
    const Launched launched(p);
    if constexpr (kShares) {
      const dim3 grid(unsigned(p.num_splits), unsigned(p.heads_q), unsigned(p.batch));
      return launch_blocks<Forward>(launched, grid, p.num_splits, shared_bytes, stream);
    }
    const int cluster = launched.pairs ? 2 : 1;
    const int64_t at_once = multiprocessors() / cluster * cluster;
    launch_blocks<Forward>(launched, unsigned(std::min(blocks, at_once)), cluster, shared_bytes, stream);
  }
  static const void* device() { return reinterpret_cast<const void*>(&run_blocks<Forward>); }

  const Launched& launched;
  const ForwardParams& p;
  char* const shared;
  Barriers& barriers;
  const int group;  // this thread's, of those that compute
  const bool pairs;
  const uint32_t rank;      // in the cluster
  const uint32_t informed;  // the barriers at which a warp's lane 0 says what it has read, and in a pair lane 1

  FA_DEVICE Forward(const Launched& launched, char* shared)
      : launched(launched),
        p(launched.p),
        shared(shared),
        barriers(*reinterpret_cast<Barriers*>(shared + kTileBytes)),
        group(warpgroup()),
        pairs(kPairs && launched.pairs),
        rank(pairs || kShares ? cluster_rank() : 0),
        informed(cluster_address(shared_address(&barriers), threadIdx.x % 32 == 1 && pairs ? rank ^ 1 : rank)) {}

  FA_DEVICE uint32_t q_address(int group) const { return shared_address(shared) + (kShares ? 0 : group * 64 * 128); }
  // Keys and values in turn where they have as many stages, else all stages of keys first.
  static constexpr bool kInTurn = kKeyStages == kStages;
  static constexpr int kKStride = (kInTurn ? 2 : 1) * kKBytes, kVBehindK = (kInTurn ? 1 : kKeyStages) * kKBytes;
  FA_DEVICE uint32_t k_address(int stage) const { return shared_address(shared) + kQBytes + stage * kKStride; }
  FA_DEVICE uint32_t v_address(int stage) const { return k_address(stage) + kVBehindK; }
  // Where the keys are of the block whose values are at `place`.
  static FA_DEVICE int key_stage(const Place& place) { return kInTurn ? place.at : place.at % kKeyStages; }
  static FA_DEVICE uint32_t key_phase(const Place& place) {
    return kInTurn ? place.phase : uint32_t(place.at / kKeyStages);
  }
  static_assert(kInTurn || kStages == 2 * kKeyStages);

  FA_DEVICE void run() {
    if constexpr (kShares) return run_share();
    if (threadIdx.x == 0) init_barriers(pairs ? 2 * kWarps : kWarps);
    __syncthreads();
    if (pairs) sync_cluster();
    if (threadIdx.x >= kGroups * 128) {
      keep_registers<Tuning::kProducerRegisters>();
      if (threadIdx.x < kGroups * 128 + 32) produce();
    } else {
      take_registers<Tuning::kConsumerRegisters>();
      consume();
    }
    if (pairs) sync_cluster();  // nobody writes to a thread block that has ended
  }

  // `readers`: warps that release a block of keys or values.
  FA_DEVICE void init_barriers(int readers) {
    for (int group = 0; group < kGroups; ++group) {
      barriers.q_full[group].init(1);
      barriers.q_free[group].init(128);  // every lane that has read Q and the message
    }
    for (int stage = 0; stage < kStages; ++stage) {
      if (stage < kKeyStages) barriers.k_full[stage].init(1);
      barriers.v_full[stage].init(1);
      if (stage < kKeyStages) barriers.k_free[stage].init(readers);
      barriers.v_free[stage].init(readers);
    }
    fence_barrier_init();
  }

  using Tile = ForwardTile<kM, kN>;
  using Share = KeyShare<kM, kN>;

  // From the producer to a warpgroup.
  struct Message {
    Tile tile;
    Share share;
  };

  // A tile's number: its place among the messages, and the phase of its Q. A tile's message is written when every
  // warpgroup has released the Q of the tile before last, and so left the third last.
  struct Turn {
    uint32_t number = 0;
    FA_DEVICE void step() { ++number; }
    FA_DEVICE uint32_t message() const { return number % kMessages; }
    FA_DEVICE uint32_t phase() const { return number % 2; }
  };
  FA_DEVICE Message& message(const Turn& turn, int group) const {
    return *reinterpret_cast<Message*>(shared + kTileBytes + kBarrierBytes +
                                       (turn.message() * kGroups + group) * kMessageBytes);
  }
  static_assert(sizeof(Message) <= kMessageBytes);

  FA_DEVICE void prefetch_maps() const {
    prefetch(launched.q);
    prefetch(launched.k);
    prefetch(launched.v);
  }

  // A warp's work. Lane g writes to warpgroup g and loads its Q.
  FA_DEVICE void produce() {
    const int lane = int(threadIdx.x) % 32;
    if (lane == 0) prefetch_maps();
    Place place;
    Turn turn;
    PackedBlocks<kM> packed(p, p.cu_seqlens_q, p.total_q, p.seqlen_q, p.heads_q, p.num_splits);
    const uint32_t at_once = pairs ? 2 : 1, tiles = uint32_t(Work::blocks(p)) / at_once;
    const int rows = pairs ? 2 * kM : kM;
    for (uint32_t tile = blockIdx.x / at_once; tile < tiles;) {
      int query_blocks = ceil_div(p.seqlen_q, rows);
      HeadItem item;
      if (kUsual || !launched.ragged) {
        item = Work::item_of(p, tile, query_blocks);
      } else if (!packed.find(tile, item, query_blocks)) {
        break;
      }
      Work work(p, query_blocks, item, rows);
      work.query_begin += int(rank) * kM;
      const Tile next(p, work);
      if (next.has_rows() || next.clears(p)) {
        if (lane < kGroups) message(turn, lane) = {next, Share(p, next, lane)};
        tile = load(next, tile, turn, place);
        turn.step();
      } else {
        tile = following(tile);
      }
    }
    if (lane < kGroups) message(turn, lane).tile.work.query_begin = -1;
    announce(turn);
  }

  // This thread block's next tile.
  FA_DEVICE uint32_t following(uint32_t tile) const {
    if (pairs) return tile + gridDim.x / 2;
    return gridDim.x + (p.tiles_taken == nullptr ? tile : take_block(p.tiles_taken));
  }

  // Messages without Q.
  FA_DEVICE void announce(const Turn& turn) {
    for (int group = 0; group < kGroups; ++group) {
      barriers.q_free[group].wait(turn.phase() ^ 1);
      if (int(threadIdx.x) % 32 == group) barriers.q_full[group].arrive();
    }
  }

  // Returns the tile to follow, asked for in time to hide the answer's latency.
  FA_DEVICE uint32_t load(const Tile& next, uint32_t tile, const Turn& turn, Place& place) {
    if (!next.has_keys()) {
      if (kShares) return tile;
      announce(turn);
      return following(tile);
    }
    const bool own_keys = kShares && p.heads_q == p.heads_kv;  // usually, as rows are heads; without a division
    const int batch = p.cu_seqlens_q ? 0 : next.work.batch;
    const int kv_head = own_keys ? next.work.head : next.work.head / (p.heads_q / p.heads_kv);
    uint32_t following = 0;
    // In pages, a lane for each box of rows.
    const bool paged = kPages || (kShares && p.block_table != nullptr);
    const int rows = paged ? rows_of_page_box(p, kN) : kN, first = paged ? int(threadIdx.x) % 32 * rows : 0;
    const auto find_box = [&](int key) { return PageBox(p, next.work.batch, key + first); };
    PageBox box;
    if (paged) box = find_box(next.keys.begin);
    for (int key = next.keys.begin; key < next.keys.end; key += kN) {
      const int stage = key_stage(place), row = int(next.seq.first_k) + key;
      const auto load_keys = [&](const CUtensorMap& map, uint32_t dst, Barrier& full, Barrier& free, uint32_t phase) {
        free.wait(phase ^ 1);
        if (paged) {
          load_pages(map, dst, full, first, box, kv_head);
        } else {
          load_rows(map, dst, full, row, kv_head, batch);
        }
      };
      if (!kShares && key + kN >= next.keys.end) following = this->following(tile);
      load_keys(launched.k, k_address(stage), barriers.k_full[stage], barriers.k_free[stage], key_phase(place));
      if (key == next.keys.begin) load_queries(next, turn, batch);
      load_keys(launched.v, v_address(place.at), barriers.v_full[place.at], barriers.v_free[place.at], place.phase);
      if (paged) box = find_box(key + kN);
      place.step(kStages);
    }
    return following;
  }

  FA_DEVICE void load_queries(const Tile& next, const Turn& turn, int batch) {
    FA_UNROLL
    for (int group = 0; group < (kShares ? 1 : kGroups); ++group) {
      Barrier& full = barriers.q_full[group];
      barriers.q_free[group].wait(turn.phase() ^ 1);
      if (int(threadIdx.x) % 32 != group) continue;
      full.arrive_expecting(kPanels * 64 * 128);
      for (int panel = 0; panel < kPanels; ++panel) {
        load_box<kKeepsRows>(q_address(group) + panel * kQPanel, launched.q, full, panel * 64,
                             int(next.seq.first_q) + next.work.query_begin + group * 64, next.work.head, batch);
      }
    }
  }

  FA_DEVICE void load_rows(const CUtensorMap& map, uint32_t dst, Barrier& full, int row, int head, int batch) const {
    if (!first_lane()) return;
    full.arrive_expecting(kKBytes);
    if (pairs) {
      for (int i = 0; i < kPanels / 2; ++i) {
        const int panel = 2 * i + int(rank);
        load_box_to_both<kKeepsPairsKeys>(dst + panel * kKPanel, map, full, panel * 64, row, head, batch);
      }
    } else {
      for (int panel = 0; panel < kPanels; ++panel) {
        load_box(dst + panel * kKPanel, map, full, panel * 64, row, head, batch);
      }
    }
  }
  // This lane's box, which has the block's rows from `first` on.
  FA_DEVICE void load_pages(const CUtensorMap& map, uint32_t dst, Barrier& full, int first, const PageBox& box,
                            int head) const {
    if (first_lane()) full.arrive_expecting(kKBytes);
    __syncwarp();
    if (first >= kN) return;
    for (int panel = 0; panel < kPanels; ++panel) {
      load_box(dst + panel * kKPanel + first * 128, map, full, panel * 64, box.row, head, box.page);
    }
  }
  // What the warp has read may be overwritten.
  FA_DEVICE void release_keys(Barrier& free) const {
    if (kPairs) {
      const auto at = reinterpret_cast<char*>(&free) - reinterpret_cast<char*>(&barriers);
      if (threadIdx.x % 32 < (pairs ? 2 : 1)) arrive_in_cluster(informed + uint32_t(at));
    } else if (first_lane()) {
      free.arrive();
    }
  }

  // The threads that compute, as functions that share work among a block's lanes see them.
  struct Lanes {
    static constexpr int kThreads = kGroups * 128;
    static FA_DEVICE int lane() { return int(threadIdx.x); }
  };

  // What becomes of a tile's scores.
  struct Scoring {
    const ScoreModifier<T, MODIFIERS> modifier;
    const Dropout dropout;
    FA_DEVICE Scoring(const ForwardParams& p, const Tile& tile)
        : modifier(p, tile.work.batch, tile.work.head, Mask(p, tile.seq).shift),
          dropout(p, tile.work.batch, tile.work.head) {}
  };

  // What a warpgroup carries along a tile's keys.
  struct State {
    Output output;
    OnlineSoftmax<float, Rows> softmax;
    ScoreLimits<Scores, Rows> limits;  // of the softmax
    Queries queries;              // where they are in registers
    Probabilities probabilities;  // of the last block, not multiplied yet
    Place place;                  // of the last block, whose values have arrived
  };

  FA_DEVICE void consume() {
    State state;
    for (Turn turn;; turn.step()) {
      barriers.q_full[group].wait(turn.phase());
      const Tile tile = message(turn, group).tile;  // in registers: messages are read again after every barrier
      const Share share = message(turn, group).share;
      if (tile.is_last()) {
        await_output_read();  // the memory must not go away before
        return;
      }
      if (tile.clears(p)) clear_rows_of_no_sequence<T, Lanes>(p, tile.work);
      state.softmax.clear();
      pass_by(share.blocks_before, state.place);
      if (share.has_keys()) {
        const Scoring scoring(p, tile);
        begin(tile, share, scoring, state);
        walk(tile, share, scoring, state);
      } else {
        state.output.fill(0);
        barriers.q_free[group].arrive();
      }
      if (tile.has_rows(group)) end(tile, share, state);
      pass_by(share.blocks_after, state.place);
    }
  }

  // Blocks of keys that none of the warpgroup's rows sees.
  FA_DEVICE void pass_by(int blocks, Place& place) {
#pragma unroll 1
    for (; blocks > 0; --blocks) {
      barriers.k_full[place.at].wait(place.phase);
      barriers.v_full[place.at].wait(place.phase);
      release_keys(barriers.k_free[place.at]);
      release_keys(barriers.v_free[place.at]);
      place.step(kStages);
    }
  }

  // To how many warpgroups the thread block's keys are dealt out.
  FA_DEVICE int dealt() const { return kDeals ? launched.dealt : 1; }
  // From one of the warpgroup's blocks to its next.
  static FA_DEVICE void advance(Place& place, int dealt) {
    if (kDeals) {
      place.skip(kStages, dealt);
    } else {
      place.step(kStages);
    }
  }

  // The thread block's share of the tile's keys. What is to be done everybody works out for himself, while others do.
  FA_DEVICE void run_share() {
    constexpr int kLoader = kGroups * 128;
    if (threadIdx.x == kLoader) prefetch_maps();
    if (threadIdx.x == kLoader + 32) init_barriers(4);  // a block is one warpgroup's
    const Tile tile(p, Work(0, int(rank), int(blockIdx.y), int(blockIdx.z)));
    const Exchange exchange(shared + kRoomAt, barriers.shares_full, tile.seq.len_q, p.head_dim,
                            p.num_splits, launched.shares_inverse, int(rank));
    if (threadIdx.x == kLoader + 64) {
      exchange.expect();
      fence_barrier_init();
    }
    __syncthreads();
    arrive_at_cluster<false>();
    if (threadIdx.x >= kLoader) {
      keep_registers<Tuning::kProducerRegisters>();
      Place place;
      if (threadIdx.x < kLoader + 32) load(tile, 0, {}, place);
      wait_for_cluster();
    } else {
      take_registers<Tuning::kConsumerRegisters>();
      consume_share(tile, exchange);
    }
  }

  FA_DEVICE void consume_share(const Tile& tile, const Exchange& exchange) {
    Tile mine = tile;
    mine.work.query_begin -= group * 64;  // all warpgroups have the same rows
    Share share(p, mine, group);
    share.deal(group, dealt());
    if (tile.clears(p)) clear_rows_of_no_sequence<T, Lanes>(p, tile.work);
    State state;
    state.place.at = kDeals ? group : 0;
    state.softmax.clear();
    if (share.has_keys()) {
      const Scoring scoring(p, mine);
      barriers.q_full[0].wait(0);
      begin(mine, share, scoring, state);
      walk(mine, share, scoring, state);
      multiply_last(share, state);
      state.softmax.finish();
      await_last(state);
    } else {
      state.output.fill(0);
      state.softmax.finish();
    }
    wait_for_cluster();  // nobody writes to a thread block that has not begun
    if (!tile.has_rows()) return;
    sync_named(1 + group, 128);  // all of the warpgroup have read the keys, in whose place its part is put
    if (group < dealt() && threadIdx.x % 128 < 32) {
      exchange.keep(shared + kQBytes + group * kKStride, state.softmax, state.output);
    }
    sync_named(1 + kGroups, Lanes::kThreads);
    const int thread = int(threadIdx.x);
    exchange.send(shared + kQBytes, kKStride, dealt(), thread, Lanes::kThreads);
    exchange.template fold<T>(p, tile.seq, tile.work.batch, tile.work.head, thread, Lanes::kThreads);
  }

  // All blocks of keys but the first.
  FA_DEVICE void walk(const Tile& tile, const Share& share, const Scoring& scoring, State& state) {
    int chunk_end = !kShares && share.has_chunks(p) ? (share.begin / p.split_size + 1) * p.split_size : share.end;
    const int stride = kDeals ? launched.dealt * kN : kN;
    for (int key = share.begin + stride; key < share.end;) {
      if (!kShares && key == chunk_end) {
        step<true, true>(tile, share, scoring, key, state);
        chunk_end += p.split_size;
        key += stride;
      } else if (!share.all_see(key)) {
        step<true, false>(tile, share, scoring, key, state);
        key += stride;
      } else {
        // A loop of its own, which asks for as little as can be: nothing is multiplied meanwhile.
        const int stop = min_int(min_int(chunk_end, share.end), share.all_end - kN + 1);
        do {
          step<false, false>(tile, share, scoring, key, state);
          key += stride;
        } while (key < stop);
      }
    }
  }

  // The last block's values. Behind a sequence's last key they may be another's, and must not reach the
  // multiply, where 0 * NaN is NaN.
  FA_DEVICE void multiply_last(const Share& share, State& state) {
    const int stage = state.place.at;
    if (share.values < kN) clear_rows<kPanels>(shared + kQBytes + stage * kKStride + kVBehindK, kKPanel, share.values);
    multiply_values(state.output, state.probabilities, stage);
  }
  FA_DEVICE void await_last(State& state) {
    wgmma_wait<0>();
    hold(state.output.value);
    release_keys(barriers.v_free[state.place.at]);
    advance(state.place, launched.dealt);
  }

  // The last values, the rows' results, where they may under the multiply, and the output.
  FA_DEVICE void end(const Tile& tile, const Share& share, State& state) {
    const Work& work = tile.work;
    const bool has_keys = share.has_keys(), folds = has_keys && share.has_chunks(p);
    const int rows = min_int(kM, tile.seq.len_q - work.query_begin);
    const float kept = kScored ? kept_scale<float>(p) : 1.0f;
    Rows scale;
    const auto finish = [&] {
      if (p.num_splits == 1) finish_rows(p, work, tile.seq, rows, kept, state.softmax, scale);
    };
    if (has_keys && !folds) {
      multiply_last(share, state);
      state.softmax.finish();
      finish();
      hold(scale.value);
      await_last(state);
    } else {
      if (folds) {
        multiply_last(share, state);
        await_last(state);
      }
      state.softmax.finish();
      if (folds) fold_stash_into(state.output, state.softmax);
      finish();
    }
    if (p.num_splits > 1) return write_partial(p, work, rows, state.softmax, state.output);
    state.softmax.apply(scale, state.output);
    const int row = int(threadIdx.x) / 32 * 16;
    char* const room = this->room(kStashIsShared && may_fold(p) ? kStash : kOutBytes);
    await_output_read();
    // Behind a packed sequence's rows another's follow. One answer for a warp: what may differ costs registers.
    if (kStoresBoxes && __any_sync(0xffffffffu, p.cu_seqlens_q == nullptr || rows - row >= 16)) {
      put_boxes<T, D>(state.output.value, shared_address(room));
      if (!first_lane()) return;
      for (int panel = 0; panel < kPanels; ++panel) {
        store_box<kKeepsRows>(launched.out, shared_address(room) + panel * kBoxBytes, panel * 64,
                              int(tile.seq.first_q) + work.query_begin + row, work.head,
                              p.cu_seqlens_q ? 0 : work.batch);
      }
      return commit_stores();
    }
    T* out = head_rows<T>(p.out, work.batch, work.head, tile.seq.first_q + work.query_begin + row);
    write_rows<T, kOutCols, kSwizzles>(state.output.value, room, out, p.out.row_stride, rows - row, p.head_dim);
    if constexpr (D > kOutCols) {
      write_rows<T, D - kOutCols>(state.output.value + kOutCols / 2, room, out + kOutCols, p.out.row_stride,
                                  rows - row, p.head_dim - kOutCols);
    }
  }

  // The last tile's output lies in the warp's room until then.
  FA_DEVICE void await_output_read() const {
    if (!kStoresBoxes) return;
    if (first_lane()) wait_written<true>();
    __syncwarp();
  }

  // The first block of keys.
  FA_DEVICE void begin(const Tile& tile, const Share& share, const Scoring& scoring, State& state) {
    const int key = share.begin;
    Scores scores;
    Rows rescale;
    if (kQueriesInRegisters) take_queries(state.queries);
    const int stage = key_stage(state.place);
    barriers.k_full[stage].wait(key_phase(state.place));
    multiply_scores(scores, state.queries, stage);
    // Not before: a load from shared memory may be overtaken by an arrival that follows it, and by the copy of the next
    // tile's Q. Multiplies that are under way have their registers.
    if (kQueriesInRegisters) barriers.q_free[group].arrive();
    state.output.fill(0);  // under the multiply
    hold(state.output.value);
    wgmma_wait<0>();
    hold(scores.value);
    release_factors(share, stage, key);
    const bool far = scoring.modifier.apply(scores, tile.work.query_begin, key);
    if (!share.all_see(key)) share.template hide<IntRows>(p, tile, key, scores);
    state.softmax.raise_max(scores, scoring.modifier.scale_of_any(), rescale);
    if (kHurries) set_limits(state.softmax, state.limits);
    scoring.modifier.with_scale(far, [&](const auto& scale) { state.softmax.exponentiate(scores, scale); });
    drop(tile, scoring, key, scores);
    state.probabilities.narrow(scores);
    barriers.v_full[state.place.at].wait(state.place.phase);
  }

  // A block's scores are known. Q goes as well with the last block, where it is still there: the next tile's is loaded
  // under what remains.
  FA_DEVICE void release_factors(const Share& share, int stage, int key) {
    release_keys(barriers.k_free[stage]);
    if (!kQueriesInRegisters && key + kN >= share.end) barriers.q_free[group].arrive();
  }

  // The next block's scores and their softmax, while the last block's values are multiplied.
  template <bool MASKED, bool NEW_CHUNK>
  FA_DEVICE void step(const Tile& tile, const Share& share, const Scoring& scoring, int key, State& state) {
    Scores scores;
    Rows rescale;
    const Place last = state.place;
    advance(state.place, launched.dealt);
    const int stage = key_stage(state.place);
    barriers.k_full[stage].wait(key_phase(state.place));
    multiply_scores(scores, state.queries, stage);
    multiply_values(state.output, state.probabilities, last.at);
    wgmma_wait<1>();
    hold(scores.value);
    release_factors(share, stage, key);
    bool moves = NEW_CHUNK || !kHurries;  // the reference of a row, if only perhaps
    bool far = false;                     // some scores, to the softcap
    if constexpr (kSoftcap) {
      const Softcap softcap(p);
      moves = moves || any_lane(state.limits.reached(scores) | state.limits.falls_below(scores, softcap.end()));
      far = moves && softcap.any_far(scores);
    } else {
      far = scoring.modifier.apply(scores, tile.work.query_begin, key);
    }
    constexpr bool kHides = MASKED || NEW_CHUNK;
    if (NEW_CHUNK ? !share.all_see(key) : MASKED) share.template hide<IntRows>(p, tile, key, scores);
    OnlineSoftmax<float, Rows> next = state.softmax;
    if (NEW_CHUNK) next.clear();
    if (kHurries && !kSoftcap) moves = moves || __any_sync(0xffffffffu, state.limits.reached(scores));
    if (moves) {
      next.raise_max(scores, scoring.modifier.scale_of_any(), rescale);
      if (kSoftcap && far) {
        scoring.modifier.with_scale(far, [&](const auto& scale) { next.exponentiate(scores, scale); });
      }
      if (kHurries) set_limits(next, state.limits);
      if (!NEW_CHUNK && kRescalesAtOnce) {
        wgmma_wait<0>();
        hold(state.output.value);
        next.apply(rescale, state.output);
      }
    }
    // The last block's values are awaited half-way, when they are likely to be known: P takes their factor's registers
    // under what is left of the softmax.
    constexpr int kRegs = Scores::kRegs;
    const auto scale = scale_of<kHides>(scoring);
    const bool is_left = kHurries && !far;
    if (is_left) next.template exponentiate_part<0, 0, kRegs / 2>(scores, scale);
    if (kScored) {
      scoring.modifier.with_scale(far, [&](const auto& scale) {
        next.template exponentiate_part<0, 0, kRegs>(scores, scale);
        next.template exponentiate_part<1, 0, kRegs>(scores, scale);
      });
    }
    const float some = next.sum[0];
    if (is_left) next.template exponentiate_part<0, kRegs / 2, kRegs>(scores, scale);
    hold(next.sum.value);
    await_values(some, state.place);
    hold(state.output.value);
    release_keys(barriers.v_free[last.at]);
    if (NEW_CHUNK) {
      const bool first = (key - 1) / p.split_size == share.begin / p.split_size;
      if (kStashIsShared && first) await_output_read();
      fold_into_stash(first, state.output, state.softmax);
    } else if (kHurries ? moves && !kRescalesAtOnce
                        : __any_sync(0xffffffffu, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
      next.apply(rescale, state.output);
    }
    if (is_left) next.template exponentiate_part<1, 0, kRegs>(scores, scale);
    drop(tile, scoring, key, scores);
    state.softmax = next;
    state.probabilities.narrow(scores);
  }

  // Of raw scores, as the softmax takes it while none is far. HIDES: some may be hidden.
  template <bool HIDES>
  FA_DEVICE auto scale_of(const Scoring& scoring) const {
    if constexpr (kSoftcap) {
      return Softcap(p).near<HIDES>();
    } else {
      return scoring.modifier.scale_log2();
    }
  }

  // Of raw scores. A softcap brings none up, nor is any far while limits are not reached.
  FA_DEVICE void set_limits(const OnlineSoftmax<float, Rows>& softmax, ScoreLimits<Scores, Rows>& limits) const {
    const float scale_log2 = float(p.softmax_scale) * float(kLog2E);
    limits.set(softmax, scale_log2, kSoftcap ? Softcap(p).end() : FLT_MAX);
  }

  FA_DEVICE void drop(const Tile& tile, const Scoring& scoring, int key, Scores& scores) {
    if (kScored && scoring.dropout.enabled()) scoring.dropout.drop(scores, tile.work.query_begin, key);
  }

  // Waits for all multiplies, and for the values of the block at `place`. The compiler would wait for the former before
  // the softmax. It does not move that across a branch, nor know that a sum is never negative: so the latter, whose
  // branch depends on a sum, stands between.
  FA_DEVICE void await_values(float sum, const Place& place) {
    const bool never = sum == -1.0f;
    barriers.v_full[place.at].wait(place.phase ^ uint32_t(never));
    wgmma_wait<0>();
  }

  // The warp's 16 rows of Q to registers.
  FA_DEVICE void take_queries(Queries& queries) {
    const int lane = int(threadIdx.x) % 32, row = int(threadIdx.x) % 128 / 32 * 16 + lane % 16;
    FA_UNROLL
    for (int step = 0; step < D / 16; ++step) {
      const int chunk = step % 4 * 2 + lane / 16;  // of 16 bytes, in the panel's row
      sm80::ldmatrix(queries.value[0][step],
                     q_address(group) + step / 4 * kQPanel + row * 128 + (chunk ^ row % 8) * 16);
    }
  }

  // scores = Q K^T
  FA_DEVICE void multiply_scores(Scores& scores, const Queries& queries, int stage) {
    wgmma_fence();
    if constexpr (kQueriesInRegisters) {
      multiply_panels<T, kN, D>(scores.value, queries.value[0], k_address(stage), kKPanel);
    } else {
      multiply_panels<T, kN, D>(scores.value, q_address(group), kQPanel, k_address(stage), kKPanel);
    }
  }

  // output += P V
  FA_DEVICE void multiply_values(Output& output, Probabilities& probabilities, int stage) {
    multiply_registers<T, D, kN>(output.value, probabilities.value[0], v_address(stage), kKPanel);
  }

  // The running fold of chunks: each warp has its part of the memory, in which its rows are turned later.
  FA_DEVICE char* room(int bytes_of_warp) const { return shared + kRoomAt + int(threadIdx.x) / 32 * bytes_of_warp; }
  FA_DEVICE float* stash() const {
    if (kStashIsShared) return reinterpret_cast<float*>(shared + kRoomAt);
    return static_cast<float*>(p.partial_out) + int64_t(blockIdx.x) * (kStashDeviceBytes / 4);
  }
  // Calls f(reg, value) for each register of the output and what is stashed of it, and stores what that becomes.
  template <bool LOAD, bool STORE, class F>
  FA_DEVICE void over_stash(F&& f) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    if constexpr (kStashIsShared) {
      float* const values = reinterpret_cast<float*>(room(kStash)) + lane;
      FA_UNROLL
      for (int reg = 0; reg < Output::kRegs; ++reg) {
        float x = LOAD ? values[reg * 32] : 0.0f;
        f(reg, x);
        if (STORE) values[reg * 32] = x;
      }
    } else {
      float4* const values = reinterpret_cast<float4*>(stash() + warp * (kStash / 4)) + lane;
      FA_UNROLL
      for (int reg = 0; reg < Output::kRegs; reg += 4) {
        float4 x = LOAD ? __ldcg(values + reg * 8) : float4{};
        f(reg, x.x);
        f(reg + 1, x.y);
        f(reg + 2, x.z);
        f(reg + 3, x.w);
        if (STORE) __stcg(values + reg * 8, x);
        if (reg % 24 == 20) __syncwarp();  // no more loads in flight than there are registers for
      }
    }
  }
  FA_DEVICE float& stashed_max(int row) { return stash()[kWarps * (kStash / 4) + row]; }
  FA_DEVICE float& stashed_sum(int row) { return stashed_max(kM + row); }

  static FA_DEVICE int slot_of(int reg) { return reg / 2 % 2; }  // of a warp's two rows of a lane

  // A finished chunk joins those before it, or is the first. The next starts from scratch.
  FA_DEVICE void fold_into_stash(bool first, Output& output, OnlineSoftmax<float, Rows>& softmax) {
    softmax.finish();
    if (first) {
      keep_rows(softmax);
      over_stash<false, true>([&](int reg, float& x) { x = output[reg] + 0.0f; });  // no -0, as from a fold
    } else {
      Rows keep, add;
      fold_rows(softmax, keep, add);
      keep_rows(softmax);
      over_stash<true, true>([&](int reg, float& x) {
        x = fma_rn(output[reg], add[slot_of(reg)], x * keep[slot_of(reg)]);
      });
    }
    softmax.clear();
    output.fill(0);
  }
  // The last chunk.
  FA_DEVICE void fold_stash_into(Output& output, OnlineSoftmax<float, Rows>& softmax) {
    Rows keep, add;
    fold_rows(softmax, keep, add);
    over_stash<true, false>([&](int reg, float& x) {
      output[reg] = fma_rn(output[reg], add[slot_of(reg)], x * keep[slot_of(reg)]);
    });
  }
  FA_DEVICE void fold_rows(OnlineSoftmax<float, Rows>& softmax, Rows& keep, Rows& add) {
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
};

}  // namespace sm90
}  // namespace flash_attn
