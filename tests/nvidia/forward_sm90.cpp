// Hopper's forwards on the host against the definition: `forward_sm90 KIND DIM SEED`, as backward_sm90.cpp.
#include "forward.h"

#include "cuda/sm90/forward.cuh"
#include "cuda/sm90/forward_fp32.cuh"

template <class K>
void launch(ForwardParams& p) {
  host::Index blocks = {unsigned(K::blocks(p))};
  unsigned cluster = 1;
  uint32_t taken = 0;
  if constexpr (!std::is_same_v<typename K::T, float>) {
    cluster = K::kShares ? unsigned(p.num_splits) : K::in_pairs(p) ? 2 : 1;
    if (K::kShares) {
      blocks = {cluster, unsigned(p.heads_q), unsigned(p.batch)};
    } else {  // thread blocks that take several tiles, dealt out or as they come
      blocks.x = std::min(blocks.x, 2 * cluster);
      if (blocks_differ(p)) p.tiles_taken = &taken;
    }
  }
  const typename K::Launched launched(p);
  const size_t bytes = K::kSharedBytes + (may_fold(p) ? K::kStashBytes : 0);
  host::launch(blocks, K::kThreads, bytes, [&] { K(launched, host::self->block->shared).run(); }, cluster);
}

// With loops for any 16-bit dtype, of the kernel that such a problem has.
template <class T, int D, Modifiers MODIFIERS>
struct Loops {
  template <sm90::Layout LAYOUT>
  using Kernel = sm90::Forward<T, D, MODIFIERS, LAYOUT>;
  static constexpr bool kFolds = true;
  static constexpr int kStashDeviceBytes = Kernel<sm90::Layout::kUsual>::kStashDeviceBytes;
  static constexpr bool kPlain = MODIFIERS == Modifiers::kNone;

  static bool in_cluster(const ForwardParams& p) { return kPlain && p.num_splits > 1 && p.seqlen_q <= 16; }
  static void run(ForwardParams& p) {
    if constexpr (kPlain) {
      if (in_cluster(p)) return launch<Kernel<sm90::Layout::kShares>>(p);
    }
    if (p.block_table != nullptr) return launch<Kernel<sm90::Layout::kPages>>(p);
    if (Kernel<sm90::Layout::kUsual>::is_ragged(p)) return launch<Kernel<sm90::Layout::kRagged>>(p);
    launch<Kernel<sm90::Layout::kUsual>>(p);
  }
};
template <int D, Modifiers MODIFIERS>
struct Loops<float, D, MODIFIERS> {
  using Kernel = sm90::Fp32Forward<D, MODIFIERS>;
  static constexpr bool kFolds = Kernel::kFolds;
  static constexpr int kStashDeviceBytes = 0;
  static bool in_cluster(const ForwardParams&) { return false; }
  static void run(ForwardParams& p) { launch<Kernel>(p); }
};

// Behind more short sequences than a warp has lanes.
std::vector<int> late(std::vector<int> lengths, int length) {
  lengths.insert(lengths.begin(), 40, length);
  return lengths;
}

// What 16-bit loops have kernels of their own for: pairs of thread blocks, ragged batches, pages, shares in clusters.
const Task kTasks16Bit[] = {
    {{256}, {300}, {}, false, false, 2, 1},
    {late({800, 3}, 1), late({90, 20}, 5), {}, true, true, 2, 1},
    {{70, 70}, {288, 288}, {250, 33}, false, true, 2, 1, -1, 0, false, 48},
    {{16, 16}, {640, 640}, {640, 130}, false, true, 2, 1, -1, 128, true},
    {{3, 3}, {640, 640}, {513, 0}, false, false, 2, 2, -1, 256, true, 16},
    {{5}, {1900}, {}, false, true, 2, 1, -1, 1024, true},
    {{2}, {1200}, {150}, false, false, 1, 1, -1, 128, true},
    {{1}, {1200}, {500}, false, false, 1, 1, -1, 128, true, 0, 24},
};

// By the copy engine; then scored, of rows that do not allow 16-byte access.
template <int D>
bool check_fp32(unsigned seed) {
  bool good = true;
  for (const Task& task : kTasks) {
    if (task.split_size > 0 && !task.partial && !Loops<float, D, Modifiers::kNone>::kFolds) continue;
    good = check<Loops<float, D, Modifiers::kNone>, float>(task, D, {}, seed) && good;
    good = check<Loops<float, D, Modifiers::kAny>, float>(task, D - 5, kScored, seed) && good;
  }
  return good;
}
// Plain; softcapped; scored, at an odd head dim.
template <int D>
bool check_all(unsigned seed) {
  bool good = true;
  const auto check_task = [&](const Task& task) {
    good = check<Loops<BFloat16, D, Modifiers::kNone>, BFloat16>(task, D - task.spare_columns, {}, seed) && good;
    good = check<Loops<Half, D, Modifiers::kSoftcap>, Half>(task, D, {3.0f}, seed) && good;
    good = check<Loops<Half, D, Modifiers::kAny>, Half>(task, D - 8, kScored, seed) && good;
  };
  for (const Task& task : kTasks) check_task(task);
  for (const Task& task : kTasks16Bit) check_task(task);
  return good;
}

int main(int, char** arguments) {
  const bool fp32 = std::strcmp(arguments[1], "fp32") == 0;
  const unsigned seed = unsigned(atoi(arguments[3]));
  host::random.seed(seed);
  switch (atoi(arguments[2])) {
    case 64:
      return !(fp32 ? check_fp32<64>(seed) : check_all<64>(seed));
    case 96:
      return !(fp32 ? check_fp32<96>(seed) : check_all<96>(seed));
    case 128:
      return !(fp32 ? check_fp32<128>(seed) : check_all<128>(seed));
    case 192:
      return !(fp32 ? check_fp32<192>(seed) : check_all<192>(seed));
    case 256:
      return !(fp32 ? check_fp32<256>(seed) : check_all<256>(seed));
  }
  return 2;
}
