// simd.h on AVX-512 (F, DQ, BW, VL), and with BF16 where the processor has it. Included by simd.h only.
#pragma once
#include <immintrin.h>

#if defined(__AVX512BF16__) || defined(FASTLM_EMULATE_AVX512_BF16)
#define FASTLM_PAIRS_OF_BF16
#include "common/avx512_bf16.h"
#endif

namespace fastlm::FASTLM_ISA {

struct Vec {
  static constexpr int64_t size = 16;
  __m512 v;
};

inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec copysign(Vec a, Vec sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, a.v), _mm512_and_ps(bit, sign.v))};
}
inline Vec if_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline Vec ldexp(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

inline float sum(Vec a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  s = _mm_add_ss(s, _mm_movehdup_ps(s));
  return _mm_cvtss_f32(s);
}

inline Vec from_bits(__m256i b, bf16) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16))}; }
inline Vec from_bits(__m256i b, f16) { return {_mm512_cvtph_ps(b)}; }

inline __m256i to_bits(Vec a, bf16) {
#if defined(FASTLM_PAIRS_OF_BF16)
  // The instruction makes zeros of subnormal numbers: those, which hardly occur, take the other way.
  if (__builtin_expect(_mm512_fpclass_ps_mask(a.v, 0x20) == 0, 1)) return rounded_to_bf16(a.v);
#endif
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
inline __m256i to_bits(Vec a, f16) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec first_n(Vec a, Vec b, int64_t n) { return {_mm512_mask_blend_ps(first(n), b.v, a.v)}; }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }

template <class Half>
inline Vec load(const Half* p) {
  return from_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Half{});
}
template <class Half>
inline Vec load_n(const Half* p, int64_t n) {
  return from_bits(_mm256_maskz_loadu_epi16(first(n), p), Half{});
}
template <class Half>
inline void store(Half* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bits(a, Half{}));
}
template <class Half>
inline void store_n(Half* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), to_bits(a, Half{}));
}

#if defined(FASTLM_PAIRS_OF_BF16)

// Products of bf16 numbers two by two. Rounding is that of fma after each of the two; numbers below 2^-126 count as 0.
template <>
struct Products<bf16> {
  static constexpr int64_t size = 2 * Vec::size;
  static constexpr bool pairs = true;
  struct Part {
    __m512i v;
  };
  static Part load(const bf16* p) { return {_mm512_loadu_si512(p)}; }
  static Part load_n(const bf16* p, int64_t n) {
    return {_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p)};
  }
  static Part spread(const bf16* p) {  // the two elements at p, over and over
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return {_mm512_set1_epi32(pair)};
  }
  static Vec add(Part a, Part b, Vec c) { return {add_dot_of_pairs(c.v, a.v, b.v)}; }
};

// Vec::size pairs of an element of `first` and one of `second` (null: zero), of which those in `n` are read, the others
// zero. In memory they are bf16, or floats that are rounded (those below 2^-126 to zero).
inline __m512i wide_bits(const bf16* p, __mmask16 n) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(n, p)); }
inline __m512i wide_bits(const float* p, __mmask16 n) {
  return _mm512_cvtepu16_epi32(rounded_to_bf16(_mm512_maskz_loadu_ps(n, p)));
}
template <class T>
inline __m512i pairs_of(const T* first, const T* second, __mmask16 n) {
  const __m512i high = second == nullptr ? _mm512_setzero_si512() : _mm512_slli_epi32(wide_bits(second, n), 16);
  return _mm512_or_si512(wide_bits(first, n), high);
}
template <class T>
inline void interleave(const T* first, const T* second, __mmask16 n, Pair* to) {
  _mm512_storeu_si512(to, pairs_of(first, second, n));
}

#endif

}  // namespace fastlm::FASTLM_ISA
