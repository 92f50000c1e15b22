// CUDA for csrc/block.cuh and kernels over it, on the CPU: each thread of a block is a fiber, and a
// barrier lets the others run. Blocks run one after the other, the last one first.
//
// It finds what a kernel computes and where it writes. It does not find races, nor how fast it is.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
using std::min;

namespace emulated {

constexpr int kBlock = 256, kLanes = 32, kStackBytes = 65536;
constexpr int kMostRounds =
    1000;  // of all threads in turns; a kernel takes one more for each barrier

struct Index {
  unsigned x;
};

// Where all threads of a warp or of a block wait for one another.
struct Meeting {
  int arrived = 0, round = 0;
};

struct Block {
  ucontext_t scheduler;
  ucontext_t fibers[kBlock];
  bool done[kBlock];
  int current;
  Meeting all, warps[kBlock / kLanes];
  uint32_t values[kBlock];
};

inline Block block;
inline std::vector<char> stacks(kBlock* kStackBytes);
inline void (*body)(const void*);
inline const void* argument;

inline void pause() { swapcontext(&block.fibers[block.current], &block.scheduler); }

inline void meet(Meeting& meeting, int expected) {
  const int round = meeting.round;
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.round;
  }
  while (meeting.round == round) pause();
}

inline int warp_of() { return block.current / kLanes; }
inline void meet_warp() { meet(block.warps[warp_of()], kLanes); }

// `use` gets what each lane of the warp gives.
template <typename Use>
auto exchange(uint32_t value, Use use) {
  block.values[block.current] = value;
  meet_warp();
  const auto result = use(block.values + warp_of() * kLanes);
  meet_warp();  // before the next values
  return result;
}

inline void start() {
  body(argument);
  block.done[block.current] = true;
  for (;;) pause();
}

}  // namespace emulated

inline emulated::Index blockIdx, gridDim;
struct ThreadIndex {
  struct X {
    operator unsigned() const { return static_cast<unsigned>(emulated::block.current); }
  } x;
};
inline ThreadIndex threadIdx;

inline void __syncthreads() { emulated::meet(emulated::block.all, emulated::kBlock); }
inline uint32_t __shfl_up_sync(unsigned, uint32_t value, int delta) {
  const int lane = emulated::block.current % emulated::kLanes;
  return emulated::exchange(value,
                            [=](uint32_t* of) { return of[lane < delta ? lane : lane - delta]; });
}
inline uint32_t __reduce_add_sync(unsigned, uint32_t value) {
  return emulated::exchange(value, [](uint32_t* of) {
    uint32_t sum = 0;
    for (int i = 0; i < emulated::kLanes; ++i) sum += of[i];
    return sum;
  });
}
inline unsigned __ballot_sync(unsigned, bool holds) {
  return emulated::exchange(holds, [](uint32_t* of) {
    unsigned mask = 0;
    for (int i = 0; i < emulated::kLanes; ++i) mask |= of[i] << i;
    return mask;
  });
}
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }

namespace emulated {

template <typename Launch>
void run(void (*kernel)(Launch), const Launch& launch, int blocks) {
  static void (*called)(Launch);
  called = kernel;
  body = [](const void* launch) { called(*static_cast<const Launch*>(launch)); };
  argument = &launch;
  gridDim.x = static_cast<unsigned>(blocks);
  for (int b = blocks - 1; b >= 0; --b) {
    blockIdx.x = static_cast<unsigned>(b);
    block.all = {};
    for (Meeting& warp : block.warps) warp = {};
    for (int t = 0; t < kBlock; ++t) {
      getcontext(&block.fibers[t]);
      block.fibers[t].uc_stack.ss_sp = stacks.data() + t * kStackBytes;
      block.fibers[t].uc_stack.ss_size = kStackBytes;
      makecontext(&block.fibers[t], start, 0);
      block.done[t] = false;
    }
    for (int left = kBlock, rounds = 0; left > 0; ++rounds) {
      if (rounds > kMostRounds) {
        std::fprintf(stderr, "emulated CUDA: threads wait at a barrier that others do not reach\n");
        std::abort();
      }
      left = 0;
      for (int t = 0; t < kBlock; ++t) {
        if (block.done[t]) continue;
        block.current = t;
        swapcontext(&block.scheduler, &block.fibers[t]);
        left += !block.done[t];
      }
    }
  }
}

}  // namespace emulated
