// Vector registers of floats, and the operations on rows of floats that the kernels share: prefetch, maximum, sum,
// transpose, exp and softmax.
//
// Legend: W = floats per vector register, ld = leading dimension (elements from one row to the next).
// Every row is padded to a multiple of W, so no loop here has a scalar tail.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

namespace lragent {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t W = Vec::size();
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int64_t kLineBytes = 64;  // of a cache line

// Allocates memory that starts at a cache line. A vector load then never crosses two lines.
template <typename T>
struct LineAllocator {
  using value_type = T;

  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kAlignment)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kAlignment); }
  bool operator==(const LineAllocator&) const = default;

  static constexpr std::align_val_t kAlignment{kLineBytes};
};

template <typename T>
using Aligned = std::vector<T, LineAllocator<T>>;

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// Prefetches the next kLines cache lines into the L2 cache and advances `prefetch_at` past them.
//
// The kernels prefetch a few lines at a time between arithmetic. Hardware prefetchers can't predict the address of the
// next page, and a burst of prefetches would stall because a core tracks few outstanding loads. `prefetch_at` may run
// past the data or past mapped memory: a prefetch never faults.
template <int kLines>
inline void prefetch_lines(const char*& prefetch_at) {
#pragma GCC unroll 4
  for (int i = 0; i < kLines; ++i) __builtin_prefetch(prefetch_at + i * kLineBytes, 0, 2);
  prefetch_at += kLines * kLineBytes;
}

// Elementwise maximum; the element of `b` where either is NaN. `at::vec::maximum` propagates NaN and takes five times
// as long.
inline Vec fast_max(const Vec& a, const Vec& b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return at::vec::maximum(a, b);
#endif
}

inline float max_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, x);
}

// Maximum of a row [n]. Four independent accumulators hide the latency of the maximum.
inline float max_of(const float* row, int64_t n) {
  Vec maxima[4];
  for (Vec& x : maxima) x = Vec::loadu(row);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) maxima[j] = fast_max(maxima[j], Vec::loadu(row + i + j * W));
  }
  for (; i < n; i += W) maxima[0] = fast_max(maxima[0], Vec::loadu(row + i));
  return max_of(fast_max(fast_max(maxima[0], maxima[1]), fast_max(maxima[2], maxima[3])));
}

inline float sum_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

// Loads W elements and upcasts them to float.
template <typename T>
inline Vec load_floats(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(from);
  } else {
    Vec x;
    at::vec::load_to_float<T>(from, x);
    return x;
  }
}

// from [rows][width] -> to [width][ld_to]; `rows` and `width` are multiples of W.
inline void transpose(const float* from, int64_t rows, int64_t width, float* to, int64_t ld_to) {
  for (int64_t i = 0; i < rows; i += W) {
    for (int64_t j = 0; j < width; j += W) {
      at::vec::transpose_mxn<float, W, W>(from + i * width + j, width, to + j * ld_to + i, ld_to);
    }
  }
}

// row [n] *= factor.
inline void scale_row(float* row, int64_t n, float factor) {
  const Vec f(factor);
  for (int64_t i = 0; i < n; i += W) (Vec::loadu(row + i) * f).store(row + i);
}

// exp(x) for x <= 0. Results below the smallest normal float become 0 (without AVX-512: results below exp(-87)).
// Polynomial of Cephes' expf, accurate to two units in the last place.
inline Vec exp_of_nonpositive(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const Vec lowest(-200.f);  // clamps -infinity: -infinity minus itself would be NaN
#else
  const Vec lowest(-87.f);
#endif
  const Vec rounder(12582912.f);  // 1.5 * 2^23: adding it leaves the rounded number in the lowest bits
  const Vec clamped = fast_max(lowest, x);
  const Vec shifted = at::vec::fmadd(clamped, Vec(1.44269504088896341f), rounder), n = shifted - rounder;
  const Vec r = at::vec::fmadd(n, Vec(2.12194440e-4f), at::vec::fmadd(n, Vec(-0.693359375f), clamped));
  Vec p = at::vec::fmadd(Vec(1.9875691500e-4f), r, Vec(1.3981999507e-3f));
  p = at::vec::fmadd(p, r, Vec(8.3334519073e-3f));
  p = at::vec::fmadd(p, r, Vec(4.1665795894e-2f));
  p = at::vec::fmadd(p, r, Vec(1.6666665459e-1f));
  p = at::vec::fmadd(p, r, Vec(5.0000001201e-1f));
  p = at::vec::fmadd(p, r * r, r + Vec(1.f));
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  const auto exponent = at::vec::cast<int32_t>(shifted) << at::vec::Vectorized<int32_t>(23);
  const Vec result = at::vec::cast<float>(at::vec::cast<int32_t>(p) + exponent);
  return Vec::blendv(result, Vec(0.f), x < lowest);
#endif
}

// Turns a dot product x into a score: `scale * x`, then `softcap * tanh(score / softcap)` if softcap > 0.
struct ScoreScale {
  float scale, softcap;
};

// One row of an online softmax. `scores` [padded(count)] holds dot products and becomes the weights
// exp(score - maximum) for keys [low, high), and 0 for the other keys below `count`. Elements from `count` up to the
// next multiple of W may be overwritten.
//
// Updates the row's running `maximum` and `total`. Returns the factor that rescales the row's earlier sums.
inline float softmax_row(
    float* scores, int64_t low, int64_t high, int64_t count, ScoreScale scaling, float& maximum, float& total) {
  if (high <= low) {
    std::fill(scores, scores + count, 0.f);
    return 1.f;
  }
  const int64_t first = low / W * W, last = padded(high);
  if (scaling.softcap > 0.f) {
    const Vec cap(scaling.softcap), factor(scaling.scale / scaling.softcap);
    for (int64_t j = first; j < last; j += W) ((Vec::loadu(scores + j) * factor).tanh() * cap).store(scores + j);
    scaling.scale = 1.f;
  }
  std::fill(scores + first, scores + low, kMinusInfinity);
  std::fill(scores + high, scores + last, kMinusInfinity);
  const float before = maximum;
  maximum = std::max(before, max_of(scores + first, last - first) * scaling.scale);
  const Vec scale(scaling.scale), shift(maximum);
  Vec sum(0.f);
  for (int64_t j = first; j < last; j += W) {
    const Vec weight = exp_of_nonpositive(at::vec::fmsub(Vec::loadu(scores + j), scale, shift));
    weight.store(scores + j);
    sum = sum + weight;
  }
  std::fill(scores, scores + first, 0.f);
  if (last < count) std::fill(scores + last, scores + count, 0.f);
  const float correction = before == kMinusInfinity ? 0.f : std::exp(before - maximum);
  total = total * correction + sum_of(sum);
  return correction;
}

}  // namespace lragent
