// The operators' schemas, and which functions stand behind them. Fakes and autograd are registered in Python.
#include "binding/build_info.h"
#include "binding/ops.h"
#include "binding/refuse.h"

namespace flash_attn {
namespace {

// clang-format off
constexpr const char* kForward =
    "forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, "
    "Tensor? alibi_slopes, Tensor? sink, Tensor? rng_state, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float softmax_scale, SymInt window_left, SymInt window_right, float softcap, float dropout_p, int split_size, "
    "bool performance_mode, bool return_s_dmask, bool deterministic) "
    "-> (Tensor out, Tensor softmax_lse, Tensor s_dmask)";

constexpr const char* kForwardPages =
    "forward_pages(Tensor q, Tensor k, Tensor v, Tensor block_table, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seqused_k, Tensor? alibi_slopes, Tensor? sink, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float softmax_scale, SymInt window_left, SymInt window_right, float softcap, int split_size, "
    "bool performance_mode, bool deterministic) -> (Tensor out, Tensor softmax_lse)";

constexpr const char* kBackward =
    "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, "
    "Tensor? alibi_slopes, Tensor? sink, Tensor? rng_state, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float softmax_scale, SymInt window_left, SymInt window_right, float softcap, float dropout_p, "
    "bool deterministic, bool performance_mode) -> Tensor delta";

constexpr const char* kAppend =
    "append(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, "
    "Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, bool interleaved, bool queries_advance) "
    "-> (Tensor rotated_q, Tensor seqlens_after)";
// clang-format on

DType dtype_from_name(const std::string& name) {
  const std::string prefix = "torch.";
  const std::string bare = name.compare(0, prefix.size(), prefix) == 0 ? name.substr(prefix.size()) : name;
  for (DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
    if (bare == dtype_name(torch_dtype_of(dtype))) return dtype;
  }
  refuse("dtype", "must be float16, bfloat16, float32 or float64", name, "see docs/numerics.md");
}

// JSON: what was built, from what, with what.
std::string build_info() { return kBuildInfo; }

int64_t key_block(std::string device_type, std::string dtype, int64_t head_dim) {
  require(head_dim >= 1 && head_dim <= kMaxHeadDim, "head_dim", "must be between 1 and 256", head_dim,
          "split the heads");
  return backend_for(device_type).key_block(dtype_from_name(dtype), static_cast<int>(head_dim));
}

std::string describe(std::string device_type, int64_t device_index) {
  const Backend& backend = backend_for(device_type);
  return backend.describe(queue_for(device_type, static_cast<int>(device_index)));
}

}  // namespace
}  // namespace flash_attn

STABLE_TORCH_LIBRARY(flash_attn, library) {
  library.def(flash_attn::kForward);
  library.def(flash_attn::kBackward);
  library.def(flash_attn::kForwardPages);
  library.def(flash_attn::kAppend);
  library.def("build_info() -> str");
  library.def("key_block(str device_type, str dtype, int head_dim) -> int");
  library.def("describe(str device_type, int device_index) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CPU, library) {
  library.impl("forward", TORCH_BOX(&flash_attn::forward));
  library.impl("backward", TORCH_BOX(&flash_attn::backward));
  library.impl("forward_pages", TORCH_BOX(&flash_attn::forward_pages));
  library.impl("append", TORCH_BOX(&flash_attn::append));
}

#ifdef FLASH_ATTENTION_GPU
// torch's name for AMD's GPUs, too.
STABLE_TORCH_LIBRARY_IMPL(flash_attn, CUDA, library) {
  library.impl("forward", TORCH_BOX(&flash_attn::forward));
  library.impl("backward", TORCH_BOX(&flash_attn::backward));
  library.impl("forward_pages", TORCH_BOX(&flash_attn::forward_pages));
  library.impl("append", TORCH_BOX(&flash_attn::append));
}

#endif

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CompositeImplicitAutograd, library) {
  library.impl("build_info", TORCH_BOX(&flash_attn::build_info));
  library.impl("key_block", TORCH_BOX(&flash_attn::key_block));
  library.impl("describe", TORCH_BOX(&flash_attn::describe));
}
