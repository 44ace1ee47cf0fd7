// Segments of packed rows cut into chunks, for sums in two ordered stages.
//
// `starts` lies in device memory, so the host knows only the number of rows: the chunks of all
// segments are numbered through, and an item finds its own by walking over the segments.
#pragma once

#include "medspark/types.h"

namespace medspark::generic {

// Rows per chunk, as a power of two: about the square root, so that both stages are of the same
// length. A function of the number of rows alone, so the order of summation is too.
inline int chunk_shift(int64_t rows) {
  int shift = 5;
  while ((int64_t{1} << 2 * shift) < rows) ++shift;
  return shift;
}

// Upper bound of the number of chunks of all segments.
inline int64_t most_chunks(int64_t rows, int64_t n_segments) {
  return (rows >> chunk_shift(rows)) + n_segments;
}

struct Chunk {
  int64_t segment, first, end;  // segment -1: there is no such chunk
};

struct Segments {
  const int64_t* starts;  // [n_segments + 1]
  int64_t n_segments;
  int shift;  // of the rows per chunk

  MEDSPARK_HD int64_t rows(int64_t s) const { return starts[s + 1] - starts[s]; }
  MEDSPARK_HD int64_t chunk_rows() const { return int64_t{1} << shift; }
  MEDSPARK_HD int64_t chunks(int64_t s) const { return (rows(s) + chunk_rows() - 1) >> shift; }

  MEDSPARK_HD Chunk at(int64_t i) const {
    for (int64_t s = 0; s < n_segments; ++s) {
      const int64_t n = chunks(s);
      if (i < n) {
        const int64_t first = starts[s] + (i << shift), end = first + chunk_rows();
        return {s, first, end < starts[s + 1] ? end : starts[s + 1]};
      }
      i -= n;
    }
    return {-1, 0, 0};
  }

  // Number of the first chunk of segment s.
  MEDSPARK_HD int64_t first_chunk(int64_t s) const {
    int64_t first = 0;
    for (int64_t before = 0; before < s; ++before) first += chunks(before);
    return first;
  }

  // The segment that holds `row`; empty segments hold none.
  MEDSPARK_HD int64_t of(int64_t row) const {
    int64_t low = 0, high = n_segments - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (starts[middle + 1] > row)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }
};

}  // namespace medspark::generic
