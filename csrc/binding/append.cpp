#include "binding/arguments.h"
#include "binding/ops.h"
#include "binding/refuse.h"

namespace flash_attn {
namespace {

void read_sizes(const Tensor& q, const Tensor& k, const Tensor& k_cache, AppendParams& params) {
  const Shape queries = shape_of(q), keys = shape_of(k), cache = shape_of(k_cache);
  const char* layout = "must have 4 dimensions, [batch, seqlen, heads, head_dim]";
  if (queries.size() != 4) refuse("q", layout, to_string(queries), "reshape it");
  if (keys.size() != 4) refuse("k", layout, to_string(keys), "reshape it");
  if (cache.size() != 4) refuse("k_cache", layout, to_string(cache), "reshape it");
  const int64_t batch = queries[0], head_dim = queries[3];
  require(head_dim >= 1 && head_dim <= kMaxHeadDim, "q", "head_dim must be between 1 and 256", head_dim,
          "split the heads");
  require(keys[0] == batch, "k", "batch must be q's", keys[0], "pass the rows of every sequence");
  require(keys[3] == head_dim, "k", "head_dim must be q's", keys[3], "q, k and v share one head_dim");
  if (cache[2] != keys[2] || cache[3] != head_dim) {
    refuse("k_cache", "heads and head_dim must be k's, " + to_string({keys[2], head_dim}),
           to_string({cache[2], cache[3]}), "check the layout");
  }
  require(cache[0] <= kMaxLength && cache[1] >= 1 && cache[1] <= kMaxLength, "k_cache",
          "rows must be of 1 to 2^30 keys", cache[1], "check the cache");
  const int64_t rows = batch * queries[1] * queries[2] + 2 * batch * keys[1] * keys[2];
  require(rows <= kMaxLength, "k", "rows of heads in all must be at most 2^30", rows, "split the batch");

  params.batch = static_cast<int>(batch);
  params.heads_q = static_cast<int>(queries[2]);
  params.heads_kv = static_cast<int>(keys[2]);
  params.head_dim = static_cast<int>(head_dim);
  params.seqlen_q = static_cast<int>(queries[1]);
  params.seqlen_new = static_cast<int>(keys[1]);
  params.pages = static_cast<int>(cache[0]);
  params.page_size = static_cast<int>(cache[1]);
}

void read_places(const Tensor& q, const Tensor& k_cache, const Tensor& cache_seqlens, const OptionalTensor& block_table,
                 AppendParams& params) {
  params.seqlens = read_int32s("cache_seqlens", cache_seqlens, q, {params.batch});
  params.pages_of_sequence = 1;
  if (!block_table) {
    require(params.pages == params.batch, "k_cache", "batch must be q's", params.pages, "pass a block_table");
    return;
  }
  const PageTable table = read_table(*block_table, q, shape_of(k_cache), params.batch, 0);
  params.block_table = table.entries;
  params.block_table_stride = table.stride;
  params.pages_of_sequence = table.columns;
}

const void* read_rotary(const char* name, const Tensor& table, const Tensor& q, int64_t& stride) {
  require_beside(name, table, q);
  require(table.dim() == 2, name, "must have 2 dimensions, [positions, rotary_dim / 2]", table.dim(), "reshape it");
  require_unit_stride(name, table);
  stride = table.stride(0);
  return table.data_ptr();
}

void read_rotary(const Tensor& q, const OptionalTensor& cos, const OptionalTensor& sin, AppendParams& params) {
  if (cos.has_value() != sin.has_value()) {
    refuse("rotary_sin", "must be given exactly when rotary_cos is", sin ? "a tensor" : "None", "pass both tables");
  }
  if (!cos) return;
  const int32_t accum = torch_accum_dtype_of(params.dtype);
  params.tables_are_accum = torch_dtype(*cos) == accum;
  if (!params.tables_are_accum) require_dtype("rotary_cos", *cos, torch_dtype_of(params.dtype));
  params.rotary_cos = read_rotary("rotary_cos", *cos, q, params.cos_stride);
  params.rotary_sin = read_rotary("rotary_sin", *sin, q, params.sin_stride);
  require_dtype("rotary_sin", *sin, torch_dtype(*cos));
  require_shape("rotary_sin", *sin, shape_of(*cos));
  require(cos->size(0) >= 1 && cos->size(0) <= kMaxLength, "rotary_cos", "must have 1 to 2^30 rows", cos->size(0),
          "compute the table");
  require(2 * cos->size(1) <= params.head_dim, "rotary_cos", "rotary_dim must be at most head_dim", 2 * cos->size(1),
          "cut the table");
  params.rotary_positions = static_cast<int>(cos->size(0));
  params.rotary_pairs = static_cast<int>(cos->size(1));
}

}  // namespace

std::tuple<Tensor, Tensor> append(const Tensor& q, const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache,
                                  const Tensor& cache_seqlens, const OptionalTensor& block_table,
                                  const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin, bool interleaved,
                                  bool queries_advance) {
  const Target target(q);
  AppendParams params{};
  params.dtype = read_dtype(q);
  read_sizes(q, k, k_cache, params);
  require_shape("v", v, shape_of(k));
  require_shape("v_cache", v_cache, shape_of(k_cache));
  read_places(q, k_cache, cache_seqlens, block_table, params);
  read_rotary(q, rotary_cos, rotary_sin, params);
  params.interleaved = interleaved;
  params.queries_advance = queries_advance;

  const bool rotates = rotary_cos.has_value();
  Tensor rotated_q = empty(q, rotates ? shape_of(q) : Shape{0}, torch_dtype(q));
  Tensor seqlens_after = empty(q, {params.batch}, aoti_torch_dtype_int32());
  params.seqlens_after = static_cast<int32_t*>(seqlens_after.data_ptr());
  params.aligned = true;
  const auto read = [&](const char* name, const Tensor& tensor, auto&& reader) {
    const TensorRef ref = reader(name, tensor, q, params.dtype);
    params.aligned = params.aligned && is_aligned(ref, tensor, params.dtype);
    return ref;
  };
  if (rotates) {
    params.q = read("q", q, read_tensor);
    params.rotated_q = read("rotated_q", rotated_q, write_tensor);
  }
  params.k = read("k", k, read_tensor);
  params.v = read("v", v, read_tensor);
  params.k_cache = read("k_cache", k_cache, write_tensor);
  params.v_cache = read("v_cache", v_cache, write_tensor);
  target.backend().append(params, target.queue());
  return {rotated_q, seqlens_after};
}

}  // namespace flash_attn
