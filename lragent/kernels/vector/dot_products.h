// Dot products of a few rows with many rows that are read from memory once.
//
// The names are those of attention, where the few rows are queries and the many rows are the keys of a page. In a
// projection, the few rows are inputs of tokens and the many rows are weights. Legend: W and ld as in vector_math.h, R
// = queries of a register block, dim = length of a row. A register block is R queries by four keys; its size fits the
// 16 registers of AVX2, or the 32 of AVX-512.
#pragma once

#include "vector/products.h"

namespace lragent {

#if defined(CPU_CAPABILITY_AVX2)
inline __m256 add_halves(const Vec& x) { return x; }
#elif defined(CPU_CAPABILITY_AVX512)
inline __m256 add_halves(const Vec& x) {
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}
#endif

// to[i * stride] = sum of the elements of x[i].
inline void store_sums(const Vec (&x)[4], float* to, int64_t stride) {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  auto add_pairs = [](__m256 a, __m256 b) { return _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)); };
  const __m256d low = _mm256_castps_pd(add_pairs(add_halves(x[0]), add_halves(x[1]))),
                high = _mm256_castps_pd(add_pairs(add_halves(x[2]), add_halves(x[3])));
  const __m256 halves =
      _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(low, high)), _mm256_castpd_ps(_mm256_unpackhi_pd(low, high)));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  if (stride == 1) {
    _mm_storeu_ps(to, sums);
  } else {
    alignas(16) float stored[4];
    _mm_store_ps(stored, sums);
    for (int i = 0; i < 4; ++i) to[i * stride] = stored[i];
  }
#else
  for (int i = 0; i < 4; ++i) to[i * stride] = sum_of(x[i]);
#endif
}

// Most queries of a register block: their sums with four keys stay in registers.
constexpr int kDotRows = 3 * kRegisterFactor;

// True if rows of these types are multiplied by the bf16 dot product.
template <typename Q, typename T>
constexpr bool kUsesBf16Dot = kHasBf16Dot && std::is_same_v<Q, at::BFloat16> && std::is_same_v<T, at::BFloat16>;

// Elements of a row in one chunk.
template <bool kPairs>
constexpr int64_t kChunk = kPairs ? 2 * W : W;

template <bool kPairs, typename T>
inline auto load_row_chunk(const T* from) {
  if constexpr (kPairs) {
    return load_chunk(as_pairs(from));
  } else {
    return load_floats(from);
  }
}

// Queries [R][ld] that are loaded from memory for each multiply-add.
template <bool kPairs_, typename Q>
struct QueriesInMemory {
  static constexpr bool kPairs = kPairs_;
  const Q* data;
  int64_t ld;

  auto load(int row, int64_t d) const { return load_row_chunk<kPairs>(data + row * ld + d); }
};

// R queries of kChunks chunks. If kFit, registers hold them in addition to the sums and four keys.
template <bool kPairs_, int R, int kChunks>
struct QueriesInRegisters {
  static constexpr bool kPairs = kPairs_;
  static constexpr bool kFit = 4 * R + R * kChunks + 4 <= 16 * kRegisterFactor;
  std::conditional_t<kPairs, PairVec, Vec> chunk[R][kChunks];

  // data [R][ld]
  template <typename Q>
  QueriesInRegisters(const Q* data, int64_t ld) {
#pragma GCC unroll 8
    for (int row = 0; row < R; ++row) {
#pragma GCC unroll 4
      for (int c = 0; c < kChunks; ++c) chunk[row][c] = load_row_chunk<kPairs>(data + row * ld + c * kChunk<kPairs>);
    }
  }
  auto load(int row, int64_t d) const { return chunk[row][d / kChunk<kPairs>]; }
};

// Keys in memory, in quads (four keys that one register block takes). Key i of quad q starts at
// data[q * quad_stride + i * key_stride]. Its scores are q * quad_score_stride + i * score_stride from the first ones.
template <typename T>
struct Keys {
  const T* data;
  int64_t key_stride, quad_stride, score_stride, quad_score_stride;
};

// Keys [count][ld], with scores next to each other.
template <typename T>
inline Keys<T> consecutive(const T* data, int64_t ld) {
  return {data, ld, 4 * ld, 1, 4};
}

// A step multiplies one chunk of each key of a quad. kPrefetches says what a step prefetches: so many lines if it is
// positive; the keys themselves, kPrefetchDistance bytes ahead (kPrefetchKeys); or nothing (kPrefetchNothing).
constexpr int kPrefetchKeys = -1, kPrefetchNothing = 0;
// In bytes. The hardware prefetcher follows the four keys that are read at once, and these prefetches keep it ahead.
constexpr int64_t kPrefetchDistance = 1024;

// One register block: scores [R][ld_scores] = dot products of R queries with a quad of keys at `key`.
//
// Lines are prefetched from `prefetch_at` on, `prefetch_stride` bytes apart. Returns the address of the next line to
// prefetch. A positive kDim must equal `dim`.
template <int R, int kPrefetches, int kDim = 0, typename Queries, typename T>
[[gnu::always_inline]] inline const char* dot_block(
    const Queries& queries, const Keys<T>& keys, const T* key, int64_t dim, float* scores, int64_t ld_scores,
    const char* prefetch_at, int64_t prefetch_stride) {
  constexpr bool uses_bf16_dot = Queries::kPairs;
  if constexpr (kDim > 0) dim = kDim;
  Vec acc[R][4];
#pragma GCC unroll 8
  for (int row = 0; row < R; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc[row][i] = Vec(0.f);
  }
#pragma GCC unroll 4
  for (int64_t d = 0; d < dim; d += kChunk<uses_bf16_dot>) {
#pragma GCC unroll 4
    for (int i = 0; i < kPrefetches; ++i) {
      __builtin_prefetch(prefetch_at, 0, 2);
      prefetch_at += prefetch_stride;
    }
    if constexpr (kPrefetches == kPrefetchKeys) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __builtin_prefetch(reinterpret_cast<const char*>(key + i * keys.key_stride + d) + kPrefetchDistance, 0, 2);
      }
    }
    auto load_key = [&](int i) { return load_row_chunk<uses_bf16_dot>(key + i * keys.key_stride + d); };
    // In addition to the sums, registers hold one of two sets: four keys, while the multiply-add reads each query from
    // memory; or R queries and one key. Keys that are upcast take the second way, since a multiply-add can't upcast.
    if constexpr (uses_bf16_dot || std::is_same_v<T, float>) {
      decltype(load_key(0)) key_chunk[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) key_chunk[i] = load_key(i);
#pragma GCC unroll 8
      for (int row = 0; row < R; ++row) {
        const auto query_chunk = queries.load(row, d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[row][i] = multiply_add(query_chunk, key_chunk[i], acc[row][i]);
      }
    } else {
      Vec query_chunk[R];
#pragma GCC unroll 8
      for (int row = 0; row < R; ++row) query_chunk[row] = queries.load(row, d);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec key_chunk = load_key(i);
#pragma GCC unroll 8
        for (int row = 0; row < R; ++row) acc[row][i] = multiply_add(query_chunk[row], key_chunk, acc[row][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < R; ++row) store_sums(acc[row], scores + row * ld_scores, keys.score_stride);
  return prefetch_at;
}

// Dot products of queries [rows][ld_query] with `count` keys, by register blocks: `full_blocks` blocks of R queries,
// then blocks of R - 1, `blocks` in all.
template <int R, int kPrefetches, typename Q, typename T>
inline void dot_blocks(
    const Q* query, int64_t ld_query, int64_t blocks, int64_t full_blocks, const Keys<T>& keys, int64_t count,
    int64_t dim, float* scores, int64_t ld_scores, const char* prefetch_at, int64_t prefetch_stride) {
  // Only the first register block of a quad prefetches the keys.
  constexpr int later_prefetches = kPrefetches == kPrefetchKeys ? kPrefetchNothing : kPrefetches;
  const T* key = keys.data;
  for (int64_t j = 0; j < count; j += 4, key += keys.quad_stride, scores += keys.quad_score_stride) {
    const Q* from = query;
    float* to = scores;
    auto block = [&]<int kRows, int kPrefetchesNow>() __attribute__((always_inline)) {
      const QueriesInMemory<kUsesBf16Dot<Q, T>, Q> queries{from, ld_query};
      prefetch_at =
          dot_block<kRows, kPrefetchesNow>(queries, keys, key, dim, to, ld_scores, prefetch_at, prefetch_stride);
      from += kRows * ld_query;
      to += kRows * ld_scores;
    };
    block.template operator()<R, kPrefetches>();
    for (int64_t i = 1; i < full_blocks; ++i) block.template operator()<R, later_prefetches>();
    if constexpr (R > 1) {
      for (int64_t i = full_blocks; i < blocks; ++i) block.template operator()<R - 1, later_prefetches>();
    }
  }
}

// Splits `rows` queries into the fewest register blocks of at most kDotRows, whose sizes differ by at most one, and
// calls run<R>(blocks, full_blocks) with the larger size R. See `dot_blocks`.
template <typename F>
inline void with_register_blocks(int64_t rows, const F& run) {
  if (rows == 0) return;
  const int64_t blocks = (rows + kDotRows - 1) / kDotRows, size = (rows + blocks - 1) / blocks;
  const int64_t full_blocks = rows - (size - 1) * blocks;
  if constexpr (kDotRows > 3) {
    switch (size) {
      case 4: return run.template operator()<4>(blocks, full_blocks);
      case 5: return run.template operator()<5>(blocks, full_blocks);
      case 6: return run.template operator()<6>(blocks, full_blocks);
    }
  }
  switch (size) {
    case 1: return run.template operator()<1>(blocks, full_blocks);
    case 2: return run.template operator()<2>(blocks, full_blocks);
    default: return run.template operator()<3>(blocks, full_blocks);
  }
}

// Bytes that `dot_products` must prefetch per step to prefetch `bytes` in all. `chunk` is in elements.
inline int64_t prefetch_bytes_per_step(int64_t bytes, int64_t count, int64_t dim, int64_t chunk) {
  const int64_t steps = (count + 3) / 4 * (dim / chunk);
  return (bytes + steps - 1) / steps;
}

// scores[row][j] = query[row] . keys[j] for query [rows][ld_query], keys [count][ld_keys] and scores
// [rows][ld_scores].
//
// `count` is rounded up to a multiple of four: so many keys are read and so many scores written. `dim` is a multiple of
// W, of 2 W for the bf16 dot product. Each step prefetches `bytes` from `prefetch_at` on: evenly, since a core tracks
// few outstanding loads.
template <typename Q, typename T>
inline void dot_products(
    const Q* query, int64_t ld_query, int64_t rows, const T* keys, int64_t ld_keys, int64_t count, int64_t dim,
    float* scores, int64_t ld_scores, const char* prefetch_at, int64_t bytes) {
  constexpr bool uses_bf16_dot = kUsesBf16Dot<Q, T>;
  const Keys<T> list = consecutive(keys, ld_keys);
  with_register_blocks(rows, [&]<int R>(int64_t blocks, int64_t full_blocks) {
    const int64_t block_bytes = blocks == 1 ? bytes : (bytes + blocks - 1) / blocks;
    auto run = [&]<int kPrefetches>() {
      const int64_t prefetch_stride = (block_bytes + kPrefetches - 1) / kPrefetches;
      auto in_registers = [&]<int kChunks>() {
        if constexpr (QueriesInRegisters<uses_bf16_dot, R, kChunks>::kFit) {
          const QueriesInRegisters<uses_bf16_dot, R, kChunks> queries(query, ld_query);
          for (int64_t j = 0; j < count; j += 4) {
            prefetch_at = dot_block<R, kPrefetches, kChunks * kChunk<uses_bf16_dot>>(
                queries, list, keys + j * ld_keys, dim, scores + j, ld_scores, prefetch_at, prefetch_stride);
          }
          return true;
        }
        return false;
      };
      if (blocks == 1 && dim == 2 * kChunk<uses_bf16_dot> && in_registers.template operator()<2>()) return;
      if (blocks == 1 && dim == 4 * kChunk<uses_bf16_dot> && in_registers.template operator()<4>()) return;
      dot_blocks<R, kPrefetches>(
          query, ld_query, blocks, full_blocks, list, count, dim, scores, ld_scores, prefetch_at, prefetch_stride);
    };
    // The stride must not exceed a line (64 bytes), so that no line is skipped.
    if (block_bytes > 128) {
      run.template operator()<4>();
    } else if (block_bytes > 64) {
      run.template operator()<2>();
    } else {
      run.template operator()<1>();
    }
  });
}

// scores[row][i * ld_section_scores + s] = query[row] . keys[i * section_stride + s * ld_keys] for four sections of
// `count` keys each, which are read in parallel. query [rows][ld_query], scores [rows][ld_scores].
template <typename Q, typename T>
inline void dot_sections(
    const Q* query, int64_t ld_query, int64_t rows, const T* keys, int64_t section_stride, int64_t ld_keys,
    int64_t count, int64_t dim, float* scores, int64_t ld_scores, int64_t ld_section_scores) {
  with_register_blocks(rows, [&]<int R>(int64_t blocks, int64_t full_blocks) {
    // A quad holds key s of each section.
    const Keys<T> sections{keys, section_stride, ld_keys, ld_section_scores, 1};
    dot_blocks<R, kPrefetchKeys>(
        query, ld_query, blocks, full_blocks, sections, 4 * count, dim, scores, ld_scores, nullptr, 0);
  });
}

}  // namespace lragent
