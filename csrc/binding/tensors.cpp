#include "binding/tensors.h"

#include <algorithm>

namespace flash_attn {

int32_t torch_dtype(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

int32_t torch_device_type(const Tensor& tensor) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
  return device_type;
}

int32_t torch_dtype_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return aoti_torch_dtype_float16();
    case DType::kBFloat16:
      return aoti_torch_dtype_bfloat16();
    case DType::kFloat32:
      return aoti_torch_dtype_float32();
    case DType::kFloat64:
      return aoti_torch_dtype_float64();
  }
  return -1;
}

int32_t torch_accum_dtype_of(DType dtype) {
  return dtype == DType::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

std::optional<DType> kernel_dtype(const Tensor& tensor) {
  const int32_t dtype = torch_dtype(tensor);
  for (DType candidate : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
    if (dtype == torch_dtype_of(candidate)) return candidate;
  }
  return std::nullopt;
}

int64_t size_in_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
  }
  return 0;
}

Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::string dtype_name(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float16()) return "float16";
  if (dtype == aoti_torch_dtype_bfloat16()) return "bfloat16";
  if (dtype == aoti_torch_dtype_float32()) return "float32";
  if (dtype == aoti_torch_dtype_float64()) return "float64";
  if (dtype == aoti_torch_dtype_int32()) return "int32";
  if (dtype == aoti_torch_dtype_int64()) return "int64";
  if (dtype == aoti_torch_dtype_bool()) return "bool";
  return "torch dtype number " + std::to_string(dtype);
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string index = ":" + std::to_string(tensor.get_device_index());
  if (tensor.is_cuda()) return "cuda" + index;
  return "device type " + std::to_string(torch_device_type(tensor)) + index;
}

Tensor empty(const Tensor& like, const Shape& shape, int32_t dtype) {
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  dtype, torch_device_type(like), like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor zeros(const Tensor& like, const Shape& shape, int32_t dtype) {
  Tensor tensor = empty(like, shape, dtype);
  torch::stable::zero_(tensor);
  return tensor;
}

Scratch::Scratch(const Tensor& like, size_t bytes) {
  if (bytes == 0) return;
  constexpr uintptr_t kAlignment = 256;  // torch's CPU allocator promises 64
  memory_ = empty(like, {static_cast<int64_t>(bytes + kAlignment)}, aoti_torch_dtype_uint8());
  const auto address = reinterpret_cast<uintptr_t>(memory_->data_ptr());
  data_ = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

}  // namespace flash_attn
