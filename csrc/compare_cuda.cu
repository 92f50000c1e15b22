// The comparison on a GPU: one launch over all cells, then one of a single thread that concludes
// it.
#include "block.cuh"
#include "host.h"

namespace nsa {
// Not unnamed, where nvcc puts a hash of the path of this file into names. Static kernels compile
// to the same machine code as in an unnamed namespace; others did not.
inline namespace compare_kernels {

constexpr int64_t kRowBlocks = 64;

using Counter = unsigned long long;

__device__ Counter* counter(const Comparison& all, ReportField field) {
  return reinterpret_cast<Counter*>(all.report + field);
}

__device__ int64_t compare_row(const Comparison& all, int p, int64_t row, int64_t columns) {
  const Pair& pair = all.pairs[p];
  int64_t different = 0;
  for (int64_t column = threadIdx.x; column < columns; column += kThreads) {
    if (our_cell(pair, row, column) == their_cell(pair, row, column)) continue;
    ++different;
    // A place is never negative, so it compares the same as an unsigned number.
    atomicMin(counter(all, kFirst), static_cast<Counter>(place_of(p, row, column)));
  }
  return different;
}

// Block (x, y) compares every gridDim.x-th row of pair y, beginning with row x.
static __global__ void __launch_bounds__(kThreads)
    compare_kernel(const __grid_constant__ Comparison all) {
  if (has_difference(all)) return;
  const int p = blockIdx.y;
  int64_t values = 0;
  int64_t different = 0;
  for (int64_t row = blockIdx.x; row < all.pairs[p].rows; row += gridDim.x) {
    const int64_t columns = live_columns(all, all.pairs[p], row);
    values += columns;
    different += compare_row(all, p, row, columns);
  }
  if (threadIdx.x == 0) atomicAdd(counter(all, kValues), static_cast<Counter>(values));
  if (different != 0) atomicAdd(counter(all, kFound), static_cast<Counter>(different));
}

static __global__ void conclude_kernel(const __grid_constant__ Comparison all) {
  if (!has_difference(all)) conclude(all);
}

int64_t most_rows(const Comparison& all) {
  int64_t rows = 1;
  for (int p = 0; p < all.pair_count; ++p) rows = maximum(rows, all.pairs[p].rows);
  return rows;
}

}  // namespace compare_kernels

int compare_on_cuda(const Comparison& all, void* stream) {
  const dim3 grid(static_cast<unsigned>(minimum(most_rows(all), kRowBlocks)),
                  static_cast<unsigned>(all.pair_count));
  compare_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(all);
  conclude_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(all);
  return cudaGetLastError();
}

}  // namespace nsa
