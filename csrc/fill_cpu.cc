// The CPU twin: the arithmetic of fill.h, one request after the other.
#include "fill.h"

#include "host.h"

namespace nsa {
namespace {

void copy_table(const Fill& fill, const PageTable& table, int64_t r, int64_t first_row,
                int64_t end_row) {
  const int64_t columns = live_columns(table, length_of(fill, r));
  if (columns == 0) return;
  const int64_t pool_row = pool_row_of(fill, r);
  for (int64_t row = first_row; row < end_row; ++row) {
    int32_t* out = table.data + row * table.row_stride;
    for (int64_t column = 0; column < columns; ++column) {
      const int32_t token = token_at(fill.req_to_token, pool_row, first_token(table, column));
      out[column * table.column_stride] = page_of(token, table.page_size);
    }
  }
}

// Of the `rows` rows from `row` on, which all have the segments of the last one.
uint32_t segments_of_item(const Fill& fill, int64_t row, int64_t rows) {
  const int64_t q = fill.rows_per_request;
  const uint32_t rows_after = static_cast<uint32_t>(q - 1 - (row + rows - 1) % q);
  const int32_t length = length_of(fill, row / q);
  return static_cast<uint32_t>(rows) *
         segments_of(fill.schedule, expanded_length(length, rows_after));
}

// A processor begins with a segment of an item, all of whose rows it takes there: a row or, by
// request, a request.
void fill_schedule(const Fill& fill) {
  const Schedule& schedule = fill.schedule;
  const int64_t rows = is_by_request(fill) ? fill.rows_per_request : 1;
  uint32_t total = 0;
  for (int64_t row = 0; row < fill.rows; row += rows) total += segments_of_item(fill, row, rows);
  int64_t row = 0;
  uint32_t before = 0;
  for (uint32_t p = 0; p <= schedule.processors.value; ++p) {
    const uint32_t start = schedule_start(schedule, total, p);
    for (; row < fill.rows && before + segments_of_item(fill, row, rows) <= start; row += rows) {
      before += segments_of_item(fill, row, rows);
    }
    const uint32_t segment = (start - before) / static_cast<uint32_t>(rows);
    store_schedule(schedule, p, row, row < fill.rows ? segment : 0);
  }
}

}  // namespace

void fill_on_cpu(const Fill& fill) {
  if (fill.enabled != nullptr && *fill.enabled == 0) return;
  store_sum_starts(fill);
  Sums before{};
  for (int64_t r = 0; r < fill.requests; ++r) {
    const Request request = request_at(fill, r);
    const Sums after = combine(before, sums_of(fill, request), fill.rows);
    store_request(fill, r, request.length, after.lengths);
    for (int64_t row = before.row; row < after.row; ++row) {
      store_live_row(fill, row, request, before);
      if (is_by_request(fill)) store_context(fill, r, row - before.row, request.length);
    }
    copy_table(fill, fill.real_page_table, r, before.row, after.row);
    copy_table(fill, fill.page_table_1, r, before.row, after.row);
    before = after;
  }
  for (int64_t row = before.row; row < fill.rows; ++row) store_row(fill, row, 0, before.clamped);
  store(fill.row_count, 0, before.row);
  if (fill.schedule.data != nullptr) fill_schedule(fill);
}

}  // namespace nsa
