#include "binding/arguments.h"

#include <algorithm>

#include "binding/refuse.h"

namespace flash_attn {

void require_beside(const char* name, const Tensor& tensor, const Tensor& like) {
  if (torch_device_type(tensor) != torch_device_type(like) || tensor.get_device_index() != like.get_device_index()) {
    refuse(name, "must be on " + device_name(like) + " like q", device_name(tensor), "move it with .to(q.device)");
  }
}

void require_dtype(const char* name, const Tensor& tensor, int32_t dtype) {
  if (torch_dtype(tensor) != dtype) {
    const std::string wanted = dtype_name(dtype);
    refuse(name, "dtype must be " + wanted, dtype_name(torch_dtype(tensor)),
           "convert it with .to(torch." + wanted + ")");
  }
}

void require_shape(const char* name, const Tensor& tensor, const Shape& shape) {
  if (shape_of(tensor) != shape) {
    refuse(name, "shape must be " + to_string(shape), to_string(shape_of(tensor)), "see the operator's documentation");
  }
}

void require_unit_stride(const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  require(tensor.size(last) <= 1 || tensor.stride(last) == 1, name, "the last dimension's stride must be 1",
          tensor.stride(last), "call .contiguous()");
}

namespace {

void require_contiguous(const char* name, const Tensor& tensor) {
  if (!tensor.is_contiguous()) {
    refuse(name, "must be contiguous", "a strided view", "call .contiguous()");
  }
}

// A small contiguous vector of parameters; null where absent.
template <class T>
const T* read_vector(const char* name, const OptionalTensor& tensor, const Tensor& like, int32_t dtype,
                     const Shape& shape) {
  if (!tensor) return nullptr;
  require_beside(name, *tensor, like);
  require_dtype(name, *tensor, dtype);
  require_shape(name, *tensor, shape);
  require_contiguous(name, *tensor);
  return static_cast<const T*>(tensor->data_ptr());
}

void read_sizes(const Arguments& arguments, AttentionParams& params) {
  const Shape q = shape_of(arguments.q), k = shape_of(arguments.k);
  const bool packed = arguments.cu_seqlens_q.has_value();
  if (packed != arguments.cu_seqlens_k.has_value()) {
    refuse("cu_seqlens_k", "must be given exactly when cu_seqlens_q is", packed ? "None" : "a tensor",
           "pass both for packed sequences, neither for padded ones");
  }
  const OptionalTensor& table = arguments.block_table;
  const size_t rank = packed ? 3 : 4, rank_k = table ? 4 : rank;
  const char* layout = packed ? "must have 3 dimensions, [total, heads, head_dim], when cu_seqlens_q is given"
                              : "must have 4 dimensions, [batch, seqlen, heads, head_dim]";
  if (q.size() != rank) refuse("q", layout, to_string(q), "reshape it");
  if (k.size() != rank_k) refuse("k", table ? "must be pages of 4 dimensions" : layout, to_string(k), "reshape it");
  if (shape_of(arguments.v) != k) {
    refuse("v", "shape must be k's, " + to_string(k), to_string(shape_of(arguments.v)), "pass keys and values alike");
  }

  const int64_t heads_q = q[rank - 2], heads_kv = k[rank_k - 2], head_dim = q[rank - 1];
  require(head_dim >= 1, "q", "head_dim must be at least 1", head_dim, "the last dimension is the head's");
  require(head_dim <= kMaxHeadDim, "q", "head_dim must be at most 256", head_dim, "split the heads");
  require(k[rank_k - 1] == head_dim, "k", "head_dim must be q's", k[rank_k - 1], "q, k and v share one head_dim");
  require(heads_q >= 1 && heads_q <= kMaxLength, "q", "heads must be at least 1", heads_q, "check the layout");
  require(heads_kv >= 1 && heads_q % heads_kv == 0, "k", "heads must divide q's heads", heads_kv,
          "grouped-query attention needs heads_q to be a multiple of heads_kv");
  if (packed) {
    require(arguments.cu_seqlens_q->numel() >= 1, "cu_seqlens_q", "must have batch + 1 entries", 0, "it starts with 0");
  } else if (!table && q[0] != k[0]) {
    refuse("k", "batch must be q's, " + std::to_string(q[0]), std::to_string(k[0]), "pass the same batch");
  }

  const int64_t batch = packed ? arguments.cu_seqlens_q->numel() - 1 : q[0];
  const int64_t seqlen_q = packed ? arguments.max_seqlen_q : q[1];
  const int64_t seqlen_k = packed || table ? arguments.max_seqlen_k : k[1];
  const int64_t total_q = packed ? q[0] : batch * seqlen_q;
  const int64_t total_k = packed && !table ? k[0] : batch * seqlen_k;
  const char* limit = "must be between 0 and 2^30";
  const char* split = "split the batch";
  require(batch <= kMaxLength, "q", "batch must be at most 2^30", batch, split);
  require(seqlen_q >= 0 && seqlen_q <= kMaxLength, "max_seqlen_q", limit, seqlen_q, "pass the longest query sequence");
  require(seqlen_k >= 0 && seqlen_k <= kMaxLength, "max_seqlen_k", limit, seqlen_k, "pass the longest key sequence");
  require(total_q <= kMaxLength, "q", "rows in all must be at most 2^30", total_q, split);
  require(total_k <= kMaxLength, "k", "rows in all must be at most 2^30", total_k, split);
  require(seqlen_q > 0 || total_q == 0 || batch == 0, "max_seqlen_q", "must be at least 1 when q has rows", 0,
          "pass the longest query sequence");

  params.batch = static_cast<int>(batch);
  params.heads_q = static_cast<int>(heads_q);
  params.heads_kv = static_cast<int>(heads_kv);
  params.head_dim = static_cast<int>(head_dim);
  params.seqlen_q = static_cast<int>(seqlen_q);
  params.seqlen_k = static_cast<int>(seqlen_k);
  params.total_q = static_cast<int>(total_q);
  params.total_k = static_cast<int>(total_k);
}

// Reads a packed batch's boundaries where that costs nothing; on a device it would wait for the queue.
void check_boundaries(const char* name, const int32_t* cu_seqlens, int batch, int total, int max_seqlen) {
  const std::string fix = "entries are the sequences' first rows, ascending from 0";
  if (cu_seqlens[0] != 0) refuse(name, "must start with 0", std::to_string(cu_seqlens[0]), fix);
  for (int b = 0; b < batch; ++b) {
    const int64_t length = int64_t{cu_seqlens[b + 1]} - cu_seqlens[b];
    if (length < 0) refuse(name, "must not descend", "a step of " + std::to_string(length), fix);
    if (length > max_seqlen) {
      refuse(name, "sequences must be at most max_seqlen = " + std::to_string(max_seqlen) + " long",
             std::to_string(length), "pass the longest length as max_seqlen");
    }
  }
  if (cu_seqlens[batch] > total) {
    refuse(name, "must end at most at the tensor's " + std::to_string(total) + " rows",
           std::to_string(cu_seqlens[batch]), fix);
  }
}

void check_seqused(const AttentionParams& params) {
  for (int b = 0; b < params.batch; ++b) {
    const int64_t length =
        params.cu_seqlens_k ? params.cu_seqlens_k[b + 1] - params.cu_seqlens_k[b] : params.seqlen_k;
    if (params.seqused_k[b] < 0 || params.seqused_k[b] > length) {
      refuse("seqused_k", "must be between 0 and the sequence's length " + std::to_string(length),
             std::to_string(params.seqused_k[b]), "it counts the keys in use");
    }
  }
}

void read_lengths(const Arguments& arguments, AttentionParams& params) {
  const Shape ends = {int64_t{params.batch} + 1};
  params.cu_seqlens_q = read_int32s("cu_seqlens_q", arguments.cu_seqlens_q, arguments.q, ends);
  params.cu_seqlens_k = read_int32s("cu_seqlens_k", arguments.cu_seqlens_k, arguments.q, ends);
  params.seqused_k = read_int32s("seqused_k", arguments.seqused_k, arguments.q, {params.batch});
  if (!arguments.q.is_cpu()) return;
  if (params.cu_seqlens_q) {
    check_boundaries("cu_seqlens_q", params.cu_seqlens_q, params.batch, params.total_q, params.seqlen_q);
    check_boundaries("cu_seqlens_k", params.cu_seqlens_k, params.batch, params.total_k, params.seqlen_k);
  }
  if (params.seqused_k) check_seqused(params);
}

void read_modifiers(const Arguments& arguments, AttentionParams& params) {
  const auto unbounded = [](int64_t window, int64_t reach) {
    return window < 0 || window >= reach ? -1 : static_cast<int>(window);
  };
  // A window wider than the sequence masks nothing: say so, and no sum of positions can overflow.
  params.window_left = unbounded(arguments.window_left, std::max(params.seqlen_k - 1, 0));
  params.window_right = unbounded(arguments.window_right, std::max(params.seqlen_q - 1, 0));
  params.softmax_scale = arguments.softmax_scale;

  if (!(arguments.softcap >= 0)) {
    refuse("softcap", "must be at least 0", std::to_string(arguments.softcap), "0 turns it off");
  }
  params.softcap = static_cast<float>(arguments.softcap);

  if (arguments.alibi_slopes) {
    const bool per_batch = arguments.alibi_slopes->dim() == 2;
    const Shape shape = per_batch ? Shape{params.batch, params.heads_q} : Shape{params.heads_q};
    params.alibi_slopes = read_vector<float>("alibi_slopes", arguments.alibi_slopes, arguments.q,
                                             aoti_torch_dtype_float32(), shape);
    params.alibi_batch_stride = per_batch ? params.heads_q : 0;
  }
  params.sink = read_vector<void>("sink", arguments.sink, arguments.q, torch_accum_dtype_of(params.dtype),
                                  {params.heads_q});

  if (!(arguments.dropout_p >= 0 && arguments.dropout_p < 1)) {
    refuse("dropout_p", "must be at least 0 and below 1", std::to_string(arguments.dropout_p), "0 turns it off");
  }
  params.dropout_p = static_cast<float>(arguments.dropout_p);
  const bool dropout = arguments.dropout_p > 0;
  if (dropout != arguments.rng_state.has_value()) {
    refuse("rng_state", "must be given exactly when dropout_p > 0", dropout ? "None" : "a tensor",
           "it holds the seed and offset of the dropout mask");
  }
  params.rng_state = read_vector<int64_t>("rng_state", arguments.rng_state, arguments.q, aoti_torch_dtype_int64(), {2});
  params.performance_mode = arguments.performance_mode;
}

// Largest step first: every stride must clear all that the smaller ones can reach.
bool overlaps_itself(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride, size
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1) steps.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(steps.begin(), steps.end());
  int64_t reach = 0;  // the farthest element of the dimensions so far
  for (const auto& [stride, size] : steps) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

}  // namespace

const int32_t* read_int32s(const char* name, const OptionalTensor& tensor, const Tensor& like, const Shape& shape) {
  return read_vector<int32_t>(name, tensor, like, aoti_torch_dtype_int32(), shape);
}

DType read_dtype(const Tensor& q) {
  const std::optional<DType> dtype = kernel_dtype(q);
  if (!dtype) {
    refuse("q", "dtype must be float16, bfloat16, float32 or (on the CPU) float64", dtype_name(torch_dtype(q)),
           "convert q, k and v");
  }
  if (*dtype == DType::kFloat64 && !q.is_cpu()) {
    refuse("q", "dtype must be float16, bfloat16 or float32 on a GPU", "float64",
           "float64 kernels exist on the CPU only: move q, k and v there or convert them");
  }
  return *dtype;
}

AttentionParams read_arguments(const Arguments& arguments) {
  AttentionParams params{};
  params.dtype = read_dtype(arguments.q);
  read_sizes(arguments, params);
  params.q = read_tensor("q", arguments.q, arguments.q, params.dtype);
  params.k = read_tensor("k", arguments.k, arguments.q, params.dtype);
  params.v = read_tensor("v", arguments.v, arguments.q, params.dtype);
  read_lengths(arguments, params);
  read_modifiers(arguments, params);
  params.aligned = is_aligned(params.q, arguments.q, params.dtype) &&
                   is_aligned(params.k, arguments.k, params.dtype) && is_aligned(params.v, arguments.v, params.dtype);
  return params;
}

PageTable read_table(const Tensor& table, const Tensor& like, const Shape& pages, int64_t batch, int64_t keys) {
  require_beside("block_table", table, like);
  require_dtype("block_table", table, aoti_torch_dtype_int32());
  const Shape shape = shape_of(table);
  if (shape.size() != 2 || shape[0] != batch || shape[1] * pages[1] < keys) {
    refuse("block_table",
           "must have a row for each of " + std::to_string(batch) + " sequences, of pages for " +
               std::to_string(keys) + " keys",
           to_string(shape), "add columns");
  }
  require_unit_stride("block_table", table);
  return {static_cast<const int32_t*>(table.data_ptr()), table.stride(0), static_cast<int>(shape[1])};
}

void read_pages(const Arguments& arguments, ForwardParams& params) {
  if (!arguments.block_table) return;
  const Shape pages = shape_of(arguments.k);
  const PageTable table = read_table(*arguments.block_table, arguments.q, pages, params.batch, params.seqlen_k);
  require(pages[0] >= 1 && pages[0] <= kMaxLength && pages[1] >= 1 && pages[1] <= kMaxLength, "k",
          "there must be 1 to 2^30 pages of 1 to 2^30 keys", pages[0] * pages[1], "check the cache");
  params.block_table = table.entries;
  params.block_table_stride = table.stride;
  params.pages = static_cast<int>(pages[0]);
  params.page_size = static_cast<int>(pages[1]);
  params.page_inverse = inverse_of(params.page_size);
}

bool is_packed(const AttentionParams& params) { return params.cu_seqlens_q != nullptr; }

Shape rows_shape(const AttentionParams& params) {
  if (is_packed(params)) return {params.heads_q, params.total_q};
  return {params.batch, params.heads_q, params.seqlen_q};
}

TensorRef read_tensor(const char* name, const Tensor& tensor, const Tensor& like, DType dtype) {
  require_beside(name, tensor, like);
  require_dtype(name, tensor, torch_dtype_of(dtype));
  const int64_t rank = tensor.dim();
  require_unit_stride(name, tensor);
  return {tensor.data_ptr(), rank == 4 ? tensor.stride(0) : 0, tensor.stride(rank - 3), tensor.stride(rank - 2)};
}

TensorRef write_tensor(const char* name, const Tensor& tensor, const Tensor& like, DType dtype) {
  const TensorRef ref = read_tensor(name, tensor, like, dtype);
  if (overlaps_itself(tensor)) {
    refuse(name, "elements must not share memory", "an expanded or overlapping view", "pass a tensor of its own");
  }
  return ref;
}

RowsRef read_rows(const char* name, const Tensor& tensor, const Tensor& like, const AttentionParams& params) {
  require_beside(name, tensor, like);
  require_dtype(name, tensor, torch_accum_dtype_of(params.dtype));
  require_shape(name, tensor, rows_shape(params));
  const int64_t rank = tensor.dim();
  require_unit_stride(name, tensor);
  return {tensor.data_ptr(), rank == 3 ? tensor.stride(0) : 0, tensor.stride(rank - 2)};
}

bool is_aligned(const TensorRef& ref, const Tensor& tensor, DType dtype) {
  constexpr int64_t kVectorBytes = 16;
  const int64_t per_vector = kVectorBytes / size_in_bytes(dtype);
  if (reinterpret_cast<uintptr_t>(ref.data) % kVectorBytes != 0) return false;
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) % per_vector != 0) return false;  // a row's last vector would cross its end
  for (int64_t i = 0; i < last; ++i) {
    if (tensor.size(i) > 1 && tensor.stride(i) % per_vector != 0) return false;
  }
  return true;
}

bool has_unowned_rows_q(const AttentionParams& params) {
  return is_packed(params) && params.cu_seqlens_q[params.batch] < params.total_q;
}

bool has_unowned_rows_k(const AttentionParams& params) {
  return is_packed(params) && params.cu_seqlens_k[params.batch] < params.total_k;
}

}  // namespace flash_attn
