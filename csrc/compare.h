// What a comparison of two fills reads, and which cells of a tensor count. No framework, no launch:
// the CUDA kernel and the CPU twin both include this header.
#pragma once

#include "integers.h"

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
  int64_t page_size;  // 0: every column counts; else those whose first token lies before the length
};

constexpr int kMostPairs = 20;

// A place is one number that orders cells by pair, row and column: 7, 28 and 28 bits of an int64_t.
constexpr int kPlaceBits = 28;
constexpr int64_t kMostCells = int64_t{1} << kPlaceBits;  // rows or columns of a pair are fewer
static_assert(kMostPairs < 1 << (63 - 2 * kPlaceBits));

struct Comparison {
  Pair pairs[kMostPairs];
  int pair_count;
  const int32_t* lengths;  // of each request, for the pairs with a page size
  int64_t requests;
  int64_t* report;  // [kReportSize]
};

// The report, on the device. It grows until a comparison finds a difference; then it stays as it
// is. sglang_nsa_plugin/shadow.py has the same fields.
enum ReportField : int {
  kChecks = 0,  // comparisons that ran
  kValues,      // cells compared
  kDifferent,   // cells that differ, in the comparison that found some
  kPair,        // of the first cell that differed: its pair
  kRow,
  kColumn,
  kOurs,  // both values
  kTheirs,
  kRequests,  // the batch size
  kLength,    // the length of its request; -1 where rows do not belong to requests
  kFound,     // of the comparison that is running: cells that differ
  kFirst,     // and the place of the first one
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

NSA_INLINE int64_t place_of(int64_t pair, int64_t row, int64_t column) {
  return (pair << 2 * kPlaceBits) | (row << kPlaceBits) | column;
}

NSA_INLINE bool has_difference(const Comparison& all) { return all.report[kDifferent] != 0; }

// Ends a comparison: counts it, and reports the first difference if there is one.
NSA_INLINE void conclude(const Comparison& all) {
  int64_t* report = all.report;
  report[kChecks] += 1;
  report[kDifferent] = report[kFound];
  if (report[kFound] == 0) return;
  constexpr int64_t kMask = kMostCells - 1;
  const Pair& pair = all.pairs[report[kFirst] >> 2 * kPlaceBits];
  report[kPair] = report[kFirst] >> 2 * kPlaceBits;
  report[kRow] = (report[kFirst] >> kPlaceBits) & kMask;
  report[kColumn] = report[kFirst] & kMask;
  report[kOurs] = our_cell(pair, report[kRow], report[kColumn]);
  report[kTheirs] = their_cell(pair, report[kRow], report[kColumn]);
  report[kRequests] = all.requests;
  report[kLength] = pair.page_size == 0 ? -1 : length_of_row(all, pair, report[kRow]);
}

}  // namespace nsa
