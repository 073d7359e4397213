// Eight elements at a time: one 16-byte access for the 16-bit types, two for float32.
#pragma once
#include "common/cuda/convert.h"

namespace fastlm::cuda {

constexpr int kVector = 8;  // elements: 16 bytes of a 16-bit type, which is the widest access of sm_80 and sm_90

template <class T>
struct alignas(16) Vector {
  T v[kVector];
};

// p must be 16-byte aligned.
template <class T>
FASTLM_DEVICE Vector<T> load_vector(const T* p) {
  Vector<T> r;
  constexpr int kParts = sizeof(Vector<T>) / 16;
#pragma unroll
  for (int i = 0; i < kParts; i++) reinterpret_cast<uint4*>(&r)[i] = reinterpret_cast<const uint4*>(p)[i];
  return r;
}

template <class T>
FASTLM_DEVICE void store_vector(T* p, const Vector<T>& r) {
  constexpr int kParts = sizeof(Vector<T>) / 16;
#pragma unroll
  for (int i = 0; i < kParts; i++) reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(&r)[i];
}

template <class T>
FASTLM_DEVICE void to_floats(const Vector<T>& in, float (&out)[kVector]) {
#pragma unroll
  for (int j = 0; j < kVector; j++) out[j] = to_float(in.v[j]);
}

// Eight elements from position i of an array whose type is known at run time only. `vectors`: the array may be read in
// 16-byte accesses at i; without it only the `count` elements that exist are touched, and the others read as zero.
FASTLM_DEVICE void load_vector_as_float(const void* p, int64_t i, DType t, bool vectors, int count, float (&out)[kVector]) {
  if (!vectors) {
#pragma unroll
    for (int j = 0; j < kVector; j++) out[j] = j < count ? load_as_float(p, i + j, t) : 0.0f;
  } else if (t == DType::f32) {
    const auto r = load_vector(static_cast<const float*>(p) + i);
#pragma unroll
    for (int j = 0; j < kVector; j++) out[j] = r.v[j];
  } else if (t == DType::f16) {
    const auto r = load_vector(static_cast<const __half*>(p) + i);
#pragma unroll
    for (int j = 0; j < kVector; j++) out[j] = to_float(r.v[j]);
  } else {
    const auto r = load_vector(static_cast<const __nv_bfloat16*>(p) + i);
#pragma unroll
    for (int j = 0; j < kVector; j++) out[j] = to_float(r.v[j]);
  }
}

template <class T>
FASTLM_DEVICE Vector<T> vector_from_float(const float (&in)[kVector]) {
  Vector<T> r;
#pragma unroll
  for (int j = 0; j < kVector; j++) r.v[j] = from_float<T>(in[j]);
  return r;
}

FASTLM_DEVICE void store_vector_from_float(void* p, int64_t i, DType t, bool vectors, int count, const float (&in)[kVector]) {
  if (!vectors) {
#pragma unroll
    for (int j = 0; j < kVector; j++) {
      if (j < count) store_from_float(p, i + j, t, in[j]);
    }
  } else if (t == DType::f32) {
    store_vector(static_cast<float*>(p) + i, vector_from_float<float>(in));
  } else if (t == DType::f16) {
    store_vector(static_cast<__half*>(p) + i, vector_from_float<__half>(in));
  } else {
    store_vector(static_cast<__nv_bfloat16*>(p) + i, vector_from_float<__nv_bfloat16>(in));
  }
}

// Host side: whether rows that start at p and are `stride` elements of `size` bytes apart can be read in vectors.
inline bool vector_aligned(const void* p, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * size % 16 == 0;
}

}  // namespace fastlm::cuda
