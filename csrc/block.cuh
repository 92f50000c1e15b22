// What the threads of a block do together.
#pragma once

#include "fill.h"

namespace nsa {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSearchSteps = 8;  // of a binary search among a block's threads
static_assert(1 << kSearchSteps == kThreads);

__device__ inline int lane() { return threadIdx.x % kWarp; }
__device__ inline int warp() { return threadIdx.x / kWarp; }

__device__ inline bool is_enabled(const Fill& fill) {
  return fill.enabled == nullptr || *fill.enabled != 0;
}

__device__ inline uint32_t scan_warp(uint32_t sum) {
#pragma unroll
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, sum, delta);
    if (lane() >= delta) sum += other;
  }
  return sum;
}

// The sum of `own` over this thread and those before it in the block, plus the sum of `before` over
// all threads. Passes one barrier; the caller needs another one before the next scan.
__device__ inline uint32_t scan_block(uint32_t own, uint32_t before) {
  __shared__ uint32_t of_warp[kWarps], before_of_warp[kWarps];
  const uint32_t sum = scan_warp(own);
  before = __reduce_add_sync(kAll, before);
  if (lane() == kWarp - 1) {
    of_warp[warp()] = sum;
    before_of_warp[warp()] = before;
  }
  __syncthreads();
  uint32_t rest = lane() < kWarps ? before_of_warp[lane()] : 0;
  if (lane() < warp()) rest += of_warp[lane()];
  return sum + __reduce_add_sync(kAll, rest);
}

// The first thread whose end is greater than `position`, for a position that is the same in all
// lanes and lower than the last end. Each lane looks at one end of an even spread.
__device__ inline uint32_t find_by_warp(const uint32_t (&ends)[kThreads], uint32_t position) {
  const unsigned spread = __ballot_sync(kAll, ends[(lane() + 1) * kWarps - 1] > position);
  const uint32_t first = (__ffs(spread) - 1) * kWarps;
  const unsigned near = __ballot_sync(kAll, ends[first + lane() % kWarps] > position);
  return first + __ffs(near) - 1;
}

// The same for a position of this thread alone; `end_of(i)` reads the end of thread i. A search
// that is unrolled is faster, one that is not has less code.
template <bool kUnroll, typename EndOf>
__device__ inline uint32_t find_by_thread(uint32_t position, EndOf end_of) {
  constexpr int kTimes = kUnroll ? kSearchSteps : 1;
  uint32_t found = 0;
#pragma unroll kTimes
  for (uint32_t step = kThreads / 2; step > 0; step /= 2) {
    if (end_of(found + step - 1) <= position) found += step;
  }
  return found;
}

}  // namespace nsa
