// Dot products of a few rows with rows that lie in memory: keys in a page, weights in a file.
//
// Register blocks fit the 16 registers of AVX2, or the 32 of AVX-512.
#pragma once

#include "products.h"

namespace lragent {

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

// Numbers that one multiplication takes of a row.
template <bool kPairs>
constexpr int64_t kChunk = kPairs ? 2 * W : W;

template <bool kPairs, typename T>
inline auto load_factor(const T* from) {
  if constexpr (kPairs) {
    return load_chunk(pairs(from));
  } else {
    return load_floats(from);
  }
}

// Queries of a block, read from memory each time they are wanted.
template <bool kPairs_, typename Q>
struct QueriesInMemory {
  static constexpr bool kPairs = kPairs_;
  const Q* data;
  int64_t apart;

  auto load(int row, int64_t d) const { return load_factor<kPairs>(data + row * apart + d); }
};

// R queries of so few chunks that registers hold them besides the sums.
template <bool kPairs_, int R, int kChunks>
struct QueriesInRegisters {
  static constexpr bool kPairs = kPairs_;
  static constexpr bool kFit = 4 * R + R * kChunks + 4 <= 16 * kRegisterFactor;
  std::conditional_t<kPairs, PairVec, Vec> chunk[R][kChunks];

  template <typename Q>
  QueriesInRegisters(const Q* data, int64_t apart) {
#pragma GCC unroll 8
    for (int row = 0; row < R; ++row) {
#pragma GCC unroll 4
      for (int c = 0; c < kChunks; ++c) chunk[row][c] = load_factor<kPairs>(data + row * apart + c * kChunk<kPairs>);
    }
  }
  auto load(int row, int64_t d) const { return chunk[row][d / kChunk<kPairs>]; }
};

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
// on asking. With kDim, that is `dim`.
template <int R, int kAsks, int kDim = 0, typename Queries, typename T>
[[gnu::always_inline]] inline const char* dot_block(
    const Queries& queries, const Keys<T>& keys, const T* key_data, int64_t dim, float* scores, int64_t ld_scores,
    const char* ahead, int64_t pace) {
  constexpr bool in_pairs = Queries::kPairs;
  if constexpr (kDim > 0) dim = kDim;
  Vec acc[R][4];
#pragma GCC unroll 8
  for (int row = 0; row < R; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc[row][i] = Vec(0.f);
  }
#pragma GCC unroll 4
  for (int64_t d = 0; d < dim; d += kChunk<in_pairs>) {
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
    auto load_key = [&](int i) { return load_factor<in_pairs>(key_data + i * keys.apart + d); };
    // Besides the sums, registers hold either four keys (a query is then read from memory in the multiplication), or
    // the queries and one key (which must be in a register if its numbers are extended).
    if constexpr (in_pairs || std::is_same_v<T, float>) {
      decltype(load_key(0)) key[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) key[i] = load_key(i);
#pragma GCC unroll 8
      for (int row = 0; row < R; ++row) {
        const auto chunk = queries.load(row, d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[row][i] = multiply_add(chunk, key[i], acc[row][i]);
      }
    } else {
      Vec chunk[R];
#pragma GCC unroll 8
      for (int row = 0; row < R; ++row) chunk[row] = queries.load(row, d);
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
      const QueriesInMemory<kInPairs<Q, T>, Q> queries{from, ld_query};
      ahead = dot_block<kRows, kAsksNow>(queries, keys, key, dim, to, ld_scores, ahead, pace);
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

// Bytes to ask for with each step of `dot_products`, a chunk of four keys, so that `bytes` are asked for in all.
inline int64_t bytes_a_step(int64_t bytes, int64_t count, int64_t dim, int64_t chunk) {
  const int64_t steps = (count + 3) / 4 * (dim / chunk);
  return (bytes + steps - 1) / steps;
}

// scores[row][j] = query[row] . keys[j] for keys as they lie in a page: a multiple of four, from `count` up.
// `dim` is a multiple of W, of 2 W for rows in pairs. With each step `bytes` are asked for, from `ahead` on: evenly, as
// the processor keeps few requests at a time.
template <typename Q, typename T>
inline void dot_products(
    const Q* query, int64_t ld_query, int64_t rows, const T* keys, int64_t ld_keys, int64_t count, int64_t dim,
    float* scores, int64_t ld_scores, const char* ahead, int64_t bytes) {
  constexpr bool in_pairs = kInPairs<Q, T>;
  const Keys<T> list = consecutive(keys, ld_keys);
  with_blocks(rows, [&]<int R>(int64_t blocks, int64_t of_most) {
    const int64_t pace = blocks == 1 ? bytes : (bytes + blocks - 1) / blocks;
    auto run = [&]<int kAsks>() {
      const int64_t apart = (pace + kAsks - 1) / kAsks;
      auto in_registers = [&]<int kChunks>() {
        if constexpr (QueriesInRegisters<in_pairs, R, kChunks>::kFit) {
          const QueriesInRegisters<in_pairs, R, kChunks> queries(query, ld_query);
          for (int64_t j = 0; j < count; j += 4) {
            ahead = dot_block<R, kAsks, kChunks * kChunk<in_pairs>>(
                queries, list, keys + j * ld_keys, dim, scores + j, ld_scores, ahead, apart);
          }
          return true;
        }
        return false;
      };
      if (blocks == 1 && dim == 2 * kChunk<in_pairs> && in_registers.template operator()<2>()) return;
      if (blocks == 1 && dim == 4 * kChunk<in_pairs> && in_registers.template operator()<4>()) return;
      dot_blocks<R, kAsks>(
          query, ld_query, blocks, of_most, list, count, dim, scores, ld_scores, ahead, apart);
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
