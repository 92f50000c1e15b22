// A k-pooling fill: its parameters, and which value goes where. The CUDA kernel and the CPU twin
// both include this header.
//
// The contract (formulas, shapes, edges) is the docstring of sglang_nsa_plugin/kpool_args.py.
#pragma once

#include <type_traits>

#include "fill.h"

namespace nsa {

// Strides count elements.
struct WideVector {
  int64_t* data;
  int64_t stride;
};

struct WideTable {
  int64_t* data;
  int64_t row_stride;
  int64_t column_stride;
};

// The names are those of KPoolArgs.
struct KPoolFill {
  const int32_t* enabled;  // null, or one number on the device: 0 makes the fill write nothing
  LengthVector seq_lens;
  IndexVector req_pool_indices;
  IndexVector accept_lens;
  IndexTable req_to_token;
  Divisor rows_per_request;
  Divisor index_kpool;
  Divisor page_size;
  Divisor server_page_size;
  Divisor tokens_per_page;  // page_size * index_kpool, of a page of the index
  uint32_t pages;           // of a request that has a token in each column of req_to_token
  uint32_t index_topk;
  int64_t requests;
  int64_t rows;
  uint32_t locs_per_request;
  OutputVector nsa_cache_seqlens;
  OutputVector nsa_cu_seqlens_k;
  WideVector write_requests;
  OutputVector write_start;
  OutputVector tail_start;
  WideTable write_locs;
  OutputVector write_counts;
  OutputVector row_seqlens;
  OutputVector kpool_seqlens;
  PageTable kpool_page_table;
  Schedule schedule;
};

// With the grid that was computed when it was bound.
struct KPoolLaunch {
  KPoolFill fill;
  int schedule_begin;  // the first block of each role; rows begin at block 0
  int table_begin;
  Divisor blocks_per_request;  // blocks that share the table of one request
  int blocks;
};

static_assert(std::is_standard_layout_v<KPoolFill> && std::is_trivially_copyable_v<KPoolFill>);
static_assert(sizeof(KPoolLaunch) <= kMostBytes);

// Modulo 2^32, as SGLang's int32 tensors.
NSA_INLINE int32_t add(int32_t a, uint32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + b);
}

NSA_INLINE int32_t divide_toward_0(int32_t x, const Divisor& by) {
  if (x >= 0) return static_cast<int32_t>(divide(static_cast<uint32_t>(x), by));
  return -static_cast<int32_t>(divide(0u - static_cast<uint32_t>(x), by));
}

NSA_INLINE int32_t length_of(const KPoolFill& fill, int64_t r) {
  return length_from(fill.seq_lens.data[r * fill.seq_lens.stride], fill.seq_lens.offset);
}

// S, the first token that this forward writes.
NSA_INLINE int32_t start_of(const KPoolFill& fill, int32_t length) {
  return add(length, 0u - fill.rows_per_request.value);
}

// What sparse attention reads for row j of a request: whole k-pools up to topk tokens, and what
// comes after the last whole one.
NSA_INLINE uint32_t kept_tokens(const KPoolFill& fill, int32_t length, uint32_t j) {
  const uint32_t seen = expanded_length(length, fill.rows_per_request.value - 1 - j);
  const uint32_t whole = divide(seen, fill.index_kpool) * fill.index_kpool.value;
  return (whole < fill.index_topk ? whole : fill.index_topk) + (seen - whole);
}

NSA_INLINE int32_t row_seqlen(const KPoolFill& fill, int32_t length, uint32_t j) {
  return add(start_of(fill, length), j + 1);
}

NSA_INLINE int32_t kpools_of_row(const KPoolFill& fill, int32_t length, uint32_t j) {
  return divide_toward_0(row_seqlen(fill, length, j), fill.index_kpool);
}

// Segments in DeepGEMM's schedule: a row has at least one k-pool there.
NSA_INLINE uint32_t kpool_segments(const KPoolFill& fill, int32_t length, uint32_t j) {
  return segments_of(fill.schedule,
                     static_cast<uint32_t>(maximum(kpools_of_row(fill, length, j), 1)));
}

NSA_INLINE uint32_t live_pages(const KPoolFill& fill, int32_t length) {
  const uint32_t below = divide_up(length < 0 ? 0 : length, fill.tokens_per_page);
  return below < fill.pages ? below : fill.pages;
}

// As in fill.h: -1 where the index lies outside the pool.
NSA_INLINE int64_t pool_row_of(const KPoolFill& fill, int64_t r) {
  const int64_t index = load(fill.req_pool_indices, r);
  return index >= 0 && index < fill.req_to_token.rows ? index : -1;
}

// The page of the index whose k-pools begin with token `column * tokens_per_page`.
NSA_INLINE int32_t index_page(const KPoolFill& fill, int64_t pool_row, uint32_t column) {
  const int64_t token = int64_t{column} * fill.tokens_per_page.value;
  return page_of(token_at(fill.req_to_token, pool_row, token), fill.server_page_size);
}

// Where the key of the p-th k-pool goes that this forward may close.
NSA_INLINE void store_loc(const KPoolFill& fill, int64_t r, uint32_t p, int32_t length,
                          int64_t pool_row) {
  const int32_t kpool = add(divide_toward_0(start_of(fill, length), fill.index_kpool), p);
  const int32_t column = divide_toward_0(kpool, fill.page_size);
  const int64_t page_size = fill.page_size.value;
  const int64_t cell = kpool - column * page_size;
  const uint32_t live_column = column < 0 ? 0 : column;
  if (live_column >= live_pages(fill, length)) return;
  fill.write_locs.data[r * fill.write_locs.row_stride + p * fill.write_locs.column_stride] =
      index_page(fill, pool_row, live_column) * page_size + cell;
}

NSA_INLINE void store_request(const KPoolFill& fill, int64_t r, int32_t length) {
  const int32_t start = start_of(fill, length);
  fill.write_requests.data[r * fill.write_requests.stride] = load(fill.req_pool_indices, r);
  store(fill.write_start, r, start);
  store(fill.tail_start, r,
        int64_t{divide_toward_0(start, fill.index_kpool)} * fill.index_kpool.value);
  if (fill.write_counts.data != nullptr) store(fill.write_counts, r, load(fill.accept_lens, r));
}

// Row `row` of the outputs, which is row j of a request.
NSA_INLINE void store_row(const KPoolFill& fill, int64_t row, int32_t length, uint32_t j,
                          uint32_t running_sum) {
  store(fill.nsa_cache_seqlens, row, kept_tokens(fill, length, j));
  store(fill.nsa_cu_seqlens_k, row + 1, running_sum);
  store(fill.row_seqlens, row, row_seqlen(fill, length, j));
  store(fill.kpool_seqlens, row, kpools_of_row(fill, length, j));
}

}  // namespace nsa
