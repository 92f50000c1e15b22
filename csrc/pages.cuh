// How the page table of a static width is filled from req_to_token, by so few instructions that they are not
// what is waited for. What `Pages` cannot say is left to copy_part.
#pragma once

#include "block.cuh"
#include "launch.h"

namespace nsa {

// Pages that a lane has in flight. All of a warp's lie side by side: rows begin anywhere in a sector, and
// each end of what a warp writes is a sector written in part.
constexpr uint32_t kPages = 4;
constexpr uint32_t kPagesOfWarp = kWarp * kPages;
constexpr uint32_t kPagesOfBlock = kWarps * kPagesOfWarp;

__device__ inline const int32_t* word_at(const char* data, uint32_t i, uint32_t stride) {
  return reinterpret_cast<const int32_t*>(data + uint64_t{i} * stride);
}

// This lane's pages from the one that begins with `token`, kWarp apart: those before `end` are live, those
// before `end_in_pool` have a slot.
__device__ inline void copy_pages(const Pages& pages, const char* source, char* out, uint32_t token,
                                  uint32_t end, uint32_t end_in_pool) {
  int32_t values[kPages];
  bool is_live[kPages];
#pragma unroll
  for (uint32_t i = 0; i < kPages; ++i) {
    const uint32_t first = token + (i * kWarp << pages.page_shift);
    is_live[i] = first < end;
    values[i] = first < end_in_pool ? __ldg(word_at(source, i * kWarp, pages.page_stride)) : 0;
  }
#pragma unroll
  for (uint32_t i = 0; i < kPages; ++i) values[i] >>= pages.page_shift;
#pragma unroll 1
  for (uint32_t row = 0; row < pages.rows; ++row, out += pages.row_stride) {
#pragma unroll
    for (uint32_t i = 0; i < kPages; ++i) {
      if (is_live[i]) reinterpret_cast<int32_t*>(out)[i * kWarp] = values[i];
    }
  }
}

// A request's pages are dealt out kPagesOfWarp at a time, first to one warp of each of its blocks. No branch
// lies between the loads of lengths and rows, nor behind them before those of tokens.
__device__ inline void fill_pages(const StaticFill& launch, uint32_t block) {
  const Pages& pages = launch.pages;
  const uint32_t r = divide(block, launch.parts);
  const uint32_t part = block - r * launch.parts.value;
  const int32_t enabled = pages.enabled == nullptr ? 1 : *pages.enabled;
  const int32_t length = *word_at(pages.lengths, r, pages.length_stride);
  const int32_t* pool_row = word_at(pages.pool_rows, r, pages.pool_row_stride);
  const uint32_t row = static_cast<uint32_t>(pool_row[0]);
  const int32_t high = pages.has_high_words ? pool_row[1] : 0;

  const uint32_t live = min(static_cast<uint32_t>(max(length, 0)), pages.most_tokens);
  const uint32_t end = enabled != 0 ? live : 0;
  const uint32_t end_in_pool = row < pages.pool_size && high == 0 ? end : 0;
  const uint32_t step = launch.parts.value * kPagesOfBlock;
  const uint32_t first = (warp() * launch.parts.value + part) * kPagesOfWarp + lane();
  const char* source =
      pages.tokens + uint64_t{row} * pages.token_row_stride + uint64_t{first} * pages.page_stride;
  char* out = pages.table + uint64_t{r} * pages.request_stride + first * sizeof(int32_t);
#pragma unroll 1
  for (uint32_t token = first << pages.page_shift; token < end; token += step << pages.page_shift) {
    copy_pages(pages, source, out, token, end, end_in_pool);
    source += uint64_t{step} * pages.page_stride;
    out += step * sizeof(int32_t);
  }
}

// Whether `Pages` can say it: bytes of strides, and tokens up to the step behind the last page, in 32 bits.
inline bool fits_pages(const Fill& fill, int64_t step) {
  constexpr int64_t kMost = UINT32_MAX;
  const PageTable& table = fill.page_table;
  const IndexTable& tokens = fill.req_to_token;
  const int64_t page_size = table.page_size.value;
  const auto fits = [](int64_t stride, int64_t times) {
    return stride <= kMost / static_cast<int64_t>(sizeof(int32_t)) / times;
  };
  return (page_size & (page_size - 1)) == 0 && table.column_stride == 1 && tokens.rows <= kMost &&
         fits(fill.seq_lens.stride, 1) && fits(fill.req_pool_indices.stride, 1) &&
         fits(tokens.row_stride, 1) && fits(tokens.column_stride, page_size) &&
         fits(table.row_stride, maximum(fill.static_extend_len, 1)) &&
         table.columns + 2 * step <= kMost / page_size;
}

inline Pages pages_of(const Fill& fill) {
  const auto address = [](const int32_t* data) { return reinterpret_cast<const char*>(data); };
  const auto bytes = [](int64_t words) { return static_cast<uint32_t>(words * sizeof(int32_t)); };
  const PageTable& table = fill.page_table;
  const IndexTable& tokens = fill.req_to_token;
  Pages pages{};
  pages.enabled = fill.enabled;
  pages.lengths = address(fill.seq_lens.data);
  pages.pool_rows = address(fill.req_pool_indices.data);
  pages.length_stride = bytes(fill.seq_lens.stride);
  pages.pool_row_stride = bytes(fill.req_pool_indices.stride);
  pages.pool_size = static_cast<uint32_t>(tokens.rows);
  pages.has_high_words = fill.req_pool_indices.is_int64;
  pages.tokens = address(tokens.data);
  pages.table = reinterpret_cast<char*>(table.data);
  pages.most_tokens = table.columns * table.page_size.value;
  pages.page_shift = table.page_size.shift - divisor_of(1).shift;
  pages.page_stride = bytes(tokens.column_stride * table.page_size.value);
  pages.token_row_stride = bytes(tokens.row_stride);
  pages.request_stride = bytes(table.row_stride * fill.static_extend_len);
  pages.row_stride = bytes(table.row_stride);
  pages.rows = static_cast<uint32_t>(fill.static_extend_len);
  return pages;
}

}  // namespace nsa
