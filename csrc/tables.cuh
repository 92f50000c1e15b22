// How one request's live columns get from req_to_token into a page table, whatever the strides and
// the page size. A column is read once and written to each of the request's rows.
//
// The tokens of a request are cut into pieces, one for a block at a time. A piece has as many
// tokens as the lanes of a block hold when each has kInFlight 16-byte vectors of them in flight.
#pragma once

#include "block.cuh"
#include "params.h"

namespace nsa {

constexpr uint32_t kVectorCells = 4;  // cells of a 16-byte vector
constexpr uint32_t kVectorsInFlight = 4;
constexpr uint32_t kSharedVectorsInFlight = 8;  // where chunks are shared out and DRAM is the limit

template <uint32_t kInFlight>
constexpr uint32_t kTokensPerWarp = kWarp * kVectorCells * kInFlight;
template <uint32_t kInFlight>
constexpr uint32_t kTokensPerBlock = kWarps * kTokensPerWarp<kInFlight>;
constexpr uint32_t kTokensPerChunk = kTokensPerBlock<kSharedVectorsInFlight>;

// One request's part of a page table, with its source.
struct RequestCopy {
  const int32_t*
      source;  // the request's row of req_to_token; null: outside the pool, every cell is 0
  int64_t source_stride;  // from the first token of a page to that of the next
  int32_t* out;           // the request's first row
  int64_t row_stride;
  int64_t column_stride;
  uint32_t rows;
  uint32_t columns;  // live ones
};

__device__ inline RequestCopy request_copy(const Fill& fill, const PageTable& table, int32_t length,
                                           int64_t pool_row, uint32_t first_row, uint32_t rows) {
  const IndexTable& tokens = fill.req_to_token;
  RequestCopy copy;
  copy.source = pool_row < 0 ? nullptr : tokens.data + pool_row * tokens.row_stride;
  copy.source_stride = tokens.column_stride * table.page_size.value;
  copy.out = table.data + first_row * table.row_stride;
  copy.row_stride = table.row_stride;
  copy.column_stride = table.column_stride;
  copy.rows = rows;
  copy.columns = live_columns(table, length);
  return copy;
}

// kVectorCells cells from `first` on, `step` apart. All loads come before what depends on them, so
// that they overlap. A step of 1 says that rows are aligned for vectors.
__device__ inline void copy_cells(const RequestCopy& copy, uint32_t first, uint32_t step) {
  const int32_t* source = copy.source + first * copy.source_stride;
  int32_t* out = copy.out + first * copy.column_stride;
  const int64_t source_step = step * copy.source_stride, out_step = step * copy.column_stride;
  int32_t values[kVectorCells];
  bool is_live[kVectorCells];
#pragma unroll
  for (uint32_t i = 0; i < kVectorCells; ++i) {
    is_live[i] = first + i * step < copy.columns;
    const bool reads = is_live[i] && copy.source != nullptr;
    values[i] = reads ? __ldg(source) : 0;
    source += source_step;
  }
#pragma unroll 1
  for (uint32_t row = 0; row < copy.rows; ++row, out += copy.row_stride) {
    if (step == 1 && first + kVectorCells <= copy.columns) {
      __stcs(reinterpret_cast<int4*>(out), int4{values[0], values[1], values[2], values[3]});
      continue;
    }
    int32_t* cell = out;
#pragma unroll
    for (uint32_t i = 0; i < kVectorCells; ++i, cell += out_step) {
      if (is_live[i]) *cell = values[i];
    }
  }
}

// A warp's columns [begin, begin + kTokensPerWarp), 16 bytes at a time. No cell at or past the
// length is touched: the last columns, which do not fill a vector, go one by one. `meanwhile` runs
// while the loads are on their way.
template <uint32_t kInFlight, typename Meanwhile>
__device__ inline void copy_vectors(const RequestCopy& copy, uint32_t begin,
                                    const Meanwhile& meanwhile) {
  const uint32_t vectors_end = copy.columns / kVectorCells * kVectorCells;
  const uint32_t first = begin + kVectorCells * lane();
  int4 values[kInFlight];
#pragma unroll
  for (uint32_t v = 0; v < kInFlight; ++v) {
    const uint32_t column = first + v * kWarp * kVectorCells;
    const bool reads = column < vectors_end && copy.source != nullptr;
    values[v] =
        reads ? __ldg(reinterpret_cast<const int4*>(copy.source + column)) : int4{0, 0, 0, 0};
  }
  const uint32_t last = vectors_end + lane();
  const bool is_last = last < copy.columns && vectors_end - begin < kTokensPerWarp<kInFlight>;
  const int32_t last_value = is_last && copy.source != nullptr ? __ldg(copy.source + last) : 0;
  meanwhile();
  int32_t* out = copy.out;
#pragma unroll 1
  for (uint32_t row = 0; row < copy.rows; ++row, out += copy.row_stride) {
#pragma unroll
    for (uint32_t v = 0; v < kInFlight; ++v) {
      const uint32_t column = first + v * kWarp * kVectorCells;
      if (column < vectors_end) __stcs(reinterpret_cast<int4*>(out + column), values[v]);
    }
    if (is_last) out[last] = last_value;
  }
}

// A warp's columns [begin, begin + kTokensPerWarp) of page_table_1.
template <uint32_t kInFlight, typename Meanwhile>
__device__ inline void copy_tokens(RequestCopy copy, const PageTable& table, uint32_t begin,
                                   const Meanwhile& meanwhile) {
  if (begin < copy.columns && table.copy_width == CopyWidth::kVectors) {
    return copy_vectors<kInFlight>(copy, begin, meanwhile);
  }
  meanwhile();
  copy.columns = min(copy.columns, begin + kTokensPerWarp<kInFlight>);
  const bool stores_vectors = table.copy_width == CopyWidth::kStoredVectors;
  const uint32_t step = stores_vectors ? 1 : kWarp;
#pragma unroll 1
  for (uint32_t first = begin + lane() * (stores_vectors ? kVectorCells : 1); first < copy.columns;
       first += kVectorCells * kWarp) {
    copy_cells(copy, first, step);
  }
}

// The pages of real_page_table that begin among the tokens [begin, end). A thread takes one at a
// time.
__device__ inline void copy_pages_generic(const RequestCopy& copy, const PageTable& table,
                                          uint32_t begin, uint32_t end) {
  const uint32_t columns = min(copy.columns, divide_up(end, table.page_size));
#pragma unroll 1
  for (uint32_t column = divide_up(begin, table.page_size) + threadIdx.x; column < columns;
       column += kThreads) {
    const int32_t token =
        copy.source == nullptr ? 0 : __ldg(copy.source + column * copy.source_stride);
    const int32_t page = page_of(token, table.page_size);
    int32_t* out = copy.out + column * copy.column_stride;
#pragma unroll 1
    for (uint32_t row = 0; row < copy.rows; ++row, out += copy.row_stride) *out = page;
  }
}

// Chunks, pieces of kTokensPerChunk tokens, that a request of this length has.
NSA_INLINE uint32_t chunks_of(const Fill& fill, int32_t length) {
  const uint32_t tokens = static_cast<uint32_t>(clamp(length, 0, fill.req_to_token.columns));
  return (tokens + kTokensPerChunk - 1) / kTokensPerChunk;
}

// Copies one piece of a request, of kTokensPerBlock<kInFlight> tokens, into both tables. Its pages
// are read while its tokens are on their way.
template <uint32_t kInFlight>
__device__ inline void copy_piece(const Fill& fill, int32_t length, int64_t pool_row,
                                  uint32_t first_row, uint32_t rows, uint32_t piece) {
  const uint32_t begin = piece * kTokensPerBlock<kInFlight>;
  const auto copy = [&](const PageTable& table) {
    return request_copy(fill, table, length, pool_row, first_row, rows);
  };
  const auto copy_pages = [&] {
    const PageTable& table = fill.real_page_table;
    if (table.data == nullptr) return;
    copy_pages_generic(copy(table), table, begin, begin + kTokensPerBlock<kInFlight>);
  };
  copy_tokens<kInFlight>(copy(fill.page_table_1), fill.page_table_1,
                         begin + warp() * kTokensPerWarp<kInFlight>, copy_pages);
}

}  // namespace nsa
