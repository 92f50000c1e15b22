// The CUDA kernel of a k-pooling fill: one launch writes every tensor.
//
// As in fill_static.cu each block has one role, decided by its index, and waits for no other block:
//
//   block   0                   schedule_begin  table_begin                      blocks
//           |       rows        |   schedule    |             table              |
//           | 256 rows a block  | 0 or 1 block  | requests x blocks_per_request  |
//
//   rows      a row for each thread; the first threads of a request write what it has once, and one
//             of write_locs each. A block sums up the rows before its own;
//   schedule  kpool_schedule;
//   table     kpool_page_table: the blocks of a request take its live columns in turns.
#include "block.cuh"
#include "host.h"

namespace nsa {
// Not unnamed, where nvcc puts a hash of the path of this file into names.
inline namespace kpool_kernel {

constexpr int64_t kTableBlocksPerSm = 2;

__device__ bool is_enabled(const KPoolFill& fill) {
  return fill.enabled == nullptr || *fill.enabled != 0;
}

__device__ uint32_t kept_of_row(const KPoolFill& fill, uint32_t row) {
  const uint32_t r = divide(row, fill.rows_per_request);
  return kept_tokens(fill, length_of(fill, r), row - r * fill.rows_per_request.value);
}

__device__ void fill_rows(const KPoolFill& fill, uint32_t block) {
  const uint32_t begin = block * kThreads;
  const uint32_t row = begin + threadIdx.x;
  const bool enabled = is_enabled(fill);
  const bool has_row = row < fill.rows;
  uint32_t before = 0;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < begin; i += kThreads) before += kept_of_row(fill, i);
  const uint32_t sum = scan_block(has_row ? kept_of_row(fill, row) : 0, before);
  if (!enabled) return;
  if (row == 0) store(fill.nsa_cu_seqlens_k, 0, 0);
  if (!has_row) return;
  const uint32_t r = divide(row, fill.rows_per_request);
  const uint32_t j = row - r * fill.rows_per_request.value;
  const int32_t length = length_of(fill, r);
  store_row(fill, row, length, j, sum);
  if (j == 0) store_request(fill, r, length);
  // A request has no more of them than rows, because k is 2 or more.
  if (j < fill.locs_per_request) store_loc(fill, r, j, length, pool_row_of(fill, r));
}

// Each thread adds up the segments of `per_thread` neighbouring rows. Then each processor finds the
// thread whose rows hold its first segment, and walks through them.
__device__ void fill_schedule(const KPoolFill& fill) {
  __shared__ uint32_t ends[kThreads];
  const Schedule& schedule = fill.schedule;
  const uint32_t rows = static_cast<uint32_t>(fill.rows);
  const uint32_t per_thread = (rows + kThreads - 1) / kThreads;
  const bool enabled = is_enabled(fill);
  const auto segments_of_row = [&](uint32_t row) {
    const uint32_t r = divide(row, fill.rows_per_request);
    return kpool_segments(fill, length_of(fill, r), row - r * fill.rows_per_request.value);
  };
  uint32_t own = 0;
#pragma unroll 1
  for (uint32_t i = 0; i < per_thread; ++i) {
    const uint32_t row = threadIdx.x * per_thread + i;
    if (row < rows) own += segments_of_row(row);
  }
  ends[threadIdx.x] = scan_block(own, 0);
  __syncthreads();
  if (!enabled) return;
  const uint32_t total = ends[kThreads - 1];
#pragma unroll 1
  for (uint32_t p = threadIdx.x; p <= schedule.processors.value; p += kThreads) {
    const uint32_t start = schedule_start(schedule, total, p);
    if (start >= total) {
      store_schedule(schedule, p, fill.rows, 0);
      continue;
    }
    const uint32_t holder = find_by_thread<false>(start, [&](uint32_t i) { return ends[i]; });
    uint32_t skipped = start - (holder == 0 ? 0 : ends[holder - 1]);
    uint32_t row = holder * per_thread;
    for (uint32_t segments; skipped >= (segments = segments_of_row(row)); ++row) {
      skipped -= segments;
    }
    store_schedule(schedule, p, row, skipped);
  }
}

__device__ void fill_table(const KPoolLaunch& launch, uint32_t block) {
  const KPoolFill& fill = launch.fill;
  const PageTable& table = fill.kpool_page_table;
  const uint32_t r = divide(block, launch.blocks_per_request);
  const uint32_t block_of_request = block - r * launch.blocks_per_request.value;
  if (!is_enabled(fill)) return;
  const int64_t pool_row = pool_row_of(fill, r);
  const uint32_t live = min(live_pages(fill, length_of(fill, r)), table.columns);
  const uint32_t n = fill.rows_per_request.value;
  int32_t* first_row = table.data + int64_t{r} * n * table.row_stride;
#pragma unroll 1
  for (uint32_t column = block_of_request * kThreads + threadIdx.x; column < live;
       column += launch.blocks_per_request.value * kThreads) {
    const int32_t page = index_page(fill, pool_row, column);
    int32_t* out = first_row + column * table.column_stride;
#pragma unroll 1
    for (uint32_t j = 0; j < n; ++j, out += table.row_stride) *out = page;
  }
}

static __global__ void __launch_bounds__(kThreads)
    fill_kpool_kernel(const __grid_constant__ KPoolLaunch launch) {
  const int block = blockIdx.x;
  if (block >= launch.table_begin) {
    fill_table(launch, block - launch.table_begin);
  } else if (block < launch.schedule_begin) {
    fill_rows(launch.fill, block);
  } else {
    fill_schedule(launch.fill);
  }
}

int64_t table_blocks_per_request(const KPoolFill& fill, int64_t sms) {
  if (fill.kpool_page_table.data == nullptr) return 0;
  const int64_t useful = maximum(ceil_div(fill.kpool_page_table.columns, kThreads), 1);
  return clamp(sms * kTableBlocksPerSm / maximum(fill.requests, 1), 1, useful);
}

}  // namespace kpool_kernel

KPoolLaunch kpool_launch(const KPoolFill& fill, int sms) {
  KPoolLaunch launch{};
  launch.fill = fill;
  launch.schedule_begin = static_cast<int>(maximum(ceil_div(fill.rows, kThreads), 1));
  launch.table_begin = launch.schedule_begin + (fill.schedule.data != nullptr);
  const int64_t blocks_per_request = table_blocks_per_request(fill, sms);
  launch.blocks_per_request = divisor_of(maximum(blocks_per_request, 1));
  launch.blocks = launch.table_begin + static_cast<int>(fill.requests * blocks_per_request);
  return launch;
}

int fill_kpool_on_cuda(const KPoolLaunch& launch, void* stream) {
  fill_kpool_kernel<<<launch.blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
  return cudaGetLastError();
}

}  // namespace nsa
