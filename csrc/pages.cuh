// How real_page_table of a uniform batch is filled from req_to_token, by as few instructions as
// possible. What PageCopyParams cannot describe is left to copy_piece of tables.cuh.
#pragma once

#include "block.cuh"
#include "params.h"

namespace nsa {

// Pages that a lane has in flight. All of a warp's pages lie side by side, because rows begin
// anywhere in a 32-byte sector and each end of what a warp writes is a sector written in part.
constexpr uint32_t kPagesInFlight = 4;
constexpr uint32_t kPagesPerWarp = kWarp * kPagesInFlight;
constexpr uint32_t kPagesPerBlock = kWarps * kPagesPerWarp;

__device__ inline const int32_t* word_at(const char* data, uint32_t i, uint32_t stride) {
  return reinterpret_cast<const int32_t*>(data + uint64_t{i} * stride);
}

// Copies this lane's pages, kWarp apart, from the one that begins with `token`. Pages before `end`
// are live, those before `end_in_pool` have a slot.
__device__ inline void copy_pages_pow2(const PageCopyParams& params, const char* source, char* out,
                                       uint32_t token, uint32_t end, uint32_t end_in_pool) {
  int32_t values[kPagesInFlight];
  bool is_live[kPagesInFlight];
#pragma unroll
  for (uint32_t i = 0; i < kPagesInFlight; ++i) {
    const uint32_t first = token + (i * kWarp << params.page_shift);
    is_live[i] = first < end;
    values[i] = first < end_in_pool ? __ldg(word_at(source, i * kWarp, params.page_stride)) : 0;
  }
#pragma unroll
  for (uint32_t i = 0; i < kPagesInFlight; ++i) values[i] >>= params.page_shift;
#pragma unroll 1
  for (uint32_t row = 0; row < params.rows_per_request; ++row, out += params.row_stride) {
#pragma unroll
    for (uint32_t i = 0; i < kPagesInFlight; ++i) {
      if (is_live[i]) reinterpret_cast<int32_t*>(out)[i * kWarp] = values[i];
    }
  }
}

// The pages of a request are dealt out kPagesPerWarp at a time, first to one warp of each of its
// blocks. No branch stands between the loads of lengths and pool rows, nor between those and the
// loads of slots.
__device__ inline void fill_pages(const StaticFill& launch, uint32_t block) {
  const PageCopyParams& params = launch.page_copy;
  const Divisor& blocks = launch.blocks_per_request;
  const uint32_t r = divide(block, blocks);
  const uint32_t block_of_request = block - r * blocks.value;
  const int32_t enabled = params.enabled == nullptr ? 1 : *params.enabled;
  const int32_t length =
      length_from(*word_at(params.lengths, r, params.length_stride), params.length_offset);
  const int32_t* pool_row = word_at(params.pool_rows, r, params.pool_row_stride);
  const uint32_t pool_row_low = static_cast<uint32_t>(pool_row[0]);
  const int32_t pool_row_high = params.has_high_words ? pool_row[1] : 0;

  const uint32_t live = min(static_cast<uint32_t>(max(length, 0)), params.most_tokens);
  const uint32_t end = enabled != 0 ? live : 0;
  const uint32_t end_in_pool = pool_row_low < params.pool_size && pool_row_high == 0 ? end : 0;
  const uint32_t step = blocks.value * kPagesPerBlock;
  const uint32_t first = (warp() * blocks.value + block_of_request) * kPagesPerWarp + lane();
  const char* source = params.tokens + uint64_t{pool_row_low} * params.token_row_stride +
                       uint64_t{first} * params.page_stride;
  char* out = params.table + uint64_t{r} * params.request_stride + first * sizeof(int32_t);
#pragma unroll 1
  for (uint32_t token = first << params.page_shift; token < end;
       token += step << params.page_shift) {
    copy_pages_pow2(params, source, out, token, end, end_in_pool);
    source += uint64_t{step} * params.page_stride;
    out += step * sizeof(int32_t);
  }
}

// Whether PageCopyParams can describe the fill: a page size of a power of two, and strides in bytes
// and tokens up to `step` pages after the last one in 32 bits.
inline bool fits_page_copy(const Fill& fill, int64_t step) {
  constexpr int64_t kMost = UINT32_MAX;
  const PageTable& table = fill.real_page_table;
  const IndexTable& tokens = fill.req_to_token;
  const int64_t page_size = table.page_size.value;
  const auto fits = [](int64_t stride, int64_t times) {
    return stride <= kMost / static_cast<int64_t>(sizeof(int32_t)) / times;
  };
  return (page_size & (page_size - 1)) == 0 && table.column_stride == 1 && tokens.rows <= kMost &&
         fits(fill.seq_lens.stride, 1) && fits(fill.req_pool_indices.stride, 1) &&
         fits(tokens.row_stride, 1) && fits(tokens.column_stride, page_size) &&
         fits(table.row_stride, maximum(fill.rows_per_request, 1)) &&
         table.columns + 2 * step <= kMost / page_size;
}

inline PageCopyParams page_copy_of(const Fill& fill) {
  const auto address = [](const int32_t* data) { return reinterpret_cast<const char*>(data); };
  const auto bytes = [](int64_t words) { return static_cast<uint32_t>(words * sizeof(int32_t)); };
  const PageTable& table = fill.real_page_table;
  const IndexTable& tokens = fill.req_to_token;
  PageCopyParams params{};
  params.enabled = fill.enabled;
  params.lengths = address(fill.seq_lens.data);
  params.pool_rows = address(fill.req_pool_indices.data);
  params.length_stride = bytes(fill.seq_lens.stride);
  params.pool_row_stride = bytes(fill.req_pool_indices.stride);
  params.pool_size = static_cast<uint32_t>(tokens.rows);
  params.has_high_words = fill.req_pool_indices.is_int64;
  params.tokens = address(tokens.data);
  params.table = reinterpret_cast<char*>(table.data);
  params.most_tokens = table.columns * table.page_size.value;
  params.page_shift = log2_of(table.page_size);
  params.page_stride = bytes(tokens.column_stride * table.page_size.value);
  params.token_row_stride = bytes(tokens.row_stride);
  params.request_stride = bytes(table.row_stride * fill.rows_per_request);
  params.row_stride = bytes(table.row_stride);
  params.rows_per_request = static_cast<uint32_t>(fill.rows_per_request);
  params.length_offset = fill.seq_lens.offset;
  return params;
}

}  // namespace nsa
