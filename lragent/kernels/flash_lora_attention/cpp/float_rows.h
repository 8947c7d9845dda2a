// Rows of any supported dtype as float rows padded with zeros to a multiple of W.
#pragma once

#include <ATen/core/Tensor.h>

#include "vector_math.h"

namespace lragent {

inline bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

// Start of a tensor's numbers, with their dtype.
struct Numbers {
  const char* data = nullptr;
  at::ScalarType type = at::kFloat;

  Numbers() = default;
  explicit Numbers(const at::Tensor& t) : data(static_cast<const char*>(t.const_data_ptr())), type(t.scalar_type()) {}

  const char* at(int64_t element) const { return data + element * (type == at::kFloat ? 4 : 2); }
  // The numbers themselves if they are floats in rows that need no padding.
  const float* floats(int64_t element, int64_t columns) const {
    return type == at::kFloat && columns % W == 0 ? reinterpret_cast<const float*>(data) + element : nullptr;
  }
};

template <typename T>
inline void copy_rows(const T* from, int64_t rows, int64_t columns, int64_t ld_from, float* to, int64_t ld_to) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* source = from + row * ld_from;
    float* target = to + row * ld_to;
    int64_t d = 0;
    for (; d + W <= columns; d += W) {
      Vec numbers;
      if constexpr (std::is_same_v<T, float>) {
        numbers = Vec::loadu(source + d);
      } else {
        at::vec::load_to_float<T>(source + d, numbers);
      }
      numbers.store(target + d);
    }
    for (; d < columns; ++d) target[d] = static_cast<float>(source[d]);
    for (; d < ld_to; ++d) target[d] = 0.f;
  }
}

// `columns` of each of `rows` rows, which lie `ld_from` apart; the rest of a row up to `ld_to` becomes zero.
inline void to_floats(
    const Numbers& numbers, int64_t element, int64_t rows, int64_t columns, int64_t ld_from, float* to, int64_t ld_to) {
  const char* from = numbers.at(element);
  if (numbers.type == at::kFloat) {
    copy_rows(reinterpret_cast<const float*>(from), rows, columns, ld_from, to, ld_to);
  } else if (numbers.type == at::kBFloat16) {
    copy_rows(reinterpret_cast<const at::BFloat16*>(from), rows, columns, ld_from, to, ld_to);
  } else {
    copy_rows(reinterpret_cast<const at::Half*>(from), rows, columns, ld_from, to, ld_to);
  }
}

}  // namespace lragent
