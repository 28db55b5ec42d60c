// What the binding needs of torch's stable C ABI, in our own words: dtypes, shapes, devices, allocation.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "core/params.h"

namespace flash_attn {

using Tensor = torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

// torch's own number for a dtype or a device type (they may change between releases: the shim translates).
int32_t torch_dtype(const Tensor& tensor);
int32_t torch_device_type(const Tensor& tensor);
int32_t torch_dtype_of(DType dtype);
// float, or double for fp64.
int32_t torch_accum_dtype_of(DType dtype);

// The kernels' dtype, or nothing where they have none.
std::optional<DType> kernel_dtype(const Tensor& tensor);
int64_t size_in_bytes(DType dtype);

Shape shape_of(const Tensor& tensor);
std::string to_string(const Shape& shape);   // "[2, 128, 8, 64]"
std::string dtype_name(int32_t torch_dtype);  // "float16"
std::string device_name(const Tensor& tensor);  // "cpu", "cuda:1"

// Uninitialised, contiguous, on like's device.
Tensor empty(const Tensor& like, const Shape& shape, int32_t torch_dtype);
Tensor zeros(const Tensor& like, const Shape& shape, int32_t torch_dtype);

// Scratch for one call, aligned to 256 bytes; its memory goes back to torch's allocator, in stream order.
class Scratch {
 public:
  Scratch(const Tensor& like, size_t bytes);
  void* data() const { return data_; }

 private:
  OptionalTensor memory_;
  void* data_ = nullptr;
};

}  // namespace flash_attn
