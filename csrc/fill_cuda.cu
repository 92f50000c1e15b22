// The CUDA kernel: one launch writes every metadata tensor of a fill.
//
// Work split. The grid is fixed when the fill is bound, so the launch can be captured in a CUDA graph
// and replayed while lengths change; nothing is read back by the host. Requests are taken in tiles of
// one request a thread. Every block scans the tile for itself (running rows, lengths and copy units),
// which costs a few shuffles and saves a grid-wide barrier. Then the blocks share what is live:
//   - requests of a tile: one block writes cache_seqlens and cu_seqlens_k;
//   - rows: thread by thread over the grid, each row finds its request by binary search;
//   - page tables: units of one block's width, unit u goes to block u mod gridDim; a unit is read once
//     from req_to_token and written to the q rows of its request.
// A short batch therefore leaves most blocks without work instead of with empty columns.
#include "launch.h"

namespace nsa {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// More blocks cost more in starting and scanning than they gain in copying: measured with 2, 4, 6 and 8.
constexpr int kBlocksPerMultiprocessor = 2;

__device__ Offsets shuffle_up(const Offsets& value, int delta) {
  constexpr unsigned kAll = 0xffffffffu;
  Offsets other;
  other.row = __shfl_up_sync(kAll, value.row, delta);
  other.lengths = __shfl_up_sync(kAll, value.lengths, delta);
  other.clamped = __shfl_up_sync(kAll, value.clamped, delta);
  for (int k = 0; k < kPageTables; ++k) {
    other.units[k] = __shfl_up_sync(kAll, value.units[k], delta);
  }
  return other;
}

// Inclusive scan over the block; `ends[t]` holds the offsets behind request t of the tile, `carry`
// included. Ends with a barrier.
__device__ void scan_tile(const Fill& fill, const Offsets& carry, const Offsets& own, Offsets* ends,
                          Offsets* warp_totals) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  Offsets sum = own;
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const Offsets other = shuffle_up(sum, delta);
    if (lane >= delta) sum = combine(other, sum, fill.rows);
  }
  if (lane == kWarp - 1) warp_totals[warp] = sum;
  __syncthreads();
  Offsets before = carry;
  for (int w = 0; w < warp; ++w) before = combine(before, warp_totals[w], fill.rows);
  ends[threadIdx.x] = combine(before, sum, fill.rows);
  __syncthreads();
}

// First request of the tile whose end, read by `end_of`, lies behind `position`.
template <typename EndOf>
__device__ int find_request(uint32_t position, int count, EndOf end_of) {
  int low = 0;
  int high = count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (end_of(middle) > position) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

struct Tile {
  int64_t first_request;
  int count;
  const Request* requests;
  const Offsets* ends;
  Offsets carry;

  __device__ Offsets before(int t) const { return t == 0 ? carry : ends[t - 1]; }
};

__device__ void fill_requests(const Fill& fill, const Tile& tile) {
  const uint32_t tile_index = static_cast<uint32_t>(tile.first_request / kThreads);
  if (blockIdx.x != tile_index % gridDim.x || threadIdx.x >= tile.count) return;
  const int t = threadIdx.x;
  store_request(fill, tile.first_request + t, tile.requests[t], tile.before(t));
}

__device__ void fill_rows(const Fill& fill, const Tile& tile) {
  const int64_t end = tile.ends[tile.count - 1].row;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t row = tile.carry.row + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; row < end; row += step) {
    const int t = find_request(static_cast<uint32_t>(row), tile.count,
                               [&](int i) { return tile.ends[i].row; });
    store_live_row(fill, row, tile.requests[t], tile.before(t));
  }
}

__device__ bool is_aligned(const void* pointer, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(int4) == 0 && row_stride % 4 == 0;
}

// Whether four neighbouring columns can be moved as one 16-byte vector, in every row.
__device__ bool moves_vectors(const Fill& fill, const PageTable& table) {
  const IndexTable& tokens = fill.req_to_token;
  return table.page_size == 1 && !tokens.is_int64 && tokens.column_stride == 1 &&
         table.column_stride == 1 && is_aligned(tokens.data, tokens.row_stride) &&
         is_aligned(table.data, table.row_stride);
}

// The rows of one request in a page table.
struct Span {
  int64_t pool_row;
  int64_t first_row;
  int64_t end_row;
};

// Columns [begin, end), a multiple of four and at most one unit. All loads come before the stores.
__device__ void copy_vectors(const Fill& fill, const PageTable& table, const Span& span,
                             int64_t begin, int64_t end) {
  const int32_t* source = static_cast<const int32_t*>(fill.req_to_token.data) +
                          span.pool_row * fill.req_to_token.row_stride;
  int4 values[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = begin + 4 * (v * kThreads + threadIdx.x);
    const bool reads = column < end && span.pool_row >= 0;
    values[v] = reads ? __ldg(reinterpret_cast<const int4*>(source + column)) : int4{0, 0, 0, 0};
  }
#pragma unroll 1
  for (int64_t row = span.first_row; row < span.end_row; ++row) {
    int32_t* out = table.data + row * table.row_stride;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = begin + 4 * (v * kThreads + threadIdx.x);
      if (column < end) *reinterpret_cast<int4*>(out + column) = values[v];
    }
  }
}

__device__ void copy_scalars(const Fill& fill, const PageTable& table, const Span& span,
                             int64_t begin, int64_t end) {
#pragma unroll 1
  for (int64_t column = begin + threadIdx.x; column < end; column += kThreads) {
    const int32_t value = page_at(fill, table, span.pool_row, column);
#pragma unroll 1
    for (int64_t row = span.first_row; row < span.end_row; ++row) {
      table.data[row * table.row_stride + column * table.column_stride] = value;
    }
  }
}

// No cell at or past the length is touched: a last vector that is not full goes as scalars.
__device__ void fill_pages(const Fill& fill, const Tile& tile, int k) {
  const PageTable& table = fill.tables[k];
  const bool vectors = moves_vectors(fill, table);
  const uint32_t first_unit = tile.carry.units[k];
  const uint32_t units = tile.ends[tile.count - 1].units[k] - first_unit;
#pragma unroll 1
  for (uint32_t i = blockIdx.x; i < units; i += gridDim.x) {
    const int t = find_request(i, tile.count,
                               [&](int j) { return tile.ends[j].units[k] - first_unit; });
    const Offsets before = tile.before(t);
    const Span span{tile.requests[t].pool_row, before.row, tile.ends[t].row};
    const int64_t width = unit_columns<kThreads>(table);
    int64_t begin = (first_unit + i - before.units[k]) * width;
    const int64_t end = minimum(begin + width, tile.requests[t].columns[k]);
    if (vectors) {
      const int64_t vectors_end = begin + (end - begin) / 4 * 4;
      copy_vectors(fill, table, span, begin, vectors_end);
      begin = vectors_end;
    }
    copy_scalars(fill, table, span, begin, end);
  }
}

// Rows behind the last request: length 0, and the running sum stays where it ended.
__device__ void fill_rest(const Fill& fill, const Offsets& total) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t row = total.row + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; row < fill.rows; row += step) store_row(fill, row, 0, total.clamped);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    store_sum_starts(fill);
    store(fill.row_count, 0, total.row);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) fill_kernel(const __grid_constant__ Fill fill) {
  __shared__ Request requests[kThreads];
  __shared__ Offsets ends[kThreads];
  __shared__ Offsets warp_totals[kWarps];
  // Read here, asked for behind the first scan: the two loads overlap. Nothing is written before.
  const bool enabled = fill.enabled == nullptr || *fill.enabled != 0;

  Offsets carry{};
  for (int64_t first = 0; first < fill.requests; first += kThreads) {
    const int count = static_cast<int>(minimum(fill.requests - first, kThreads));
    Offsets own{};
    if (threadIdx.x < count) {
      requests[threadIdx.x] = request_at(fill, first + threadIdx.x);
      own = offsets_of<kThreads>(fill, requests[threadIdx.x]);
    }
    scan_tile(fill, carry, own, ends, warp_totals);
    if (!enabled) return;
    const Tile tile{first, count, requests, ends, carry};
    fill_requests(fill, tile);
    fill_rows(fill, tile);
#pragma unroll 1
    for (int k = 0; k < kPageTables; ++k) fill_pages(fill, tile, k);
    carry = ends[count - 1];
    __syncthreads();  // the next tile overwrites requests and ends
  }
  if (enabled) fill_rest(fill, carry);
}

int64_t most_units(const Fill& fill) {
  int64_t units = ceil_div(fill.rows, int64_t{kThreads});
  for (const PageTable& table : fill.tables) {
    if (table.data == nullptr) continue;
    units += fill.requests * ceil_div(table.columns, int64_t{unit_columns<kThreads>(table)});
  }
  return units;
}

}  // namespace

Grid grid_for(const Fill& fill, int device, int64_t max_blocks) {
  int multiprocessors = 1;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  int64_t blocks = clamp(most_units(fill), 1, multiprocessors * kBlocksPerMultiprocessor);
  if (max_blocks > 0) blocks = minimum(blocks, max_blocks);
  return Grid{device, static_cast<int>(blocks)};
}

int fill_on_cuda(const Fill& fill, const Grid& grid, void* stream) {
  fill_kernel<<<grid.blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(fill);
  return cudaGetLastError();
}

const char* cuda_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace nsa
