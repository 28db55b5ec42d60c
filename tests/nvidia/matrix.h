// What the programs here make problems of, and compare.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "core/params.h"
#include "cuda/attention/dropout.cuh"
#include "cuda/compat.cuh"

using namespace flash_attn;

// [rows, heads, dim], with NaN in the rows from `valid` on.
template <class T>
struct Matrix {
  int rows, heads, dim;
  std::vector<T> values;

  Matrix(int rows, int heads, int dim, int valid, std::mt19937& random)
      : rows(rows), heads(heads), dim(dim), values(size_t(rows) * heads * dim) {
    std::normal_distribution<float> normal;
    for (T& x : values) x = narrow<T>(normal(random));
    for (int row = valid; row < rows; ++row) spoil(row);
  }
  void spoil(int row) {
    for (int i = 0; i < heads * dim; ++i) values[size_t(row) * heads * dim + i] = narrow<T>(NAN);
  }
  void scale(int row, float factor) {
    for (int i = 0; i < heads * dim; ++i) {
      T& x = values[size_t(row) * heads * dim + i];
      x = narrow<T>(widen(x) * factor);
    }
  }
  double at(int row, int head, int col) const { return widen(values[(size_t(row) * heads + head) * dim + col]); }
  TensorRef ref(bool packed, int rows_of_batch) {
    return {values.data(), packed ? 0 : int64_t(rows_of_batch) * heads * dim, int64_t(heads) * dim, dim};
  }
};

// |found - wanted| / |wanted|; NaN where something found is.
struct Difference {
  double square = 0, norm = 1e-12;
  void add(double found, double wanted) {
    square += (found - wanted) * (found - wanted);
    norm += wanted * wanted;
  }
  double value() const { return std::sqrt(square / norm); }
};

// One side of a batch. Padded sequences are all as long as the longest; behind packed ones are `spare` rows.
struct Lengths {
  int longest = 0, total;
  std::vector<int> ends{0};

  Lengths(const std::vector<int>& of_sequences, bool packed, int spare) {
    for (int length : of_sequences) longest = std::max(longest, length);
    for (int length : of_sequences) ends.push_back(ends.back() + (packed ? length : longest));
    total = ends.back() + (packed ? spare : 0);
  }
  int operator[](int b) const { return ends[b + 1] - ends[b]; }
};

// What scores are put through, and dropout.
struct Scoring {
  float softcap = 0, slope = 0, dropout_p = 0;  // slope: ALiBi's of head 0; the n-th head has n + 1 times that
  std::vector<float> slopes{};
  int64_t rng_state[2] = {1234567890123, 42};

  void describe(AttentionParams& p) {
    p.softcap = softcap;
    p.dropout_p = dropout_p;
    p.rng_state = rng_state;
    for (int head = 0; head < p.heads_q; ++head) slopes.push_back(slope * float(head + 1));
    if (slope != 0) p.alibi_slopes = slopes.data();
  }
  double modify(double score, int head, int distance, double& derivative) const {
    const double tanh = softcap > 0 ? std::tanh(score / softcap) : 0;
    derivative = 1 - tanh * tanh;
    return (softcap > 0 ? softcap * tanh : score) - double(slope) * (head + 1) * std::abs(distance);
  }
  // What a probability is multiplied by.
  static double kept(const AttentionParams& p, int batch, int head, int query, int key) {
    const Dropout dropout(p, batch, head);
    if (!dropout.enabled()) return 1;
    uint32_t bits[4];
    dropout.patch(query, key, bits);
    const uint32_t pair = bits[query % 16 / 8 * 2 + key % 16 / 8];
    return dropout.keeps(key % 2 == 0 ? pair : pair >> 16) ? 1 / (1 - double(p.dropout_p)) : 0;
  }
};

const Scoring kScored = {3.0f, 0.02f, 0.3f};

// What the forward's and the backward's params share of a task: lengths, masks, scale.
template <class Task>
void describe(AttentionParams& p, const Task& task, int dim, const Lengths& q, const Lengths& k) {
  p.batch = int(task.lengths_q.size());
  p.heads_q = task.heads_q;
  p.heads_kv = task.heads_kv;
  p.head_dim = dim;
  p.seqlen_q = q.longest;
  p.seqlen_k = k.longest;
  p.total_q = q.total;
  p.total_k = k.total;
  p.cu_seqlens_q = task.packed ? q.ends.data() : nullptr;
  p.cu_seqlens_k = task.packed ? k.ends.data() : nullptr;
  p.seqused_k = task.used_k.empty() ? nullptr : task.used_k.data();
  p.softmax_scale = 1 / std::sqrt(double(dim));
  p.window_left = task.window_left;
  p.window_right = task.causal ? 0 : -1;
  p.head_group = 1;
}
