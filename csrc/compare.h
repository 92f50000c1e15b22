// What a comparison of two fills reads, and which cells of a tensor count. No framework, no launch:
// the CUDA kernel and its CPU twin both include this header.
#pragma once

#include <cstdint>

#include "fill.h"

namespace nsa {

// Two int32 matrices of the same shape; vectors are matrices of one row. Strides count elements.
struct Pair {
  const int32_t* ours;
  const int32_t* theirs;
  int64_t rows;
  int64_t columns;
  int64_t our_row_stride;
  int64_t our_column_stride;
  int64_t their_row_stride;
  int64_t their_column_stride;
  int64_t page_size;  // 0: every column counts; else those whose first token lies below the row's length
};

constexpr int kMostPairs = 12;

struct Comparison {
  Pair pairs[kMostPairs];
  int pair_count;
  const int32_t* lengths;  // of each request, for the pairs with a page size
  int64_t requests;
  int64_t* report;  // [kReportSize]
};

// The report, on the device. It grows until a comparison found a difference, and then stays as it is.
enum ReportField : int {
  kChecks = 0,  // comparisons that ran
  kValues,      // cells compared
  kDifferent,   // cells that differ, in the comparison that found some
  kPair,        // the first of them: which pair,
  kRow,         // its row,
  kColumn,      // its column,
  kOurs,        // both values,
  kTheirs,
  kRequests,    // the batch size
  kLength,      // and the length of the request of that row, where rows belong to requests
  kFound,       // the last two belong to the comparison that is running: cells that differ
  kFirst,       // and the place of the first one
  kReportSize,
};
constexpr int64_t kNowhere = INT64_MAX;

// Every request has the same number of rows.
NSA_INLINE int64_t length_of_row(const Comparison& all, const Pair& pair, int64_t row) {
  return maximum(all.lengths[row * all.requests / pair.rows], 0);
}

NSA_INLINE int64_t live_columns(const Comparison& all, const Pair& pair, int64_t row) {
  if (pair.page_size == 0) return pair.columns;
  return minimum(ceil_div(length_of_row(all, pair, row), pair.page_size), pair.columns);
}

NSA_INLINE int32_t our_cell(const Pair& pair, int64_t row, int64_t column) {
  return pair.ours[row * pair.our_row_stride + column * pair.our_column_stride];
}

NSA_INLINE int32_t their_cell(const Pair& pair, int64_t row, int64_t column) {
  return pair.theirs[row * pair.their_row_stride + column * pair.their_column_stride];
}

// Orders cells by pair, row and column: rows and columns lie below 2^28 each.
NSA_INLINE int64_t place_of(int64_t pair, int64_t row, int64_t column) {
  return (pair << 56) | (row << 28) | column;
}

NSA_INLINE bool has_difference(const Comparison& all) { return all.report[kDifferent] != 0; }

// Ends a comparison: counts it, and writes down the first difference if it found any.
NSA_INLINE void conclude(const Comparison& all) {
  int64_t* report = all.report;
  report[kChecks] += 1;
  report[kDifferent] = report[kFound];
  if (report[kFound] == 0) return;
  constexpr int64_t kMask = (int64_t{1} << 28) - 1;
  const Pair& pair = all.pairs[report[kFirst] >> 56];
  report[kPair] = report[kFirst] >> 56;
  report[kRow] = (report[kFirst] >> 28) & kMask;
  report[kColumn] = report[kFirst] & kMask;
  report[kOurs] = our_cell(pair, report[kRow], report[kColumn]);
  report[kTheirs] = their_cell(pair, report[kRow], report[kColumn]);
  report[kRequests] = all.requests;
  report[kLength] = pair.page_size == 0 ? -1 : length_of_row(all, pair, report[kRow]);
}

}  // namespace nsa
