// The parameters of a fill: what binding.cc packs and the kernels read. Structs only.
//
// The order of the fields is part of the kernel's speed. A launch finds its parameters in no cache
// and waits for each 64 bytes of them once, so what a row of a page table needs comes first, then
// what lengths need. The assertions at the end hold that.
#pragma once

#include <cstddef>
#include <type_traits>

#include "integers.h"

namespace nsa {

// Index tensors are int32 or int64 and read as 32-bit words, the low one first. Most values count
// by their low word alone, and one load then serves both types without a branch. Their strides
// count words. A null `data` means that the tensor was left out.
struct IndexVector {
  const int32_t* data;
  int64_t stride;
  bool is_int64;
};

// The lengths L of a fill: seq_lens, of which only the low words count, plus a number.
struct LengthVector {
  const int32_t* data;
  int64_t stride;
  uint32_t offset;
};

struct IndexTable {
  const int32_t* data;
  int64_t row_stride;
  int64_t column_stride;
  int64_t rows;
  int64_t columns;
};

// Strides of outputs count elements.

struct OutputVector {
  int32_t* data;
  int64_t stride;
};

struct OutputTable {
  int32_t* data;
  int64_t row_stride;
  int64_t column_stride;
};

// How a GPU copies page_table_1. Pages of more than one token are always copied one by one.
enum class CopyWidth : int {
  kCells,          // one by one
  kStoredVectors,  // read one by one, stored 16 bytes at a time
  kVectors,        // read and stored 16 bytes at a time
};

struct PageTable {
  int32_t* data;  // null: left out
  int64_t row_stride;
  int64_t column_stride;
  Divisor page_size;
  uint32_t columns;  // those whose first token has a column in req_to_token
  CopyWidth copy_width;
};

// DeepGEMM's schedule: where each of `processors` begins in the segments of the rows, and the end.
struct Schedule {
  int32_t* data;
  int64_t row_stride;
  int64_t column_stride;
  Divisor processors;
  uint32_t longest;     // tokens of a row that count; see longest_row
  bool last_take_more;  // the remainder goes to the last processors, not to the first
};

// The names are those of FillArgs.
struct Fill {
  const int32_t* enabled;  // null, or one number on the device: 0 makes the fill write nothing
  LengthVector seq_lens;
  IndexVector req_pool_indices;
  int64_t rows_per_request;  // of a uniform batch
  IndexTable req_to_token;
  PageTable page_table_1;
  PageTable real_page_table;

  Schedule schedule;
  IndexVector extend_lens;  // rows of each request of a ragged batch
  bool is_ragged;           // said here, because an empty tensor has no address either
  int64_t requests;
  int64_t rows;
  int64_t index_topk;
  OutputVector cache_seqlens;
  OutputVector cu_seqlens_k;
  OutputVector seqlens_expanded;
  OutputVector nsa_cache_seqlens;
  OutputVector nsa_cu_seqlens_k;
  OutputVector ctx_lens;
  OutputVector row_count;
  // ctx_lens [bs, q] of a fill by request, see is_by_request; then the vector above is left out.
  OutputTable ctx_lens_by_request;
};

// How page_table_1 is copied in a uniform batch. Each mode has a kernel of its own, so that the
// code that runs lies together. See fill_static.cu for what a chunk is.
enum class TokenCopyMode {
  kNone,          // there is no page_table_1
  kSmallChunks,   // a block for each chunk of kTokensPerBlock<1> tokens that a request can have
  kChunks,        // the same with kTokensPerBlock<kVectorsInFlight> tokens
  kSharedChunks,  // a fixed number of blocks shares out live chunks, and copies their pages too
};

// real_page_table of a uniform batch, where 32 bits are enough: strides in bytes make an address in
// one instruction, and with a page size of a power of two a slot's page is a shift.
struct PageCopyParams {
  const int32_t* enabled;
  const char* lengths;
  const char* pool_rows;

  uint32_t length_stride;
  uint32_t pool_row_stride;
  uint32_t pool_size;
  bool has_high_words;  // pool_rows are int64
  const char* tokens;
  char* table;
  uint32_t most_tokens;  // of a request that the table has columns for
  uint32_t page_shift;   // a page has 2^page_shift tokens
  uint32_t page_stride;  // from the first token of a page to that of the next
  uint32_t token_row_stride;
  uint32_t request_stride;  // in the table, from the first row of a request to that of the next
  uint32_t row_stride;
  uint32_t rows_per_request;
  uint32_t length_offset;
};

// A uniform batch, with the grid that was computed when it was bound.
struct StaticFill {
  int pages_begin;  // the first block of each role; requests begin at block 0
  int rows_begin;
  int schedule_begin;
  Divisor blocks_per_request;  // blocks that share the pages of one request
  PageCopyParams page_copy;

  int tokens_begin;
  uint32_t few_chunks;  // up to this many live chunks are copied in halves
  Divisor requests;
  Divisor rows_per_request;
  Fill fill;
  int blocks;
  TokenCopyMode token_copy_mode;
};

struct RaggedFill {
  Fill fill;
  int blocks;
};

// On sm_90 parameters begin at byte 0x210 of a constant bank that is fetched 64 bytes at a time:
// their first line has 48 bytes.
constexpr size_t kLine = 64;
constexpr size_t kFirstLine = 48;
constexpr size_t kMostBytes = 4096;  // of all parameters of a kernel

// A page block reads two lines and nothing after them; a token block goes on with the third.
static_assert(offsetof(StaticFill, page_copy) + sizeof(PageCopyParams) <= kFirstLine + kLine);
static_assert(offsetof(StaticFill, tokens_begin) <= kFirstLine + kLine);
static_assert(offsetof(StaticFill, fill) <= kFirstLine + 2 * kLine);
// What copies tokens comes before what copies the pages of shared chunks, and both before lengths.
static_assert(offsetof(Fill, page_table_1) < offsetof(Fill, real_page_table));
static_assert(offsetof(Fill, schedule) <= 200);

static_assert(sizeof(StaticFill) <= kMostBytes && sizeof(RaggedFill) <= kMostBytes);
static_assert(std::is_standard_layout_v<StaticFill> && std::is_standard_layout_v<RaggedFill>);
static_assert(std::is_trivially_copyable_v<StaticFill> && std::is_trivially_copyable_v<RaggedFill>);

}  // namespace nsa
