// Exhaustive check of medspark/index.h on small levels and windows; prints what it counted.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "medspark/index.h"

using namespace medspark;

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

// Every voxel of the volume is either hidden or the voxel of its own row, and every row is met
// once.
int64_t check_rows(int64_t batch, const int64_t* grid, const int64_t* block, std::mt19937& random) {
  const int64_t n_cells = batch * grid[0] * grid[1] * grid[2];
  std::vector<int32_t> cells(n_cells, -1), blocks;
  for (int64_t i = 0; i < n_cells; ++i)
    if (random() % 2) {
      cells[i] = static_cast<int32_t>(blocks.size());
      blocks.push_back(static_cast<int32_t>(i));
    }
  Level level{cells.data(), blocks.data(), static_cast<int64_t>(blocks.size()), batch, {}, {}};
  for (int a = 0; a < 3; ++a) {
    level.grid[a] = grid[a];
    level.block[a] = block[a];
  }
  std::vector<int> met(level.rows(), 0);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t z = 0; z < level.size(0); ++z)
      for (int64_t y = 0; y < level.size(1); ++y)
        for (int64_t x = 0; x < level.size(2); ++x) {
          const int64_t row = row_of(level, b, z, y, x);
          if (row < 0) continue;
          require(row < level.rows(), "row_of stays below the number of rows");
          ++met[row];
          const Voxel v = voxel_of(level, row);
          require(v.b == b && v.z == z && v.y == y && v.x == x, "voxel_of inverts row_of");
        }
  for (const int n : met) require(n == 1, "every row belongs to one voxel");
  return level.rows();
}

// o reads i through k exactly where i is read by o through k.
int64_t check_axis(int64_t size, int64_t out, int64_t stride, int64_t padding, int64_t dilation) {
  int64_t pairs = 0;
  for (int64_t k = 0; k < 7; ++k) {
    for (int64_t o = 0; o < out; ++o) {
      const int64_t i = input_of(o, k, stride, padding, dilation, size);
      require(i == -1 || (i >= 0 && i < size), "input_of stays inside");
      require((i == -1) == (o * stride - padding + k * dilation < 0 ||
                            o * stride - padding + k * dilation >= size),
              "input_of is -1 outside only");
      for (int64_t j = 0; j < size; ++j) {
        const bool reads = i == j;
        require(reads == (output_of(j, k, stride, padding, dilation, out) == o),
                "input_of and output_of are adjoint");
        pairs += reads;
      }
    }
    for (int64_t j = 0; j < size; ++j) {
      const int64_t o = output_of(j, k, stride, padding, dilation, out);
      require(o >= -1 && o < out, "output_of stays inside");
    }
  }
  return pairs;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  int64_t rows = 0, pairs = 0;
  for (int64_t a = 0; a < 27 * 27; ++a) {
    const int64_t grid[3] = {a % 3 + 1, a / 3 % 3 + 1, a / 9 % 3 + 1};
    const int64_t block[3] = {a / 27 % 3 + 1, a / 81 % 3 + 1, a / 243 % 3 + 1};
    for (int64_t batch = 1; batch <= 3; ++batch) rows += check_rows(batch, grid, block, random);
  }
  for (int64_t size = 1; size <= 9; ++size)
    for (int64_t out = 1; out <= 9; ++out)
      for (int64_t stride = 1; stride <= 4; ++stride)
        for (int64_t padding = 0; padding <= 6; ++padding)
          for (int64_t dilation = 1; dilation <= 4; ++dilation)
            pairs += check_axis(size, out, stride, padding, dilation);
  std::printf("rows %lld pairs %lld\n", static_cast<long long>(rows),
              static_cast<long long>(pairs));
}
