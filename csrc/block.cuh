// What the threads of a block do together.
#pragma once

#include "fill.h"

namespace nsa {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

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

// `own` of this thread and of those before it in the block, and `before` of all threads. Passes one barrier;
// another one has to come before the next scan.
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

// The first thread whose end lies behind `position`, which lies before the last end; the same position in
// all lanes. Each lane looks at one end of an even spread.
__device__ inline uint32_t find(const uint32_t (&ends)[kThreads], uint32_t position) {
  const unsigned spread = __ballot_sync(kAll, ends[(lane() + 1) * kWarps - 1] > position);
  const uint32_t first = (__ffs(spread) - 1) * kWarps;
  const unsigned near = __ballot_sync(kAll, ends[first + lane() % kWarps] > position);
  return first + __ffs(near) - 1;
}

// The same for a position of this thread alone.
__device__ inline uint32_t find_alone(const uint32_t (&ends)[kThreads], uint32_t position) {
  uint32_t found = 0;
#pragma unroll
  for (uint32_t step = kThreads / 2; step > 0; step /= 2) {
    if (ends[found + step - 1] <= position) found += step;
  }
  return found;
}

}  // namespace nsa
