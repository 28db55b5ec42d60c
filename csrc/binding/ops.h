// The operators, as torch calls them. Schemas, with the names of the arguments, are in library.cpp.
#pragma once

#include <tuple>

#include "backend.h"
#include "binding/tensors.h"

namespace flash_attn {

// A backend, and where on it this call runs. Makes q's device current for as long as it lives.
class Target {
 public:
  explicit Target(const Tensor& q);
  const Backend& backend() const { return *backend_; }
  const Queue& queue() const { return queue_; }

 private:
  const Backend* backend_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Queue queue_;
};

// The backend for "cpu" or "cuda" (which is also what torch calls AMD's); says what to install where it was not built.
const Backend& backend_for(const std::string& device_type);
Queue queue_for(const std::string& device_type, int device_index);

// Returns out (q's shape and dtype), softmax_lse (accum; see rows_shape) and s_dmask (q's dtype,
// [batch, heads_q, max_seqlen_q, max_seqlen_k], or [0] when not asked for).
std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sink, const OptionalTensor& rng_state, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double softmax_scale, int64_t window_left, int64_t window_right, double softcap, double dropout_p,
    int64_t split_size, bool performance_mode, bool return_s_dmask, bool deterministic);

// out and softmax_lse of keys and values in pages, [pages, page_size, heads_kv, head_dim], read where they lie; two
// empty tensors where no kernel does that, and the caller has to gather them. A sequence has max_seqlen_k keys;
// packed, cu_seqlens_k says how many.
std::tuple<Tensor, Tensor> forward_pages(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& block_table, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sink, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, int64_t window_left,
    int64_t window_right, double softcap, int64_t split_size, bool performance_mode, bool deterministic);

// Fills dq, dk and dv; returns delta = rowsum(dout * out) - dlse, in softmax_lse's shape and dtype.
Tensor backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                const Tensor& out, const Tensor& softmax_lse, Tensor dq, Tensor dk, Tensor dv,
                const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes, const OptionalTensor& sink,
                const OptionalTensor& rng_state, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                int64_t window_left, int64_t window_right, double softcap, double dropout_p, bool deterministic,
                bool performance_mode);

// Writes k and v into the caches, [pages, page_size, heads_kv, head_dim], behind the keys that cache_seqlens counts.
// Returns q rotated (or an empty tensor, without tables) and how many keys there are afterwards, int32 [batch].
std::tuple<Tensor, Tensor> append(const Tensor& q, const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache,
                                  const Tensor& cache_seqlens, const OptionalTensor& block_table,
                                  const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin, bool interleaved,
                                  bool queries_advance);

}  // namespace flash_attn
