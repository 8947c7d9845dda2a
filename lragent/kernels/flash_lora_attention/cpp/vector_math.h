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

namespace lragent {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t W = Vec::size();
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// C[m][n] (+)= sum_k A[m][k] * B[k][n] for MR rows and NV vectors of C, which stay in registers.
// The sum over k is added to C as a whole: sums over a long context then round once a page, not once a key.
template <int MR, int NV, bool kAccumulate>
inline void product_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k_size) {
  Vec acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[m][n] = Vec(0.f);
  }
  for (int64_t k = 0; k < k_size; ++k) {
    Vec row[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) row[n] = Vec::loadu(b + k * ldb + n * W);
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

template <int MR, int NV, bool kAccumulate>
inline void product_rows(
    const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t n_size, int64_t k_size) {
  int64_t n = 0;
  for (; n + NV * W <= n_size; n += NV * W) product_block<MR, NV, kAccumulate>(a, lda, b + n, ldb, c + n, ldc, k_size);
  for (; n < n_size; n += W) product_block<MR, 1, kAccumulate>(a, lda, b + n, ldb, c + n, ldc, k_size);
}

// C[M][N] (+)= A[M][K] B[K][N]; N is a multiple of W. Register blocks fit the 16 registers of AVX2.
template <bool kAccumulate>
inline void product(
    const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m_size, int64_t n_size, int64_t k_size) {
  int64_t m = 0;
  for (; m_size - m >= 6; m += 6) product_rows<6, 2, kAccumulate>(a + m * lda, lda, b, ldb, c + m * ldc, ldc, n_size, k_size);
  a += m * lda;
  c += m * ldc;
  switch (m_size - m) {
    case 1: return product_rows<1, 8, kAccumulate>(a, lda, b, ldb, c, ldc, n_size, k_size);
    case 2: return product_rows<2, 4, kAccumulate>(a, lda, b, ldb, c, ldc, n_size, k_size);
    case 3: return product_rows<3, 4, kAccumulate>(a, lda, b, ldb, c, ldc, n_size, k_size);
    case 4: return product_rows<4, 2, kAccumulate>(a, lda, b, ldb, c, ldc, n_size, k_size);
    case 5: return product_rows<5, 2, kAccumulate>(a, lda, b, ldb, c, ldc, n_size, k_size);
    default: return;
  }
}

// Sums of W vectors as one vector.
inline Vec sums(const Vec (&x)[W]) {
#if defined(CPU_CAPABILITY_AVX2)
  auto pair = [](__m256 a, __m256 b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); };
  auto quad = [](__m256 a, __m256 b) {
    const __m256d p = _mm256_castps_pd(a), q = _mm256_castps_pd(b);
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(p, q)), _mm256_castpd_ps(_mm256_unpackhi_pd(p, q)));
  };
  const __m256 low = quad(pair(x[0], x[1]), pair(x[2], x[3]));
  const __m256 high = quad(pair(x[4], x[5]), pair(x[6], x[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
#else
  alignas(64) float rows[W * W], columns[W * W];
  for (int64_t i = 0; i < W; ++i) x[i].store(rows + i * W);
  at::vec::transpose_mxn<float, W, W>(rows, W, columns, W);
  Vec total = Vec::loadu(columns);
  for (int64_t i = 1; i < W; ++i) total = total + Vec::loadu(columns + i * W);
  return total;
#endif
}

// scores[row][j] = query[row] . keys[j]: dot products over rows of keys as they lie in a page, W keys at a time.
inline void dot_products(
    const float* query, int64_t rows, const float* keys, int64_t count, int64_t dim, float* scores, int64_t ld_scores) {
  for (int64_t j = 0; j < count; j += W) {
    const float* group = keys + j * dim;
    for (int64_t row = 0; row < rows; ++row) {
      const float* q = query + row * dim;
      Vec acc[W];
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i) acc[i] = Vec(0.f);
      for (int64_t d = 0; d < dim; d += W) {
        const Vec chunk = Vec::loadu(q + d);
#pragma GCC unroll 16
        for (int64_t i = 0; i < W; ++i) acc[i] = at::vec::fmadd(chunk, Vec::loadu(group + i * dim + d), acc[i]);
      }
      sums(acc).store(scores + row * ld_scores + j);
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

inline float largest_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, x);
}

inline float sum_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
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
    const Vec weight = at::vec::fmsub(Vec::loadu(scores + j), scale, shift).exp();
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
