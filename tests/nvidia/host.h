// CUDA's threads on the host: fibres that run in random order of warps, with what kernels call that is not PTX.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  unsigned x = 0, y = 0, z = 0, w = 0;
};

namespace host {

struct Index {
  unsigned x, y = 1, z = 1;
};

// Threads that wait for each other.
struct Meeting {
  int arrived = 0;
  unsigned held = 0;
};

struct Warp {
  Meeting meeting;
  uint32_t slot[32][4];  // what lanes exchange
};

struct ThreadBlock {
  Index number;
  char* shared;
  Warp warps[16];
  Meeting named[5];
  int threads, left;     // in all, that have not ended
  ThreadBlock* cluster;  // its first thread block
  unsigned rank;         // in it
  Meeting of_cluster;    // the first one's, of all
  int threads_of_cluster;
};

// A copy that a thread makes itself, of its group of that number.
struct OwnCopy {
  int group;
  std::function<void()> run;
};

struct Thread {
  Index number;
  ThreadBlock* block;
  ucontext_t context;  // to begin with; then `left`, which takes no call of the system
  jmp_buf left;
  bool begun = false;
  std::unique_ptr<char[]> stack;
  unsigned held_of_cluster = 0;  // when it arrived there
  int stores = 0;                // that it has asked the copy engine for, and are to be done
  std::vector<OwnCopy> own_copies;  // that are to be done
  int copy_groups = 0;              // closed
  const char* waits_for = "";
};

inline Thread* self;
inline std::vector<std::function<void()>> copies;  // that the copy engine has not done
inline Index grid;
inline std::vector<std::unique_ptr<Thread>> threads;
inline std::vector<Thread*> running;  // self is number `at`
inline size_t at;
inline uint64_t switches;
inline ucontext_t outside;
inline void (*body)(void*);
inline void* argument;

inline std::minstd_rand random;
inline size_t random_below(size_t count) { return random() % count; }

// The lanes of a warp one after the other, the warps in turn or at random. Lanes that have met go on together: where all
// wait for a barrier, it must not be a phase ahead before the last one looks.
inline Thread* take_thread(size_t number) {
  const auto is_first = [](size_t i) {
    return i == 0 || running[i - 1]->block != running[i]->block ||
           running[i - 1]->number.x / 32 != running[i]->number.x / 32;
  };
  at = number % running.size();
  if (is_first(at) && random_below(4) == 0) {
    at = random_below(running.size());
    while (!is_first(at)) --at;
  }
  return running[at];
}

inline void resume(Thread* thread) {
  self = thread;
  if (thread->begun) _longjmp(thread->left, 1);
  thread->begun = true;
  setcontext(&thread->context);
}

// As the thread that now asks for it, but at any time and in any order.
template <class F>
void copy_later(F&& copy) {
  copies.emplace_back([copy, asker = self] {
    Thread* const now = self;
    self = asker;
    copy();
    self = now;
  });
}
inline void copy_one() {
  std::swap(copies[random_below(copies.size())], copies.back());
  const auto copy = std::move(copies.back());
  copies.pop_back();
  copy();
}

// Lets another thread run.
inline void yield() {
  if (++switches > 80'000'000) {
    printf("nobody gets on\n");
    for (const Thread* const thread : running) {
      if (running.size() > 32 && thread->number.x % 32 != 0) continue;
      printf("thread %u of block %u waits for %s\n", thread->number.x, thread->block->number.x, thread->waits_for);
    }
    fflush(stdout);
    _Exit(1);
  }
  Thread* const from = self;
  if (!copies.empty() && random_below(8192) == 0) copy_one();
  Thread* const next = take_thread(at + 1);
  if (next != from && _setjmp(from->left) == 0) resume(next);
}

inline void meet(Meeting& meeting, int count) {
  const unsigned now = meeting.held;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.held;
    yield();
  }
  while (meeting.held == now) yield();
}
inline Warp& warp() { return self->block->warps[self->number.x / 32]; }
inline void meet_warp() { meet(warp().meeting, 32); }

// Calls f(slot of every lane) once all lanes have written theirs.
template <class Write, class F>
void exchange(Write&& write, F&& f) {
  write(warp().slot[self->number.x % 32]);
  meet_warp();
  f(warp().slot);
  meet_warp();
}

template <class T>
T shuffle(T x, int lane) {
  exchange([&](uint32_t(&mine)[4]) { memcpy(mine, &x, sizeof x); },
           [&](uint32_t(&all)[32][4]) { memcpy(&x, all[lane], sizeof x); });
  return x;
}

// An address is of the thread's own block, or says which of the cluster's.
constexpr int kRankBit = 20;
inline char* shared_memory(uint32_t address) {
  const uint32_t rank = address >> kRankBit;
  const ThreadBlock& block = rank == 0 ? *self->block : self->block->cluster[rank - 1];
  if (rank != 0 && block.left == 0) {
    printf("access to the memory of a thread block that has ended\n");
    _Exit(1);
  }
  return block.shared + (address & ((1u << kRankBit) - 1));
}
// The copy engine's 128-byte mode.
inline char* swizzled(uint32_t address) { return shared_memory(address ^ (address >> 7 & 7) << 4); }

inline void arrive_at_cluster() {
  Meeting& meeting = self->block->cluster->of_cluster;
  self->held_of_cluster = meeting.held;
  if (++meeting.arrived < self->block->threads_of_cluster) return;
  meeting.arrived = 0;
  ++meeting.held;
}
inline void wait_for_cluster() {
  self->waits_for = "the cluster";
  while (self->block->cluster->of_cluster.held == self->held_of_cluster) yield();
}

inline void start() {
  body(argument);
  if (self->stores > 0 || !self->own_copies.empty()) {
    printf("a thread ends before its stores or copies\n");
    _Exit(1);
  }
  --self->block->left;
  running.erase(running.begin() + at);
  if (running.empty()) setcontext(&outside);
  resume(take_thread(at));
}

// Runs f() in every thread of a grid of thread blocks, of which `cluster` at a time are one.
template <class F>
void launch(Index blocks, unsigned threads_of_block, size_t shared_bytes, F&& f, unsigned cluster = 1) {
  constexpr size_t kStack = 256 << 10;
  std::vector<ThreadBlock> all(blocks.x * blocks.y * blocks.z);
  threads.clear();
  at = switches = 0;
  grid = blocks;
  body = [](void* f) { (*static_cast<std::remove_reference_t<F>*>(f))(); };
  argument = &f;
  for (unsigned block = 0; block < all.size(); ++block) {
    all[block].number = {block % blocks.x, block / blocks.x % blocks.y, block / blocks.x / blocks.y};
    all[block].threads = all[block].left = int(threads_of_block);
    all[block].threads_of_cluster = int(threads_of_block * cluster);
    all[block].rank = block % cluster;
    all[block].cluster = &all[block - block % cluster];
    all[block].shared = static_cast<char*>(aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024));
    memset(all[block].shared, 0x7f, shared_bytes);  // NaN in either 16-bit dtype
    for (unsigned number = 0; number < threads_of_block; ++number) {
      auto& thread = *threads.emplace_back(std::make_unique<Thread>());
      thread.number = {number};
      thread.block = &all[block];
      thread.stack.reset(new char[kStack]);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStack;
      makecontext(&thread.context, start, 0);
    }
  }
  for (const auto& thread : threads) running.push_back(thread.get());
  self = running[0];
  self->begun = true;
  swapcontext(&outside, &self->context);
  for (const ThreadBlock& block : all) free(block.shared);
}

}  // namespace host

#define threadIdx (host::self->number)
#define blockIdx (host::self->block->number)
#define gridDim (host::grid)
using dim3 = host::Index;
#define __grid_constant__

inline void __syncwarp(unsigned = 0xffffffffu) { host::meet_warp(); }
inline void __syncthreads() { host::meet(host::self->block->named[0], host::self->block->threads); }
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return host::shuffle(x, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return host::shuffle(x, int(threadIdx.x % 32) ^ mask);
}
inline unsigned atomicAdd(unsigned* p, unsigned x) {
  const unsigned before = *p;
  *p += x;
  return before;
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  unsigned most = 0;
  host::exchange([&](uint32_t(&mine)[4]) { mine[0] = x; },
                 [&](uint32_t(&all)[32][4]) {
                   for (const auto& of_lane : all) most = of_lane[0] > most ? of_lane[0] : most;
                 });
  return most;
}
inline unsigned __ballot_sync(unsigned, int x) {
  unsigned lanes = 0;
  host::exchange([&](uint32_t(&mine)[4]) { mine[0] = x != 0; },
                 [&](uint32_t(&all)[32][4]) {
                   for (int lane = 0; lane < 32; ++lane) lanes |= all[lane][0] << lane;
                 });
  return lanes;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __any_sync(unsigned, int x) { return int(__reduce_max_sync(0, x != 0)); }
inline void atomicMax(unsigned* p, unsigned x) { *p = x > *p ? x : *p; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T x) {
  *p = x;
}
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t x = 0;
  for (int i = 0; i < 4; ++i) x |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return x;
}
