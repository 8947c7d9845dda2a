// Rows of any supported dtype as float rows padded with zeros to a multiple of W.
#pragma once

#include <ATen/core/Tensor.h>

#include "dot_products.h"

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

  explicit Numbers(const float* floats) : data(reinterpret_cast<const char*>(floats)) {}
  explicit Numbers(const at::BFloat16* numbers)
      : data(reinterpret_cast<const char*>(numbers)), type(at::kBFloat16) {}

  Numbers from(int64_t element) const {
    Numbers rest = *this;
    rest.data = at(element);
    return rest;
  }
  int64_t bytes(int64_t elements) const { return elements * (type == at::kFloat ? 4 : 2); }
  const char* at(int64_t element) const { return data + bytes(element); }
  // Calls f(numbers from an element on, with their type).
  template <typename F>
  void typed(int64_t element, const F& f) const {
    switch (type) {
      case at::kFloat: return f(reinterpret_cast<const float*>(data) + element);
      case at::kBFloat16: return f(reinterpret_cast<const at::BFloat16*>(data) + element);
      default: return f(reinterpret_cast<const at::Half*>(data) + element);
    }
  }
  const at::BFloat16* bfloats() const { return reinterpret_cast<const at::BFloat16*>(data); }
  // The numbers themselves if they are floats in rows that need no padding.
  const float* floats(int64_t element, int64_t columns) const {
    return type == at::kFloat && columns % W == 0 ? reinterpret_cast<const float*>(data) + element : nullptr;
  }
};

template <typename T>
inline void copy_rows(
    const T* from, int64_t rows, int64_t columns, int64_t ld_from, float* to, int64_t ld_to, const char* ahead) {
  const int64_t lines = ahead == nullptr ? 0 : ld_from * static_cast<int64_t>(sizeof(T)) / 64;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < lines; ++i) ask<1>(ahead);
    const T* source = from + row * ld_from;
    float* target = to + row * ld_to;
    int64_t d = 0;
    for (; d + W <= columns; d += W) load_floats(source + d).store(target + d);
    for (; d < columns; ++d) target[d] = static_cast<float>(source[d]);
    for (; d < ld_to; ++d) target[d] = 0.f;
  }
}

// `columns` of each of `rows` rows, which lie `ld_from` apart; the rest of a row up to `ld_to` becomes zero.
// `ahead` is where rows of the same size lie that are needed next, if any (see `ask`).
inline void to_floats(
    const Numbers& numbers, int64_t element, int64_t rows, int64_t columns, int64_t ld_from, float* to, int64_t ld_to,
    const char* ahead = nullptr) {
  numbers.typed(element, [&](const auto* from) { copy_rows(from, rows, columns, ld_from, to, ld_to, ahead); });
}

}  // namespace lragent
