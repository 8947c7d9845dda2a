// How registers of numbers multiply into registers of float sums: W floats one by one or, where the processor has an
// instruction for it, 2 W bfloat16 numbers as W pairs, the two products of a pair going into one sum.
#pragma once

#include <cstring>

#include "vector_math.h"

namespace lragent {

// Two bfloat16 numbers that follow each other in memory.
struct Pair {
  at::BFloat16 first, second;
};

inline const Pair* pairs(const at::BFloat16* numbers) { return reinterpret_cast<const Pair*>(numbers); }

inline Vec spread(float x) { return Vec(x); }
inline Vec load_chunk(const float* from) { return Vec::loadu(from); }
inline Vec multiply_add(const Vec& a, const Vec& b, const Vec& sum) { return at::vec::fmadd(a, b, sum); }

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)

constexpr bool kMultipliesPairs = true;

using PairVec = __m512bh;

inline PairVec as_pairs(__m512i bits) { return reinterpret_cast<PairVec>(bits); }

inline PairVec spread(const Pair& x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return as_pairs(_mm512_set1_epi32(bits));
}
inline PairVec load_chunk(const Pair* from) { return as_pairs(_mm512_loadu_si512(from)); }
inline Vec multiply_add(PairVec a, PairVec b, const Vec& sum) { return _mm512_dpbf16_ps(sum, a, b); }

// W columns of two rows of bfloat16 numbers, column by column.
inline void load_interleaved(const at::BFloat16* upper, const at::BFloat16* lower, PairVec& left, PairVec& right) {
  alignas(64) static constexpr int16_t lefts[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i place = _mm512_load_si512(lefts), other_place = _mm512_add_epi16(place, _mm512_set1_epi16(16));
  const __m512i a = _mm512_loadu_si512(upper), b = _mm512_loadu_si512(lower);
  left = as_pairs(_mm512_permutex2var_epi16(a, place, b));
  right = as_pairs(_mm512_permutex2var_epi16(a, other_place, b));
}

// `columns` of two rows, column by column, and zeros up to a multiple of W; without a lower row its numbers are zero.
inline void interleave(const at::BFloat16* upper, const at::BFloat16* lower, int64_t columns, Pair* to) {
  for (int64_t c = 0; c < columns; c += W) {
    const __mmask16 mask = columns - c >= W ? 0xffff : (1 << (columns - c)) - 1;
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, upper + c)),
                  b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lower == nullptr ? 0 : mask, lower + c));
    _mm512_storeu_si512(to + c, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
}

inline void store_numbers(const Vec& x, at::BFloat16* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

#else

constexpr bool kMultipliesPairs = false;

// Declared only, for code that is never reached.
struct PairVec {};
PairVec spread(const Pair& x);
PairVec load_chunk(const Pair* from);
Vec multiply_add(PairVec a, PairVec b, const Vec& sum);
void load_interleaved(const at::BFloat16* upper, const at::BFloat16* lower, PairVec& left, PairVec& right);
void interleave(const at::BFloat16* upper, const at::BFloat16* lower, int64_t columns, Pair* to);
void store_numbers(const Vec& x, at::BFloat16* to);

#endif

inline void store_numbers(const Vec& x, float* to) { x.store(to); }

}  // namespace lragent
