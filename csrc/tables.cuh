// How one request's live columns get from req_to_token into a page table. A column is read once and
// written to each of the request's rows.
#pragma once

#include "block.cuh"
#include "launch.h"

namespace nsa {

// Neighbouring columns that a lane moves as one 16-byte vector, and vectors that it has in flight: more
// where chunks are shared out, for there the GPU's memory is what is waited for.
constexpr uint32_t kVector = 4;
constexpr uint32_t kVectors = 4;
constexpr uint32_t kSharedVectors = 8;
// With so many vectors in flight in each lane.
template <uint32_t kInFlight>
constexpr uint32_t kTokensOfWarp = kWarp * kVector * kInFlight;
template <uint32_t kInFlight>
constexpr uint32_t kTokensOfBlock = kWarps * kTokensOfWarp<kInFlight>;
constexpr uint32_t kTokensOfChunk = kTokensOfBlock<kSharedVectors>;

struct Copy {
  const int32_t* source;  // the request's tokens; null: outside the pool, every cell is 0
  int64_t source_stride;  // from the first token of a page to that of the next
  int32_t* out;           // the request's first row
  int64_t row_stride;
  int64_t column_stride;
  uint32_t rows;
  uint32_t columns;  // live ones
};

__device__ inline Copy copy_of(const Fill& fill, const PageTable& table, int32_t length,
                               int64_t pool_row, uint32_t first_row, uint32_t rows) {
  const IndexTable& tokens = fill.req_to_token;
  Copy copy;
  copy.source = pool_row < 0 ? nullptr : tokens.data + pool_row * tokens.row_stride;
  copy.source_stride = tokens.column_stride * table.page_size.value;
  copy.out = table.data + first_row * table.row_stride;
  copy.row_stride = table.row_stride;
  copy.column_stride = table.column_stride;
  copy.rows = rows;
  copy.columns = live_columns(table, length);
  return copy;
}

// kVector tokens from `first` on, `step` apart. All loads come before what depends on them, so that they
// overlap. A step of 1 says that rows are aligned for vectors.
__device__ inline void copy_cells(const Copy& copy, uint32_t first, uint32_t step) {
  const int32_t* source = copy.source + first * copy.source_stride;
  int32_t* out = copy.out + first * copy.column_stride;
  const int64_t source_step = step * copy.source_stride, out_step = step * copy.column_stride;
  int32_t values[kVector];
  bool is_live[kVector];
#pragma unroll
  for (uint32_t i = 0; i < kVector; ++i) {
    is_live[i] = first + i * step < copy.columns;
    const bool reads = is_live[i] && copy.source != nullptr;
    values[i] = reads ? __ldg(source) : 0;
    source += source_step;
  }
#pragma unroll 1
  for (uint32_t row = 0; row < copy.rows; ++row, out += copy.row_stride) {
    if (step == 1 && first + kVector <= copy.columns) {
      __stcs(reinterpret_cast<int4*>(out), int4{values[0], values[1], values[2], values[3]});
      continue;
    }
    int32_t* cell = out;
#pragma unroll
    for (uint32_t i = 0; i < kVector; ++i, cell += out_step) {
      if (is_live[i]) *cell = values[i];
    }
  }
}

// A warp's columns [begin, begin + kTokensOfWarp), 16 bytes at a time. No cell at or past the length is
// touched: the last columns, which are no whole vector, go one by one. `meanwhile` runs while the loads
// are on their way.
template <uint32_t kInFlight, typename Meanwhile>
__device__ inline void copy_vectors(const Copy& copy, uint32_t begin, const Meanwhile& meanwhile) {
  const uint32_t vectors_end = copy.columns / kVector * kVector;
  const uint32_t first = begin + kVector * lane();
  int4 values[kInFlight];
#pragma unroll
  for (uint32_t v = 0; v < kInFlight; ++v) {
    const uint32_t column = first + v * kWarp * kVector;
    const bool reads = column < vectors_end && copy.source != nullptr;
    values[v] = reads ? __ldg(reinterpret_cast<const int4*>(copy.source + column)) : int4{0, 0, 0, 0};
  }
  const uint32_t last = vectors_end + lane();
  const bool is_last = last < copy.columns && vectors_end - begin < kTokensOfWarp<kInFlight>;
  const int32_t last_value = is_last && copy.source != nullptr ? __ldg(copy.source + last) : 0;
  meanwhile();
  int32_t* out = copy.out;
#pragma unroll 1
  for (uint32_t row = 0; row < copy.rows; ++row, out += copy.row_stride) {
#pragma unroll
    for (uint32_t v = 0; v < kInFlight; ++v) {
      const uint32_t column = first + v * kWarp * kVector;
      if (column < vectors_end) __stcs(reinterpret_cast<int4*>(out + column), values[v]);
    }
    if (is_last) out[last] = last_value;
  }
}

// A warp's columns [begin, begin + kTokensOfWarp) of the token table.
template <uint32_t kInFlight, typename Meanwhile>
__device__ inline void copy_tokens(Copy copy, const PageTable& table, uint32_t begin,
                                   const Meanwhile& meanwhile) {
  if (begin < copy.columns && table.moves == Moves::kVectors) {
    return copy_vectors<kInFlight>(copy, begin, meanwhile);
  }
  meanwhile();
  copy.columns = min(copy.columns, begin + kTokensOfWarp<kInFlight>);
  const bool stores_vectors = table.moves == Moves::kStoredVectors;
  const uint32_t step = stores_vectors ? 1 : kWarp;
#pragma unroll 1
  for (uint32_t first = begin + lane() * (stores_vectors ? kVector : 1); first < copy.columns;
       first += kVector * kWarp) {
    copy_cells(copy, first, step);
  }
}

// The pages that begin among the tokens [begin, end) of a block: a thread takes one of them at a time.
__device__ inline void copy_pages(const Copy& copy, const PageTable& table, uint32_t begin, uint32_t end) {
  const uint32_t columns = min(copy.columns, divide_up(end, table.page_size));
#pragma unroll 1
  for (uint32_t column = divide_up(begin, table.page_size) + threadIdx.x; column < columns;
       column += kThreads) {
    const int32_t token = copy.source == nullptr ? 0 : __ldg(copy.source + column * copy.source_stride);
    const int32_t page = page_of(token, table.page_size);
    int32_t* out = copy.out + column * copy.column_stride;
#pragma unroll 1
    for (uint32_t row = 0; row < copy.rows; ++row, out += copy.row_stride) *out = page;
  }
}

// The live tokens of a request come in chunks, one for a block at a time.
NSA_INLINE uint32_t chunks_of(const Fill& fill, int32_t length) {
  const uint32_t tokens = static_cast<uint32_t>(clamp(length, 0, fill.req_to_token.columns));
  return (tokens + kTokensOfChunk - 1) / kTokensOfChunk;
}

// What the tables hold of the part-th kTokensOfBlock tokens of a request. Pages are read while the tokens
// are on their way.
template <uint32_t kInFlight>
__device__ inline void copy_part(const Fill& fill, int32_t length, int64_t pool_row, uint32_t first_row,
                                 uint32_t rows, uint32_t part) {
  const uint32_t begin = part * kTokensOfBlock<kInFlight>;
  const auto copy = [&](const PageTable& table) {
    return copy_of(fill, table, length, pool_row, first_row, rows);
  };
  const auto pages = [&] {
    const PageTable& table = fill.page_table;
    if (table.data != nullptr) copy_pages(copy(table), table, begin, begin + kTokensOfBlock<kInFlight>);
  };
  copy_tokens<kInFlight>(copy(fill.token_table), fill.token_table,
                         begin + warp() * kTokensOfWarp<kInFlight>, pages);
}

}  // namespace nsa
