// The two instructions of AVX-512 BF16, each with two bodies: the instruction, and (with FASTLM_EMULATE_AVX512_BF16, for
// tests on processors that lack it) what Intel's manual says it does. Included by simd_avx512.h only.
#pragma once
#include <immintrin.h>

namespace fastlm::FASTLM_ISA {

#if defined(FASTLM_EMULATE_AVX512_BF16)

// Subnormal numbers count as zero, as operands and as results, whatever the processor's mode.
inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

inline float element_of_pair(uint32_t pair, bool odd) {
  const uint32_t bits = odd ? pair & 0xffff0000u : pair << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}

// VDPBF16PS: in each lane the product of the odd elements is added first, then that of the even ones, by two fused
// multiply-adds that round to nearest.
inline __m512 add_dot_of_pairs(__m512 sums, __m512i a, __m512i b) {
  float sum[16];
  uint32_t left[16], right[16];
  std::memcpy(sum, &sums, 64);
  std::memcpy(left, &a, 64);
  std::memcpy(right, &b, 64);
  for (int i = 0; i < 16; ++i) {
    sum[i] = flushed(__builtin_fmaf(element_of_pair(left[i], true), element_of_pair(right[i], true), flushed(sum[i])));
    sum[i] = flushed(__builtin_fmaf(element_of_pair(left[i], false), element_of_pair(right[i], false), sum[i]));
  }
  std::memcpy(&sums, sum, 64);
  return sums;
}

// VCVTNEPS2BF16: to nearest, ties to even; NaN becomes quiet.
inline __m256i rounded_to_bf16(__m512 x) {
  uint32_t bits[16];
  uint16_t rounded[16];
  std::memcpy(bits, &x, 64);
  for (int i = 0; i < 16; ++i) {
    const uint32_t magnitude = bits[i] & 0x7fffffff;
    uint32_t result = bits[i] + 0x7fff + ((bits[i] >> 16) & 1);
    if (magnitude < 0x00800000) result = bits[i] & 0x80000000;
    if (magnitude > 0x7f800000) result = bits[i] | 0x00400000;
    rounded[i] = static_cast<uint16_t>(result >> 16);
  }
  __m256i out;
  std::memcpy(&out, rounded, 32);
  return out;
}

#else

inline __m512 add_dot_of_pairs(__m512 sums, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
}
inline __m256i rounded_to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

#endif

}  // namespace fastlm::FASTLM_ISA
