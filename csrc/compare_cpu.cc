// The CPU twin of the comparison: the arithmetic of compare.h, one cell after the other.
#include "compare.h"

#include "host.h"

namespace nsa {

void compare_on_cpu(const Comparison& all) {
  if (has_difference(all)) return;
  int64_t* report = all.report;
  for (int p = 0; p < all.pair_count; ++p) {
    const Pair& pair = all.pairs[p];
    for (int64_t row = 0; row < pair.rows; ++row) {
      const int64_t columns = live_columns(all, pair, row);
      report[kValues] += columns;
      for (int64_t column = 0; column < columns; ++column) {
        if (our_cell(pair, row, column) == their_cell(pair, row, column)) continue;
        report[kFound] += 1;
        report[kFirst] = minimum(report[kFirst], place_of(p, row, column));
      }
    }
  }
  conclude(all);
}

}  // namespace nsa
