// The CPU twin: the arithmetic of fill.h, one request after the other.
#include "launch.h"

namespace nsa {
namespace {

void copy_pages(const Fill& fill, int k, const Request& request, int64_t first_row,
                int64_t end_row) {
  const PageTable& table = fill.tables[k];
  for (int64_t row = first_row; row < end_row; ++row) {
    int32_t* out = table.data + row * table.row_stride;
    for (int64_t column = 0; column < request.columns[k]; ++column) {
      out[column * table.column_stride] = page_at(fill, table, request.pool_row, column);
    }
  }
}

}  // namespace

void fill_on_cpu(const Fill& fill) {
  if (fill.enabled != nullptr && *fill.enabled == 0) return;
  store_sum_starts(fill);
  Offsets before{};
  for (int64_t r = 0; r < fill.requests; ++r) {
    const Request request = request_at(fill, r);
    const Offsets after = combine(before, offsets_of<1>(fill, request), fill.rows);
    store_request(fill, r, request, before);
    for (int64_t row = before.row; row < after.row; ++row) {
      store_live_row(fill, row, request, before);
    }
    for (int k = 0; k < kPageTables; ++k) copy_pages(fill, k, request, before.row, after.row);
    before = after;
  }
  for (int64_t row = before.row; row < fill.rows; ++row) store_row(fill, row, 0, before.clamped);
  store(fill.row_count, 0, before.row);
}

}  // namespace nsa
