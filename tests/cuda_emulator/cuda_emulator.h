// Runs csrc/cuda on the CPU: each thread of a block is a fiber, barriers and warp instructions are rendezvous.
// Written from the PTX ISA's definitions, not from the kernels. Threads run in a shuffled order, shared memory starts
// poisoned, and cp.async lands either at once or only when waited for, so a missing barrier or wait gives wrong
// numbers.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "arithmetic.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __grid_constant__
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace pykernels::cuda {

struct Vec16 {
  uint32_t word[4];
};
struct Vec8 {
  uint32_t word[2];
};

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_emulator: %s\n", what);
  std::abort();
}

inline void require_aligned(const void* p, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail(what);
}

struct Copy {
  void* target;
  const void* source;
  int bytes;
  void run() const {
    unsigned char staged[16] = {};
    std::memcpy(staged, source, bytes);
    std::memcpy(target, staged, 16);
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> open;
  bool done = false;
};

struct Rendezvous {
  int arrived = 0;
  uint64_t generation = 0;
};

constexpr int kStackBytes = 64 * 1024;
constexpr int kLaneBytes = 64;

struct Warp {
  Rendezvous meet;
  const char* operation = nullptr;
  alignas(16) unsigned char in[32][kLaneBytes];
  alignas(16) unsigned char out[32][kLaneBytes];
};

inline bool deferred_copies = false;
inline uint32_t schedule_seed = 0;
inline int multiprocessors = 132;

inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline dim3 grid_dim, block_dim, block_idx;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Rendezvous block_meet;
inline std::vector<unsigned char> shared_storage;
inline unsigned char* shared = nullptr;
inline std::function<void()> body;
inline uint64_t progress = 0;

inline void yield() { swapcontext(&current->context, &scheduler); }

// True for the one that arrives last, which may then work for all; the others wait for the next generation.
template <typename Last>
void rendezvous(Rendezvous& meet, int count, Last last) {
  ++progress;
  if (++meet.arrived == count) {
    last();
    meet.arrived = 0;
    ++meet.generation;
    return;
  }
  const uint64_t generation = meet.generation;
  while (meet.generation == generation) yield();
}

// Every lane of the warp gives `in`; the last to come runs `all(in, out)` over the lanes; every lane takes its `out`.
template <typename In, typename Out, typename F>
Out warp_collective(const char* operation, const In& in, F all) {
  static_assert(sizeof(In) <= kLaneBytes && sizeof(Out) <= kLaneBytes);
  const int lane = current->thread.x % 32;
  Warp& warp = warps[current->thread.x / 32];
  if (warp.meet.arrived == 0) warp.operation = operation;
  if (std::strcmp(warp.operation, operation) != 0) fail("the lanes of a warp met in different instructions");
  std::memcpy(warp.in[lane], &in, sizeof(In));
  rendezvous(warp.meet, 32, [&] {
    In ins[32];
    Out outs[32];
    for (int i = 0; i < 32; ++i) std::memcpy(&ins[i], warp.in[i], sizeof(In));
    all(ins, outs);
    for (int i = 0; i < 32; ++i) std::memcpy(warp.out[i], &outs[i], sizeof(Out));
  });
  Out out;
  std::memcpy(&out, warp.out[lane], sizeof(Out));
  return out;
}

inline void trampoline() {
  body();
  current->done = true;
  ++progress;
  swapcontext(&current->context, &scheduler);
}

inline void run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    fiber.thread = {static_cast<unsigned>(i), 0, 0};
    fiber.done = false;
    fiber.open.clear();
    fiber.committed.clear();
    makecontext(&fiber.context, trampoline, 0);
  }
  warps.assign((threads + 31) / 32, Warp{});
  block_meet = {};
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  std::mt19937 random(schedule_seed + block_idx.x);
  for (int left = threads; left > 0;) {
    std::shuffle(order.begin(), order.end(), random);
    const uint64_t before = progress;
    for (int i : order) {
      if (fibers[i].done) continue;
      current = &fibers[i];
      swapcontext(&scheduler, &current->context);
      if (fibers[i].done) --left;
    }
    if (progress == before) fail("deadlock: some threads wait at a barrier the others never reach");
  }
}

template <typename T>
uint32_t byte_of(const T& words, int i) {
  return (words[i / 4] >> (8 * (i % 4))) & 0xffu;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k32" (8-bit) and "mma.m16n8k16" (16-bit): lane = 4 * group + t.
struct MmaIn {
  uint32_t a[4], b[2], d[4];
};
struct MmaOut {
  uint32_t d[4];
};

template <typename Acc, typename Element>
void mma_all(const MmaIn (&in)[32], MmaOut (&out)[32], int element_bytes, Element element) {
  const int k = 32 / element_bytes, per_register = 4 / element_bytes;
  std::vector<Acc> a(16 * k), b(k * 8);
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 4 * per_register; ++i) {
      const int reg = i / per_register, j = i % per_register;
      const int row = reg == 0 || reg == 2 ? group : group + 8;
      const int col = t * per_register + j + (reg >= 2 ? k / 2 : 0);
      a[row * k + col] = element(in[lane].a[reg], j);
    }
    for (int i = 0; i < 2 * per_register; ++i) {
      const int reg = i / per_register, j = i % per_register;
      b[(t * per_register + j + (reg == 1 ? k / 2 : 0)) * 8 + group] = element(in[lane].b[reg], j);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), col = lane % 4 * 2 + (i & 1);
      Acc sum;
      std::memcpy(&sum, &in[lane].d[i], 4);
      for (int x = 0; x < k; ++x) sum += a[row * k + x] * b[x * 8 + col];
      std::memcpy(&out[lane].d[i], &sum, 4);
    }
  }
}

template <typename Acc, typename Element>
void mma(const char* name, Acc (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int bytes, Element element) {
  MmaIn in;
  std::memcpy(in.a, a, sizeof(a));
  std::memcpy(in.b, b, sizeof(b));
  std::memcpy(in.d, d, sizeof(d));
  const MmaOut out = warp_collective<MmaIn, MmaOut>(
      name, in, [&](const MmaIn(&ins)[32], MmaOut(&outs)[32]) { mma_all<Acc>(ins, outs, bytes, element); });
  std::memcpy(d, out.d, sizeof(d));
}

}  // namespace emulator

#define threadIdx (::pykernels::cuda::emulator::current->thread)
#define blockIdx (::pykernels::cuda::emulator::block_idx)
#define blockDim (::pykernels::cuda::emulator::block_dim)
#define gridDim (::pykernels::cuda::emulator::grid_dim)

using std::max;
using std::min;

inline void __syncthreads() {
  emulator::rendezvous(emulator::block_meet, emulator::block_dim.x, [] {});
}

inline Vec16 load16(const void* source) {
  emulator::require_aligned(source, 16, "a 16-byte load off its alignment");
  Vec16 v;
  std::memcpy(&v, source, 16);
  return v;
}
inline Vec8 load8(const void* source) {
  emulator::require_aligned(source, 8, "an 8-byte load off its alignment");
  Vec8 v;
  std::memcpy(&v, source, 8);
  return v;
}
inline Vec16 load16_streaming(const void* source) { return load16(source); }
inline void store16(void* target, const Vec16& v) {
  emulator::require_aligned(target, 16, "a 16-byte store off its alignment");
  std::memcpy(target, &v, 16);
}
inline void store16_global(void* target, const Vec16& v) { store16(target, v); }
inline void store8(void* target, uint32_t low, uint32_t high) {
  emulator::require_aligned(target, 8, "an 8-byte store off its alignment");
  const uint32_t words[2] = {low, high};
  std::memcpy(target, words, 8);
}
inline void store4(void* target, uint32_t v) {
  emulator::require_aligned(target, 4, "a 4-byte store off its alignment");
  std::memcpy(target, &v, 4);
}

inline void cp_async_16(void* target, const void* source, int bytes) {
  emulator::require_aligned(target, 16, "cp.async to a shared address off its alignment");
  emulator::require_aligned(source, 16, "cp.async from a global address off its alignment");
  if (bytes < 0 || bytes > 16) emulator::fail("cp.async of fewer than 0 or more than 16 bytes");
  emulator::current->open.push_back({target, source, bytes});
  if (!emulator::deferred_copies) emulator::current->open.back().run();
}
inline void cp_async_commit() {
  emulator::current->committed.push_back(std::move(emulator::current->open));
  emulator::current->open.clear();
}
template <int kPending>
void cp_async_wait() {
  auto& groups = emulator::current->committed;
  while (groups.size() > kPending) {
    if (emulator::deferred_copies) {
      for (const auto& copy : groups.front()) copy.run();
    }
    groups.erase(groups.begin());
  }
}

// Lane l gives the address of row l % 8 of matrix l / 8, and takes 4 bytes at 4 * (l % 4) of row l / 4 of each.
inline void ldmatrix_x4(uint32_t (&r)[4], const void* address) {
  emulator::require_aligned(address, 16, "ldmatrix from an address off its alignment");
  const Vec16 out = emulator::warp_collective<const void*, Vec16>(
      "ldmatrix", address, [](const void* const(&rows)[32], Vec16(&outs)[32]) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            const char* row = static_cast<const char*>(rows[matrix * 8 + lane / 4]);
            std::memcpy(&outs[lane].word[matrix], row + lane % 4 * 4, 4);
          }
        }
      });
  std::memcpy(r, out.word, 16);
}

inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma("mma.s8", d, a, b, 1,
                [](uint32_t w, int j) { return static_cast<int32_t>(static_cast<int8_t>(w >> (8 * j))); });
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma("mma.f16", d, a, b, 2,
                [](uint32_t w, int j) { return half_to_float(static_cast<uint16_t>(w >> (16 * j))); });
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma("mma.bf16", d, a, b, 2, [](uint32_t w, int j) { return bits_to_float((w >> (16 * j)) << 16); });
}

inline uint32_t warp_max(uint32_t v) {
  return emulator::warp_collective<uint32_t, uint32_t>(
      "redux.max", v,
      [](const uint32_t (&in)[32], uint32_t (&out)[32]) { std::fill(out, out + 32, *std::max_element(in, in + 32)); });
}
template <typename T>
T warp_sum(T v) {
  return emulator::warp_collective<T, T>("shfl.sum", v, [](const T(&in)[32], T(&out)[32]) {
    T step[32], next[32];
    std::copy(in, in + 32, step);
    for (int offset = 16; offset > 0; offset /= 2) {
      for (int i = 0; i < 32; ++i) next[i] = step[i] + step[i ^ offset];
      std::copy(next, next + 32, step);
    }
    std::copy(step, step + 32, out);
  });
}

template <typename T>
T warp_scan(T v) {
  return emulator::warp_collective<T, T>("shfl.up", v,
                                         [](const T(&in)[32], T(&out)[32]) { std::partial_sum(in, in + 32, out); });
}

inline unsigned char* shared_memory() { return emulator::shared; }
inline int multiprocessor_count() { return emulator::multiprocessors; }
inline bool is_capturing(void*) { return false; }
inline const char* mapped_address(const void* host, void** device) {
  *device = const_cast<void*>(host);
  return nullptr;
}

template <typename... Params, typename... Args>
const char* launch(void (*kernel)(Params...), int64_t blocks_x, int64_t blocks_y, int threads, size_t shared_bytes,
                   void*, const Args&... args) {
  if (blocks_x < 1 || blocks_y < 1 || threads < 1 || threads > 1024 || threads % 32 != 0) return "bad launch";
  emulator::grid_dim = {static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y), 1};
  emulator::block_dim = {static_cast<unsigned>(threads), 1, 1};
  if (emulator::fibers.size() < static_cast<size_t>(threads)) emulator::fibers.resize(1024);
  emulator::body = [&] { kernel(args...); };
  for (unsigned y = 0; y < blocks_y; ++y) {
    for (unsigned x = 0; x < blocks_x; ++x) {
      emulator::block_idx = {x, y, 0};
      emulator::shared_storage.assign(shared_bytes + 128, 0xa5);
      auto address = reinterpret_cast<uintptr_t>(emulator::shared_storage.data());
      emulator::shared = reinterpret_cast<unsigned char*>((address + 127) / 128 * 128);
      emulator::run_block(threads);
    }
  }
  return nullptr;
}

}  // namespace pykernels::cuda
