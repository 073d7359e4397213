// Element types of the device, and their conversion to and from float32, in which all arithmetic is done.
#pragma once
#include "common/cuda/ptx_math.h"
#include "common/dtype.h"

namespace fastlm::cuda {

FASTLM_DEVICE float to_float(float v) { return v; }
FASTLM_DEVICE float to_float(__half v) { return __half2float(v); }
FASTLM_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
FASTLM_DEVICE T from_float(float v);
template <>
FASTLM_DEVICE float from_float<float>(float v) { return v; }
template <>
FASTLM_DEVICE __half from_float<__half>(float v) { return __float2half_rn(v); }
template <>
FASTLM_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// Two neighbouring 16-bit elements in a register, the first in the low half.
template <class T>
FASTLM_DEVICE uint32_t pack_pair(float low, float high);
template <>
FASTLM_DEVICE uint32_t pack_pair<__nv_bfloat16>(float low, float high) { return ptx::pack_bf16(low, high); }
template <>
FASTLM_DEVICE uint32_t pack_pair<__half>(float low, float high) { return ptx::pack_f16(low, high); }

template <class T>
FASTLM_DEVICE float2 unpack_pair(uint32_t v);
template <>
FASTLM_DEVICE float2 unpack_pair<__nv_bfloat16>(uint32_t v) {
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}
template <>
FASTLM_DEVICE float2 unpack_pair<__half>(uint32_t v) {
  return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(v))),
                     __half2float(__ushort_as_half(static_cast<unsigned short>(v >> 16))));
}

// Element i of an array whose type is known at run time only.
FASTLM_DEVICE float load_as_float(const void* p, int64_t i, DType t) {
  if (t == DType::f32) return static_cast<const float*>(p)[i];
  if (t == DType::f16) return to_float(static_cast<const __half*>(p)[i]);
  return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
}

FASTLM_DEVICE void store_from_float(void* p, int64_t i, DType t, float v) {
  if (t == DType::f32) static_cast<float*>(p)[i] = v;
  else if (t == DType::f16) static_cast<__half*>(p)[i] = from_float<__half>(v);
  else static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(v);
}

// v as it reads back after having been stored as t.
FASTLM_DEVICE float rounded_to(float v, DType t) {
  if (t == DType::f16) return to_float(from_float<__half>(v));
  if (t == DType::bf16) return to_float(from_float<__nv_bfloat16>(v));
  return v;
}

}  // namespace fastlm::cuda
