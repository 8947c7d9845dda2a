// Loads, broadcasts and multiply-adds of one chunk. A chunk is the part of a row that one multiply-add takes.
//
// A chunk is W floats. On a processor with AVX512_BF16 it can also be W pairs: pairs of bf16 numbers, multiplied and
// added by one instruction, sum[i] += a[i].first * b[i].first + a[i].second * b[i].second. The other files call this
// the bf16 dot product. Sums are always W floats. Legend: see vector_math.h.
#pragma once

#include <cstring>

#include "vector/vector_math.h"

namespace lragent {

// Two bf16 numbers that are neighbours in memory.
struct Bf16Pair {
  at::BFloat16 first, second;
};

inline const Bf16Pair* as_pairs(const at::BFloat16* row) { return reinterpret_cast<const Bf16Pair*>(row); }

inline Vec broadcast(float x) { return Vec(x); }
inline Vec load_chunk(const float* from) { return Vec::loadu(from); }
inline Vec multiply_add(const Vec& a, const Vec& b, const Vec& sum) { return at::vec::fmadd(a, b, sum); }

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)

constexpr bool kHasBf16Dot = true;

using PairVec = __m512bh;

inline PairVec pair_vec(__m512i bits) { return reinterpret_cast<PairVec>(bits); }

inline PairVec broadcast(const Bf16Pair& x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return pair_vec(_mm512_set1_epi32(bits));
}
inline PairVec load_chunk(const Bf16Pair* from) { return pair_vec(_mm512_loadu_si512(from)); }
inline Vec multiply_add(PairVec a, PairVec b, const Vec& sum) { return _mm512_dpbf16_ps(sum, a, b); }

// Interleaves two rows [2 W] into the pairs (upper[i], lower[i]). `left` takes the first W pairs, `right` the others.
inline void load_interleaved(const at::BFloat16* upper, const at::BFloat16* lower, PairVec& left, PairVec& right) {
  alignas(64) static constexpr int16_t left_indices[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                           37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                           11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i left_index = _mm512_load_si512(left_indices),
                right_index = _mm512_add_epi16(left_index, _mm512_set1_epi16(16));
  const __m512i a = _mm512_loadu_si512(upper), b = _mm512_loadu_si512(lower);
  left = pair_vec(_mm512_permutex2var_epi16(a, left_index, b));
  right = pair_vec(_mm512_permutex2var_epi16(a, right_index, b));
}

// Interleaves two rows [width] into pairs `to` [padded(width)], padded with zeros. Without a lower row (null) the
// second number of each pair is zero.
inline void interleave(const at::BFloat16* upper, const at::BFloat16* lower, int64_t width, Bf16Pair* to) {
  for (int64_t i = 0; i < width; i += W) {
    const __mmask16 mask = width - i >= W ? 0xffff : (1 << (width - i)) - 1;
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, upper + i)),
                  b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lower == nullptr ? 0 : mask, lower + i));
    _mm512_storeu_si512(to + i, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
}

// Rounds W floats to bf16.
inline void store_vec(const Vec& x, at::BFloat16* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

#else

constexpr bool kHasBf16Dot = false;

// Declarations without definitions: code that uses them must compile, but `if constexpr (kHasBf16Dot)` discards it.
struct PairVec {};
PairVec broadcast(const Bf16Pair& x);
PairVec load_chunk(const Bf16Pair* from);
Vec multiply_add(PairVec a, PairVec b, const Vec& sum);
void load_interleaved(const at::BFloat16* upper, const at::BFloat16* lower, PairVec& left, PairVec& right);
void interleave(const at::BFloat16* upper, const at::BFloat16* lower, int64_t width, Bf16Pair* to);
void store_vec(const Vec& x, at::BFloat16* to);

#endif

inline void store_vec(const Vec& x, float* to) { x.store(to); }

}  // namespace lragent
