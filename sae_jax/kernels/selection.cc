// The k largest of each row of product + bias on a CPU, for XLA: the same columns in the same order as jax.lax.top_k.
//
// A row is cut into groups of columns. The k-th largest maximum of a group is a bound that at least k entries reach. Only
// groups whose maximum reaches it can hold one of the k, so that a row is read once and little of it a second time.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "blocks.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kRows = 16;    // of a block
constexpr int64_t kGroups = 16;  // for each of the k, where there are columns enough

// Integers in the order of XLA's top-k: -NaN < -inf < -0 < +0 < inf < NaN.
inline int32_t Ordered(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Larger for a larger value, and of equal ones for the lower column.
inline uint64_t Packed(int32_t ordered, int64_t column) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(ordered) ^ 0x80000000u) << 32) |
         (0xffffffffu - static_cast<uint32_t>(column));
}

struct Rows {
  const float* product;
  const float* bias;
  int32_t* columns;
  int64_t rows, width, k, group, groups;

  void Row(int64_t row, std::vector<int32_t>& largest, std::vector<int32_t>& sorted, std::vector<uint64_t>& found) const {
    const float* values = product + row * width;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t end = std::min(width, (g + 1) * group);
      int32_t most = std::numeric_limits<int32_t>::min();
      for (int64_t f = g * group; f < end; ++f) most = std::max(most, Ordered(values[f] + bias[f]));
      largest[g] = most;
    }
    int32_t bound = std::numeric_limits<int32_t>::min();
    if (groups > k) {
      std::copy(largest.begin(), largest.end(), sorted.begin());
      std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<>());
      bound = sorted[k - 1];
    }
    found.clear();
    for (int64_t g = 0; g < groups; ++g) {
      if (largest[g] < bound) continue;
      const int64_t end = std::min(width, (g + 1) * group);
      for (int64_t f = g * group; f < end; ++f) {
        const int32_t ordered = Ordered(values[f] + bias[f]);
        if (ordered >= bound) found.push_back(Packed(ordered, f));
      }
    }
    if (static_cast<int64_t>(found.size()) < k) {
      // NaN + NaN is either of them, and a compiler may choose otherwise in each loop.
      found.clear();
      for (int64_t f = 0; f < width; ++f) found.push_back(Packed(Ordered(values[f] + bias[f]), f));
    }
    if (static_cast<int64_t>(found.size()) > k) {
      std::nth_element(found.begin(), found.begin() + k, found.end(), std::greater<>());
    }
    std::sort(found.begin(), found.begin() + k, std::greater<>());
    for (int64_t j = 0; j < k; ++j) columns[row * k + j] = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(found[j]));
  }
};

ffi::Error Columns(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> product, ffi::Buffer<ffi::F32> bias,
                   ffi::ResultBuffer<ffi::S32> columns) {
  const auto shape = product.dimensions(), made = columns->dimensions();
  if (shape.size() != 2 || made.size() != 2 || static_cast<int64_t>(bias.element_count()) != shape[1] ||
      made[0] != shape[0] || made[1] > shape[1]) {
    return ffi::Error::InvalidArgument("product [B, F], bias [F] and columns [B, k] with k <= F");
  }
  if (made[0] == 0 || made[1] == 0) return ffi::Error::Success();
  Rows all{product.typed_data(), bias.typed_data(), columns->typed_data(), shape[0], shape[1], made[1]};
  all.group = std::clamp<int64_t>(all.width / (kGroups * all.k) / 16 * 16, 16, 64);
  all.groups = (all.width + all.group - 1) / all.group;
  InBlocks(pool, (all.rows + kRows - 1) / kRows, [all] {
    return [all, largest = std::vector<int32_t>(all.groups), sorted = std::vector<int32_t>(all.groups),
            found = std::vector<uint64_t>()](int64_t block) mutable {
      const int64_t end = std::min(all.rows, (block + 1) * kRows);
      for (int64_t row = block * kRows; row < end; ++row) all.Row(row, largest, sorted, found);
    };
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(sae_jax_columns, Columns,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
