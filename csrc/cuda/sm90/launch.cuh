// Launching a kernel that reads tensors through the copy engine: the host's part.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../../core/registry.h"

namespace flash_attn {
namespace sm90 {

inline void check(cudaError_t status, const char* doing) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(status));
}

// From the driver that is loaded, so that nothing links against it.
inline auto tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "looking up cuTensorMapEncodeTiled");
    if (function == nullptr) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled (update it)");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// Boxes of `box_rows` rows of t [batch, rows, heads, head_dim]; what lies outside reads as zero. 16-bit elements: of
// one 128-byte panel of columns, swizzled as wgmma wants it. fp32: of `box_cols` columns, as they are. `streamed`: read
// from device memory, as good as once.
inline CUtensorMap tensor_map(const TensorRef& t, DType dtype, int batch, int rows, int heads, int head_dim,
                              int box_rows, int box_cols = 64, bool streamed = false) {
  const int element_bytes = is_16_bit(dtype) ? 2 : 4;
  const cuuint64_t sizes[4] = {cuuint64_t(head_dim), cuuint64_t(rows), cuuint64_t(heads), cuuint64_t(batch)};
  const auto bytes = [=](int64_t stride, int size) {
    return size > 1 ? cuuint64_t(stride) * element_bytes : cuuint64_t(16);
  };
  const cuuint64_t strides[3] = {bytes(t.row_stride, rows), bytes(t.head_stride, heads), bytes(t.batch_stride, batch)};
  const cuuint32_t box[4] = {cuuint32_t(box_cols), cuuint32_t(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const auto type = dtype == DType::kFloat32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  // The L2 cache fetches 256 bytes at once. Not of rows of 128, where the next 128 are another head's; nor where memory
  // is what is waited for, as what another box asks for as well takes up some of its time.
  const auto promotion = head_dim * element_bytes > 128 && !streamed ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B
                                                                     : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, type, 4, t.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      is_16_bit(dtype) ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, promotion,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("describing a tensor to the copy engine failed (error " + std::to_string(int(result)) +
                             ")");
  }
  return map;
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "reading the device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "reading a device attribute");
  return count;
}

template <class K>
__global__ void __launch_bounds__(K::kThreads, 1) run_blocks(const __grid_constant__ typename K::Launched p) {
  extern __shared__ __align__(1024) char shared[];
  K(p, shared).run();
}

// A launch of K in clusters of `cluster` thread blocks.
template <class K>
class BlockLaunch {
 public:
  BlockLaunch(dim3 blocks, int cluster, int shared_bytes, void* stream = nullptr) {
    if (shared_bytes > 48 * 1024) {
      check(cudaFuncSetAttribute(kernel(), cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
            "reserving shared memory");
    }
    if (cluster > kPortableCluster) {
      check(cudaFuncSetAttribute(kernel(), cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "allowing clusters");
    }
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim = {unsigned(cluster), 1, 1};
    config_.gridDim = blocks;
    config_.blockDim = dim3(K::kThreads);
    config_.dynamicSmemBytes = size_t(shared_bytes);
    config_.stream = static_cast<cudaStream_t>(stream);
    config_.attrs = &attribute_;
    config_.numAttrs = cluster > 1 ? 1 : 0;
  }
  BlockLaunch(const BlockLaunch&) = delete;

  void run(const typename K::Launched& launched) const {
    void* arguments[] = {const_cast<typename K::Launched*>(&launched)};
    check(cudaLaunchKernelExC(&config_, kernel(), arguments), "launching a kernel");
  }
  int clusters_at_once() const {
    cudaLaunchConfig_t config = config_;
    config.numAttrs = 1;  // a cluster of one has to be said, too
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel(), &config), "counting clusters");
    return clusters;
  }

 private:
  static constexpr int kPortableCluster = 8;
  static const void* kernel() { return reinterpret_cast<const void*>(&run_blocks<K>); }

  cudaLaunchAttribute attribute_{};
  cudaLaunchConfig_t config_{};
};

template <class K>
void launch_blocks(const typename K::Launched& launched, dim3 blocks, int cluster, int shared_bytes, void* stream) {
  BlockLaunch<K>(blocks, cluster, shared_bytes, stream).run(launched);
}

// How many clusters of 1 to MOST thread blocks a device runs at a time.
template <int MOST>
struct ClustersAtOnce {
  int of[MOST];

  // The most thread blocks that a cluster may have if all of so many are to run at once; 0 where that is too many.
  int largest(int64_t clusters) const {
    return int(std::find_if(of, of + MOST, [=](int at_once) { return at_once < clusters; }) - of);
  }
};

// Those of K on the current device, which is asked once.
template <class K, int MOST>
const ClustersAtOnce<MOST>& clusters_at_once(int shared_bytes) {
  constexpr int kDevices = 64;  // whose answers are kept apart
  static ClustersAtOnce<MOST> known[kDevices];
  static std::once_flag asked[kDevices];
  int device = 0;
  check(cudaGetDevice(&device), "reading the device");
  ClustersAtOnce<MOST>& clusters = known[device % kDevices];
  std::call_once(asked[device % kDevices], [&] {
    for (int blocks = 1; blocks <= MOST; ++blocks) {
      clusters.of[blocks - 1] = BlockLaunch<K>(blocks, blocks, shared_bytes).clusters_at_once();
    }
  });
  return clusters;
}

}  // namespace sm90
}  // namespace flash_attn
