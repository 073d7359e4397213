// Element types of the device, and their conversion to and from float32, in which all arithmetic is done.
#pragma once
#include "common/cuda/platform.h"
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
