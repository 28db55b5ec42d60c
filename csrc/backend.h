// The handful of functions every backend implements. The binding checks arguments, allocates and dispatches;
// a backend plans and launches, and never allocates: memory it needs comes from the caller.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/params.h"

namespace flash_attn {

// The framework's own threads, lent to the CPU backend for one call.
struct HostThreads {
  int count;
  // Calls body(context, i) once for every i in [0, count), on several threads at once or one after the other.
  void (*run)(int count, void (*body)(void* context, int thread), void* context);
};

// Where to run: a GPU's stream, or the host's threads (run null: the calling thread alone).
struct Queue {
  int device_index;
  void* stream;  // cudaStream_t or hipStream_t
  HostThreads threads;
};

// Bytes of scratch the caller allocates (256-byte aligned, uninitialised) before a call.
struct Workspace {
  size_t bytes;
};

// What a backend says where the mode would change the arithmetic and its kernels were left out.
constexpr const char* kNoPerformanceMode =
    "FLASH_ATTENTION_INTERNAL_PERFORMANCE_MODE: must not be 1, as this build has no kernels that round toward zero "
    "(unset it, or rebuild with FLASH_ATTENTION_INTERNAL_USE_RTZ=1)";

struct Backend {
  const char* name;  // "cpu", "cuda", "hip"

  // Throws std::runtime_error, saying what is missing, unless the device is there and runs this build's kernels.
  void (*check_device)(int device_index);

  // Fills split_size and num_splits (split_size > 0 on entry: schedule invariance is required; it must be a
  // multiple of the key block) and returns the scratch the forward needs.
  // Throws std::invalid_argument where no kernel can honour the request, saying which and why.
  Workspace (*plan_forward)(ForwardParams& params, const Queue& queue);
  void (*forward)(ForwardParams params, void* workspace, const Queue& queue);

  // Whether the forward of these params, which have a block table, can read the pages where they are.
  bool (*reads_pages)(const ForwardParams& params, const Queue& queue);

  Workspace (*plan_backward)(BackwardParams& params, const Queue& queue);
  void (*backward)(BackwardParams params, void* workspace, const Queue& queue);

  void (*append)(const AppendParams& params, const Queue& queue);

  // The forward's key block for a head dimension: what split_size must be a multiple of.
  int (*key_block)(DType dtype, int head_dim);

  // One line for people: instruction set and threads, or device name and architecture.
  const char* (*describe)(const Queue& queue);
};

const Backend& cpu_backend();
const Backend& gpu_backend();  // NVIDIA or AMD, whichever was built

}  // namespace flash_attn
