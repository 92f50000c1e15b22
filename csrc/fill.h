// What a draft-extend metadata fill reads and writes, and the index arithmetic that says which value
// goes where. No framework, no launch: the CUDA kernel and its CPU twin both include this header.
//
// The contract (formulas, shapes, edges) is the docstring of sglang_nsa_plugin/fill_args.py.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NSA_INLINE __host__ __device__ __forceinline__
#else
#define NSA_INLINE inline
#endif

namespace nsa {

// Index tensors are int32 or int64 and read as 32-bit words, the low one first: most values count by
// their low word alone, and one load then serves both types without a branch, which would keep it from
// overlapping with the next one. Their strides count words. A null `data` means that the tensor was
// left out.
struct IndexVector {
  const int32_t* data;
  int64_t stride;
  bool is_int64;
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

// Divides numbers below 2^31 by a number that is known at bind time: a multiplication and a shift
// instead of the dozens of instructions that a GPU needs for a division.
struct Divisor {
  uint32_t value;
  uint32_t multiplier;
  uint32_t shift;
};

// How a GPU moves the cells of a page table whose pages are tokens. Of others it moves them one by one.
enum class Moves : int {
  kCells,          // one by one
  kStoredVectors,  // read one by one, stored 16 bytes at a time
  kVectors,        // read and stored 16 bytes at a time
};

struct PageTable {
  int32_t* data;  // null: left out
  int64_t row_stride;
  int64_t column_stride;
  Divisor page_size;
  uint32_t columns;  // those that can be live: req_to_token has their token
  Moves moves;
};

// DeepGEMM's schedule: where each of `processors` begins in the rows' segments, and one behind them.
struct Schedule {
  int32_t* data;
  int64_t row_stride;
  int64_t column_stride;
  Divisor processors;
  uint32_t longest;     // row that counts; see longest_row
  bool last_take_more;  // what does not divide evenly goes to the last processors, not to the first
};

// In this order because a kernel finds its parameters in no cache and waits for each 64 bytes of them: first
// what a row of a page table is made of, then what lengths are.
struct Fill {
  const int32_t* enabled;  // null, or one number on the device: 0 makes the fill write nothing
  IndexVector seq_lens;
  IndexVector req_pool_indices;
  int64_t static_extend_len;
  IndexTable req_to_token;
  PageTable token_table;  // of one token a page
  PageTable page_table;   // of page_size

  Schedule schedule;
  IndexVector extend_lens;  // of a ragged batch; else every request has `static_extend_len` rows
  bool is_ragged;  // a tensor without elements has no address that would tell
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
};

NSA_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
NSA_INLINE int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
NSA_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return minimum(maximum(x, low), high);
}
NSA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// multiplier = ceil(2^shift / value), shift = 31 + ceil(log2(value)): exact below 2^31.
inline Divisor divisor_of(int64_t value) {
  uint32_t shift = 31;
  while ((int64_t{1} << (shift - 31)) < value) ++shift;
  const uint64_t multiplier = ((uint64_t{1} << shift) + value - 1) / value;
  return Divisor{static_cast<uint32_t>(value), static_cast<uint32_t>(multiplier), shift};
}

NSA_INLINE uint32_t divide(uint32_t x, const Divisor& by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(x) * by.multiplier) >> by.shift);
}
// Without a branch, which would keep loads behind it from overlapping with those before it.
NSA_INLINE uint32_t divide_up(uint32_t x, const Divisor& by) {
  const uint32_t is_any = x != 0;
  return divide(x - is_any, by) + is_any;
}

NSA_INLINE int32_t low_word(const IndexVector& vector, int64_t i) {
  return vector.data[i * vector.stride];
}

NSA_INLINE int64_t load(const IndexVector& vector, int64_t i) {
  const int32_t low = low_word(vector, i);
  const int32_t high = vector.is_int64 ? vector.data[i * vector.stride + 1] : low >> 31;
  return static_cast<int64_t>(high) * (int64_t{1} << 32) + static_cast<uint32_t>(low);
}

NSA_INLINE void store(const OutputVector& out, int64_t i, int64_t value) {
  if (out.data != nullptr) out.data[i * out.stride] = static_cast<int32_t>(value);
}

// L, as SGLang keeps it: the low 32 bits of seq_lens, signed.
NSA_INLINE int32_t length_of(const Fill& fill, int64_t r) {
  return low_word(fill.seq_lens, r);
}

// q, 0 to 2^31 - 1.
NSA_INLINE int64_t extend_len_of(const Fill& fill, int64_t r) {
  return fill.is_ragged ? clamp(load(fill.extend_lens, r), 0, INT32_MAX) : fill.static_extend_len;
}

// seqlens_expanded of a row with `behind` rows of its request behind it: max(L - behind, 0).
NSA_INLINE uint32_t expanded_length(int32_t length, uint32_t behind) {
  const uint32_t tokens = length < 0 ? 0 : static_cast<uint32_t>(length);
  return tokens > behind ? tokens - behind : 0;
}

// What the lengths of one request's rows are made of.
struct Request {
  int32_t length;
  int64_t extend_len;
  int64_t first;  // expanded length of its row 0, before it is raised to 0: L - q + 1
};

NSA_INLINE Request request_at(const Fill& fill, int64_t r) {
  Request request;
  request.length = length_of(fill, r);
  request.extend_len = extend_len_of(fill, r);
  request.first = request.length - request.extend_len + 1;
  return request;
}

// Sum of min(max(L - q + 1 + j, 0), topk) over j < n, modulo 2^32, in closed form: rows before `rising`
// are 0, rows from `level` on are topk, and those between rise by one each.
NSA_INLINE uint32_t clamped_sum(const Request& request, int64_t n, int64_t topk) {
  const int64_t first = clamp(request.first, -n, topk);  // further out makes no difference
  const int64_t rising = maximum(-first, 0);
  const int64_t level = clamp(topk - first, rising, n);
  const uint64_t steps = static_cast<uint64_t>(level - rising);  // unsigned: products may wrap
  const uint64_t ramp = steps * static_cast<uint64_t>(first) +
                        steps * static_cast<uint64_t>(rising + level - 1) / 2;
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
  return Sums{static_cast<uint32_t>(minimum(request.extend_len, fill.rows)),
              static_cast<uint32_t>(request.length),
              clamped_sum(request, request.extend_len, fill.index_topk)};
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
  const uint32_t behind = static_cast<uint32_t>(request.extend_len - 1 - j);
  store_row(fill, row, expanded_length(request.length, behind),
            before.clamped + clamped_sum(request, j + 1, fill.index_topk));
}

NSA_INLINE void store_sum_starts(const Fill& fill) {
  store(fill.cu_seqlens_k, 0, 0);
  store(fill.nsa_cu_seqlens_k, 0, 0);
}

// Columns of a page table that a request of this length fills.
NSA_INLINE uint32_t live_columns(const PageTable& table, int32_t length) {
  const uint32_t below = divide_up(length < 0 ? 0 : length, table.page_size);
  return below < table.columns ? below : table.columns;
}

// Its row of req_to_token. A request whose index lies outside the pool gets -1, and slot 0, SGLang's
// padding slot, in every live cell.
NSA_INLINE int64_t pool_row_of(const Fill& fill, int64_t r) {
  const int64_t index = load(fill.req_pool_indices, r);
  return index >= 0 && index < fill.req_to_token.rows ? index : -1;
}

// The slot of a token: the low 32 bits of req_to_token, signed.
NSA_INLINE int32_t token_at(const IndexTable& source, int64_t pool_row, int64_t column) {
  return pool_row < 0
             ? 0
             : source.data[pool_row * source.row_stride + column * source.column_stride];
}

inline bool is_aligned(const void* pointer, int64_t row_stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_stride % 4 == 0;
}

inline Moves moves_of(const PageTable& table, const IndexTable& tokens) {
  if (table.column_stride != 1 || !is_aligned(table.data, table.row_stride)) return Moves::kCells;
  const bool reads_vectors = table.page_size.value == 1 && tokens.column_stride == 1 &&
                             is_aligned(tokens.data, tokens.row_stride);
  return reads_vectors ? Moves::kVectors : Moves::kStoredVectors;
}

// Rounds down, also below 0: there ~t = -t - 1 is divided instead.
NSA_INLINE int32_t page_of(int32_t token, const Divisor& page_size) {
  const int32_t flip = token < 0 ? -1 : 0;
  return static_cast<int32_t>(divide(static_cast<uint32_t>(token ^ flip), page_size)) ^ flip;
}

// The token whose slot says where a page of this table lies.
NSA_INLINE int64_t first_token(const PageTable& table, int64_t column) {
  return column * table.page_size.value;
}

// Tokens of one segment of DeepGEMM's schedule.
constexpr uint32_t kSegment = 256;

// The longest row that counts in a schedule of so many rows: all segments together stay below 2^31.
inline uint32_t longest_row(int64_t rows) {
  return static_cast<uint32_t>(minimum(INT32_MAX / maximum(rows, 1) * kSegment, INT32_MAX));
}

// Segments of a row, the last one perhaps shorter.
NSA_INLINE uint32_t segments_of(const Schedule& schedule, uint32_t expanded_length) {
  const uint32_t length =
      expanded_length < schedule.longest ? expanded_length : schedule.longest;
  return (length + kSegment - 1) / kSegment;
}

// The first segment of processor p, of `total` segments in all: total % processors of them get one
// more than the others.
NSA_INLINE uint32_t schedule_start(const Schedule& schedule, uint32_t total, uint32_t p) {
  const uint32_t processors = schedule.processors.value;
  const uint32_t each = divide(total, schedule.processors);
  const uint32_t longer = total - each * processors;
  if (!schedule.last_take_more) return p * each + (p < longer ? p : longer);
  const uint32_t shorter = processors - longer;
  return p * each + (p > shorter ? p - shorter : 0);
}

// Processor p begins in this row, behind its first `segment` segments.
NSA_INLINE void store_schedule(const Schedule& schedule, int64_t p, int64_t row, uint32_t segment) {
  int32_t* out = schedule.data + p * schedule.row_stride;
  out[0] = static_cast<int32_t>(row);
  out[schedule.column_stride] = static_cast<int32_t>(segment);
}

}  // namespace nsa
