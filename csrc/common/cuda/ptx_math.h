// Conversions and the special function unit. The emulation computes these with the C library: on the GPU the .approx
// functions differ in the last bits.
#pragma once
#include "common/cuda/platform.h"

namespace fastlm::ptx {

// Two float32 rounded to nearest, the first in the low half.
FASTLM_DEVICE uint32_t pack_bf16(float low, float high) {
#ifdef __CUDACC__
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return __bfloat16_as_ushort(__float2bfloat16_rn(low)) | uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(high))} << 16;
#endif
}

FASTLM_DEVICE uint32_t pack_f16(float low, float high) {
#ifdef __CUDACC__
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return __half_as_ushort(__float2half_rn(low)) | uint32_t{__half_as_ushort(__float2half_rn(high))} << 16;
#endif
}

// The nearest tf32 (ties away from zero), as float32 bits. a - to_tf32(a) is exact, which is what 3xTF32 builds on.
FASTLM_DEVICE uint32_t to_tf32(float a) {
#ifdef __CUDACC__
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(a));
  return r;
#else
  const uint32_t bits = __float_as_uint(a);
  return (fabsf(a) < INFINITY ? bits + 0x1000u : bits) & 0xffffe000u;  // else NaN with all bits set would become 0
#endif
}

// 2^x; denormal results are zero.
FASTLM_DEVICE float exp2_approx(float x) {
#ifdef __CUDACC__
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  const float r = exp2f(x);
  return r < 1.17549435e-38f ? 0.0f : r;
#endif
}

FASTLM_DEVICE float log2_approx(float x) {
#ifdef __CUDACC__
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return log2f(x);
#endif
}

FASTLM_DEVICE float tanh_approx(float x) {
#ifdef __CUDACC__
  float r;
  asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return tanhf(x);
#endif
}

FASTLM_DEVICE float reciprocal_approx(float x) {
#ifdef __CUDACC__
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#else
  return 1.0f / x;
#endif
}

// v, of which the compiler no longer knows what it is: what is computed from it inside a loop stays there, instead of
// being computed once and kept in registers.
FASTLM_DEVICE uint32_t opaque(uint32_t v) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(v));
#endif
  return v;
}

}  // namespace fastlm::ptx
