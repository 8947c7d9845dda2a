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

#if defined(CPU_CAPABILITY_AVX2)
inline __m256 half_sums(const Vec& x) { return x; }
#elif defined(CPU_CAPABILITY_AVX512)
inline __m256 half_sums(const Vec& x) {
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
#endif

// Sums of four vectors.
inline void store_sums(const Vec (&x)[4], float* to) {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  auto pair = [](__m256 a, __m256 b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); };
  const __m256d low = _mm256_castps_pd(pair(half_sums(x[0]), half_sums(x[1]))),
                high = _mm256_castps_pd(pair(half_sums(x[2]), half_sums(x[3])));
  const __m256 halves = _mm256_add_ps(
      _mm256_castpd_ps(_mm256_unpacklo_pd(low, high)), _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
  for (int i = 0; i < 4; ++i) to[i] = sum_of(x[i]);
#endif
}

// Rows of `dot_block`: sums with four keys each stay in registers.
constexpr int kDotRows = 3 * kRegisterFactor;

// Whether rows of these types are multiplied in pairs.
template <typename Q, typename T>
constexpr bool kInPairs = kMultipliesPairs && std::is_same_v<Q, at::BFloat16> && std::is_same_v<T, at::BFloat16>;

template <bool kPairs, typename T>
inline auto load_factor(const T* from) {
  if constexpr (kPairs) {
    return load_chunk(pairs(from));
  } else {
    return load_floats(from);
  }
}

// Dot products of R queries with four keys. Every vector of the rows asks for kAsks lines, `pace` bytes apart; returns
// where to go on asking.
template <int R, int kAsks, typename Q, typename T>
[[gnu::always_inline]] inline const char* dot_block(
    const Q* query, int64_t ld_query, const T* keys, int64_t ld_keys, int64_t dim, float* scores, int64_t ld_scores,
    const char* ahead, int64_t pace) {
  constexpr bool in_pairs = kInPairs<Q, T>;
  Vec acc[R][4];
#pragma GCC unroll 8
  for (int row = 0; row < R; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc[row][i] = Vec(0.f);
  }
  for (int64_t d = 0; d < dim; d += in_pairs ? 2 * W : W) {
#pragma GCC unroll 4
    for (int i = 0; i < kAsks; ++i) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += pace;
    }
    auto load = [&](int row) { return load_factor<in_pairs>(query + row * ld_query + d); };
    auto load_key = [&](int i) { return load_factor<in_pairs>(keys + i * ld_keys + d); };
    // Besides the sums, registers hold either four keys (a query is then read from memory in the multiplication), or
    // the queries and one key (which must be in a register if its numbers are extended).
    if constexpr (in_pairs || std::is_same_v<T, float>) {
      decltype(load_key(0)) key[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) key[i] = load_key(i);
#pragma GCC unroll 8
      for (int row = 0; row < R; ++row) {
        const auto chunk = load(row);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[row][i] = multiply_add(chunk, key[i], acc[row][i]);
      }
    } else {
      Vec chunk[R];
#pragma GCC unroll 8
      for (int row = 0; row < R; ++row) chunk[row] = load(row);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec key = load_key(i);
#pragma GCC unroll 8
        for (int row = 0; row < R; ++row) acc[row][i] = multiply_add(chunk[row], key, acc[row][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < R; ++row) store_sums(acc[row], scores + row * ld_scores);
  return ahead;
}

// Queries are cut into `blocks` blocks of R, and of R - 1 after the first `of_most`.
template <int R, int kAsks, typename Q, typename T>
inline void dot_blocks(
    const Q* query, int64_t ld_query, int64_t blocks, int64_t of_most, const T* keys, int64_t ld_keys, int64_t count,
    int64_t dim, float* scores, int64_t ld_scores, const char* ahead, int64_t pace) {
  for (int64_t j = 0; j < count; j += 4) {
    const T* key = keys + j * ld_keys;
    const Q* from = query;
    float* to = scores + j;
    for (int64_t i = 0; i < of_most; ++i, from += R * ld_query, to += R * ld_scores) {
      ahead = dot_block<R, kAsks>(from, ld_query, key, ld_keys, dim, to, ld_scores, ahead, pace);
    }
    if constexpr (R > 1) {
      for (int64_t i = of_most; i < blocks; ++i, from += (R - 1) * ld_query, to += (R - 1) * ld_scores) {
        ahead = dot_block<R - 1, kAsks>(from, ld_query, key, ld_keys, dim, to, ld_scores, ahead, pace);
      }
    }
  }
}

// scores[row][j] = query[row] . keys[j] for keys as they lie in a page: a multiple of four, from `count` up.
// `dim` is a multiple of W, of 2 W for rows in pairs. `bytes` are asked for from `ahead` on, evenly: the processor keeps
// few requests at a time.
template <typename Q, typename T>
inline void dot_products(
    const Q* query, int64_t ld_query, int64_t rows, const T* keys, int64_t ld_keys, int64_t count, int64_t dim,
    float* scores, int64_t ld_scores, const char* ahead, int64_t bytes) {
  if (rows == 0) return;
  constexpr int64_t chunk = kInPairs<Q, T> ? 2 * W : W;
  const int64_t blocks = (rows + kDotRows - 1) / kDotRows, vectors = (count + 3) / 4 * (dim / chunk) * blocks;
  const int64_t pace = (bytes + vectors - 1) / vectors, most = (rows + blocks - 1) / blocks;
  auto run = [&]<int R, int kAsks>() {
    dot_blocks<R, kAsks>(
        query, ld_query, blocks, rows - (R - 1) * blocks, keys, ld_keys, count, dim, scores, ld_scores, ahead,
        (pace + kAsks - 1) / kAsks);
  };
  auto with_asks = [&]<int R>() {  // a line each time at most, so that none is left out
    if (pace > 128) {
      run.template operator()<R, 4>();
    } else if (pace > 64) {
      run.template operator()<R, 2>();
    } else {
      run.template operator()<R, 1>();
    }
  };
  if constexpr (kDotRows > 3) {
    switch (most) {
      case 4: return with_asks.template operator()<4>();
      case 5: return with_asks.template operator()<5>();
      case 6: return with_asks.template operator()<6>();
    }
  }
  switch (most) {
    case 1: return with_asks.template operator()<1>();
    case 2: return with_asks.template operator()<2>();
    default: return with_asks.template operator()<3>();
  }
}

}  // namespace lragent
