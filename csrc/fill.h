// The index arithmetic of a fill: which value goes where. No framework, no launch: the CUDA kernels
// and the CPU twin both include this header.
//
// The contract (formulas, shapes, edges) is the docstring of sglang_nsa_plugin/fill_args.py.
#pragma once

#include "params.h"

namespace nsa {

NSA_INLINE int64_t load(const IndexVector& vector, int64_t i) {
  const int32_t low = vector.data[i * vector.stride];
  const int32_t high = vector.is_int64 ? vector.data[i * vector.stride + 1] : low >> 31;
  return static_cast<int64_t>(high) * (int64_t{1} << 32) + static_cast<uint32_t>(low);
}

NSA_INLINE void store(const OutputVector& out, int64_t i, int64_t value) {
  if (out.data != nullptr) out.data[i * out.stride] = static_cast<int32_t>(value);
}

// L of a word of seq_lens, as SGLang keeps it: the low 32 bits of the sum, signed.
NSA_INLINE int32_t length_from(int32_t word, uint32_t offset) {
  return static_cast<int32_t>(static_cast<uint32_t>(word) + offset);
}

NSA_INLINE int32_t length_of(const Fill& fill, int64_t r) {
  return length_from(fill.seq_lens.data[r * fill.seq_lens.stride], fill.seq_lens.offset);
}

// q, the rows of request r: 0 to 2^31 - 1.
NSA_INLINE int64_t rows_of(const Fill& fill, int64_t r) {
  return fill.is_ragged ? clamp(load(fill.extend_lens, r), 0, INT32_MAX) : fill.rows_per_request;
}

// seqlens_expanded of a row that `rows_after` rows of its request follow: max(L - rows_after, 0).
NSA_INLINE uint32_t expanded_length(int32_t length, uint32_t rows_after) {
  const uint32_t tokens = length < 0 ? 0 : static_cast<uint32_t>(length);
  return tokens > rows_after ? tokens - rows_after : 0;
}

// What the lengths of one request's rows follow from.
struct Request {
  int32_t length;
  int64_t rows;
  int64_t first;  // L - q + 1, the expanded length of its row 0 where that is not negative
};

NSA_INLINE Request request_at(const Fill& fill, int64_t r) {
  Request request;
  request.length = length_of(fill, r);
  request.rows = rows_of(fill, r);
  request.first = request.length - request.rows + 1;
  return request;
}

// Sum of min(max(L - q + 1 + j, 0), topk) over j < n, modulo 2^32, in closed form: rows before
// `rising` are 0, rows from `level` on are topk, and those between rise by one each.
NSA_INLINE uint32_t clamped_sum(const Request& request, int64_t n, int64_t topk) {
  const int64_t first = clamp(request.first, -n, topk);  // further out makes no difference
  const int64_t rising = maximum(-first, 0);
  const int64_t level = clamp(topk - first, rising, n);
  const uint64_t steps = static_cast<uint64_t>(level - rising);  // unsigned: products may wrap
  const uint64_t ramp =
      steps * static_cast<uint64_t>(first) + steps * static_cast<uint64_t>(rising + level - 1) / 2;
  return static_cast<uint32_t>(ramp + static_cast<uint64_t>((n - level) * topk));
}

// Sums over requests. Those of lengths wrap like the int32 tensors they go to; `row` stops at the
// number of rows of the outputs, so that no later request can write past them.
struct Sums {
  uint32_t row;
  uint32_t lengths;
  uint32_t clamped;
};

NSA_INLINE Sums combine(const Sums& a, const Sums& b, int64_t rows) {
  const int64_t row = minimum(static_cast<int64_t>(a.row) + b.row, rows);
  return Sums{static_cast<uint32_t>(row), a.lengths + b.lengths, a.clamped + b.clamped};
}

NSA_INLINE Sums sums_of(const Fill& fill, const Request& request) {
  return Sums{static_cast<uint32_t>(minimum(request.rows, fill.rows)),
              static_cast<uint32_t>(request.length),
              clamped_sum(request, request.rows, fill.index_topk)};
}

NSA_INLINE void store_request(const Fill& fill, int64_t r, int32_t length, uint32_t lengths) {
  store(fill.cache_seqlens, r, length);
  store(fill.cu_seqlens_k, r + 1, lengths);
}

NSA_INLINE void store_row(const Fill& fill, int64_t row, int64_t expanded, uint32_t running_sum) {
  store(fill.seqlens_expanded, row, expanded);
  store(fill.nsa_cache_seqlens, row, minimum(expanded, fill.index_topk));
  store(fill.ctx_lens, row, expanded);
  store(fill.nsa_cu_seqlens_k, row + 1, running_sum);
}

// Row `row` of a request, with the sums before the request.
NSA_INLINE void store_live_row(const Fill& fill, int64_t row, const Request& request,
                               const Sums& before) {
  const int64_t j = row - before.row;
  const uint32_t rows_after = static_cast<uint32_t>(request.rows - 1 - j);
  store_row(fill, row, expanded_length(request.length, rows_after),
            before.clamped + clamped_sum(request, j + 1, fill.index_topk));
}

// Whether ctx_lens and the schedule go by requests, not by rows. Of an empty batch it does not
// matter: it has no address, and its schedule is the same.
NSA_INLINE bool is_by_request(const Fill& fill) { return fill.ctx_lens_by_request.data != nullptr; }

// ctx_lens of row j of request r, by request.
NSA_INLINE void store_context(const Fill& fill, int64_t r, int64_t j, int32_t length) {
  const OutputTable& out = fill.ctx_lens_by_request;
  out.data[r * out.row_stride + j * out.column_stride] = length;
}

NSA_INLINE void store_sum_starts(const Fill& fill) {
  store(fill.cu_seqlens_k, 0, 0);
  store(fill.nsa_cu_seqlens_k, 0, 0);
}

// Columns of a page table that are live for a request of this length.
NSA_INLINE uint32_t live_columns(const PageTable& table, int32_t length) {
  const uint32_t below = divide_up(length < 0 ? 0 : length, table.page_size);
  return below < table.columns ? below : table.columns;
}

// The request's row of req_to_token, or -1 where its index lies outside the pool. All live cells of
// such a request get slot 0, SGLang's padding slot.
NSA_INLINE int64_t pool_row_of(const Fill& fill, int64_t r) {
  const int64_t index = load(fill.req_pool_indices, r);
  return index >= 0 && index < fill.req_to_token.rows ? index : -1;
}

// The slot of a token: the low 32 bits of req_to_token, signed.
NSA_INLINE int32_t token_at(const IndexTable& source, int64_t pool_row, int64_t column) {
  return pool_row < 0 ? 0
                      : source.data[pool_row * source.row_stride + column * source.column_stride];
}

inline bool is_aligned(const void* pointer, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_stride % 4 == 0;
}

inline CopyWidth copy_width_of(const PageTable& table, const IndexTable& tokens) {
  if (table.column_stride != 1 || !is_aligned(table.data, table.row_stride))
    return CopyWidth::kCells;
  const bool reads_vectors = table.page_size.value == 1 && tokens.column_stride == 1 &&
                             is_aligned(tokens.data, tokens.row_stride);
  return reads_vectors ? CopyWidth::kVectors : CopyWidth::kStoredVectors;
}

// Rounds down, also below 0: there ~t = -t - 1 is divided instead.
NSA_INLINE int32_t page_of(int32_t token, const Divisor& page_size) {
  const int32_t flip = token < 0 ? -1 : 0;
  return static_cast<int32_t>(divide(static_cast<uint32_t>(token ^ flip), page_size)) ^ flip;
}

// The first token of a page; its slot, divided by the page size, is the page.
NSA_INLINE int64_t first_token(const PageTable& table, int64_t column) {
  return column * table.page_size.value;
}

// Tokens of one segment of DeepGEMM's schedule.
constexpr uint32_t kSegment = 256;

// Tokens of a row that count in a schedule of `rows` rows: all segments together stay below 2^31.
inline uint32_t longest_row(int64_t rows) {
  return static_cast<uint32_t>(minimum(INT32_MAX / maximum(rows, 1) * kSegment, INT32_MAX));
}

// Segments of a row; the last one may be shorter.
NSA_INLINE uint32_t segments_of(const Schedule& schedule, uint32_t expanded_length) {
  const uint32_t length = expanded_length < schedule.longest ? expanded_length : schedule.longest;
  return (length + kSegment - 1) / kSegment;
}

// The same of a request whose q rows all have the segments of its last one.
NSA_INLINE uint32_t segments_of_request(const Schedule& schedule, int32_t length, uint32_t q) {
  return q * segments_of(schedule, expanded_length(length, 0));
}

// The first of the `total` segments that is processor p's. total % processors of the processors get
// one segment more than the others.
NSA_INLINE uint32_t schedule_start(const Schedule& schedule, uint32_t total, uint32_t p) {
  const uint32_t processors = schedule.processors.value;
  const uint32_t each = divide(total, schedule.processors);
  const uint32_t longer = total - each * processors;
  if (!schedule.last_take_more) return p * each + (p < longer ? p : longer);
  const uint32_t shorter = processors - longer;
  return p * each + (p > shorter ? p - shorter : 0);
}

// Processor p begins with segment `segment` of this row.
NSA_INLINE void store_schedule(const Schedule& schedule, int64_t p, int64_t row, uint32_t segment) {
  int32_t* out = schedule.data + p * schedule.row_stride;
  out[0] = static_cast<int32_t>(row);
  out[schedule.column_stride] = static_cast<int32_t>(segment);
}

}  // namespace nsa
