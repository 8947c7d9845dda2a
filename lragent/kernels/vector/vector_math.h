// Small dense kernels on float tiles. Legend: M, N, K = sizes of a product, W = floats in a vector register.
//
// Every tile's rows are padded to a multiple of W, so that no loop here has a tail.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace lragent {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t W = Vec::size();
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// Memory that is needed soon is asked for a few lines at a time between arithmetic: pages lie anywhere, so the
// processor can't foresee the next one, and asked for all at once it would be waited for. `ahead` is where to go on;
// it may run past what is needed or past the end of memory.
template <int kLines>
inline void ask(const char*& ahead) {
#pragma GCC unroll 4
  for (int i = 0; i < kLines; ++i) __builtin_prefetch(ahead + i * 64);
  ahead += kLines * 64;
}

inline float largest_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, x);
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

// C[m][n] (+)= sum_k A[m][k] * B[k][n] for MR rows and NV vectors of C, which stay in registers.
// The sum over k is added to C as a whole: sums over a long context then round once a page, not once a key.
template <int MR, int NV, bool kAccumulate, bool kAhead, typename T>
inline void product_block(
    const float* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t k_size, const char*& ahead) {
  constexpr int lines = std::max<int>(1, NV * W * sizeof(T) / 64);
  Vec acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[m][n] = Vec(0.f);
  }
  for (int64_t k = 0; k < k_size; ++k) {
    if constexpr (kAhead) ask<lines>(ahead);
    Vec row[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) row[n] = load_floats(b + k * ldb + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec factor(a[m * lda + k]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) acc[m][n] = at::vec::fmadd(factor, row[n], acc[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      float* to = c + m * ldc + n * W;
      (kAccumulate ? Vec::loadu(to) + acc[m][n] : acc[m][n]).store(to);
    }
  }
}

template <int MR, int NV, bool kAccumulate, bool kAhead, typename T>
inline void product_rows(
    const float* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t n_size, int64_t k_size,
    const char* ahead) {
  int64_t n = 0;
  for (; n + NV * W <= n_size; n += NV * W) {
    product_block<MR, NV, kAccumulate, kAhead>(a, lda, b + n, ldb, c + n, ldc, k_size, ahead);
  }
  for (; n < n_size; n += W) product_block<MR, 1, kAccumulate, kAhead>(a, lda, b + n, ldb, c + n, ldc, k_size, ahead);
}

// C[M][N] (+)= A[M][K] B[K][N]; N is a multiple of W. Register blocks fit the 16 registers of AVX2.
// With kAhead, as many bytes as B has are asked for from `ahead` on.
template <bool kAccumulate, bool kAhead = false, typename T>
inline void product(
    const float* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t m_size, int64_t n_size,
    int64_t k_size, const char* ahead = nullptr) {
  const int64_t rows = m_size > 8 ? 6 : m_size > 6 ? 4 : m_size;
  switch (rows) {
    case 1: product_rows<1, 8, kAccumulate, kAhead>(a, lda, b, ldb, c, ldc, n_size, k_size, ahead); break;
    case 2: product_rows<2, 4, kAccumulate, kAhead>(a, lda, b, ldb, c, ldc, n_size, k_size, ahead); break;
    case 3: product_rows<3, 4, kAccumulate, kAhead>(a, lda, b, ldb, c, ldc, n_size, k_size, ahead); break;
    case 4: product_rows<4, 2, kAccumulate, kAhead>(a, lda, b, ldb, c, ldc, n_size, k_size, ahead); break;
    case 5: product_rows<5, 2, kAccumulate, kAhead>(a, lda, b, ldb, c, ldc, n_size, k_size, ahead); break;
    case 6: product_rows<6, 2, kAccumulate, kAhead>(a, lda, b, ldb, c, ldc, n_size, k_size, ahead); break;
    default: return;
  }
  if (m_size > rows) {
    product<kAccumulate>(a + rows * lda, lda, b, ldb, c + rows * ldc, ldc, m_size - rows, n_size, k_size);
  }
}

// Sums of four vectors.
inline void store_sums(const Vec (&x)[4], float* to) {
#if defined(CPU_CAPABILITY_AVX2)
  auto pair = [](__m256 a, __m256 b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); };
  const __m256d low = _mm256_castps_pd(pair(x[0], x[1])), high = _mm256_castps_pd(pair(x[2], x[3]));
  const __m256 halves = _mm256_add_ps(
      _mm256_castpd_ps(_mm256_unpacklo_pd(low, high)), _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
  for (int i = 0; i < 4; ++i) to[i] = sum_of(x[i]);
#endif
}

// Dot products of R queries with four keys. Every vector of the rows asks for kAsks lines, `pace` bytes apart.
template <int R, int kAsks, typename T>
inline void dot_block(
    const float* query, int64_t ld_query, const T* keys, int64_t ld_keys, int64_t dim, float* scores, int64_t ld_scores,
    const char*& ahead, int64_t pace) {
  Vec acc[R][4];
#pragma GCC unroll 4
  for (int row = 0; row < R; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc[row][i] = Vec(0.f);
  }
  for (int64_t d = 0; d < dim; d += W) {
#pragma GCC unroll 4
    for (int i = 0; i < kAsks; ++i) {
      __builtin_prefetch(ahead);
      ahead += pace;
    }
    auto load = [&](int row) { return Vec::loadu(query + row * ld_query + d); };
    // Sixteen registers hold the sums and either four keys (a query is then read from memory in the multiplication), or
    // the queries and one key (which must be in a register if its numbers are extended).
    if constexpr (std::is_same_v<T, float>) {
      Vec key[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) key[i] = load_floats(keys + i * ld_keys + d);
#pragma GCC unroll 4
      for (int row = 0; row < R; ++row) {
        const Vec chunk = load(row);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[row][i] = at::vec::fmadd(chunk, key[i], acc[row][i]);
      }
    } else {
      Vec chunk[R];
#pragma GCC unroll 4
      for (int row = 0; row < R; ++row) chunk[row] = load(row);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec key = load_floats(keys + i * ld_keys + d);
#pragma GCC unroll 4
        for (int row = 0; row < R; ++row) acc[row][i] = at::vec::fmadd(chunk[row], key, acc[row][i]);
      }
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < R; ++row) store_sums(acc[row], scores + row * ld_scores);
}

// scores[row][j] = query[row] . keys[j] for keys as they lie in a page: a multiple of four, from `count` up.
// `bytes` are asked for from `ahead` on, evenly: the processor keeps few requests at a time.
template <typename T>
inline void dot_products(
    const float* query, int64_t ld_query, int64_t rows, const T* keys, int64_t ld_keys, int64_t count, int64_t dim,
    float* scores, int64_t ld_scores, const char* ahead, int64_t bytes) {
  const int64_t blocks = (rows + 2) / 3, vectors = (count + 3) / 4 * (dim / W) * blocks;
  const int64_t pace = (bytes + vectors - 1) / vectors;
  for (int64_t j = 0; j < count; j += 4) {
    auto block = [&]<int R, int kAsks>(int64_t row, int64_t step) {
      dot_block<R, kAsks>(
          query + row * ld_query, ld_query, keys + j * ld_keys, ld_keys, dim, scores + row * ld_scores + j, ld_scores,
          ahead, step);
    };
    auto blocks_of = [&]<int kAsks>(int64_t step) {
      int64_t row = 0;
      for (; row + 3 <= rows; row += 3) block.template operator()<3, kAsks>(row, step);
      if (rows - row == 2) block.template operator()<2, kAsks>(row, step);
      if (rows - row == 1) block.template operator()<1, kAsks>(row, step);
    };
    if (pace > 64) {
      blocks_of.template operator()<2>((pace + 1) / 2);
    } else {
      blocks_of.template operator()<1>(pace);
    }
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

// exp(x) for x <= 0, and 0 below the smallest normal result; polynomial of Cephes' expf, good to two units in the
// last place.
inline Vec exp_of_nonpositive(const Vec& x) {
  const Vec least(-87.f), rounder(12582912.f);  // 1.5 * 2^23: adding it leaves the rounded number in the lowest bits
  const Vec clamped = at::vec::maximum(x, least);
  const Vec shifted = at::vec::fmadd(clamped, Vec(1.44269504088896341f), rounder), n = shifted - rounder;
  const Vec r = at::vec::fmadd(n, Vec(2.12194440e-4f), at::vec::fmadd(n, Vec(-0.693359375f), clamped));
  Vec p = at::vec::fmadd(Vec(1.9875691500e-4f), r, Vec(1.3981999507e-3f));
  p = at::vec::fmadd(p, r, Vec(8.3334519073e-3f));
  p = at::vec::fmadd(p, r, Vec(4.1665795894e-2f));
  p = at::vec::fmadd(p, r, Vec(1.6666665459e-1f));
  p = at::vec::fmadd(p, r, Vec(5.0000001201e-1f));
  p = at::vec::fmadd(p, r * r, r + Vec(1.f));
  const auto exponent = at::vec::cast<int32_t>(shifted) << at::vec::Vectorized<int32_t>(23);
  const Vec result = at::vec::cast<float>(at::vec::cast<int32_t>(p) + exponent);
  return Vec::blendv(result, Vec(0.f), x < least);
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
  Vec largest = Vec::loadu(scores + first);
  for (int64_t j = first + W; j < last; j += W) largest = at::vec::maximum(largest, Vec::loadu(scores + j));
  const float before = maximum;
  maximum = std::max(before, largest_of(largest) * scaling.scale);
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
