#include "binding/arguments.h"
#include "binding/ops.h"
#include "binding/refuse.h"

namespace flash_attn {
namespace {

void require_like(const char* name, const Tensor& tensor, const char* model_name, const Tensor& model) {
  if (shape_of(tensor) != shape_of(model)) {
    refuse(name, std::string("shape must be ") + model_name + "'s, " + to_string(shape_of(model)),
           to_string(shape_of(tensor)), "gradients have the shape of what they are the gradient of");
  }
}

// Where no query meets a key, every gradient is zero, and delta = rowsum(dout * out) - dlse has an output of zero.
Tensor write_keyless(const Tensor& like, const AttentionParams& params, const OptionalTensor& dlse) {
  Tensor delta = zeros(like, rows_shape(params), torch_accum_dtype_of(params.dtype));
  return dlse ? torch::stable::subtract(delta, *dlse) : delta;
}

}  // namespace

Tensor backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                const Tensor& out, const Tensor& softmax_lse, Tensor dq, Tensor dk, Tensor dv,
                const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes, const OptionalTensor& sink,
                const OptionalTensor& rng_state, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                int64_t window_left, int64_t window_right, double softcap, double dropout_p, bool deterministic,
                bool performance_mode) {
  const Target target(q);
  BackwardParams params{};
  static_cast<AttentionParams&>(params) = read_arguments(
      {q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sink, rng_state, max_seqlen_q, max_seqlen_k,
       softmax_scale, window_left, window_right, softcap, dropout_p, performance_mode});
  params.deterministic = deterministic;

  require_like("dout", dout, "q", q);
  require_like("out", out, "q", q);
  require_like("dq", dq, "q", q);
  require_like("dk", dk, "k", k);
  require_like("dv", dv, "v", v);
  params.dout = read_tensor("dout", dout, q, params.dtype);
  params.out = read_tensor("out", out, q, params.dtype);
  params.dq = write_tensor("dq", dq, q, params.dtype);
  params.dk = write_tensor("dk", dk, q, params.dtype);
  params.dv = write_tensor("dv", dv, q, params.dtype);
  params.lse = read_rows("softmax_lse", softmax_lse, q, params);
  if (dlse) params.dlse = read_rows("dlse", *dlse, q, params);
  params.aligned = params.aligned && is_aligned(params.dout, dout, params.dtype) &&
                   is_aligned(params.out, out, params.dtype) && is_aligned(params.dq, dq, params.dtype) &&
                   is_aligned(params.dk, dk, params.dtype) && is_aligned(params.dv, dv, params.dtype);

  const bool nothing = params.batch == 0 || params.total_q == 0 || params.total_k == 0 || params.seqlen_k == 0;
  if (nothing || (q.is_cpu() && has_unowned_rows_q(params))) torch::stable::zero_(dq);
  if (nothing || (q.is_cpu() && has_unowned_rows_k(params))) {
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
  }
  if (nothing) return write_keyless(q, params, dlse);

  Tensor delta = q.is_cpu() && has_unowned_rows_q(params)
                     ? zeros(q, rows_shape(params), torch_accum_dtype_of(params.dtype))
                     : empty(q, rows_shape(params), torch_accum_dtype_of(params.dtype));
  params.delta = read_rows("delta", delta, q, params);

  const Workspace workspace = target.backend().plan_backward(params, target.queue());
  const Scratch scratch(q, workspace.bytes);
  target.backend().backward(params, scratch.data(), target.queue());
  return delta;
}

}  // namespace flash_attn
