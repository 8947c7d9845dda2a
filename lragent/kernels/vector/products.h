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

// Sums of four vectors, `apart` from each other.
inline void store_sums(const Vec (&x)[4], float* to, int64_t apart) {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  auto pair = [](__m256 a, __m256 b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); };
  const __m256d low = _mm256_castps_pd(pair(half_sums(x[0]), half_sums(x[1]))),
                high = _mm256_castps_pd(pair(half_sums(x[2]), half_sums(x[3])));
  const __m256 halves = _mm256_add_ps(
      _mm256_castpd_ps(_mm256_unpacklo_pd(low, high)), _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  if (apart == 1) {
    _mm_storeu_ps(to, sums);
  } else {
    alignas(16) float numbers[4];
    _mm_store_ps(numbers, sums);
    for (int i = 0; i < 4; ++i) to[i * apart] = numbers[i];
  }
#else
  for (int i = 0; i < 4; ++i) to[i * apart] = sum_of(x[i]);
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

// Keys as they lie: blocks of four, whose members are `apart` from each other and whose scores are `scores_apart`; from
// one block to the next it is `step`, and `scores_step`.
template <typename T>
struct Keys {
  const T* data;
  int64_t apart, step, scores_apart, scores_step;
};

template <typename T>
inline Keys<T> consecutive(const T* data, int64_t apart) {
  return {data, apart, 4 * apart, 1, 4};
}

// What dot products ask for (see `ask`): each vector of keys so many lines; or its own memory, further on; or nothing.
constexpr int kAsksFurtherOn = -1, kAsksNothing = 0;
// How much further on. Four streams that are read at once are fetched by the processor itself; this helps it.
constexpr int64_t kFurtherOn = 1024;

// Dot products of R queries with a block of keys; lines that are asked for are `pace` bytes apart. Returns where to go
// on asking.
template <int R, int kAsks, typename Q, typename T>
[[gnu::always_inline]] inline const char* dot_block(
    const Q* query, int64_t ld_query, const Keys<T>& keys, const T* key_data, int64_t dim, float* scores,
    int64_t ld_scores, const char* ahead, int64_t pace) {
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
    if constexpr (kAsks == kAsksFurtherOn) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __builtin_prefetch(reinterpret_cast<const char*>(key_data + i * keys.apart + d) + kFurtherOn, 0, 2);
      }
    }
    auto load = [&](int row) { return load_factor<in_pairs>(query + row * ld_query + d); };
    auto load_key = [&](int i) { return load_factor<in_pairs>(key_data + i * keys.apart + d); };
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
  for (int row = 0; row < R; ++row) store_sums(acc[row], scores + row * ld_scores, keys.scores_apart);
  return ahead;
}

// Queries are cut into `blocks` blocks of R, and of R - 1 after the first `of_most`.
template <int R, int kAsks, typename Q, typename T>
inline void dot_blocks(
    const Q* query, int64_t ld_query, int64_t blocks, int64_t of_most, const Keys<T>& keys, int64_t count, int64_t dim,
    float* scores, int64_t ld_scores, const char* ahead, int64_t pace) {
  // Who asks for the keys' own memory does so once.
  constexpr int asks_again = kAsks == kAsksFurtherOn ? kAsksNothing : kAsks;
  const T* key = keys.data;
  for (int64_t j = 0; j < count; j += 4, key += keys.step, scores += keys.scores_step) {
    const Q* from = query;
    float* to = scores;
    auto block = [&]<int kRows, int kAsksNow>() __attribute__((always_inline)) {
      ahead = dot_block<kRows, kAsksNow>(from, ld_query, keys, key, dim, to, ld_scores, ahead, pace);
      from += kRows * ld_query;
      to += kRows * ld_scores;
    };
    block.template operator()<R, kAsks>();
    for (int64_t i = 1; i < of_most; ++i) block.template operator()<R, asks_again>();
    if constexpr (R > 1) {
      for (int64_t i = of_most; i < blocks; ++i) block.template operator()<R - 1, asks_again>();
    }
  }
}

// Calls run<R>(blocks, of_most) with the least blocks of at most kDotRows queries, of equal size or almost.
template <typename F>
inline void with_blocks(int64_t rows, const F& run) {
  if (rows == 0) return;
  const int64_t blocks = (rows + kDotRows - 1) / kDotRows, most = (rows + blocks - 1) / blocks;
  const int64_t of_most = rows - (most - 1) * blocks;
  if constexpr (kDotRows > 3) {
    switch (most) {
      case 4: return run.template operator()<4>(blocks, of_most);
      case 5: return run.template operator()<5>(blocks, of_most);
      case 6: return run.template operator()<6>(blocks, of_most);
    }
  }
  switch (most) {
    case 1: return run.template operator()<1>(blocks, of_most);
    case 2: return run.template operator()<2>(blocks, of_most);
    default: return run.template operator()<3>(blocks, of_most);
  }
}

// scores[row][j] = query[row] . keys[j] for keys as they lie in a page: a multiple of four, from `count` up.
// `dim` is a multiple of W, of 2 W for rows in pairs. `bytes` are asked for from `ahead` on, evenly: the processor
// keeps few requests at a time.
template <typename Q, typename T>
inline void dot_products(
    const Q* query, int64_t ld_query, int64_t rows, const T* keys, int64_t ld_keys, int64_t count, int64_t dim,
    float* scores, int64_t ld_scores, const char* ahead, int64_t bytes) {
  constexpr int64_t chunk = kInPairs<Q, T> ? 2 * W : W;
  with_blocks(rows, [&]<int R>(int64_t blocks, int64_t of_most) {
    const int64_t vectors = (count + 3) / 4 * (dim / chunk) * blocks, pace = (bytes + vectors - 1) / vectors;
    auto run = [&]<int kAsks>() {
      dot_blocks<R, kAsks>(
          query, ld_query, blocks, of_most, consecutive(keys, ld_keys), count, dim, scores, ld_scores, ahead,
          (pace + kAsks - 1) / kAsks);
    };
    if (pace > 128) {  // a line each time at most, so that none is left out
      run.template operator()<4>();
    } else if (pace > 64) {
      run.template operator()<2>();
    } else {
      run.template operator()<1>();
    }
  });
}

// scores[row][i][s] = query[row] . keys[i][s] for four streams of `count` keys that lie `apart`, each read on and on;
// a stream's scores are `scores_apart` from those of the one before.
template <typename Q, typename T>
inline void dot_streams(
    const Q* query, int64_t ld_query, int64_t rows, const T* keys, int64_t apart, int64_t ld_keys, int64_t count,
    int64_t dim, float* scores, int64_t ld_scores, int64_t scores_apart) {
  with_blocks(rows, [&]<int R>(int64_t blocks, int64_t of_most) {
    const Keys<T> streams{keys, apart, ld_keys, scores_apart, 1};
    dot_blocks<R, kAsksFurtherOn>(
        query, ld_query, blocks, of_most, streams, 4 * count, dim, scores, ld_scores, nullptr, 0);
  });
}

}  // namespace lragent
