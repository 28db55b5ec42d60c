// A backward's problems and their definition, for the programs that run its kernels.
#pragma once

#include <climits>

#include "host.h"

#include "matrix.h"

#include "cuda/attention/schedule.cuh"

struct Task {
  std::vector<int> lengths_q, lengths_k, used_k;  // used_k: empty for all
  bool packed, causal, deterministic;
  int heads_q, heads_kv, window_left = -1;
};

// Loops: T, kM and kN of a block, kFinishesDq, and run(p): kernels that do not finish dq want its sums zero.
template <class Loops, int D>
bool check(const Task& task, int dim, Scoring scoring, unsigned seed) {
  using T = typename Loops::T;
  constexpr bool kFp32 = std::is_same_v<T, float>;
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
  const bool alike = Loops::kFinishesDq && !packed && task.used_k.empty();
  p.dq_lag = alike ? ceil_div(longest_k, Loops::kN) : -1;
  p.dq_heads = std::min(batch * task.heads_kv, alike ? 2 : INT_MAX);
  const int64_t head_blocks = query_blocks(p, Loops::kM);
  const size_t sums = alike ? size_t(p.dq_heads) * group * ceil_div(longest_q, Loops::kM)
                            : size_t(task.heads_q) * head_blocks;
  std::vector<float> dq_accum(sums * Loops::kM * D, Loops::kFinishesDq ? NAN : 0.0f);
  std::vector<int32_t> dq_turn(size_t(task.heads_q) * head_blocks);
  std::vector<int32_t> dq_progress(size_t(2) * batch * task.heads_kv);
  uint32_t blocks_taken = 0;
  p.dq_accum = dq_accum.data();
  p.dq_turn = dq_turn.data();
  p.dq_progress = dq_progress.data();
  p.blocks_taken = &blocks_taken;

  Loops::run(p);

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
