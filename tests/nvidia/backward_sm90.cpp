// Hopper's backward on the host against the definition: `backward_sm90 KIND DIM SEED`. Includes kernels from a copy of csrc in
// which the files of overlay/ have replaced those that are PTX. One line a problem; exits with 1 where one differs.
#include "backward.h"

#include "cuda/kernels/finish_dq.cuh"
#include "cuda/sm90/backward.cuh"
#include "cuda/sm90/backward_fp32.cuh"
#include "cuda/sm90/backward_wide.cuh"

template <class Kernel, class Launched>
void launch(unsigned blocks, const Launched& launched) {
  host::launch({blocks}, Kernel::kThreads, Kernel::kSharedBytes,
               [&] { Kernel(launched, host::self->block->shared).run(); });
}

// Of a 16-bit kernel.
template <class K>
struct Loops {
  using T = typename K::T;
  static constexpr int kM = K::kM, kN = K::kN;
  static constexpr bool kFinishesDq = true;

  static void run(const BackwardParams& p) {
    const typename K::Launched launched(p);
    const unsigned blocks = unsigned(std::min<int64_t>(K::blocks(p), 3));
    K::is_ragged(p) ? launch<typename K::Ragged>(blocks, launched) : launch<K>(blocks, launched);
    using Finish = typename K::Sums::Kernel;
    if (p.dq_lag < 0) launch<Finish>(unsigned(Finish::blocks(p)), p);
  }
};

template <class K, int D>
struct Fp32Loops {
  // As sm90/arch.cuh has it.
  struct Arch : Sm80 {
    template <Kernel KERNEL, class T, int DIM, bool MODIFIED>
    using Tuning = sm90::Tuning<KERNEL, T, DIM, MODIFIED>;
  };
  using T = float;
  static constexpr int kM = K::kM, kN = K::kN;
  static constexpr bool kFinishesDq = false;

  static void run(const BackwardParams& p) {
    const typename K::Launched launched(p);
    launch<K>(unsigned(K::blocks(p)), launched);
    using Finish = FinishDq<Arch, Problem<float, D, false>>;
    host::launch({unsigned(Finish::blocks(p))}, Finish::kThreads, Finish::kSharedBytes,
                 [&] { Finish::run(p, blockIdx.x, host::self->block->shared); });
  }
};

// Behind more sequences than a warp has lanes: a ragged batch, where one of them has more than 512 keys.
std::vector<int> late(std::vector<int> lengths) {
  lengths.insert(lengths.begin(), 40, 0);
  return lengths;
}

const Task kRagged = {late({70, 3, 131}), late({520, 64, 70}), {}, true, true, false, 2, 1};

// Plain; then scored, at an odd head dim.
template <template <class, int, Modifiers> class K, int D>
bool check_all(unsigned seed) {
  bool good = true;
  const auto check_both = [&](const Task& task) {
    good = check<Loops<K<BFloat16, D, Modifiers::kNone>>, D>(task, D, {}, seed) && good;
    good = check<Loops<K<Half, D, Modifiers::kAny>>, D>(task, D - 8, kScored, seed) && good;
  };
  for (const Task& task : kTasks) check_both(task);
  check_both(kRagged);
  return good;
}
// By the copy engine; then scored, of rows that do not allow 16-byte access.
template <int D>
bool check_fp32(unsigned seed) {
  bool good = true;
  for (const Task& task : kTasks) {
    good = check<Fp32Loops<sm90::Fp32Backward<D, Modifiers::kNone>, D>, D>(task, D, {}, seed) && good;
    good = check<Fp32Loops<sm90::Fp32Backward<D, Modifiers::kAny>, D>, D>(task, D - 5, kScored, seed) && good;
  }
  return good;
}

int main(int, char** arguments) {
  const bool fp32 = std::strcmp(arguments[1], "fp32") == 0;
  const int dim = atoi(arguments[2]);
  const unsigned seed = unsigned(atoi(arguments[3]));
  host::random.seed(seed);
  switch (dim) {
    case 64:
      return !(fp32 ? check_fp32<64>(seed) : check_all<sm90::Backward, 64>(seed));
    case 96:
      return !(fp32 ? check_fp32<96>(seed) : check_all<sm90::Backward, 96>(seed));
    case 128:
      return !(fp32 ? check_fp32<128>(seed) : check_all<sm90::Backward, 128>(seed));
    case 192:
      return !(fp32 ? check_fp32<192>(seed) : check_all<sm90::WideBackward, 192>(seed));
    case 256:
      return !(fp32 ? check_fp32<256>(seed) : check_all<sm90::WideBackward, 256>(seed));
  }
  return 2;
}
