// Hopper's fp32 forward on the host against the definition: `forward_fp32 DIM SEED`, as backward.cpp.
#include "host.h"

#include "matrix.h"

#include "cuda/sm90/forward_fp32.cuh"

struct Task {
  std::vector<int> lengths_q, lengths_k, used_k;  // used_k: empty for all
  bool packed, causal;
  int heads_q, heads_kv, window_left = -1;
  int split_size = 0;
  bool partial = false;  // a thread block for each chunk
};

template <int D, Modifiers MODIFIERS>
bool check(const Task& task, int dim, Scoring scoring, unsigned seed) {
  using K = sm90::Fp32Forward<D, MODIFIERS>;
  std::mt19937 random(seed);
  const bool packed = task.packed;
  const int batch = int(task.lengths_q.size()), group = task.heads_q / task.heads_kv;
  const Lengths lengths_q(task.lengths_q, packed, 7), lengths_k(task.lengths_k, packed, 5);
  const std::vector<int>&ends_q = lengths_q.ends, &ends_k = lengths_k.ends;
  const int longest_q = lengths_q.longest, longest_k = lengths_k.longest;
  const int total_q = lengths_q.total, total_k = lengths_k.total;
  Matrix<float> q(total_q, task.heads_q, dim, ends_q.back(), random), out(q);
  Matrix<float> k(total_k, task.heads_kv, dim, ends_k.back(), random), v(k);
  std::shuffle(v.values.begin(), v.values.begin() + size_t(ends_k.back()) * task.heads_kv * dim, random);
  for (int row = 0; row < ends_k.back(); ++row) v.scale(row, std::ldexp(1.0f, int(random() % 40) - 20));
  for (int b = 0; b < batch && !task.used_k.empty(); ++b) {
    for (int row = ends_k[b] + task.used_k[b]; row < ends_k[b + 1]; ++row) k.spoil(row), v.spoil(row);
  }
  std::fill(out.values.begin(), out.values.end(), NAN);
  std::vector<float> lse(size_t(task.heads_q) * total_q, NAN);

  ForwardParams p{};
  p.q = q.ref(packed, longest_q);
  p.k = k.ref(packed, longest_k);
  p.v = v.ref(packed, longest_k);
  p.out = out.ref(packed, longest_q);
  p.lse = {lse.data(), packed ? 0 : int64_t(task.heads_q) * longest_q, packed ? total_q : longest_q};
  describe(p, task, dim, lengths_q, lengths_k);
  scoring.describe(p);
  p.dtype = DType::kFloat32;
  p.aligned = dim % 4 == 0;
  p.split_size = task.split_size;
  p.num_splits = task.partial ? ceil_div(longest_k, task.split_size) : 1;
  const int64_t partial_rows = int64_t(p.num_splits) * batch * task.heads_q * longest_q;
  std::vector<float> partial_out(size_t(partial_rows) * dim, NAN), partial_max(partial_rows), partial_sum(partial_rows);
  p.partial_out = partial_out.data();
  p.partial_max = partial_max.data();
  p.partial_sum = partial_sum.data();
  const typename K::Launched launched(p);
  host::launch(unsigned(K::blocks(p)), K::kThreads, K::kSharedBytes + (may_fold(p) ? K::kStashBytes : 0),
               [&] { K(launched, host::self->block->shared).run(); });

  // Relative to what a row's terms add up to, dropped ones included, where they are largest.
  double worst = 0, worst_lse = 0;
  for (int b = 0; b < batch; ++b) {
    const int rows = lengths_q[b], keys = task.used_k.empty() ? lengths_k[b] : task.used_k[b];
    for (int h = 0; h < task.heads_q; ++h) {
      for (int i = 0; i < rows; ++i) {
        const int row = ends_q[b] + i, diagonal = i + keys - rows;
        const int begin = task.window_left < 0 ? 0 : std::max(0, diagonal - task.window_left);
        const int end = task.causal ? std::min(keys, diagonal + 1) : keys;
        std::vector<double> weight(keys), kept(keys);
        double max = -INFINITY, sum = 0;
        for (int j = begin; j < end; ++j) {
          for (int d = 0; d < dim; ++d) weight[j] += q.at(row, h, d) * k.at(ends_k[b] + j, h / group, d);
          double derivative;
          weight[j] = scoring.modify(weight[j] * p.softmax_scale, h, diagonal - j, derivative);
          max = std::max(max, weight[j]);
        }
        for (int j = begin; j < end; ++j) {
          sum += weight[j] = std::exp(weight[j] - max);
          kept[j] = Scoring::kept(p, b, h, i, j);
        }
        double largest = 0, error = 0;
        for (int d = 0; d < dim; ++d) {
          double wanted = 0, size = 0, found = out.at(row, h, d);
          for (int j = begin; j < end; ++j) {
            const double term = weight[j] / sum * v.at(ends_k[b] + j, h / group, d);
            wanted += kept[j] * term;
            size += std::fabs(term);
          }
          if (task.partial) {  // as Combine folds them
            double all = 0;
            found = 0;
            for (int split = 0; split < p.num_splits; ++split) {
              const size_t at = ((size_t(split) * batch + b) * task.heads_q + h) * longest_q + i;
              const double share = std::exp2(partial_max[at] - max / kLn2);
              found += share * partial_out[at * dim + d];
              all += share * partial_sum[at];
            }
            found = begin < end ? found / all * kept_scale<double>(p) : 0;
          }
          largest = std::max(largest, size);
          if (!(std::fabs(found - wanted) <= error)) error = std::fabs(found - wanted);
        }
        if (begin < end) error /= largest;
        if (!(error <= worst)) worst = error;
        if (task.partial) continue;
        const size_t at = packed ? size_t(h) * total_q + row : (size_t(b) * task.heads_q + h) * longest_q + i;
        const double wanted = begin < end ? max + std::log(sum) : INFINITY;
        const double of_lse = lse[at] == wanted ? 0 : std::fabs(lse[at] - wanted);
        if (!(of_lse <= worst_lse)) worst_lse = of_lse;
      }
    }
  }
  for (int row = ends_q.back(); row < total_q; ++row) {
    for (int d = 0; d < dim; ++d) worst += std::fabs(out.at(row, 0, d));  // rows of no sequence are zero
  }
  const bool good = worst < 2e-6 && worst_lse < 2e-6;
  printf("%s dim %d, %s, %s, chunks of %d%s, %d queries and %d keys in %d: out %.1e lse %.1e\n", good ? "good" : "BAD",
         dim, packed ? "packed" : "padded", task.causal ? "causal" : "full", task.split_size,
         task.partial ? " apart" : "", total_q, total_k, batch, worst, worst_lse);
  return good;
}

// By the copy engine; then scored, of rows that do not allow 16-byte access.
template <int D>
bool check_all(unsigned seed) {
  const Task tasks[] = {
      {{70, 70}, {200, 200}, {}, false, false, 2, 1},
      {{200}, {200}, {}, false, true, 2, 2},
      {{70, 3, 131}, {150, 64, 70}, {}, true, true, 2, 1},
      {{70, 3, 0, 64}, {150, 64, 10, 0}, {}, true, false, 1, 1},
      {{190}, {250}, {}, false, true, 1, 1, 40},
      {{100, 64}, {128, 150}, {77, 130}, true, false, 1, 1},
      {{130}, {330}, {}, false, true, 1, 1, -1, 128},
      {{5}, {330}, {}, false, false, 2, 1, -1, 64, true},
  };
  bool good = true;
  for (const Task& task : tasks) {
    if (task.split_size > 0 && !task.partial && !sm90::Fp32Forward<D, Modifiers::kNone>::kFolds) continue;
    good = check<D, Modifiers::kNone>(task, D, {}, seed) && good;
    good = check<D, Modifiers::kAny>(task, D - 5, kScored, seed) && good;
  }
  return good;
}

int main(int, char** arguments) {
  const unsigned seed = unsigned(atoi(arguments[2]));
  srand(seed);
  switch (atoi(arguments[1])) {
    case 64:
      return !check_all<64>(seed);
    case 96:
      return !check_all<96>(seed);
    case 128:
      return !check_all<128>(seed);
    case 192:
      return !check_all<192>(seed);
    case 256:
      return !check_all<256>(seed);
  }
  return 2;
}
