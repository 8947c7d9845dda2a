// Small matrix products of tiles that lie in the innermost caches. Legend: M, N, K = sizes of a product.
//
// Register blocks fit the 16 registers of AVX2, or the 32 of AVX-512.
#pragma once

#include "chunks.h"

namespace lragent {

constexpr int kRegisterFactor = W == 16 ? 2 : 1;

// Right factor of `product`: rows of floats, of numbers that are extended to floats, or of pairs. A row of pairs is two
// rows of numbers, column by column.
template <typename T>
struct Rows {
  const T* data;
  int64_t apart;

  static constexpr int64_t kBytes = W * sizeof(T);  // that one load reads
  Rows from(int64_t column) const { return {data + column, apart}; }
  template <int NV, typename Register>
  void load(int64_t k, Register (&row)[NV]) const {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      if constexpr (std::is_same_v<T, Pair>) {
        row[n] = load_chunk(data + k * apart + n * W);
      } else {
        row[n] = load_floats(data + k * apart + n * W);
      }
    }
  }
};

template <typename T>
Rows(const T*, int64_t) -> Rows<T>;

// The same for rows of bfloat16 numbers that become pairs as they are read: row k is rows 2 k and 2 k + 1. An even
// number of vectors is read at a time.
struct RowPairs {
  const at::BFloat16* data;
  int64_t apart;

  static constexpr int64_t kBytes = 2 * W * sizeof(at::BFloat16);
  RowPairs from(int64_t column) const { return {data + column, apart}; }
  template <int NV, typename Register>
  void load(int64_t k, Register (&row)[NV]) const {
    const at::BFloat16* upper = data + 2 * k * apart;
#pragma GCC unroll 4
    for (int n = 0; n < NV; n += 2) load_interleaved(upper + n * W, upper + apart + n * W, row[n], row[n + 1]);
  }
};

// C[m][n] (+)= sum_k A[m][k] * B[k][n] for MR rows and NV vectors of C, which stay in registers.
// The sum over k is added to C as a whole: sums over a long context then round once a page, not once a key.
template <int MR, int NV, bool kAccumulate, bool kAhead, typename A, typename B>
inline void product_block(
    const A* a, int64_t lda, const B& b, float* c, int64_t ldc, int64_t k_size, const char*& ahead) {
  constexpr int lines = std::max<int>(1, NV * B::kBytes / 64);
  Vec acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[m][n] = Vec(0.f);
  }
  for (int64_t k = 0; k < k_size; ++k) {
    if constexpr (kAhead) ask<lines>(ahead);
    decltype(spread(*a)) row[NV];
    b.load(k, row);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const auto factor = spread(a[m * lda + k]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) acc[m][n] = multiply_add(factor, row[n], acc[m][n]);
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

template <int MR, int NV, bool kAccumulate, bool kAhead, typename A, typename B>
inline void product_rows(
    const A* a, int64_t lda, const B& b, float* c, int64_t ldc, int64_t n_size, int64_t k_size, const char* ahead) {
  int64_t n = 0;
  for (; n + NV * W <= n_size; n += NV * W) {
    product_block<MR, NV, kAccumulate, kAhead>(a, lda, b.from(n), c + n, ldc, k_size, ahead);
  }
  if constexpr (NV > 2) {
    for (; n + 2 * W <= n_size; n += 2 * W) {
      product_block<MR, 2, kAccumulate, kAhead>(a, lda, b.from(n), c + n, ldc, k_size, ahead);
    }
  }
  if constexpr (!std::is_same_v<B, RowPairs>) {
    if (n < n_size) product_block<MR, 1, kAccumulate, kAhead>(a, lda, b.from(n), c + n, ldc, k_size, ahead);
  }
}

// C[M][N] (+)= A[M][K] B[K][N]; N is a multiple of W, or of 2 W if B is RowPairs. A is floats, or pairs as B is.
// With kAhead, as many bytes as B has are asked for from `ahead` on.
template <bool kAccumulate, bool kAhead = false, typename A, typename B>
inline void product(
    const A* a, int64_t lda, const B& b, float* c, int64_t ldc, int64_t m_size, int64_t n_size, int64_t k_size,
    const char* ahead = nullptr) {
  constexpr int vectors = 2 * kRegisterFactor;
  const int64_t rows = m_size > 8 ? 6 : m_size > 6 ? 4 : m_size;
  switch (rows) {
    case 1: product_rows<1, 8, kAccumulate, kAhead>(a, lda, b, c, ldc, n_size, k_size, ahead); break;
    case 2: product_rows<2, 4, kAccumulate, kAhead>(a, lda, b, c, ldc, n_size, k_size, ahead); break;
    case 3: product_rows<3, 4, kAccumulate, kAhead>(a, lda, b, c, ldc, n_size, k_size, ahead); break;
    case 4: product_rows<4, vectors, kAccumulate, kAhead>(a, lda, b, c, ldc, n_size, k_size, ahead); break;
    case 5: product_rows<5, vectors, kAccumulate, kAhead>(a, lda, b, c, ldc, n_size, k_size, ahead); break;
    case 6: product_rows<6, vectors, kAccumulate, kAhead>(a, lda, b, c, ldc, n_size, k_size, ahead); break;
    default: return;
  }
  if (m_size > rows) {
    product<kAccumulate>(a + rows * lda, lda, b, c + rows * ldc, ldc, m_size - rows, n_size, k_size);
  }
}

}  // namespace lragent
