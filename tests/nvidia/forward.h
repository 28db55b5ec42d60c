// A forward's problems and their definition, for the programs that run its kernels.
#pragma once

#include <cfloat>

#include "host.h"

#include "matrix.h"

// As compat.cuh has it for NVIDIA.
#define kTanhBySeries true
#define any_lane(x) (__any_sync(0xffffffffu, x) != 0)

#include "cuda/attention/schedule.cuh"
#include "cuda/attention/softcap.cuh"

struct Task {
  std::vector<int> lengths_q, lengths_k, used_k;  // used_k: empty for all
  bool packed, causal;
  int heads_q, heads_kv, window_left = -1;
  int split_size = 0;
  bool partial = false;  // a thread block for each chunk
  int page_size = 0;
  int spare_columns = 0;  // of the plain instance
};

// Keys or values in pages, which lie in the order of `table`.
template <class T>
std::vector<T> paged(const Matrix<T>& x, const Task& task, const std::vector<int32_t>& table) {
  const size_t bytes = size_t(task.page_size) * x.heads * x.dim;  // elements of a page
  std::vector<T> pages(table.size() * bytes);
  for (size_t page = 0; page < table.size(); ++page) {
    std::copy_n(x.values.begin() + page * bytes, bytes, pages.begin() + table[page] * bytes);
  }
  return pages;
}

// The larger of both; NaN where one is.
void raise(double& most, double x) {
  if (!(x <= most) && !std::isnan(most)) most = x;
}

// Loops: run(p), whose thread blocks have kStashDeviceBytes of partial_out, and leave num_splits > 1 to Combine where not
// in_cluster(p).
template <class Loops, class T>
bool check(const Task& task, int dim, Scoring scoring, unsigned seed) {
  constexpr bool kFp32 = std::is_same_v<T, float>, kHalf = std::is_same_v<T, Half>;
  std::mt19937 random(seed);
  const bool packed = task.packed;
  const int batch = int(task.lengths_q.size()), group = task.heads_q / task.heads_kv;
  const Lengths lengths_q(task.lengths_q, packed, 7), lengths_k(task.lengths_k, packed, 5);
  const std::vector<int>&ends_q = lengths_q.ends, &ends_k = lengths_k.ends;
  const int longest_q = lengths_q.longest, longest_k = lengths_k.longest;
  const int total_q = lengths_q.total, total_k = lengths_k.total;
  Matrix<T> q(total_q, task.heads_q, dim, ends_q.back(), random), out(q);
  Matrix<T> k(total_k, task.heads_kv, dim, ends_k.back(), random), v(k);
  std::shuffle(v.values.begin(), v.values.begin() + size_t(ends_k.back()) * task.heads_kv * dim, random);
  for (int row = 0; row < ends_k.back(); ++row) {
    const int octaves = kFp32 ? 40 : 8;
    v.scale(row, std::ldexp(1.0f, int(random() % octaves) - octaves / 2));
  }
  for (int b = 0; b < batch && !task.used_k.empty(); ++b) {
    for (int row = ends_k[b] + task.used_k[b]; row < ends_k[b + 1]; ++row) k.spoil(row), v.spoil(row);
  }
  for (int row = 0; row < total_q; ++row) out.spoil(row);
  std::vector<float> lse(size_t(task.heads_q) * total_q, NAN);

  ForwardParams p{};
  p.q = q.ref(packed, longest_q);
  p.k = k.ref(packed, longest_k);
  p.v = v.ref(packed, longest_k);
  p.out = out.ref(packed, longest_q);
  p.lse = {lse.data(), packed ? 0 : int64_t(task.heads_q) * longest_q, packed ? total_q : longest_q};
  describe(p, task, dim, lengths_q, lengths_k);
  scoring.describe(p);
  if (p.softcap > 0) p.softcap_series = softcap_series(p.softmax_scale, p.softcap);
  p.dtype = kFp32 ? DType::kFloat32 : kHalf ? DType::kFloat16 : DType::kBFloat16;
  p.aligned = dim * sizeof(T) % 16 == 0;
  p.split_size = task.split_size;
  p.deterministic = seed % 2 == 0;  // then a share of keys is one warpgroup's
  p.num_splits = task.partial ? ceil_div(longest_k, task.split_size) : 1;
  const int64_t partial_rows = int64_t(p.num_splits) * batch * task.heads_q * longest_q;
  std::vector<float> partial_out(size_t(partial_rows) * dim + Loops::kStashDeviceBytes, NAN);
  std::vector<float> partial_max(partial_rows), partial_sum(partial_rows);
  p.partial_out = partial_out.data();
  p.partial_max = partial_max.data();
  p.partial_sum = partial_sum.data();
  std::vector<int32_t> table;
  std::vector<T> k_pages, v_pages;
  if (task.page_size > 0) {
    for (int i = 0; i < total_k / task.page_size; ++i) table.push_back(i);
    std::shuffle(table.begin(), table.end(), random);
    k_pages = paged(k, task, table), v_pages = paged(v, task, table);
    p.k.data = k_pages.data(), p.v.data = v_pages.data();
    p.k.batch_stride = p.v.batch_stride = int64_t(task.page_size) * task.heads_kv * dim;
    p.block_table = table.data();
    p.block_table_stride = longest_k / task.page_size;
    p.pages = int(table.size());
    p.page_size = task.page_size;
    p.page_inverse = inverse_of(p.page_size);
  }
  Loops::run(p);
  const bool is_partial = task.partial && !Loops::in_cluster(p);

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
          if (is_partial) {  // as Combine folds them
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
          raise(error, std::fabs(found - wanted));
        }
        if (begin < end) error /= largest;
        raise(worst, error);
        if (is_partial) continue;
        const size_t at = packed ? size_t(h) * total_q + row : (size_t(b) * task.heads_q + h) * longest_q + i;
        const double wanted = begin < end ? max + std::log(sum) : INFINITY;
        raise(worst_lse, lse[at] == wanted ? 0 : std::fabs(lse[at] - wanted));
      }
    }
  }
  for (int row = ends_q.back(); row < total_q; ++row) {
    for (int d = 0; d < dim; ++d) worst += std::fabs(out.at(row, 0, d));  // rows of no sequence are zero
  }
  // Twice the dtype's rounding, P being rounded too; of LSE what the softcap's series leaves.
  const bool good = worst < (kFp32 ? 2e-6 : kHalf ? 1e-3 : 8e-3) && worst_lse < (kFp32 ? 2e-6 : 2e-5);
  printf("%s dim %d, %s, %s, chunks of %d%s, %d queries and %d keys in %d: out %.1e lse %.1e\n", good ? "good" : "BAD",
         dim, packed ? "packed" : "padded", task.causal ? "causal" : "full", task.split_size,
         task.partial ? " apart" : "", total_q, total_k, batch, worst, worst_lse);
  return good;
}

const Task kTasks[] = {
    {{70, 70}, {200, 200}, {}, false, false, 2, 1},
    {{200}, {200}, {}, false, true, 2, 2},
    {{70, 3, 131}, {150, 64, 70}, {}, true, true, 2, 1},
    {{70, 3, 0, 64}, {150, 64, 10, 0}, {}, true, false, 1, 1},
    {{190}, {250}, {}, false, true, 1, 1, 40},
    {{100, 64}, {128, 150}, {77, 130}, true, false, 1, 1},
    {{130}, {330}, {}, false, true, 1, 1, -1, 128},
    {{5}, {330}, {}, false, false, 2, 1, -1, 128, true},
};
