// What the programs here make problems of, and compare.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "core/params.h"
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

// What the forward's and the backward's params share of a task: lengths, masks, scale.
template <class Task>
void describe(AttentionParams& p, const Task& task, int dim, int longest_q, int longest_k, int total_q, int total_k,
              const std::vector<int>& ends_q, const std::vector<int>& ends_k) {
  p.batch = int(task.lengths_q.size());
  p.heads_q = task.heads_q;
  p.heads_kv = task.heads_kv;
  p.head_dim = dim;
  p.seqlen_q = longest_q;
  p.seqlen_k = longest_k;
  p.total_q = total_q;
  p.total_k = total_k;
  p.cu_seqlens_q = task.packed ? ends_q.data() : nullptr;
  p.cu_seqlens_k = task.packed ? ends_k.data() : nullptr;
  p.seqused_k = task.used_k.empty() ? nullptr : task.used_k.data();
  p.softmax_scale = 1 / std::sqrt(double(dim));
  p.window_left = task.window_left;
  p.window_right = task.causal ? 0 : -1;
  p.head_group = 1;
}
