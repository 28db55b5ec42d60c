#include "binding/ops.h"
#include "binding/refuse.h"

// Exported by torch's GPU builds, for NVIDIA and AMD alike; weak, so that the library also loads beside a CPU torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream)
    __attribute__((weak));

namespace flash_attn {
namespace {

std::string device_type_of(const Tensor& q) {
  if (q.is_cpu()) return "cpu";
  if (q.is_cuda()) return "cuda";
  return device_name(q);
}

// torch's pool: it follows torch.set_num_threads, and does not compete with itself.
HostThreads host_threads() {
  const auto run = [](int count, void (*body)(void*, int), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) body(context, static_cast<int>(thread));
    });
  };
  return {static_cast<int>(torch::stable::get_num_threads()), run};
}

}  // namespace

const Backend& backend_for(const std::string& device_type) {
  if (device_type == "cpu") return cpu_backend();
#ifdef FLASH_ATTENTION_GPU
  if (device_type == "cuda") return gpu_backend();
#endif
  if (device_type == "cuda") {
    throw std::runtime_error(
        "flash_attn: tensors are on a GPU, but this build has the CPU backend only (reinstall where the GPU's "
        "compiler is, with FLASH_ATTENTION_BACKEND=cuda or hip; `python -m flash_attn info` shows the build)");
  }
  refuse("device", "must be cpu or cuda", device_type, "move the tensors with .to(\"cuda\") or .cpu()");
}

Queue queue_for(const std::string& device_type, int device_index) {
  Queue queue{device_index, nullptr, {}};
  if (device_type == "cpu") {
    queue.threads = host_threads();
    return queue;
  }
  backend_for(device_type).check_device(device_index);
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error(
        "flash_attn: this build is for a GPU, the installed torch is not (install a torch with CUDA or ROCm)");
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &queue.stream));
  return queue;
}

Target::Target(const Tensor& q) : backend_(&backend_for(device_type_of(q))) {
  const int device_index = q.get_device_index();
  queue_ = queue_for(device_type_of(q), device_index);
  if (!q.is_cpu()) guard_.emplace(device_index);
}

}  // namespace flash_attn
