// Registers of floats, and what is done with rows of them. Legend: W = floats in a vector register.
//
// Every row is padded to a multiple of W, so that no loop here has a tail.
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

// Begins where a cache line does: a register is then never read from two lines.
template <typename T>
struct LineAllocator {
  using value_type = T;

  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* numbers, size_t) { ::operator delete(numbers, kLine); }
  bool operator==(const LineAllocator&) const = default;

  static constexpr std::align_val_t kLine{64};
};

template <typename T>
using Aligned = std::vector<T, LineAllocator<T>>;

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// Memory that is needed soon is asked for a few lines at a time between arithmetic: pages lie anywhere, so the
// processor can't foresee the next one, and asked for all at once it would be waited for. `ahead` is where to go on;
// it may run past what is needed or past the end of memory.
template <int kLines>
inline void ask(const char*& ahead) {
#pragma GCC unroll 4
  for (int i = 0; i < kLines; ++i) __builtin_prefetch(ahead + i * 64, 0, 2);
  ahead += kLines * 64;
}

// The larger numbers, or those of `b` where one is NaN. (`at::vec::maximum` hands on any NaN, and takes five times as
// long.)
inline Vec larger_of(const Vec& a, const Vec& b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return at::vec::maximum(a, b);
#endif
}

inline float largest_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, x);
}

// The same of a row. Four maxima at once: each waits for the one before.
inline float largest_of(const float* row, int64_t n) {
  Vec largest[4];
  for (Vec& x : largest) x = Vec::loadu(row);
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) largest[j] = larger_of(largest[j], Vec::loadu(row + i + j * W));
  }
  for (; i < n; i += W) largest[0] = larger_of(largest[0], Vec::loadu(row + i));
  return largest_of(larger_of(larger_of(largest[0], largest[1]), larger_of(largest[2], largest[3])));
}

inline float sum_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}

template <typename T>
inline Vec load_floats(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(from);
  } else {
    Vec numbers;
    at::vec::load_to_float<T>(from, numbers);
    return numbers;
  }
}

// [rows][columns] -> [columns][rows]; both are multiples of W.
inline void transpose(const float* from, int64_t rows, int64_t columns, float* to, int64_t ld_to) {
  for (int64_t i = 0; i < rows; i += W) {
    for (int64_t j = 0; j < columns; j += W) {
      at::vec::transpose_mxn<float, W, W>(from + i * columns + j, columns, to + j * ld_to + i, ld_to);
    }
  }
}

inline void scale_row(float* row, int64_t n, float factor) {
  const Vec f(factor);
  for (int64_t i = 0; i < n; i += W) (Vec::loadu(row + i) * f).store(row + i);
}

// exp(x) for x <= 0, and 0 where that is below the smallest normal number (without AVX-512: below exp(-87));
// polynomial of Cephes' expf, good to two units in the last place.
inline Vec exp_of_nonpositive(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const Vec least(-200.f);  // an infinity minus itself would be NaN
#else
  const Vec least(-87.f);
#endif
  const Vec rounder(12582912.f);  // 1.5 * 2^23: adding it leaves the rounded number in the lowest bits
  const Vec clamped = larger_of(least, x);
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
  return Vec::blendv(result, Vec(0.f), x < least);
#endif
}

// How raw products become scores: `scale * x`, then `softcap * tanh(score / softcap)` if softcap > 0.
struct ScoreScale {
  float scale, softcap;
};

// Products of keys [low, high) of a tile become exp(score - maximum); keys outside, of `count`, become 0.
//
// `maximum` and `total` are the running ones of the row. Returns what the row's former sums must be multiplied by.
// The row may be overwritten up to the next multiple of W after `count`.
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
  maximum = std::max(before, largest_of(scores + first, last - first) * scaling.scale);
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
