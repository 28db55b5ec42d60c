#include <limits>

#include "binding/arguments.h"
#include "binding/ops.h"
#include "binding/refuse.h"

namespace flash_attn {
namespace {

// No key at all: the output is zero, and the row's sum is the sink's alone, or empty.
void write_keyless(Tensor& out, Tensor& lse, const OptionalTensor& sink) {
  torch::stable::zero_(out);
  if (!sink) {
    torch::stable::fill_(lse, std::numeric_limits<double>::infinity());
    return;
  }
  const int64_t column[] = {sink->numel(), 1};  // broadcasts over the rows of each head
  torch::stable::copy_(lse, torch::stable::reshape(*sink, {column, 2}));
}

Tensor allocate_s_dmask(const Tensor& q, const AttentionParams& params, bool wanted) {
  const int32_t dtype = torch_dtype(q);
  if (!wanted) return empty(q, {0}, dtype);
  // Zero beforehand: kernels skip blocks of keys that no query sees.
  return zeros(q, {params.batch, params.heads_q, params.seqlen_q, params.seqlen_k}, dtype);
}

ForwardParams read_forward(const Arguments& arguments, int64_t split_size, bool deterministic) {
  ForwardParams params{};
  static_cast<AttentionParams&>(params) = read_arguments(arguments);
  read_pages(arguments, params);
  require(split_size >= 0 && split_size <= std::numeric_limits<int>::max(), "split_size", "must be at least 0",
          split_size, "0 turns the mode off");
  params.split_size = static_cast<int>(split_size);
  params.deterministic = deterministic;
  return params;
}

std::tuple<Tensor, Tensor, Tensor> run(const Target& target, ForwardParams params, const Tensor& q,
                                       const OptionalTensor& sink, bool return_s_dmask) {
  Tensor out = empty(q, shape_of(q), torch_dtype(q));
  Tensor lse = empty(q, rows_shape(params), torch_accum_dtype_of(params.dtype));
  Tensor s_dmask = allocate_s_dmask(q, params, return_s_dmask);
  if (params.batch == 0 || params.total_k == 0 || params.seqlen_k == 0) {
    write_keyless(out, lse, sink);
    return {out, lse, s_dmask};
  }
  if (params.total_q == 0) return {out, lse, s_dmask};
  if (q.is_cpu() && has_unowned_rows_q(params)) write_keyless(out, lse, sink);

  params.out = write_tensor("out", out, q, params.dtype);
  params.aligned = params.aligned && is_aligned(params.out, out, params.dtype);
  params.lse = read_rows("softmax_lse", lse, q, params);
  params.s_dmask = s_dmask.numel() ? s_dmask.data_ptr() : nullptr;

  const Workspace workspace = target.backend().plan_forward(params, target.queue());
  const Scratch scratch(q, workspace.bytes);
  target.backend().forward(params, scratch.data(), target.queue());
  return {out, lse, s_dmask};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sink, const OptionalTensor& rng_state, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double softmax_scale, int64_t window_left, int64_t window_right, double softcap, double dropout_p,
    int64_t split_size, bool performance_mode, bool return_s_dmask, bool deterministic) {
  const Target target(q);
  const ForwardParams params = read_forward(
      {q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sink, rng_state, max_seqlen_q, max_seqlen_k,
       softmax_scale, window_left, window_right, softcap, dropout_p, performance_mode},
      split_size, deterministic);
  return run(target, params, q, sink, return_s_dmask);
}

std::tuple<Tensor, Tensor> forward_pages(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& block_table, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sink, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, int64_t window_left,
    int64_t window_right, double softcap, int64_t split_size, bool performance_mode, bool deterministic) {
  const Target target(q);
  const OptionalTensor table = block_table;
  const ForwardParams params = read_forward(
      {q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sink, kNoTensor, max_seqlen_q, max_seqlen_k,
       softmax_scale, window_left, window_right, softcap, 0.0, performance_mode, table},
      split_size, deterministic);
  if (!target.backend().reads_pages(params, target.queue())) {
    return {empty(q, {0}, torch_dtype(q)), empty(q, {0}, torch_dtype(q))};
  }
  const auto [out, lse, s_dmask] = run(target, params, q, sink, false);
  return {out, lse};
}

}  // namespace flash_attn
