// Products of token inputs with a strip of weight rows, which are read where they are stored, in their dtype; and the
// output of the sums. Legend: see linear_call.h. A strip is up to kStrip output features (weight rows) of a projection.
#pragma once

#include "vector/float_rows.h"

namespace lragent {

// Output features of a strip: two vectors, as wide as a register block.
constexpr int64_t kStrip = 2 * W;
// Bytes of an input row that are multiplied in one pass over a strip. Four weight rows of that length stay in the L1
// cache while all register blocks of tokens read them.
constexpr int64_t kPassBytes = 3072;
// With AVX-512, passes are half as long for so many tokens: the inputs of two register blocks then also stay in the L1
// cache. With more tokens they would not stay there in either case.
constexpr int64_t kMaxTokensOfHalfPass = kRegisterFactor == 2 ? 2 * kDotRows : 0;
// Up to so many tokens, half-precision weights are upcast as they are read, not once before.
constexpr int64_t kMaxTokensInPlace = 9;
// For few tokens, memory is the bottleneck, and a weight is read at four places (sections) in parallel: hardware
// prefetchers fetch four sequential reads faster than one. For more tokens, software prefetches at the pace of the
// arithmetic hide more.
constexpr int64_t kSections = 4;
constexpr int64_t kMaxTokensOfSections = 4;

// Scratch memory of one thread, reused by later calls.
struct StripSpace {
  std::vector<float> rows, sums, pass_sums, lora_b, inputs;
};

inline float* ensure_size(std::vector<float>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// sums[t][s] = x[t] . rows[s] for x [tokens][k_pad], rows [count][k_pad] and sums [tokens][kStrip]. `count` is a
// multiple of four. Prefetches `bytes` from `prefetch_at` on.
template <typename X, typename T>
inline void dot_strip(
    const X* x, int64_t tokens, const T* rows, int64_t count, int64_t k_pad, StripSpace& space, float* sums,
    const char* prefetch_at, int64_t bytes) {
  constexpr int64_t chunk = 2 * W;
  const bool half_pass = tokens > kDotRows && tokens <= kMaxTokensOfHalfPass;
  const int64_t max_dim = kPassBytes / (half_pass ? 2 : 1) / static_cast<int64_t>(sizeof(X));
  const int64_t passes = (k_pad + max_dim - 1) / max_dim, pass_bytes = bytes / passes;
  const int64_t pass_dim = ((k_pad + passes - 1) / passes + chunk - 1) / chunk * chunk;
  for (int64_t begin = 0; begin < k_pad; begin += pass_dim) {
    float* pass_sums = begin == 0 ? sums : ensure_size(space.pass_sums, tokens * kStrip);
    const int64_t dim = std::min(pass_dim, k_pad - begin);
    const int64_t step_bytes = prefetch_bytes_per_step(pass_bytes, count, dim, kChunk<kUsesBf16Dot<X, T>>);
    dot_products(x + begin, k_pad, tokens, rows + begin, k_pad, count, dim, pass_sums, kStrip, prefetch_at, step_bytes);
    prefetch_at += pass_bytes;
    for (int64_t i = 0; begin > 0 && i < tokens * kStrip; i += W) {
      (Vec::loadu(sums + i) + Vec::loadu(pass_sums + i)).store(sums + i);
    }
  }
}

// Memory that is read next, to be prefetched.
struct PrefetchRange {
  const char* data;
  int64_t bytes;
};

// The memory of weight rows [first, first + count) of a weight [features][k].
inline PrefetchRange memory_of_rows(const TypedPointer& weight, int64_t first, int64_t count, int64_t k) {
  return {weight.address(first * k), weight.bytes(count * k)};
}

// True if the rows of a weight [features][k] and of `x` [T][k] can be multiplied by the bf16 dot product in place.
inline bool can_use_bf16_dot(const TypedPointer& x, const TypedPointer& weight, int64_t k) {
  return kHasBf16Dot && x.type == at::kBFloat16 && weight.type == at::kBFloat16 && k % (2 * W) == 0;
}

// sums[t][s] = x[t] . weight[first + s] for `count` <= kStrip rows of a weight [features][k].
//
// x is bf16 [tokens][k] for the bf16 dot product, else floats [tokens][padded(k)]. sums [tokens][kStrip]; sums past
// `count` are undefined. Prefetches `next`.
inline void strip_products(
    const TypedPointer& x, int64_t tokens, const TypedPointer& weight, int64_t first, int64_t count, int64_t k,
    const PrefetchRange& next, StripSpace& space, float* sums) {
  const int64_t k_pad = padded(k), offset = first * k, whole = (count + 3) / 4 * 4;
  if (x.type == at::kBFloat16) {
    const at::BFloat16* rows = weight.shifted(offset).bf16();
    if (count != whole) {  // dot products read four rows at a time, and the weight may end before the fourth
      auto* copy = reinterpret_cast<at::BFloat16*>(ensure_size(space.rows, kStrip * k));
      std::copy_n(rows, count * k, copy);
      rows = copy;
    }
    dot_strip(x.bf16(), tokens, rows, whole, k, space, sums, next.data, next.bytes);
    return;
  }
  const auto* inputs = reinterpret_cast<const float*>(x.data);
  if (count == whole && k == k_pad && (tokens <= kMaxTokensInPlace || weight.type == at::kFloat)) {
    weight.visit(offset, [&](const auto* rows) {
      dot_strip(inputs, tokens, rows, count, k, space, sums, next.data, next.bytes);
    });
    return;
  }
  float* rows = ensure_size(space.rows, kStrip * k_pad);
  upcast_rows(weight, offset, count, k, k, rows, k_pad);
  dot_strip(inputs, tokens, rows, whole, k_pad, space, sums, next.data, next.bytes);
}

// True if a weight is read in sections for so many tokens. Its rows must need no copy and no padding.
inline bool reads_sections(const TypedPointer& x, int64_t tokens, int64_t k) {
  return tokens <= kMaxTokensOfSections && (x.type == at::kBFloat16 || k == padded(k));
}

// sums[t][i][s] = x[t] . weight[first + i * section + s] for `count` <= kStrip rows of each of the four sections.
// x [tokens][k], weight [features][k], sums [tokens][kSections][kStrip]. `section` = rows per section.
inline void section_products(
    const TypedPointer& x, int64_t tokens, const TypedPointer& weight, int64_t first, int64_t section, int64_t count,
    int64_t k, float* sums) {
  auto multiply = [&](const auto* inputs, const auto* rows) {
    dot_sections(inputs, k, tokens, rows, section * k, k, count, k, sums, kSections * kStrip, kStrip);
  };
  if (x.type == at::kBFloat16) return multiply(x.bf16(), weight.shifted(first * k).bf16());
  weight.visit(first * k, [&](const auto* rows) { multiply(reinterpret_cast<const float*>(x.data), rows); });
}

template <typename T>
inline void store_strip(const Vec& left, const Vec& right, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    left.store(to);
    right.store(to + W);
  } else {
    at::vec::convert_from_float<T>(left, right).store(to);
  }
}

// Writes the first `count` of sums [tokens][ld], plus bias [kStrip] (null: none), as T to `to` [tokens][ld_to].
template <typename T>
inline void store_rows(
    const float* sums, int64_t ld, int64_t tokens, int64_t count, const float* bias, T* to, int64_t ld_to) {
  static const float zeros[kStrip] = {};
  if (bias == nullptr) bias = zeros;
  const Vec bias_left = Vec::loadu(bias), bias_right = Vec::loadu(bias + W);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = sums + t * ld;
    const Vec left = Vec::loadu(row) + bias_left, right = Vec::loadu(row + W) + bias_right;
    if (count == kStrip) {
      store_strip(left, right, to + t * ld_to);
    } else {
      T strip[kStrip];
      store_strip(left, right, strip);
      std::copy_n(strip, count, to + t * ld_to);
    }
  }
}

}  // namespace lragent
