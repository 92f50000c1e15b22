// The CPU twin of a k-pooling fill: the arithmetic of kpool.h, one request after the other.
#include "kpool.h"

#include "host.h"

namespace nsa {
namespace {

void copy_table(const KPoolFill& fill, int64_t r, int32_t length, int64_t pool_row) {
  const PageTable& table = fill.kpool_page_table;
  const uint32_t n = fill.rows_per_request.value;
  for (uint32_t column = 0; column < minimum(live_pages(fill, length), table.columns); ++column) {
    const int32_t page = index_page(fill, pool_row, column);
    for (int64_t row = r * n; row < (r + 1) * n; ++row) {
      table.data[row * table.row_stride + column * table.column_stride] = page;
    }
  }
}

uint32_t segments_of_row(const KPoolFill& fill, int64_t row) {
  const int64_t n = fill.rows_per_request.value;
  return kpool_segments(fill, length_of(fill, row / n), static_cast<uint32_t>(row % n));
}

void fill_schedule(const KPoolFill& fill) {
  const Schedule& schedule = fill.schedule;
  uint32_t total = 0;
  for (int64_t row = 0; row < fill.rows; ++row) total += segments_of_row(fill, row);
  int64_t row = 0;
  uint32_t before = 0;
  for (uint32_t p = 0; p <= schedule.processors.value; ++p) {
    const uint32_t start = schedule_start(schedule, total, p);
    for (; row < fill.rows && before + segments_of_row(fill, row) <= start; ++row) {
      before += segments_of_row(fill, row);
    }
    store_schedule(schedule, p, row, row < fill.rows ? start - before : 0);
  }
}

}  // namespace

void fill_kpool_on_cpu(const KPoolFill& fill) {
  if (fill.enabled != nullptr && *fill.enabled == 0) return;
  const uint32_t n = fill.rows_per_request.value;
  uint32_t sum = 0;
  store(fill.nsa_cu_seqlens_k, 0, 0);
  for (int64_t r = 0; r < fill.requests; ++r) {
    const int32_t length = length_of(fill, r);
    const int64_t pool_row = pool_row_of(fill, r);
    store_request(fill, r, length);
    for (uint32_t j = 0; j < n; ++j) {
      sum += kept_tokens(fill, length, j);
      store_row(fill, r * n + j, length, j, sum);
    }
    for (uint32_t p = 0; p < fill.locs_per_request; ++p) store_loc(fill, r, p, length, pool_row);
    if (fill.kpool_page_table.data != nullptr) copy_table(fill, r, length, pool_row);
  }
  if (fill.schedule.data != nullptr) fill_schedule(fill);
}

}  // namespace nsa
