// The sm_80 loops' backward on the host against the definition: `backward_sm80 KIND DIM SEED`, as backward_sm90.cpp.
#include "backward.h"

#include "cuda/kernels/backward.cuh"
#include "cuda/kernels/finish_dq.cuh"
#include "cuda/sm80/arch.cuh"

template <class ELEMENT, int D, bool MODIFIED>
struct Loops {
  using T = ELEMENT;
  using K = Backward<Sm80, Problem<T, D, MODIFIED>>;
  using Finish = FinishDq<Sm80, Problem<T, D, false>>;
  static constexpr int kM = K::kM, kN = K::kN;
  static constexpr bool kFinishesDq = false;

  // A few thread blocks at a time: one waits for none behind it.
  template <class Kernel>
  static void launch(const BackwardParams& p) {
    constexpr unsigned kAtOnce = 4;
    const unsigned blocks = unsigned(Kernel::blocks(p));
    for (unsigned first = 0; first < blocks; first += kAtOnce) {
      host::launch({std::min(kAtOnce, blocks - first)}, Kernel::kThreads, Kernel::kSharedBytes,
                   [&] { Kernel::run(p, first + blockIdx.x, host::self->block->shared); });
    }
  }
  static void run(BackwardParams p) {
    if (!p.deterministic) p.dq_turn = nullptr;
    launch<K>(p);
    launch<Finish>(p);
  }
};

// Plain; then modified, of rows that do not allow 16-byte access.
template <class T, class OfScored, int D>
bool check_all(unsigned seed) {
  bool good = true;
  for (const Task& task : kTasks) {
    good = check<Loops<T, D, false>, D>(task, D, {}, seed) && good;
    good = check<Loops<OfScored, D, true>, D>(task, D - 5, kScored, seed) && good;
  }
  return good;
}
template <int D>
bool check_kind(bool fp32, unsigned seed) {
  return fp32 ? check_all<float, float, D>(seed) : check_all<BFloat16, Half, D>(seed);
}

int main(int, char** arguments) {
  const bool fp32 = std::strcmp(arguments[1], "fp32") == 0;
  const unsigned seed = unsigned(atoi(arguments[3]));
  host::random.seed(seed);
  switch (atoi(arguments[2])) {
    case 32:
      return !check_kind<32>(fp32, seed);
    case 64:
      return !check_kind<64>(fp32, seed);
    case 96:
      return !check_kind<96>(fp32, seed);
    case 128:
      return !check_kind<128>(fp32, seed);
    case 192:
      return !check_kind<192>(fp32, seed);
    case 256:
      return !check_kind<256>(fp32, seed);
  }
  return 2;
}
