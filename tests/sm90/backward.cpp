// Hopper's backward on the host against the definition: `backward KIND DIM SEED`. Includes kernels from a copy of csrc in
// which the files of overlay/ have replaced those that are PTX. One line a problem; exits with 1 where one differs.
#include <climits>

#include "host.h"

#include "matrix.h"

#include "cuda/kernels/finish_dq.cuh"
#include "cuda/sm90/backward.cuh"
#include "cuda/sm90/backward_fp32.cuh"
#include "cuda/sm90/backward_wide.cuh"

// As sm90/arch.cuh has it.
struct Loops : Sm80 {
  template <Kernel KERNEL, class T, int D, bool MODIFIED>
  using Tuning = sm90::Tuning<KERNEL, T, D, MODIFIED>;
};

struct Task {
  std::vector<int> lengths_q, lengths_k, used_k;  // used_k: empty for all
  bool packed, causal, deterministic;
  int heads_q, heads_kv, window_left = -1;
};

template <class K, int D>
bool check(const Task& task, int dim, Scoring scoring, unsigned seed) {
  using T = typename K::T;
  constexpr bool kFp32 = std::is_same_v<T, float>;  // its kernel leaves dQ to FinishDq
  std::mt19937 random(seed);
  const bool packed = task.packed;
  const int batch = int(task.lengths_q.size()), group = task.heads_q / task.heads_kv;
  const Lengths lengths_q(task.lengths_q, packed, 7), lengths_k(task.lengths_k, packed, 5);
  const std::vector<int>&ends_q = lengths_q.ends, &ends_k = lengths_k.ends;
  const int longest_q = lengths_q.longest, longest_k = lengths_k.longest;
  const int total_q = lengths_q.total, total_k = lengths_k.total;
  Matrix<T> q(total_q, task.heads_q, dim, ends_q.back(), random), dout(q), dq(q);
  Matrix<T> k(total_k, task.heads_kv, dim, ends_k.back(), random), v(k), dk(k), dv(k);
  std::shuffle(dout.values.begin(), dout.values.begin() + size_t(ends_q.back()) * task.heads_q * dim, random);
  std::shuffle(v.values.begin(), v.values.begin() + size_t(ends_k.back()) * task.heads_kv * dim, random);
  if (kFp32) {  // rows of any size, and of zeros
    for (int row = 0; row < ends_k.back(); ++row) v.scale(row, std::ldexp(1.0f, int(random() % 20) - 10));
    for (int row = 0; row < ends_q.back(); ++row) {
      dout.scale(row, random() % 4 == 0 ? 0.0f : std::ldexp(1.0f, int(random() % 20) - 10));
    }
  }
  for (int b = 0; b < batch && !task.used_k.empty(); ++b) {
    for (int row = ends_k[b] + task.used_k[b]; row < ends_k[b + 1]; ++row) k.spoil(row), v.spoil(row);
  }
  for (Matrix<T>* x : {&dq, &dk, &dv}) std::fill(x->values.begin(), x->values.end(), narrow<T>(NAN));

  BackwardParams p{};
  describe(p, task, dim, lengths_q, lengths_k);
  scoring.describe(p);

  // The definition, in double.
  const double scale = 1 / std::sqrt(double(dim));
  std::vector<float> lse(size_t(task.heads_q) * total_q), delta(lse.size());
  std::normal_distribution<float> of_lse;  // its gradient
  std::vector<double> exact_dq(q.values.size()), exact_dk(k.values.size()), exact_dv(k.values.size());
  for (int b = 0; b < batch; ++b) {
    const int rows = lengths_q[b], keys = task.used_k.empty() ? lengths_k[b] : task.used_k[b];
    for (int h = 0; h < task.heads_q; ++h) {
      for (int i = 0; i < rows; ++i) {
        const int row = ends_q[b] + i, kv_head = h / group, diagonal = i + keys - rows;
        const int begin = task.window_left < 0 ? 0 : std::max(0, diagonal - task.window_left);
        const int end = task.causal ? std::min(keys, diagonal + 1) : keys;
        std::vector<double> score(keys), slope(keys), weight(keys), kept(keys), dp(keys);
        const auto dot = [&](const Matrix<T>& x, const Matrix<T>& y, int j) {
          double sum = 0;
          for (int d = 0; d < dim; ++d) sum += x.at(row, h, d) * y.at(ends_k[b] + j, kv_head, d);
          return sum;
        };
        double max = -INFINITY, sum = 0, row_delta = 0;
        for (int j = begin; j < end; ++j) {
          score[j] = scoring.modify(dot(q, k, j) * scale, h, diagonal - j, slope[j]);
          kept[j] = Scoring::kept(p, b, h, i, j);
          max = std::max(max, score[j]);
        }
        for (int j = begin; j < end; ++j) sum += std::exp(score[j] - max);
        const double row_lse = begin < end ? max + std::log(sum) : INFINITY;
        for (int j = begin; j < end; ++j) {
          weight[j] = std::exp(score[j] - row_lse);
          dp[j] = dot(dout, v, j) * kept[j];
          row_delta += weight[j] * dp[j];
        }
        const size_t at = packed ? size_t(h) * total_q + row : (size_t(b) * task.heads_q + h) * longest_q + i;
        lse[at] = float(row_lse);
        row_delta -= of_lse(random);
        delta[at] = float(row_delta);
        for (int j = begin; j < end; ++j) {
          const double ds = weight[j] * (dp[j] - row_delta) * slope[j] * scale;
          for (int d = 0; d < dim; ++d) {
            const size_t query = (size_t(row) * task.heads_q + h) * dim + d;
            const size_t key = (size_t(ends_k[b] + j) * task.heads_kv + kv_head) * dim + d;
            exact_dq[query] += ds * k.at(ends_k[b] + j, kv_head, d);
            exact_dk[key] += ds * q.at(row, h, d);
            exact_dv[key] += weight[j] * kept[j] * dout.at(row, h, d);
          }
        }
      }
    }
  }

  p.q = q.ref(packed, longest_q);
  p.k = k.ref(packed, longest_k);
  p.v = v.ref(packed, longest_k);
  p.dout = dout.ref(packed, longest_q);
  p.dq = dq.ref(packed, longest_q);
  p.dk = dk.ref(packed, longest_k);
  p.dv = dv.ref(packed, longest_k);
  p.lse = {lse.data(), packed ? 0 : int64_t(task.heads_q) * longest_q, packed ? total_q : longest_q};
  p.delta = {delta.data(), p.lse.batch_stride, p.lse.head_stride};
  p.dtype = kFp32 ? DType::kFloat32 : std::is_same_v<T, Half> ? DType::kFloat16 : DType::kBFloat16;
  p.aligned = dim % 8 == 0;
  p.deterministic = task.deterministic;
  const bool alike = !kFp32 && !packed && task.used_k.empty();
  p.dq_lag = alike ? ceil_div(longest_k, K::kN) : -1;
  p.dq_heads = std::min(batch * task.heads_kv, alike ? 2 : INT_MAX);
  const int64_t head_blocks = query_blocks(p, K::kM);
  const size_t sums = alike ? size_t(p.dq_heads) * group * ceil_div(longest_q, K::kM)
                            : size_t(task.heads_q) * head_blocks;
  std::vector<float> dq_accum(sums * K::kM * D, kFp32 ? 0.0f : NAN);
  std::vector<int32_t> dq_turn(size_t(task.heads_q) * head_blocks);
  std::vector<int32_t> dq_progress(size_t(2) * batch * task.heads_kv);
  uint32_t blocks_taken = 0;
  p.dq_accum = dq_accum.data();
  p.dq_turn = dq_turn.data();
  p.dq_progress = dq_progress.data();
  p.blocks_taken = &blocks_taken;

  const typename K::Launched launched(p);
  const unsigned blocks = unsigned(kFp32 ? K::blocks(p) : std::min<int64_t>(K::blocks(p), 3));
  const auto run = [&](auto* kernel) {
    using Kernel = std::remove_pointer_t<decltype(kernel)>;
    host::launch(blocks, K::kThreads, K::kSharedBytes, [&] { Kernel(launched, host::self->block->shared).run(); });
  };
  if constexpr (kFp32) {
    run(static_cast<K*>(nullptr));
    using Finish = FinishDq<Loops, Problem<float, D, false>>;
    host::launch(unsigned(Finish::blocks(p)), Finish::kThreads, Finish::kSharedBytes,
                 [&] { Finish::run(p, blockIdx.x, host::self->block->shared); });
  } else {
    if (K::is_ragged(p)) {
      run(static_cast<typename K::Ragged*>(nullptr));
    } else {
      run(static_cast<K*>(nullptr));
    }
    using Finish = typename K::Sums::Kernel;
    if (p.dq_lag < 0) {
      host::launch(unsigned(Finish::blocks(p)), Finish::kThreads, Finish::kSharedBytes,
                   [&] { Finish(p, host::self->block->shared).run(); });
    }
  }

  Difference of_dq, of_dk, of_dv;
  for (size_t i = 0; i < dk.values.size(); ++i) {
    of_dk.add(widen(dk.values[i]), exact_dk[i]);
    of_dv.add(widen(dv.values[i]), exact_dv[i]);
  }
  for (size_t i = 0; i < size_t(ends_q.back()) * task.heads_q * dim; ++i) of_dq.add(widen(dq.values[i]), exact_dq[i]);
  // Twice the dtype's rounding, P and dS being rounded too.
  const double bound = kFp32 ? 2e-6 : std::is_same_v<T, Half> ? 1e-3 : 8e-3;
  const bool good = of_dq.value() < bound && of_dk.value() < bound && of_dv.value() < bound;
  printf("%s dim %d, %s, %s, %s, %d queries and %d keys in %d: dq %.1e dk %.1e dv %.1e\n", good ? "good" : "BAD", dim,
         packed ? "packed" : "padded", task.causal ? "causal" : "full", task.deterministic ? "fixed" : "any order",
         total_q, total_k, batch, of_dq.value(), of_dk.value(), of_dv.value());
  return good;
}

const Task kTasks[] = {
    {{70, 70, 70}, {130, 130, 130}, {}, false, false, false, 2, 2},
    {{130, 130, 130}, {200, 200, 200}, {}, false, true, true, 2, 1},
    {{70, 3, 131}, {150, 64, 70}, {}, true, true, false, 2, 1},
    {{70, 3, 0, 64, 131}, {150, 64, 10, 0, 129}, {}, true, false, true, 2, 2},
    {{5, 190}, {150, 70}, {}, true, true, true, 2, 1, 40},
    {{100, 64}, {128, 150}, {77, 130}, true, false, false, 1, 1},
    {{40, 100}, {128, 128}, {0, 101}, false, true, true, 2, 1},
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
    good = check<K<BFloat16, D, Modifiers::kNone>, D>(task, D, {}, seed) && good;
    good = check<K<Half, D, Modifiers::kAny>, D>(task, D - 8, kScored, seed) && good;
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
    good = check<sm90::Fp32Backward<D, Modifiers::kNone>, D>(task, D, {}, seed) && good;
    good = check<sm90::Fp32Backward<D, Modifiers::kAny>, D>(task, D - 5, kScored, seed) && good;
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
