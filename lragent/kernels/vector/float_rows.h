// Pointers to rows of any supported dtype, and the upcast of such rows to float rows padded with zeros to a multiple
// of W. Legend: see vector_math.h.
#pragma once

#include <ATen/core/Tensor.h>

#include "vector/dot_products.h"

namespace lragent {

inline bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

// Pointer to elements whose dtype (float32, bfloat16 or float16) is known at run time. Offsets count elements.
struct TypedPointer {
  const char* data = nullptr;
  at::ScalarType type = at::kFloat;

  TypedPointer() = default;
  explicit TypedPointer(const at::Tensor& t)
      : data(static_cast<const char*>(t.const_data_ptr())), type(t.scalar_type()) {}

  explicit TypedPointer(const float* floats) : data(reinterpret_cast<const char*>(floats)) {}
  explicit TypedPointer(const at::BFloat16* bf16) : data(reinterpret_cast<const char*>(bf16)), type(at::kBFloat16) {}

  TypedPointer shifted(int64_t offset) const {
    TypedPointer result = *this;
    result.data = address(offset);
    return result;
  }
  int64_t bytes(int64_t elements) const { return elements * (type == at::kFloat ? 4 : 2); }
  const char* address(int64_t offset) const { return data + bytes(offset); }
  // Calls f(pointer to the element at `offset`, as a pointer to its C++ type).
  template <typename F>
  void visit(int64_t offset, const F& f) const {
    switch (type) {
      case at::kFloat: return f(reinterpret_cast<const float*>(data) + offset);
      case at::kBFloat16: return f(reinterpret_cast<const at::BFloat16*>(data) + offset);
      default: return f(reinterpret_cast<const at::Half*>(data) + offset);
    }
  }
  const at::BFloat16* bf16() const { return reinterpret_cast<const at::BFloat16*>(data); }
  // Rows [..., width] from `offset` on if they need neither upcast nor padding, else null.
  const float* padded_floats(int64_t offset, int64_t width) const {
    return type == at::kFloat && width % W == 0 ? reinterpret_cast<const float*>(data) + offset : nullptr;
  }
};

template <typename T>
inline void upcast_typed_rows(
    const T* from, int64_t rows, int64_t width, int64_t ld_from, float* to, int64_t ld_to, const char* prefetch_at) {
  const int64_t lines = prefetch_at == nullptr ? 0 : ld_from * static_cast<int64_t>(sizeof(T)) / kLineBytes;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < lines; ++i) prefetch_lines<1>(prefetch_at);
    const T* source = from + row * ld_from;
    float* target = to + row * ld_to;
    int64_t d = 0;
    for (; d + W <= width; d += W) load_floats(source + d).store(target + d);
    for (; d < width; ++d) target[d] = static_cast<float>(source[d]);
    for (; d < ld_to; ++d) target[d] = 0.f;
  }
}

// Upcasts rows [rows][ld_from] at `offset` of `from` to floats `to` [rows][ld_to]: the first `width` elements of each
// row, then zeros. Prefetches as many bytes as it reads from `prefetch_at` on, unless that is null.
inline void upcast_rows(
    const TypedPointer& from, int64_t offset, int64_t rows, int64_t width, int64_t ld_from, float* to, int64_t ld_to,
    const char* prefetch_at = nullptr) {
  from.visit(
      offset, [&](const auto* typed) { upcast_typed_rows(typed, rows, width, ld_from, to, ld_to, prefetch_at); });
}

}  // namespace lragent
