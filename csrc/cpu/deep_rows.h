// Rows of taps x channels, gathered side by side: what convolutions of very few channels multiply.
#pragma once

#include <algorithm>

#include "row_map.h"

namespace medspark {

// Columns [c0, c1) of the flat (tap, channel) axis, for destinations start .. start + n:
// to[i * (c1 - c0) + column - c0], zeros where a tap reads nothing. `source` holds `row_size`
// numbers per row, of which the first `channels` are read.
template <class T>
void gather_deep_rows(const RowMap& map, int64_t start, int64_t n, const T* source,
                      int64_t row_size, int64_t channels, int64_t c0, int64_t c1, T* to) {
  const int64_t columns = c1 - c0, first = c0 / channels, last = (c1 - 1) / channels + 1;
  std::fill(to, to + n * columns, T{});
  map.for_each_run(start, n, first, last, [&](int64_t t, int64_t i, int64_t count, int64_t row) {
    const int64_t column = (first + t) * channels;
    const int64_t from_c = std::max(c0, column), to_c = std::min(c1, column + channels);
    const T* from = source + row * row_size + from_c - column;
    T* at = to + i * columns + from_c - c0;
    const int64_t step = map.step() * row_size;
    if (to_c - from_c == 1)
      for (int64_t j = 0; j < count; ++j) at[j * columns] = from[j * step];
    else
      for (int64_t j = 0; j < count; ++j)
        std::copy_n(from + j * step, to_c - from_c, at + j * columns);
  });
}

}  // namespace medspark
