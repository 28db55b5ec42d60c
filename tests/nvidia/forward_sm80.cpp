// The sm_80 loops' forward on the host against the definition: `forward_sm80 KIND DIM SEED`, as backward_sm90.cpp.
#include "forward.h"

#include "cuda/kernels/forward.cuh"
#include "cuda/sm80/arch.cuh"

template <class T, int D, bool MODIFIED>
struct Loops {
  using K = Forward<Sm80, Problem<T, D, MODIFIED>>;
  static constexpr int kStashDeviceBytes = 0;

  static bool in_cluster(const ForwardParams&) { return false; }
  static void run(const ForwardParams& p) {
    const size_t bytes = K::kSharedBytes + (may_fold(p) ? K::kStashBytes : 0);
    host::launch({unsigned(K::blocks(p))}, K::kThreads, bytes,
                 [&] { K::run(p, blockIdx.x, host::self->block->shared); });
  }
};

// Pages of several to a block of keys and the other way round, and of a size that divides nothing.
const Task kPaged[] = {
    {{70, 70}, {288, 288}, {250, 33}, false, true, 2, 1, -1, 0, false, 144},
    {{3, 3}, {640, 640}, {513, 0}, false, false, 2, 2, -1, 256, true, 16},
    {{130, 1}, {210, 210}, {}, false, true, 1, 1, 60, 0, false, 7},
};

// Plain; then modified, of rows that do not allow 16-byte access. Modified kernels alone read pages.
template <class T, class OfScored, int D>
bool check_all(unsigned seed) {
  using Modified = Loops<OfScored, D, true>;
  bool good = true;
  for (const Task& task : kTasks) {
    good = check<Loops<T, D, false>, T>(task, D, {}, seed) && good;
    good = check<Modified, OfScored>(task, D - 5, kScored, seed) && good;
  }
  for (const Task& task : kPaged) {
    good = check<Loops<T, D, true>, T>(task, D - 8, {}, seed) && good;
    good = check<Modified, OfScored>(task, D - 5, kScored, seed) && good;
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
