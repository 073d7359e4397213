// The transposition of a square of Vec::size x Vec::size floats in registers.
#pragma once
#include "common/simd.h"

namespace fastlm::FASTLM_ISA {

#if defined(__AVX512F__)

inline void transpose(Vec (&rows)[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {  // pairs of rows: elements side by side
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // fours of rows: a quarter of each column in 128 bits
    for (int k = 0; k < 2; ++k) {
      const __m512d low = _mm512_castps_pd(a[i + k]), high = _mm512_castps_pd(a[i + k + 2]);
      b[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int k = 0; k < 4; ++k) {  // the quarters of columns k, k + 4, k + 8, k + 12
    const __m512 top_even = _mm512_shuffle_f32x4(b[k], b[4 + k], 0x88),
                 top_odd = _mm512_shuffle_f32x4(b[k], b[4 + k], 0xdd);
    const __m512 low_even = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(b[8 + k], b[12 + k], 0xdd);
    rows[k].v = _mm512_shuffle_f32x4(top_even, low_even, 0x88);
    rows[k + 8].v = _mm512_shuffle_f32x4(top_even, low_even, 0xdd);
    rows[k + 4].v = _mm512_shuffle_f32x4(top_odd, low_odd, 0x88);
    rows[k + 12].v = _mm512_shuffle_f32x4(top_odd, low_odd, 0xdd);
  }
}

#elif defined(__AVX2__)

inline void transpose(Vec (&rows)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int k = 0; k < 2; ++k) {
      const __m256d low = _mm256_castps_pd(a[i + k]), high = _mm256_castps_pd(a[i + k + 2]);
      b[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      b[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
  for (int k = 0; k < 4; ++k) {
    rows[k].v = _mm256_permute2f128_ps(b[k], b[4 + k], 0x20);
    rows[k + 4].v = _mm256_permute2f128_ps(b[k], b[4 + k], 0x31);
  }
}

#elif defined(__aarch64__)

inline void transpose(Vec (&rows)[4]) {
  const float32x4x2_t top = vtrnq_f32(rows[0].v, rows[1].v), low = vtrnq_f32(rows[2].v, rows[3].v);
  for (int k = 0; k < 2; ++k) {  // columns k and k + 2 of two rows each
    rows[k].v = vcombine_f32(vget_low_f32(top.val[k]), vget_low_f32(low.val[k]));
    rows[k + 2].v = vcombine_f32(vget_high_f32(top.val[k]), vget_high_f32(low.val[k]));
  }
}

#else

inline void transpose(Vec (&rows)[4]) {
  float square[4][4];
  for (int i = 0; i < 4; ++i) store(square[i], rows[i]);
  for (int i = 0; i < 4; ++i) {
    const float column[4] = {square[0][i], square[1][i], square[2][i], square[3][i]};
    rows[i] = load(column);
  }
}

#endif

}  // namespace fastlm::FASTLM_ISA
