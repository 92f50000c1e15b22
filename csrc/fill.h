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

// Strides count elements. A null `data` means that the tensor was left out.
struct IndexVector {
  const void* data;
  int64_t stride;
  bool is_int64;
};

struct IndexTable {
  const void* data;
  int64_t row_stride;
  int64_t column_stride;
  int64_t rows;
  int64_t columns;
  bool is_int64;
};

struct OutputVector {
  int32_t* data;
  int64_t stride;
};

struct PageTable {
  int32_t* data;
  int64_t row_stride;
  int64_t column_stride;
  int64_t columns;
  int64_t page_size;
};

constexpr int kPageTables = 2;

struct Fill {
  IndexVector seq_lens;
  IndexVector req_pool_indices;
  IndexVector extend_lens;  // null: every request has `static_extend_len` rows
  IndexTable req_to_token;
  int64_t static_extend_len;
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
  PageTable tables[kPageTables];

  const int32_t* enabled;  // null, or one number on the device: 0 makes the fill write nothing
};

// What a fill knows of one request. Everything is read at once, so that no load waits for another.
struct Request {
  int64_t length;      // L, as SGLang keeps it: the low 32 bits of seq_lens, signed
  int64_t extend_len;  // q, 0 to 2^31 - 1
  int64_t pool_row;    // its row of req_to_token, or -1 when its index lies outside the pool
  uint32_t columns[kPageTables];  // of each page table, that its length fills
};

// Running sums over the requests before one. Sums of lengths wrap like the int32 tensors they go to;
// `row` stops at the number of rows of the outputs, so that no later request can write past them.
struct Offsets {
  uint32_t row;
  uint32_t lengths;
  uint32_t clamped;
  uint32_t units[kPageTables];
};

NSA_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
NSA_INLINE int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
NSA_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return minimum(maximum(x, low), high);
}
NSA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Dividing 32 bits takes a GPU a fraction of what 64 bits take. Holds for a, b < 2^31.
NSA_INLINE uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

NSA_INLINE int64_t load(const void* data, int64_t index, bool is_int64) {
  return is_int64 ? static_cast<const int64_t*>(data)[index]
                  : static_cast<const int32_t*>(data)[index];
}

NSA_INLINE int64_t load(const IndexVector& vector, int64_t i) {
  return load(vector.data, i * vector.stride, vector.is_int64);
}

NSA_INLINE void store(const OutputVector& out, int64_t i, int64_t value) {
  if (out.data != nullptr) out.data[i * out.stride] = static_cast<int32_t>(value);
}

// Columns of a page table that a request of this length fills: those below the length that exist both
// in the table and in req_to_token.
NSA_INLINE uint32_t live_columns(const Fill& fill, const PageTable& table, int64_t length) {
  if (table.data == nullptr) return 0;
  const uint32_t tokens = static_cast<uint32_t>(clamp(length, 0, fill.req_to_token.columns));
  const uint32_t page = static_cast<uint32_t>(table.page_size);
  return static_cast<uint32_t>(minimum(ceil_div(tokens, page), table.columns));
}

// A request whose index lies outside the pool gets slot 0, SGLang's padding slot, in every live cell.
NSA_INLINE int64_t pool_row(const Fill& fill, int64_t r) {
  if (fill.req_pool_indices.data == nullptr) return -1;
  const int64_t index = load(fill.req_pool_indices, r);
  return index >= 0 && index < fill.req_to_token.rows ? index : -1;
}

NSA_INLINE Request request_at(const Fill& fill, int64_t r) {
  Request request;
  request.pool_row = pool_row(fill, r);
  request.length = static_cast<int32_t>(load(fill.seq_lens, r));
  const int64_t q =
      fill.extend_lens.data == nullptr ? fill.static_extend_len : load(fill.extend_lens, r);
  request.extend_len = clamp(q, 0, INT32_MAX);
  for (int k = 0; k < kPageTables; ++k) {
    request.columns[k] = live_columns(fill, fill.tables[k], request.length);
  }
  return request;
}

// seqlens_expanded of row j of a request: max(L - q + 1 + j, 0).
NSA_INLINE int64_t expanded_length(const Request& request, int64_t j) {
  return maximum(request.length - request.extend_len + 1 + j, 0);
}

// Sum of min(expanded_length(j), topk) over j < n, modulo 2^32, in closed form: rows before `rising`
// are 0, rows from `level` on are topk, and those between rise by one each.
NSA_INLINE uint32_t clamped_sum(const Request& request, int64_t n, int64_t topk) {
  const int64_t first = request.length - request.extend_len + 1;
  const int64_t rising = clamp(-first, 0, n);
  const int64_t level = clamp(topk - first, rising, n);
  const uint64_t steps = static_cast<uint64_t>(level - rising);  // unsigned: products may wrap
  const uint64_t ramp = steps * static_cast<uint64_t>(first) +
                        steps * static_cast<uint64_t>(rising + level - 1) / 2;
  return static_cast<uint32_t>(ramp + static_cast<uint64_t>((n - level) * topk));
}

// Columns that one block copies at a time: `kVectors` times four a thread for the token table, one for
// the paged one.
constexpr int kVectors = 2;

template <int kThreads>
NSA_INLINE uint32_t unit_columns(const PageTable& table) {
  return table.page_size == 1 ? 4 * kVectors * kThreads : kThreads;
}

NSA_INLINE Offsets combine(const Offsets& a, const Offsets& b, int64_t rows) {
  Offsets sum;
  sum.row = static_cast<uint32_t>(minimum(static_cast<int64_t>(a.row) + b.row, rows));
  sum.lengths = a.lengths + b.lengths;
  sum.clamped = a.clamped + b.clamped;
  for (int k = 0; k < kPageTables; ++k) sum.units[k] = a.units[k] + b.units[k];
  return sum;
}

template <int kThreads>
NSA_INLINE Offsets offsets_of(const Fill& fill, const Request& request) {
  Offsets own;
  own.row = static_cast<uint32_t>(minimum(request.extend_len, fill.rows));
  own.lengths = static_cast<uint32_t>(request.length);
  own.clamped = clamped_sum(request, request.extend_len, fill.index_topk);
  for (int k = 0; k < kPageTables; ++k) {
    own.units[k] = ceil_div(request.columns[k], unit_columns<kThreads>(fill.tables[k]));
  }
  return own;
}

// The slot of a token: the low 32 bits of req_to_token, signed.
NSA_INLINE int32_t token_at(const Fill& fill, int64_t pool_row, int64_t column) {
  if (pool_row < 0) return 0;
  const IndexTable& source = fill.req_to_token;
  const int64_t index = pool_row * source.row_stride + column * source.column_stride;
  return static_cast<int32_t>(load(source.data, index, source.is_int64));
}

// Rounds down, also below 0: there ~t = -t - 1 is divided instead.
NSA_INLINE int32_t page_of(int32_t token, int64_t page_size) {
  const int32_t flip = token < 0 ? -1 : 0;
  const uint32_t quotient = static_cast<uint32_t>(token ^ flip) / static_cast<uint32_t>(page_size);
  return static_cast<int32_t>(quotient) ^ flip;
}

NSA_INLINE int32_t page_at(const Fill& fill, const PageTable& table, int64_t pool_row,
                           int64_t column) {
  return page_of(token_at(fill, pool_row, column * table.page_size), table.page_size);
}

NSA_INLINE void store_request(const Fill& fill, int64_t r, const Request& request,
                              const Offsets& before) {
  store(fill.cache_seqlens, r, request.length);
  store(fill.cu_seqlens_k, r + 1, before.lengths + static_cast<uint32_t>(request.length));
}

NSA_INLINE void store_row(const Fill& fill, int64_t row, int64_t expanded, uint32_t running_sum) {
  store(fill.seqlens_expanded, row, expanded);
  store(fill.nsa_cache_seqlens, row, minimum(expanded, fill.index_topk));
  store(fill.ctx_lens, row, expanded);
  store(fill.nsa_cu_seqlens_k, row + 1, running_sum);
}

// Row `row` of a request whose first row is `before.row`.
NSA_INLINE void store_live_row(const Fill& fill, int64_t row, const Request& request,
                               const Offsets& before) {
  const int64_t j = row - before.row;
  store_row(fill, row, expanded_length(request, j),
            before.clamped + clamped_sum(request, j + 1, fill.index_topk));
}

NSA_INLINE void store_sum_starts(const Fill& fill) {
  store(fill.cu_seqlens_k, 0, 0);
  store(fill.nsa_cu_seqlens_k, 0, 0);
}

}  // namespace nsa
