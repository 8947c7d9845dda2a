// Small matrix products C (+)= A B of tiles that are in the L1 and L2 caches.
//
// Legend: M, N, K = sizes of a product, W and ld as in vector_math.h.
// A register block is the part of C that stays in registers. Its size fits the 16 registers of AVX2, or the 32 of
// AVX-512.
#pragma once

#include "vector/chunks.h"

namespace lragent {

constexpr int kRegisterFactor = W == 16 ? 2 : 1;

// Right factor B of `product`, [K][ld]: floats, half-precision numbers that are upcast as they are read, or pairs.
// Row k of pairs holds the interleaved rows 2 k and 2 k + 1.
template <typename T>
struct Rows {
  const T* data;
  int64_t ld;

  static constexpr int64_t kBytes = W * sizeof(T);  // read by one load
  Rows shifted(int64_t n) const { return {data + n, ld}; }
  // Loads NV vectors of row k.
  template <int NV, typename Register>
  void load(int64_t k, Register (&row)[NV]) const {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      if constexpr (std::is_same_v<T, Bf16Pair>) {
        row[n] = load_chunk(data + k * ld + n * W);
      } else {
        row[n] = load_floats(data + k * ld + n * W);
      }
    }
  }
};

template <typename T>
Rows(const T*, int64_t) -> Rows<T>;

// Right factor B of `product` from bf16 rows [2 K][ld] that are interleaved into pairs as they are read: row k of B is
// rows 2 k and 2 k + 1. NV must be even.
struct RowPairs {
  const at::BFloat16* data;
  int64_t ld;

  static constexpr int64_t kBytes = 2 * W * sizeof(at::BFloat16);
  RowPairs shifted(int64_t n) const { return {data + n, ld}; }
  template <int NV, typename Register>
  void load(int64_t k, Register (&row)[NV]) const {
    const at::BFloat16* upper = data + 2 * k * ld;
#pragma GCC unroll 4
    for (int n = 0; n < NV; n += 2) load_interleaved(upper + n * W, upper + ld + n * W, row[n], row[n + 1]);
  }
};

// One register block, MR rows by NV vectors: C[m][n] (+)= sum_k A[m][k] * B[k][n].
//
// The finished sum over k is added to C, not each product: a sum over a long context then rounds once per page, not
// once per key.
template <int MR, int NV, bool kAccumulate, bool kPrefetch, typename A, typename B>
inline void product_block(
    const A* a, int64_t lda, const B& b, float* c, int64_t ldc, int64_t k_size, const char*& prefetch_at) {
  constexpr int lines = std::max<int>(1, NV * B::kBytes / kLineBytes);
  Vec acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[m][n] = Vec(0.f);
  }
  for (int64_t k = 0; k < k_size; ++k) {
    if constexpr (kPrefetch) prefetch_lines<lines>(prefetch_at);
    decltype(broadcast(*a)) row[NV];
    b.load(k, row);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const auto factor = broadcast(a[m * lda + k]);
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

// MR rows of C over all of N.
template <int MR, int NV, bool kAccumulate, bool kPrefetch, typename A, typename B>
inline void product_rows(
    const A* a, int64_t lda, const B& b, float* c, int64_t ldc, int64_t n_size, int64_t k_size,
    const char* prefetch_at) {
  int64_t n = 0;
  for (; n + NV * W <= n_size; n += NV * W) {
    product_block<MR, NV, kAccumulate, kPrefetch>(a, lda, b.shifted(n), c + n, ldc, k_size, prefetch_at);
  }
  if constexpr (NV > 2) {
    for (; n + 2 * W <= n_size; n += 2 * W) {
      product_block<MR, 2, kAccumulate, kPrefetch>(a, lda, b.shifted(n), c + n, ldc, k_size, prefetch_at);
    }
  }
  if constexpr (!std::is_same_v<B, RowPairs>) {
    if (n < n_size) product_block<MR, 1, kAccumulate, kPrefetch>(a, lda, b.shifted(n), c + n, ldc, k_size, prefetch_at);
  }
}

// C[M][N] (+)= A[M][K] B[K][N].
//
// N is a multiple of W, or of 2 W if B is `RowPairs`. A is floats, or pairs if B is pairs: K then counts pairs. With
// kPrefetch, as many bytes as B has are prefetched from `prefetch_at` on.
template <bool kAccumulate, bool kPrefetch = false, typename A, typename B>
inline void product(
    const A* a, int64_t lda, const B& b, float* c, int64_t ldc, int64_t m_size, int64_t n_size, int64_t k_size,
    const char* prefetch_at = nullptr) {
  constexpr int vectors = 2 * kRegisterFactor;
  const int64_t rows = m_size > 8 ? 6 : m_size > 6 ? 4 : m_size;
  switch (rows) {
    case 1: product_rows<1, 8, kAccumulate, kPrefetch>(a, lda, b, c, ldc, n_size, k_size, prefetch_at); break;
    case 2: product_rows<2, 4, kAccumulate, kPrefetch>(a, lda, b, c, ldc, n_size, k_size, prefetch_at); break;
    case 3: product_rows<3, 4, kAccumulate, kPrefetch>(a, lda, b, c, ldc, n_size, k_size, prefetch_at); break;
    case 4: product_rows<4, vectors, kAccumulate, kPrefetch>(a, lda, b, c, ldc, n_size, k_size, prefetch_at); break;
    case 5: product_rows<5, vectors, kAccumulate, kPrefetch>(a, lda, b, c, ldc, n_size, k_size, prefetch_at); break;
    case 6: product_rows<6, vectors, kAccumulate, kPrefetch>(a, lda, b, c, ldc, n_size, k_size, prefetch_at); break;
    default: return;
  }
  if (m_size > rows) {
    product<kAccumulate>(a + rows * lda, lda, b, c + rows * ldc, ldc, m_size - rows, n_size, k_size);
  }
}

}  // namespace lragent
