// The GPU backend: plans a call and launches its kernels. Hipified for AMD as it is.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "../backend.h"
#include "../core/registry.h"
#include "attention/schedule.cuh"
#include "attention/softcap.cuh"

namespace flash_attn {
namespace {

void check(cudaError_t status, const char* doing) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(status));
}

// This library links the runtime statically: it has a current device of its own, beside torch's.
void use_device(const Queue& queue) { check(cudaSetDevice(queue.device_index), "choosing the device"); }

int device_attribute(cudaDeviceAttr attribute, const Queue& queue) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, queue.device_index), "reading a device attribute");
  return value;
}

bool is_for_gpus(const KernelTable& table) { return table.count > 0 && table.kernels[0]->device != nullptr; }

// The machines that this build has GPU kernels for, best first, as text.
std::string built_for() {
  std::string names;
  const KernelTables all = kernel_tables();
  for (int i = 0; i < all.count; ++i) {
    if (is_for_gpus(*all.tables[i])) names += (names.empty() ? "" : ", ") + std::string(all.tables[i]->machine);
  }
  return names.empty() ? "no GPU (rebuild with FLASH_ATTENTION_BACKEND=cuda or hip)" : names;
}

constexpr int kDevices = 64;  // whose answers are remembered

// Throws unless the device is there.
void check_device(int index) {
  static std::atomic<uint64_t> known{0};
  const uint64_t bit = index >= 0 && index < kDevices ? uint64_t(1) << index : 0;
  if (known.load(std::memory_order_relaxed) & bit) return;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  const std::string about = " (this build's GPU kernels are for " + built_for() + ")";
  if (status != cudaSuccess || count == 0) {
    throw std::runtime_error(std::string("flash_attn: no ") + kRuntime + " device is present: " +
                             cudaGetErrorString(status == cudaSuccess ? cudaErrorNoDevice : status) + about);
  }
  if (index < 0 || index >= count) {
    throw std::runtime_error("flash_attn: device " + std::to_string(index) + " is not one of the " +
                             std::to_string(count) + " that " + kRuntime + " sees" + about);
  }
  known.fetch_or(bit, std::memory_order_relaxed);
}

const KernelTable& choose_table(int device_index) {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, device_index), "reading the device's properties");
  const KernelTables all = kernel_tables();
  for (int i = 0; i < all.count; ++i) {
    if (is_for_gpus(*all.tables[i]) && runs_on(all.tables[i]->machine, device)) return *all.tables[i];
  }
  throw std::runtime_error("flash_attn: this build's GPU kernels are for " + built_for() + "; none runs on " +
                           device.name + ", " + arch_name(device) +
                           " (rebuild with FLASH_ATTENTION_ARCHS, where there are kernels for it)");
}

// The best that this build has for the device.
const KernelTable& table(int device_index) {
  static std::atomic<const KernelTable*> known[kDevices];
  if (device_index < 0 || device_index >= kDevices) return choose_table(device_index);
  const KernelTable* found = known[device_index].load(std::memory_order_relaxed);
  if (found == nullptr) known[device_index].store(found = &choose_table(device_index), std::memory_order_relaxed);
  return *found;
}

// Whether that is asked for which plain instances, find(false), do not do. Most take no rows that do not allow 16-byte
// access.
template <class Find>
bool is_modified(const AttentionParams& p, Find&& find) {
  return p.softcap > 0 || p.alibi_slopes != nullptr || p.dropout_p > 0 || !(p.softmax_scale > 0) ||
         !(p.aligned || find(false).takes_any_rows);
}

bool in_performance_mode(const AttentionParams& p, const Queue& queue) {
  return p.performance_mode && is_16_bit(p.dtype) && table(queue.device_index).has_performance_mode;
}

// KernelTable::find_padded, which looks at every instance; a thread's calls mostly repeat its last ones.
const KernelInfo* find_again(const KernelTable& in, const KernelKey& key) {
  struct Found {
    const KernelTable* in;
    KernelKey key;
    const KernelInfo* info;
  };
  thread_local Found last[kKernelKinds][2];
  Found& found = last[int(key.kind)][key.modified];
  if (found.in != &in || !(found.key == key)) found = {&in, key, in.find_padded(key)};
  return found.info;
}

const KernelInfo& find(const Queue& queue, KernelKind kind, DType dtype, int head_dim = 0, bool modified = false,
                       bool performance = false) {
  const KernelTable& built = table(queue.device_index);
  const KernelInfo* info = find_again(built, {kind, dtype, head_dim, modified, performance});
  if (info == nullptr && performance && built.find_padded({kind, dtype, head_dim, modified}) != nullptr) {
    throw std::invalid_argument(kNoPerformanceMode);
  }
  if (info == nullptr) {
    throw std::invalid_argument(std::string("no kernel was compiled for this dtype and head_dim ") +
                                std::to_string(head_dim) + " (see FLASH_ATTENTION_INSTANCES in the build's settings)");
  }
  return *info;
}

// Whether one block can hold a row's running fold beside its tiles.
bool stash_fits(const KernelInfo& kernel, const Queue& queue) {
  return kernel.shared_bytes + kernel.stash_bytes <=
         device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, queue);
}

// A modified kernel, or that of the same size which does what these params ask for in the machine's own loops.
const KernelInfo& or_scored(const KernelInfo& kernel, const AttentionParams& p, const Queue& queue) {
  if (!kernel.key.modified || !(p.softmax_scale > 0)) return kernel;
  const auto find = [&](Modifiers scored) {
    KernelKey key = kernel.key;
    key.scored = scored;
    return table(queue.device_index).find(key);
  };
  const bool softcap_alone = p.softcap > 0 && p.alibi_slopes == nullptr && !(p.dropout_p > 0);
  const KernelInfo* own = softcap_alone ? find(Modifiers::kSoftcap) : nullptr;
  if (own == nullptr) own = find(Modifiers::kAny);
  return own != nullptr && (p.aligned || own->takes_any_rows) ? *own : kernel;
}

// Whether it is a template of csrc/cuda/kernels: of those modified kernels have the bits of plain ones.
bool is_shared(const KernelInfo& kernel) { return kernel.launch == nullptr; }

bool reads_pages(const KernelInfo& kernel, const ForwardParams& p) {
  const bool whole = p.seqlen_k <= p.page_size;
  switch (kernel.pages) {
    case Pages::kNone:
      return false;
    case Pages::kBlocks:
      return whole || p.page_size % kernel.block_n == 0;
    case Pages::kBoxes:
      return p.aligned && (whole || p.page_size % 8 == 0);
    case Pages::kAny:
      return true;
  }
  return false;
}

const KernelInfo& forward_kernel(const ForwardParams& p, const Queue& queue) {
  const auto find_forward = [&](bool modified) -> const KernelInfo& {
    return find(queue, KernelKind::kForward, p.dtype, p.head_dim, modified, in_performance_mode(p, queue));
  };
  const bool modified = p.s_dmask != nullptr || is_modified(p, find_forward);
  const KernelInfo &any = find_forward(modified), &kernel = p.s_dmask == nullptr ? or_scored(any, p, queue) : any;
  if (p.block_table != nullptr && is_shared(kernel) && !reads_pages(kernel, p)) return find_forward(true);
  // Then for calls of one chunk, too, whose rows have the bits that they have among more keys; not for the heuristic's.
  if (p.split_size > 0 && p.deterministic && kernel.stash_bytes == KernelInfo::kNoStash) return find_forward(true);
  if (!may_fold(p) || stash_fits(kernel, queue)) return kernel;
  const KernelInfo& other = find_forward(true);  // the same bits
  return stash_fits(other, queue) ? other : kernel;
}
const KernelInfo& backward_kernel(const BackwardParams& p, const Queue& queue) {
  const auto find_backward = [&](bool modified) -> const KernelInfo& {
    return find(queue, KernelKind::kBackward, p.dtype, p.head_dim, modified, in_performance_mode(p, queue));
  };
  return or_scored(find_backward(is_modified(p, find_backward)), p, queue);
}

// delta takes dO as the products do; bf16 is the same to both.
const KernelInfo& preprocess_kernel(const BackwardParams& p, const Queue& queue) {
  const bool performance = in_performance_mode(p, queue) && p.dtype == DType::kFloat16;
  return find(queue, KernelKind::kPreprocess, p.dtype, p.head_dim, false, performance);
}

template <class Params>
void launch(const KernelInfo& kernel, Params& params, const Queue& queue, int more_shared_bytes = 0) {
  const int64_t blocks = kernel.blocks(&params);
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::invalid_argument("the call needs more than 2^31 thread blocks (split the batch)");
  const int shared_bytes = kernel.shared_bytes + more_shared_bytes;
  if (kernel.launch != nullptr) return kernel.launch(&params, blocks, shared_bytes, queue.stream);
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel.device, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "reserving shared memory");
  }
  void* arguments[] = {&params};
  check(cudaLaunchKernel(kernel.device, dim3(unsigned(blocks)), dim3(unsigned(kernel.threads)), arguments,
                         size_t(shared_bytes), static_cast<cudaStream_t>(queue.stream)),
        "launching a kernel");
}

size_t align(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Heads, of `bytes` and `blocks` each, whose blocks are interleaved. Where a head's blocks are alike, as many as fill
// the GPU: more would push each other's data out of the L2 cache. Where they differ, about twice as many, so that short
// blocks fill the gaps that long ones leave, and such that the last group is not much smaller. No more than half of the
// cache holds, but `needed` in any case.
int choose_head_group(int64_t bytes, int blocks, int heads, bool differ, int needed, const Queue& queue) {
  const int64_t room = device_attribute(cudaDevAttrL2CacheSize, queue) / 2 / std::max<int64_t>(1, bytes);
  const int most = std::max(1, int(std::min<int64_t>(heads, std::max<int64_t>(needed, room))));
  const int wanted = device_attribute(cudaDevAttrMultiProcessorCount, queue) * (differ ? 2 : 1);
  const int least = std::min(most, std::max(needed, ceil_div(wanted, std::max(1, blocks))));
  if (!differ) return least;
  const auto last = [&](int group) { return heads % group == 0 ? group : heads % group; };
  int best = least;
  for (int group = std::max(needed, (least + 1) / 2); group <= std::min(most, 2 * least); ++group) {
    if (last(group) * best > last(best) * group) best = group;
  }
  return best;
}

size_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Throws where the kernels cannot reach from one row to the next.
void check_rows(const char* name, const TensorRef& tensor, int64_t rows, DType dtype) {
  const int64_t bytes = tensor.row_stride * int64_t(element_bytes(dtype));
  if (rows > 1 && bytes > kMaxRowBytes) {
    throw std::invalid_argument(std::string(name) + ": rows must lie at most " + std::to_string(kMaxRowBytes) +
                                " bytes apart on this GPU, got " + std::to_string(bytes) + " (call .contiguous())");
  }
}

void check_rows(const AttentionParams& p) {
  check_rows("q", p.q, p.total_q, p.dtype);
  check_rows("k", p.k, p.total_k, p.dtype);
  check_rows("v", p.v, p.total_k, p.dtype);
}

// ---- forward -------------------------------------------------------------------------------------------------------

int64_t partial_rows(const ForwardParams& p) {
  return int64_t(p.num_splits) * p.batch * p.heads_q * p.seqlen_q;
}

// Whether the chunks' partial results stay within a tenth of the tensors: the mode may cost no more memory.
bool partials_are_small(const ForwardParams& p, int chunks) {
  const int64_t tensors = 2 * (int64_t(p.total_q) * p.heads_q + int64_t(p.total_k) * p.heads_kv) * p.head_dim;
  const int64_t partials = int64_t(chunks) * p.batch * p.heads_q * p.seqlen_q * p.head_dim;
  return partials * int64_t(sizeof(float)) * 10 <= tensors * int64_t(element_bytes(p.dtype));
}

// A persistent kernel counts in device memory the blocks that were taken. In the backward it also stores the first
// addition to a sum of dQ.
size_t blocks_taken_bytes(const KernelInfo& kernel) { return kernel.persistent ? align(sizeof(uint32_t)) : 0; }

// The last of a head's tiles may be shorter than those before it.
bool tiles_differ(const ForwardParams& p, const KernelInfo& kernel) {
  return blocks_differ(p) || (p.seqlen_q > kernel.block_m && p.seqlen_q % kernel.block_m != 0);
}

// Tiles that differ in length are taken by whichever multiprocessor comes free.
size_t tiles_taken_bytes(const ForwardParams& p, const KernelInfo& kernel, const Queue& queue) {
  const bool many = kernel.blocks(&p) > device_attribute(cudaDevAttrMultiProcessorCount, queue);
  return p.num_splits == 1 && tiles_differ(p, kernel) && many ? blocks_taken_bytes(kernel) : 0;
}

// The running folds of the thread blocks that there are at a time.
size_t stash_device_bytes(const ForwardParams& p, const KernelInfo& kernel, const Queue& queue) {
  if (!may_fold(p) || kernel.stash_device_bytes == 0) return 0;
  const int64_t at_once = device_attribute(cudaDevAttrMultiProcessorCount, queue);
  return size_t(std::min(kernel.blocks(&p), at_once)) * kernel.stash_device_bytes;
}

int most_folded_shares(const ForwardParams& p, const KernelInfo& kernel) {
  return kernel.most_shares == nullptr ? 0 : kernel.most_shares(&p);
}

// Whether a kernel folds a row's shares itself: then it needs no memory for them, and no Combine.
bool folds_shares(const ForwardParams& p, const KernelInfo& kernel) {
  return p.num_splits > 1 && p.num_splits <= most_folded_shares(p, kernel);
}

// Into how many shares of its keys, of four key blocks at least where Combine folds them, the heuristic splits each of
// `blocks` blocks.
int choose_shares(const ForwardParams& p, const KernelInfo& kernel, int64_t blocks, const Queue& queue) {
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, queue);
  const int64_t at_once = kernel.persistent ? multiprocessors : 2 * multiprocessors;
  const int key_blocks = ceil_div(p.seqlen_k, kernel.block_n);
  const auto most = [&](int64_t of) {
    return int(std::min<int64_t>(of / std::max<int64_t>(blocks, 1), key_blocks / 4));
  };
  // Few queries wait for memory, and half of the multiprocessors take most of that.
  const bool has_few_queries = 2 * p.seqlen_q <= kernel.block_m;
  if (!kernel.persistent || has_few_queries) {
    // Shares that need no Combine may be fewer, and of a single key block: half as many if they are soon done, or if
    // several warpgroups work at each, as for all but the widest heads. Pages take as many loading warps as may be.
    const int wanted = std::max(1, most(at_once)), folded = most_folded_shares(p, kernel);
    const bool soon = key_blocks <= 16 * folded || (p.head_dim <= 192 && p.block_table == nullptr);
    const bool enough = 4 * folded >= 3 * wanted || (2 * folded >= wanted && soon);
    return enough && folded > 1 && key_blocks > 1 ? std::min(folded, key_blocks) : wanted;
  }
  if (blocks > at_once) return 1;
  int best = 1, least = 0x7fffffff;
  for (int shares = 1; shares <= most(2 * at_once); ++shares) {
    const int rounds = int((blocks * shares + at_once - 1) / at_once);
    const int time = rounds * (ceil_div(key_blocks, shares) + 2);  // a share's beginning and end take as long as two
    if (time < least) best = shares, least = time;
  }
  return best;
}

Workspace plan_forward(ForwardParams& p, const Queue& queue) {
  make_rows_of_heads(p);
  check_rows(p);
  if (p.softcap > 0) p.softcap_series = softcap_series(p.softmax_scale, p.softcap);
  p.num_splits = 1;
  p.deterministic = p.deterministic || p.split_size > 0;  // so that chunks asked for are not taken for the heuristic's
  const KernelInfo& kernel = forward_kernel(p, queue);
  if (p.split_size < 0 || p.split_size % kernel.block_n != 0) {
    throw std::invalid_argument("split_size must be a multiple of the key block " + std::to_string(kernel.block_n) +
                                " of head_dim " + std::to_string(p.head_dim) + ", got " + std::to_string(p.split_size));
  }
  const int group = p.heads_q / p.heads_kv;
  const int64_t keys_bytes = 2 * int64_t(p.seqlen_k) * p.head_dim * element_bytes(p.dtype);
  const int tiles = ceil_div(p.seqlen_q, kernel.block_m) * group;
  p.head_group = group * choose_head_group(keys_bytes, tiles, p.heads_kv * p.batch, tiles_differ(p, kernel), 1, queue);
  const int64_t blocks = kernel.blocks(&p);
  if (p.s_dmask != nullptr && p.split_size == 0) return {0};  // a second pass needs the row's final sum

  if (p.split_size > 0) {
    const int chunks = ceil_div(p.seqlen_k, p.split_size);
    const int64_t room = int64_t(2) * device_attribute(cudaDevAttrMultiProcessorCount, queue);
    const bool alone = p.s_dmask != nullptr, fits = stash_fits(kernel, queue);
    if (chunks > 1 && !alone && ((blocks < room && partials_are_small(p, chunks)) || !fits)) p.num_splits = chunks;
    if (chunks > 1 && alone && !fits) {
      throw std::invalid_argument(
          "return_attn_probs with split_size needs more shared memory than this GPU has (use a split_size of at least "
          "the number of keys)");
    }
  } else if (!p.deterministic) {
    const int shares = choose_shares(p, kernel, blocks, queue);
    if (shares > 1) {
      p.split_size = ceil_div(ceil_div(p.seqlen_k, kernel.block_n), shares) * kernel.block_n;
      p.num_splits = ceil_div(p.seqlen_k, p.split_size);
    }
  }
  if (folds_shares(p, kernel)) return {0};
  if (p.num_splits == 1) return {tiles_taken_bytes(p, kernel, queue) + stash_device_bytes(p, kernel, queue)};
  return {align(size_t(partial_rows(p)) * p.head_dim * sizeof(float)) +
          2 * align(size_t(partial_rows(p)) * sizeof(float))};
}

void forward(ForwardParams p, void* workspace, const Queue& queue) {
  use_device(queue);
  const KernelInfo& kernel = forward_kernel(p, queue);
  if (p.num_splits > 1) {
    char* at = static_cast<char*>(workspace);
    p.partial_out = at;
    at += align(size_t(partial_rows(p)) * p.head_dim * sizeof(float));
    p.partial_max = at;
    at += align(size_t(partial_rows(p)) * sizeof(float));
    p.partial_sum = at;
    launch(kernel, p, queue);
    if (!folds_shares(p, kernel)) launch(find(queue, KernelKind::kCombine, p.dtype), p, queue);
    return;
  }
  const size_t taken_bytes = tiles_taken_bytes(p, kernel, queue);
  if (taken_bytes > 0) {
    p.tiles_taken = static_cast<uint32_t*>(workspace);
    check(cudaMemsetAsync(workspace, 0, taken_bytes, static_cast<cudaStream_t>(queue.stream)), "clearing a counter");
  }
  p.partial_out = static_cast<char*>(workspace) + taken_bytes;
  const auto launch_one = [&](const KernelInfo& kernel) {
    launch(kernel, p, queue, may_fold(p) ? kernel.stash_bytes : 0);
  };
  launch_one(kernel);
  if (p.s_dmask == nullptr) return;
  // Where a call without it has other bits, so have the output and the LSE.
  p.s_dmask = nullptr;
  const KernelInfo& usual = forward_kernel(p, queue);
  if (usual.takes_any_rows) launch_one(usual);
}

bool reads_pages(const ForwardParams& p, const Queue& queue) { return reads_pages(forward_kernel(p, queue), p); }

// ---- backward ------------------------------------------------------------------------------------------------------

// A persistent kernel writes dq itself. Where heads are alike and many, at the ends of blocks, of heads all of whose
// blocks have been begun: then there need be room for the sums of a few groups of heads alone. Else afterwards; so too
// where there is more to write than to do, one block of keys or two a head.
void plan_dq(BackwardParams& p, const KernelInfo& kernel, const Queue& queue) {
  const int64_t heads = int64_t(p.batch) * p.heads_kv, blocks = std::max(1, ceil_div(p.seqlen_k, kernel.block_n));
  const int64_t group = std::min<int64_t>(heads, p.head_group) * blocks;
  // How many blocks are begun while one is done: as many as run at a time, and twice as many beside the longest of a
  // causal mask, which in the fixed order is a group's last.
  const int64_t at_once = device_attribute(cudaDevAttrMultiProcessorCount, queue);
  const int64_t meanwhile = blocks_differ(p) ? 2 * at_once : at_once;
  const int64_t late = p.deterministic && blocks_differ(p) ? meanwhile : std::min(group, at_once / 4);
  const bool alike = p.cu_seqlens_q == nullptr && p.seqused_k == nullptr;
  if (alike && blocks > 2 && heads * blocks > 3 * (std::max(group, at_once) + late)) {
    p.dq_lag = int(group + late);
    // A block must not need the room of sums that it, or a later one, is to write.
    const int64_t least = (group + p.dq_lag + group - 1) / group * p.head_group;
    const int64_t wanted = (group + p.dq_lag + meanwhile + blocks - 1) / blocks;
    p.dq_heads = int(std::min(heads, std::max(least, wanted)));
  } else {
    p.dq_lag = -1;
    p.dq_heads = int(heads);
  }
}

int64_t dq_blocks(const BackwardParams& p, const KernelInfo& kernel) {
  return p.heads_q * query_blocks(p, kernel.block_m);
}
size_t dq_turn_bytes(const BackwardParams& p, const KernelInfo& kernel) {
  const bool counted = p.deterministic || kernel.persistent;
  return counted ? align(size_t(dq_blocks(p, kernel)) * sizeof(int32_t)) : 0;
}
size_t dq_accum_bytes(const BackwardParams& p, const KernelInfo& kernel) {
  int64_t blocks = dq_blocks(p, kernel);
  if (kernel.persistent && p.dq_heads < p.batch * p.heads_kv) {
    blocks = int64_t(p.dq_heads) * (p.heads_q / p.heads_kv) * ceil_div(p.seqlen_q, kernel.block_m);
  }
  return align(size_t(blocks) * kernel.block_m * kernel.key.head_dim * sizeof(float));
}
size_t dq_progress_bytes(const BackwardParams& p, const KernelInfo& kernel) {
  return kernel.persistent ? align(size_t(2) * p.batch * p.heads_kv * sizeof(int32_t)) : 0;
}

// Heads that must run side by side lest the fixed order hold blocks back. A head's blocks start at most as fast as one
// follows another in adding to a sum, which takes about as long as a step, and a multiprocessor asks for a block when
// it has done the steps of one: so many heads, and one more, for none of this runs like clockwork.
int heads_of_fixed_order(const BackwardParams& p, const KernelInfo& kernel, const Queue& queue) {
  if (!p.deterministic) return 1;
  const int steps = ceil_div(p.seqlen_q, kernel.block_m) * (p.heads_q / p.heads_kv);
  return ceil_div(device_attribute(cudaDevAttrMultiProcessorCount, queue), std::max(1, steps)) + 1;
}

Workspace plan_backward(BackwardParams& p, const Queue& queue) {
  check_rows(p);
  check_rows("out", p.out, p.total_q, p.dtype);
  check_rows("dout", p.dout, p.total_q, p.dtype);
  if (p.softcap > 0) p.softcap_series = softcap_series(p.softmax_scale, p.softcap);
  const KernelInfo& kernel = backward_kernel(p, queue);
  const int group = p.heads_q / p.heads_kv, blocks = ceil_div(p.seqlen_k, kernel.block_n);
  const int64_t head_bytes =
      2 * (int64_t(p.seqlen_q) * group + p.seqlen_k) * p.head_dim * int64_t(element_bytes(p.dtype));
  p.head_group = choose_head_group(head_bytes, blocks, p.heads_kv * p.batch, blocks_differ(p),
                                   heads_of_fixed_order(p, kernel, queue), queue);
  if (kernel.persistent) plan_dq(p, kernel, queue);
  return {dq_accum_bytes(p, kernel) + dq_turn_bytes(p, kernel) + dq_progress_bytes(p, kernel) +
          blocks_taken_bytes(kernel)};
}

void backward(BackwardParams p, void* workspace, const Queue& queue) {
  use_device(queue);
  const KernelInfo& kernel = backward_kernel(p, queue);
  const size_t accum_bytes = dq_accum_bytes(p, kernel), turn_bytes = dq_turn_bytes(p, kernel);
  const size_t progress_bytes = dq_progress_bytes(p, kernel), taken_bytes = blocks_taken_bytes(kernel);
  char* const counters = static_cast<char*>(workspace) + accum_bytes;
  p.dq_accum = workspace;
  p.dq_turn = turn_bytes > 0 ? reinterpret_cast<int32_t*>(counters) : nullptr;
  p.dq_progress = reinterpret_cast<int32_t*>(counters + turn_bytes);
  p.blocks_taken = reinterpret_cast<uint32_t*>(counters + turn_bytes + progress_bytes);
  const size_t left_alone = kernel.persistent ? accum_bytes : 0;
  check(cudaMemsetAsync(static_cast<char*>(workspace) + left_alone, 0,
                        accum_bytes - left_alone + turn_bytes + progress_bytes + taken_bytes,
                        static_cast<cudaStream_t>(queue.stream)),
        "clearing the backward's workspace");
  launch(preprocess_kernel(p, queue), p, queue);
  launch(kernel, p, queue);
  if (!kernel.persistent) launch(find(queue, KernelKind::kFinishDq, p.dtype, p.head_dim), p, queue);
}

// ---- append --------------------------------------------------------------------------------------------------------

void append(const AppendParams& p, const Queue& queue) {
  use_device(queue);
  AppendParams params = p;
  launch(find(queue, KernelKind::kAppend, p.dtype), params, queue);
}

// That of the first device.
int key_block(DType dtype, int head_dim) {
  check_device(0);
  return find({}, KernelKind::kForward, dtype, head_dim).block_n;
}

const char* describe(const Queue& queue) {
  thread_local char text[320];
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, queue.device_index), "reading the device's properties");
  std::snprintf(text, sizeof text, "%s, %s, %d multiprocessors, kernels for %s", properties.name,
                arch_name(properties).c_str(), properties.multiProcessorCount, table(queue.device_index).machine);
  return text;
}

const Backend kGpuBackend = {"cuda", check_device, plan_forward, forward, reads_pages,
                              plan_backward, backward, append, key_block, describe};

}  // namespace

const Backend& gpu_backend() { return kGpuBackend; }

}  // namespace flash_attn
