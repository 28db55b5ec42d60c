// The CPU backend: plans a call, and hands its blocks to the framework's threads.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../backend.h"
#include "../cuda/attention/schedule.cuh"
#include "machine.h"

namespace flash_attn {
namespace {

// ---- threads -------------------------------------------------------------------------------------------------------

int thread_count(const Queue& queue) { return queue.threads.run == nullptr ? 1 : max_int(1, queue.threads.count); }

// Threads that `count` items occupy.
int thread_count(const Queue& queue, int64_t count) {
  return int(count < thread_count(queue) ? count : thread_count(queue));
}

// Calls item(index, thread) for every index in [0, count). Indices are taken in ascending order, each by a thread that
// is already running: an item may wait for one with a smaller index.
template <class F>
void for_each_item(const Queue& queue, int64_t count, F&& item) {
  struct Shared {
    F& item;
    const int64_t count;
    std::atomic<int64_t> next{0};
  } shared{item, count};
  const auto work = [](void* context, int thread) {
    Shared& shared = *static_cast<Shared*>(context);
    for (int64_t index; (index = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;) {
      shared.item(index, thread);
    }
  };
  const int threads = thread_count(queue, count);
  if (threads <= 1) {
    work(&shared, 0);
  } else {
    queue.threads.run(threads, work, &shared);
  }
}

size_t align(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Scratch of one thread that runs a kernel, and of all that will.
size_t scratch_bytes(const KernelInfo& kernel) { return align(size_t(kernel.shared_bytes) + kernel.stash_bytes); }
template <class Params>
size_t scratch_bytes(const KernelInfo& kernel, const Params& params, const Queue& queue) {
  return scratch_bytes(kernel) * thread_count(queue, kernel.blocks(&params));
}

template <class Params>
void launch(const KernelInfo& kernel, const Params& params, char* scratch, const Queue& queue) {
  for_each_item(queue, kernel.blocks(&params), [&](int64_t block, int thread) {
    kernel.host(&params, block, scratch + thread * scratch_bytes(kernel));
  });
}

// ---- kernels -------------------------------------------------------------------------------------------------------

bool is_modified(const AttentionParams& p) {
  return p.softcap > 0 || p.alibi_slopes != nullptr || p.dropout_p > 0 || !(p.softmax_scale > 0);
}

const KernelInfo& find(KernelKind kind, DType dtype, int head_dim = 0, bool modified = false,
                       bool performance = false) {
  const KernelInfo* info = find_host_kernel({kind, dtype, head_dim, modified, performance});
  if (info == nullptr && performance && find_host_kernel({kind, dtype, head_dim, modified}) != nullptr) {
    throw std::invalid_argument(kNoPerformanceMode);
  }
  if (info == nullptr) {
    throw std::invalid_argument("no CPU kernel was compiled for this dtype and head_dim " + std::to_string(head_dim) +
                                " (see FLASH_ATTENTION_INSTANCES in the build's settings)");
  }
  return *info;
}

// The mode's instances are all modified ones: here it is there for its arithmetic, and they serve every call.
bool in_performance_mode(const AttentionParams& p) { return p.performance_mode && is_16_bit(p.dtype); }

const KernelInfo& forward_kernel(const ForwardParams& p) {
  const bool performance = in_performance_mode(p);
  const bool modified = is_modified(p) || p.s_dmask != nullptr || p.block_table != nullptr;
  return find(KernelKind::kForward, p.dtype, p.head_dim, performance || modified, performance);
}
const KernelInfo& backward_kernel(const BackwardParams& p) {
  const bool performance = in_performance_mode(p);
  return find(KernelKind::kBackward, p.dtype, p.head_dim, performance || is_modified(p), performance);
}

size_t accum_size(DType dtype) { return dtype == DType::kFloat64 ? sizeof(double) : sizeof(float); }

// ---- forward -------------------------------------------------------------------------------------------------------

// What Forward's blocks leave for Combine.
struct PartialBytes {
  size_t out = 0, row = 0;  // of partial_out; of partial_max and partial_sum each

  explicit PartialBytes(const ForwardParams& p) {
    if (p.num_splits <= 1) return;
    const size_t rows = size_t(p.num_splits) * p.batch * p.heads_q * p.seqlen_q;
    out = align(rows * p.head_dim * accum_size(p.dtype));
    row = align(rows * accum_size(p.dtype));
  }
  size_t all() const { return out + 2 * row; }
};

// Where the caller names no split_size. Folding costs at most a hundredth of the time, and lets threads share the keys
// of a few queries.
constexpr int kUsualSplit = 2048;

// Whether a row's chunks are given to several threads changes no bit, so it may depend on how many there are.
Workspace plan_forward(ForwardParams& p, const Queue& queue) {
  make_rows_of_heads(p);
  const KernelInfo& kernel = forward_kernel(p);
  if (p.split_size < 0 || p.split_size % kernel.block_n != 0) {
    throw std::invalid_argument("split_size: must be a multiple of " + std::to_string(kernel.block_n) +
                                ", the key block, got " + std::to_string(p.split_size) + " (0 turns the mode off)");
  }
  if (p.split_size == 0) p.split_size = kUsualSplit;
  p.num_splits = 1;
  p.head_group = 1;  // a head's query blocks share its keys in cache
  if (p.s_dmask == nullptr && kernel.blocks(&p) < thread_count(queue)) {
    p.num_splits = max_int(1, ceil_div(p.seqlen_k, p.split_size));
  }
  return {PartialBytes(p).all() + scratch_bytes(kernel, p, queue)};
}

void forward(ForwardParams p, void* workspace, const Queue& queue) {
  char* partial = static_cast<char*>(workspace);
  const PartialBytes bytes(p);
  p.partial_out = partial;
  p.partial_max = partial + bytes.out;
  p.partial_sum = partial + bytes.out + bytes.row;
  char* scratch = partial + bytes.all();
  launch(forward_kernel(p), p, scratch, queue);
  if (p.num_splits > 1) launch(find(KernelKind::kCombine, p.dtype), p, scratch, queue);
}

bool reads_pages(const ForwardParams&, const Queue&) { return true; }

// ---- backward ------------------------------------------------------------------------------------------------------

// The order of dQ's sums is always fixed: blocks take turns, which costs the host nothing.
struct BackwardBytes {
  size_t dq_accum, dq_turn, scratch;  // scratch: for whichever kernel wants most

  BackwardBytes(const BackwardParams& p, const KernelInfo& main, const KernelInfo& finish, const Queue& queue) {
    const size_t blocks = size_t(p.heads_q) * query_blocks(p, main.block_m);
    dq_accum = align(blocks * main.block_m * main.key.head_dim * accum_size(p.dtype));
    dq_turn = align(blocks * sizeof(int32_t));
    const size_t a = scratch_bytes(main, p, queue), b = scratch_bytes(finish, p, queue);
    scratch = a > b ? a : b;
  }
};

// delta takes dO as the products do; bf16 is the same to both.
const KernelInfo& preprocess_kernel(const BackwardParams& p) {
  const bool performance = p.performance_mode && p.dtype == DType::kFloat16;
  return find(KernelKind::kPreprocess, p.dtype, p.head_dim, false, performance);
}
const KernelInfo& finish_kernel(const BackwardParams& p) { return find(KernelKind::kFinishDq, p.dtype, p.head_dim); }

Workspace plan_backward(BackwardParams& p, const Queue& queue) {
  p.head_group = p.heads_kv * p.batch;  // threads take different heads, and need not wait for their turns at dQ
  const BackwardBytes bytes(p, backward_kernel(p), finish_kernel(p), queue);
  return {bytes.dq_accum + bytes.dq_turn + bytes.scratch};
}

void clear(char* memory, size_t bytes, const Queue& queue) {
  constexpr size_t kShare = size_t(1) << 18;
  for_each_item(queue, int64_t((bytes + kShare - 1) / kShare), [&](int64_t index, int) {
    const size_t begin = size_t(index) * kShare;
    std::memset(memory + begin, 0, bytes - begin < kShare ? bytes - begin : kShare);
  });
}

void backward(BackwardParams p, void* workspace, const Queue& queue) {
  const KernelInfo &main = backward_kernel(p), &finish = finish_kernel(p);
  const BackwardBytes bytes(p, main, finish, queue);
  char* memory = static_cast<char*>(workspace);
  clear(memory, bytes.dq_accum + bytes.dq_turn, queue);
  p.dq_accum = memory;
  p.dq_turn = reinterpret_cast<int32_t*>(memory + bytes.dq_accum);
  p.deterministic = true;
  char* scratch = memory + bytes.dq_accum + bytes.dq_turn;
  launch(preprocess_kernel(p), p, scratch, queue);
  launch(main, p, scratch, queue);
  launch(finish, p, scratch, queue);
}

// ---- append --------------------------------------------------------------------------------------------------------

void append(const AppendParams& p, const Queue& queue) {
  launch(find(KernelKind::kAppend, p.dtype), p, nullptr, queue);
}

int key_block(DType dtype, int head_dim) { return find(KernelKind::kForward, dtype, head_dim).block_n; }

const char* describe(const Queue& queue) {
  thread_local char text[96];
  std::snprintf(text, sizeof text, "host, kernels for %s, %d threads", host_machine(), thread_count(queue));
  return text;
}

void check_device(int) {}

const Backend kCpuBackend = {"cpu",         check_device, plan_forward, forward, reads_pages,
                             plan_backward, backward,     append,       key_block,    describe};

}  // namespace

const Backend& cpu_backend() { return kCpuBackend; }

}  // namespace flash_attn
