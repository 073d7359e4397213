// simd.h on NEON, which every arm64 processor has: GH200, Graviton, Apple. Included by simd.h only.
//
// bf16 is converted by whole-number arithmetic, since the instructions for it came with Armv8.6; those for f16 are in
// every arm64 processor.
#pragma once
#include <arm_neon.h>

namespace fastlm::FASTLM_ISA {

struct Vec {
  static constexpr int64_t size = 4;
  float32x4_t v;
};

inline Vec set1(float x) { return {vdupq_n_f32(x)}; }
inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {vsqrtq_f32(a.v)}; }
inline Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }  // FMAX gives NaN where either is
inline Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
inline Vec copysign(Vec a, Vec sign) { return {vbslq_f32(vdupq_n_u32(0x80000000), sign.v, a.v)}; }
inline Vec if_less(Vec a, Vec b, Vec yes, Vec no) { return {vbslq_f32(vcltq_f32(a.v, b.v), yes.v, no.v)}; }
// In two steps, each by a normal power of two: the result may be subnormal or infinite.
inline Vec ldexp(Vec a, Vec n) {
  const int32x4_t whole = vcvtq_s32_f32(n.v), half = vshrq_n_s32(whole, 1);
  const auto power = [](int32x4_t k) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k, vdupq_n_s32(127)), 23));
  };
  return {vmulq_f32(vmulq_f32(a.v, power(half)), power(vsubq_s32(whole, half)))};
}

inline float sum(Vec a) {
  const float32x2_t s = vadd_f32(vget_low_f32(a.v), vget_high_f32(a.v));
  return vget_lane_f32(s, 0) + vget_lane_f32(s, 1);
}

inline Vec from_bits(uint16x4_t b, bf16) { return {vreinterpretq_f32_u32(vshll_n_u16(b, 16))}; }
inline Vec from_bits(uint16x4_t b, f16) { return {vcvt_f32_f16(vreinterpret_f16_u16(b))}; }

inline uint16x4_t to_bits(Vec a, bf16) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(a.v, a.v), rounded, quiet), 16);  // NaN differs from itself
}
inline uint16x4_t to_bits(Vec a, f16) { return vreinterpret_u16_f16(vcvt_f16_f32(a.v)); }

inline Vec first_n(Vec a, Vec b, int64_t n) {
  const uint32_t lanes[] = {0, 1, 2, 3};
  return {vbslq_f32(vcltq_u32(vld1q_u32(lanes), vdupq_n_u32(static_cast<uint32_t>(n))), a.v, b.v)};
}

inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }

template <class Half>
inline Vec load(const Half* p) {
  return from_bits(vld1_u16(&p->bits), Half{});
}
template <class Half>
inline void store(Half* p, Vec a) {
  vst1_u16(&p->bits, to_bits(a, Half{}));
}

template <class T>
inline Vec load_n(const T* p, int64_t n) {
  T buffer[Vec::size] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
inline void store_n(T* p, Vec a, int64_t n) {
  T buffer[Vec::size];
  store(buffer, a);
  std::memcpy(p, buffer, n * sizeof(T));
}

}  // namespace fastlm::FASTLM_ISA
