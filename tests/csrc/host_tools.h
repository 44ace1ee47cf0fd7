// Random levels and data, serial launches and comparisons, for generic_host.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "medspark/types.h"

namespace host {

using namespace medspark;

inline std::mt19937_64& random() {
  static std::mt19937_64 engine(7);
  return engine;
}

// Items one after the other, in either order: a result may not depend on it.
struct Loop {
  bool backwards;

  template <class Item>
  void operator()(int64_t n, const Item& item) const {
    for (int64_t i = 0; i < n; ++i) item(backwards ? n - 1 - i : i);
  }
};

// The kind of numbers: small integers make every sum exact, so that equal means equal to the bit.
enum class Numbers { integers, reals };

template <class T>
std::vector<T> numbers(int64_t n, Numbers kind) {
  std::uniform_int_distribution<int> small(-3, 3);
  std::normal_distribution<double> normal;
  std::vector<T> values(n);
  for (T& v : values) {
    const double d = kind == Numbers::integers ? small(random()) : normal(random());
    v = Element<T>::store(static_cast<typename Element<T>::Acc>(d));
  }
  return values;
}

// Poisoned, so that an element that nobody writes shows (-1 for integers, NaN otherwise).
template <class T>
std::vector<T> unwritten(int64_t n) {
  std::vector<T> values(n);
  if (n) std::memset(static_cast<void*>(values.data()), 0xff, n * sizeof(T));
  return values;
}

// Workspace of exactly the promised size, poisoned, behind which a guard must survive.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes), buffer_(unwritten<double>(bytes / 8 + 32)) {}

  ~Workspace() {
    for (size_t i = bytes_ / 8; i < buffer_.size(); ++i) {
      uint64_t bits;
      std::memcpy(&bits, &buffer_[i], sizeof(bits));
      if (bits == ~uint64_t{0}) continue;
      std::printf("FAILED: written behind the workspace\n");
      std::abort();
    }
  }

  void* data() { return buffer_.data(); }

 private:
  int64_t bytes_;
  std::vector<double> buffer_;
};

struct LevelData {
  std::vector<int32_t> cells, blocks;
  Level level;

  LevelData(const std::vector<bool>& visible, int64_t batch, const int64_t* grid,
            const int64_t* block)
      : cells(visible.size(), -1), level{} {
    for (size_t i = 0; i < visible.size(); ++i)
      if (visible[i]) {
        cells[i] = static_cast<int32_t>(blocks.size());
        blocks.push_back(static_cast<int32_t>(i));
      }
    level = {cells.data(), blocks.data(), static_cast<int64_t>(blocks.size()), batch, {}, {}};
    std::copy_n(grid, 3, level.grid);
    std::copy_n(block, 3, level.block);
  }
};

// Visible cells on a grid: `density` of the cells, none in sample 1, and the level of any size.
struct Mask {
  int64_t batch;
  int64_t grid[3];
  std::vector<bool> visible;

  Mask(int64_t batch, const int64_t* cells, double density) : batch(batch), grid{} {
    std::copy_n(cells, 3, grid);
    std::bernoulli_distribution shown(density);
    const int64_t sample = grid[0] * grid[1] * grid[2];
    for (int64_t i = 0; i < batch * sample; ++i)
      visible.push_back(shown(random()) && (density == 1 || i / sample != 1));
  }

  // Where the level is coarser than the cells, a voxel is active if any of its cells is visible.
  LevelData level(const int64_t* size) const {
    int64_t g[3], block[3], step[3];
    for (int a = 0; a < 3; ++a) {
      g[a] = std::min(size[a], grid[a]);
      block[a] = size[a] / g[a];
      step[a] = grid[a] / g[a];
    }
    std::vector<bool> active(batch * g[0] * g[1] * g[2], false);
    for (size_t i = 0; i < visible.size(); ++i) {
      const int64_t x = i % grid[2], y = i / grid[2] % grid[1];
      const int64_t z = i / grid[2] / grid[1] % grid[0], b = i / grid[2] / grid[1] / grid[0];
      const int64_t at = ((b * g[0] + z / step[0]) * g[1] + y / step[1]) * g[2] + x / step[2];
      if (visible[i]) active[at] = true;
    }
    return LevelData(active, batch, g, block);
  }
};

inline double as_double(bf16 v) { return to_float(v); }
inline double as_double(f16 v) { return to_float(v); }
inline double as_double(double v) { return v; }

// Largest difference relative to the largest value; infinite where one side alone is not a number.
template <class T>
double difference(const std::vector<T>& got, const std::vector<T>& want) {
  double largest = 0, scale = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double a = as_double(got[i]), b = as_double(want[i]);
    if (std::isnan(a) != std::isnan(b)) return INFINITY;
    if (std::isnan(b) || a == b) continue;
    largest = std::max(largest, std::abs(a - b));
    scale = std::max(scale, std::abs(b));
  }
  for (const T& v : want)
    if (std::isfinite(as_double(v))) scale = std::max(scale, std::abs(as_double(v)));
  return largest > 0 ? largest / scale : 0;
}

// Worst difference seen, by "op dtype numbers", and the number of comparisons.
class Report {
 public:
  template <class T>
  void add(const std::string& what, const std::vector<T>& first, const std::vector<T>& second,
           const std::vector<T>& want) {
    if (first.size() && std::memcmp(first.data(), second.data(), first.size() * sizeof(T)) != 0) {
      std::printf("FAILED: %s depends on the order of its items\n", what.c_str());
      std::exit(1);
    }
    Entry& entry = entries_[what];
    entry.worst = std::max(entry.worst, difference(first, want));
    entry.compared += static_cast<int64_t>(want.size());
  }

  void print() const {
    for (const auto& [what, entry] : entries_)
      std::printf("%s %.3g %lld\n", what.c_str(), entry.worst,
                  static_cast<long long>(entry.compared));
  }

 private:
  struct Entry {
    double worst = 0;
    int64_t compared = 0;
  };
  std::map<std::string, Entry> entries_;
};

template <class T>
constexpr DType dtype_of() {
  if (std::is_same_v<T, double>) return DType::f64;
  if (std::is_same_v<T, float>) return DType::f32;
  return std::is_same_v<T, bf16> ? DType::bf16 : DType::f16;
}

template <class T>
std::string suffix(Numbers kind) {
  const char* names[] = {" f32", " f64", " bf16", " f16"};  // in the order of the codes
  const char* name = names[static_cast<int>(dtype_of<T>())];
  return std::string(name) + (kind == Numbers::integers ? " integers" : " reals");
}

}  // namespace host
