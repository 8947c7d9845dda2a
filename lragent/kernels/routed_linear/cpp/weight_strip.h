// Products of token rows with a strip of weight rows, which are read where they lie, in their dtype; and their output.
//
// Legend: T = tokens, K = input features, S = kStrip weight rows of a projection.
#pragma once

#include "../../vector/float_rows.h"

namespace lragent {

// Output features that are computed together: two vectors of a register block.
constexpr int64_t kStrip = 2 * W;
// Bytes of an input whose products are summed in one go: four rows of a strip then stay in the innermost cache.
constexpr int64_t kBytesForDotProducts = 3072;
// With AVX-512, inputs in two register blocks stay there as well if it is half of that; more pass through in any case.
constexpr int64_t kMostInHalves = kRegisterFactor == 2 ? 2 * kDotRows : 0;
// Up to so many tokens, numbers of half precision are extended while they are read, not once before.
constexpr int64_t kTokensForInPlace = 9;
// Places of a weight that are read at once for few tokens, when memory is what is waited for: the processor fetches
// four streams faster than any one. For more tokens, asking at the pace of the arithmetic hides more.
constexpr int64_t kStreams = 4;
constexpr int64_t kTokensForStreams = 4;

// What a thread needs to compute strips, kept between calls.
struct StripSpace {
  std::vector<float> rows, sums, part, up, inputs;
};

inline float* at_least(std::vector<float>& numbers, int64_t count) {
  if (static_cast<int64_t>(numbers.size()) < count) numbers.resize(count);
  return numbers.data();
}

// sums[t][s] = x[t] . rows[s] for `count` rows, a multiple of four, that lie `k_pad` apart; `bytes` are asked for from
// `ahead` on (see `ask`).
template <typename X, typename T>
inline void dot_strip(
    const X* x, int64_t tokens, const T* rows, int64_t count, int64_t k_pad, StripSpace& space, float* sums,
    const char* ahead, int64_t bytes) {
  constexpr int64_t chunk = 2 * W;
  const bool in_halves = tokens > kDotRows && tokens <= kMostInHalves;
  const int64_t most = kBytesForDotProducts / (in_halves ? 2 : 1) / static_cast<int64_t>(sizeof(X));
  const int64_t parts = (k_pad + most - 1) / most, bytes_a_part = bytes / parts;
  const int64_t features = ((k_pad + parts - 1) / parts + chunk - 1) / chunk * chunk;
  for (int64_t begin = 0; begin < k_pad; begin += features) {
    float* part = begin == 0 ? sums : at_least(space.part, tokens * kStrip);
    const int64_t dim = std::min(features, k_pad - begin);
    const int64_t step = bytes_a_step(bytes_a_part, count, dim, kChunk<kInPairs<X, T>>);
    dot_products(x + begin, k_pad, tokens, rows + begin, k_pad, count, dim, part, kStrip, ahead, step);
    ahead += bytes_a_part;
    for (int64_t i = 0; begin > 0 && i < tokens * kStrip; i += W) {
      (Vec::loadu(sums + i) + Vec::loadu(part + i)).store(sums + i);
    }
  }
}

// Memory that is read next.
struct Next {
  const char* at;
  int64_t bytes;
};

inline Next rows_from(const Numbers& weight, int64_t first, int64_t count, int64_t k) {
  return {weight.at(first * k), weight.bytes(count * k)};
}

// Whether a weight's rows are multiplied with `x`, `[T, K]`, in pairs: as they lie, both.
inline bool multiplies_in_pairs(const Numbers& x, const Numbers& weight, int64_t k) {
  return kMultipliesPairs && x.type == at::kBFloat16 && weight.type == at::kBFloat16 && k % (2 * W) == 0;
}

// sums[t][s] = x[t] . weight[first + s] for `tokens` rows of x, `[T, K]` bfloat16 numbers to be multiplied in pairs or
// `[T, padded K]` floats, and `count` <= S rows of a weight `[rows, K]`. Sums past `count` are undefined.
inline void strip_products(
    const Numbers& x, int64_t tokens, const Numbers& weight, int64_t first, int64_t count, int64_t k, const Next& next,
    StripSpace& space, float* sums) {
  const int64_t k_pad = padded(k), element = first * k, whole = (count + 3) / 4 * 4;
  if (x.type == at::kBFloat16) {
    const at::BFloat16* rows = weight.from(element).bfloats();
    if (count != whole) {  // dot products read four rows at a time
      auto* copy = reinterpret_cast<at::BFloat16*>(at_least(space.rows, kStrip * k));
      std::copy_n(rows, count * k, copy);
      rows = copy;
    }
    dot_strip(x.bfloats(), tokens, rows, whole, k, space, sums, next.at, next.bytes);
    return;
  }
  const auto* floats = reinterpret_cast<const float*>(x.data);
  if (count == whole && k == k_pad && (tokens <= kTokensForInPlace || weight.type == at::kFloat)) {
    weight.typed(element, [&](const auto* rows) {
      dot_strip(floats, tokens, rows, count, k, space, sums, next.at, next.bytes);
    });
    return;
  }
  float* rows = at_least(space.rows, kStrip * k_pad);
  to_floats(weight, element, count, k, k, rows, k_pad);
  dot_strip(floats, tokens, rows, whole, k_pad, space, sums, next.at, next.bytes);
}

// Whether a weight's rows are read as streams for so many tokens: where they lie, with no more to do than to multiply.
inline bool reads_streams(const Numbers& x, int64_t tokens, int64_t k) {
  return tokens <= kTokensForStreams && (x.type == at::kBFloat16 || k == padded(k));
}

// sums[t][i][s] = x[t] . weight[first + i apart + s] for `count` <= S rows of each of four streams; a token's sums are
// four times S.
inline void stream_products(
    const Numbers& x, int64_t tokens, const Numbers& weight, int64_t first, int64_t apart, int64_t count, int64_t k,
    float* sums) {
  auto multiply = [&](const auto* inputs, const auto* rows) {
    dot_streams(inputs, k, tokens, rows, apart * k, k, count, k, sums, kStreams * kStrip, kStrip);
  };
  if (x.type == at::kBFloat16) return multiply(x.bfloats(), weight.from(first * k).bfloats());
  weight.typed(first * k, [&](const auto* rows) { multiply(reinterpret_cast<const float*>(x.data), rows); });
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

// Writes sums, `ld` apart, plus bias (padded to S, or null) as T, `ld_to` apart.
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
      T numbers[kStrip];
      store_strip(left, right, numbers);
      std::copy_n(numbers, count, to + t * ld_to);
    }
  }
}

}  // namespace lragent
