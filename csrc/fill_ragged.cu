// The CUDA kernel for a ragged batch: one launch writes every metadata tensor.
//
// Only a scan over the requests says which row belongs to which request. Requests are taken in
// tiles, one for each thread of a block. Every block scans the whole tile, which saves a barrier
// over the grid. Then the blocks share out the tile's requests, rows and live chunks. The grid is
// fixed when the fill is bound, and the host reads nothing back.
#include "host.h"
#include "tables.cuh"

namespace nsa {
// Not unnamed, where nvcc puts a hash of the path of this file into names. Static kernels compile
// to the same machine code as in an unnamed namespace; others did not.
inline namespace ragged_kernel {

constexpr int kResidentBlocksPerSm = 2;

struct Ends {
  Sums sums;
  uint32_t chunks;
};

__device__ Ends combine(const Ends& a, const Ends& b, int64_t rows) {
  return Ends{combine(a.sums, b.sums, rows), a.chunks + b.chunks};
}

struct Tile {
  Request requests[kThreads];
  int32_t pool_rows[kThreads];
  Ends ends[kThreads];  // the sums up to the end of each request
  Ends of_warp[kWarps];
};

// Writes tile.ends; `carry` are the sums before the tile. Ends with a barrier. It stays
// apart from scan_block: one template for both compiled to other code on sm_100 and sm_120.
__device__ void scan_tile(const Fill& fill, const Ends& carry, const Ends& own, Tile& tile) {
  Ends sum = own;
#pragma unroll 1
  for (int delta = 1; delta < kWarp; delta *= 2) {
    Ends other;
    other.sums.row = __shfl_up_sync(kAll, sum.sums.row, delta);
    other.sums.lengths = __shfl_up_sync(kAll, sum.sums.lengths, delta);
    other.sums.clamped = __shfl_up_sync(kAll, sum.sums.clamped, delta);
    other.chunks = __shfl_up_sync(kAll, sum.chunks, delta);
    if (lane() >= delta) sum = combine(other, sum, fill.rows);
  }
  if (lane() == kWarp - 1) tile.of_warp[warp()] = sum;
  __syncthreads();
  Ends before = carry;
#pragma unroll 1
  for (int w = 0; w < warp(); ++w) before = combine(before, tile.of_warp[w], fill.rows);
  tile.ends[threadIdx.x] = combine(before, sum, fill.rows);
  __syncthreads();
}

__device__ void load_tile(const Fill& fill, int64_t first, const Ends& carry, Tile& tile) {
  const int64_t r = first + threadIdx.x;
  Ends own{};
  if (r < fill.requests) {
    const Request request = request_at(fill, r);
    tile.requests[threadIdx.x] = request;
    own = Ends{sums_of(fill, request), chunks_of(fill, request.length)};
    if (own.chunks > 0) tile.pool_rows[threadIdx.x] = static_cast<int32_t>(pool_row_of(fill, r));
  }
  scan_tile(fill, carry, own, tile);
}

__device__ void fill_tile(const Fill& fill, int64_t first, const Ends& carry, const Tile& tile) {
  const auto before = [&](int t) { return t == 0 ? carry : tile.ends[t - 1]; };
  const int64_t r = first + threadIdx.x;
  if (r < fill.requests && (first / kThreads) % gridDim.x == blockIdx.x) {
    store_request(fill, r, tile.requests[threadIdx.x].length, tile.ends[threadIdx.x].sums.lengths);
  }

  const Ends& total = tile.ends[kThreads - 1];
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t row = carry.sums.row + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
#pragma unroll 1
  for (; row < total.sums.row; row += step) {
    const int t = find_by_thread<false>(static_cast<uint32_t>(row),
                                        [&](int i) { return tile.ends[i].sums.row; });
    store_live_row(fill, row, tile.requests[t], before(t).sums);
  }

  const uint32_t chunks = total.chunks - carry.chunks;
#pragma unroll 1
  for (uint32_t i = blockIdx.x; i < chunks; i += gridDim.x) {
    const int t =
        find_by_thread<false>(i, [&](int j) { return tile.ends[j].chunks - carry.chunks; });
    const Ends start = before(t);
    const uint32_t rows = tile.ends[t].sums.row - start.sums.row;
    copy_piece<kSharedVectorsInFlight>(fill, tile.requests[t].length, tile.pool_rows[t],
                                       start.sums.row, rows, carry.chunks + i - start.chunks);
  }
}

// Rows after those of the last request: length 0, and the running sum stays where it ended.
__device__ void fill_rest(const Fill& fill, const Sums& total) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t row = total.row + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
#pragma unroll 1
  for (; row < fill.rows; row += step) store_row(fill, row, 0, total.clamped);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    store_sum_starts(fill);
    store(fill.row_count, 0, total.row);
  }
}

static __global__ void __launch_bounds__(kThreads, kResidentBlocksPerSm)
    fill_ragged_kernel(const __grid_constant__ Fill fill) {
  __shared__ Tile tile;
  const bool enabled = is_enabled(fill);
  Ends carry{};
#pragma unroll 1
  for (int64_t first = 0; first < fill.requests; first += kThreads) {
    load_tile(fill, first, carry, tile);
    if (!enabled) return;
    fill_tile(fill, first, carry, tile);
    carry = tile.ends[kThreads - 1];
    __syncthreads();  // the next tile overwrites this one
  }
  if (enabled) fill_rest(fill, carry.sums);
}

// As many blocks as the largest batch of these shapes can use.
int64_t most_blocks(const Fill& fill) {
  const int64_t chunks = fill.requests * ceil_div(fill.req_to_token.columns, kTokensPerChunk);
  return maximum(ceil_div(fill.rows, kThreads), chunks);
}

}  // namespace ragged_kernel

RaggedFill ragged_fill(const Fill& fill, int sms, int64_t max_blocks) {
  const int64_t resident = int64_t{sms} * kResidentBlocksPerSm;
  const int64_t blocks = clamp(most_blocks(fill), 1, resident);
  return RaggedFill{fill, static_cast<int>(max_blocks > 0 ? minimum(blocks, max_blocks) : blocks)};
}

int fill_ragged_on_cuda(const RaggedFill& launch, void* stream) {
  fill_ragged_kernel<<<launch.blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      launch.fill);
  return cudaGetLastError();
}

}  // namespace nsa
