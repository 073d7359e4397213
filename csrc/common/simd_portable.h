// simd.h in the vector extensions of GCC and clang: SSE2 on any x86-64. Included by simd.h only.
#pragma once

namespace fastlm::FASTLM_ISA {

typedef float float4 __attribute__((vector_size(16)));
typedef int32_t int4 __attribute__((vector_size(16)));

struct Vec {
  static constexpr int64_t size = 4;
  float4 v;
};

inline Vec set1(float x) { return {float4{x, x, x, x}}; }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec abs(Vec a) { return {(float4)((int4)a.v & 0x7fffffff)}; }
inline Vec copysign(Vec a, Vec sign) { return {(float4)(((int4)a.v & 0x7fffffff) | ((int4)sign.v & ~0x7fffffff))}; }
inline Vec if_less(Vec a, Vec b, Vec yes, Vec no) { return {a.v < b.v ? yes.v : no.v}; }
// In two steps, each by a normal power of two: the result may be subnormal or infinite.
inline Vec ldexp(Vec a, Vec n) {
  const int4 whole = __builtin_convertvector(n.v, int4), half = whole >> 1;
  return {a.v * (float4)((half + 127) << 23) * (float4)((whole - half + 127) << 23)};
}

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FP_FAST_FMAF)
  for (int i = 0; i < 4; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
#else
  return {a.v * b.v + c.v};
#endif
}

inline Vec sqrt(Vec a) {
  for (int i = 0; i < 4; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}

inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

inline Vec first_n(Vec a, Vec b, int64_t n) {
  for (int64_t i = n; i < 4; ++i) a.v[i] = b.v[i];
  return a;
}

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(f16 h) {
  uint32_t bits = uint32_t(h.bits & 0x7fff) << 13;  // exponent and mantissa in float's places
  const uint32_t exponent = bits & 0x0f800000;
  bits += 112u << 23;                               // float's exponent bias less f16's
  if (exponent == 0x0f800000) bits += 112u << 23;   // infinity and NaN: all ones
  if (exponent == 0) bits += 1u << 23;              // subnormal: 2^-14 (1 + mantissa), and 2^-14 too much
  const float x = exponent == 0 ? as_float(bits) - 0x1p-14f : as_float(bits);
  return h.bits & 0x8000 ? -x : x;
}

inline void from_float(float x, bf16& h) {
  uint32_t bits = as_bits(x);
  if (x != x) {
    bits |= 0x400000;
  } else {
    bits += 0x7fff + ((bits >> 16) & 1);
  }
  h.bits = static_cast<uint16_t>(bits >> 16);
}

inline void from_float(float x, f16& h) {
  uint32_t bits = as_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {  // NaN
    bits = 0x7e00 | ((bits >> 13) & 0x3ff);
  } else if (bits >= 0x47800000) {  // 2^16 and above
    bits = 0x7c00;
  } else if (bits < 0x38800000) {  // below 2^-14: adding 1/2 leaves the rounded multiple of 2^-24 in the mantissa
    bits = as_bits(as_float(bits) + 0.5f) - 0x3f000000;
  } else {
    bits += 0xfff + ((bits >> 13) & 1) - (112u << 23);
    bits >>= 13;
  }
  h.bits = static_cast<uint16_t>(sign | bits);
}

inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, 16);
  return a;
}
inline void store(float* p, Vec a) { std::memcpy(p, &a.v, 16); }

inline Vec load(const bf16* p) {
  uint32_t bits[4];
  for (int i = 0; i < 4; ++i) bits[i] = uint32_t(p[i].bits) << 16;
  Vec a;
  std::memcpy(&a.v, bits, 16);
  return a;
}
inline Vec load(const f16* p) {
  Vec a;
  for (int i = 0; i < 4; ++i) a.v[i] = to_float(p[i]);
  return a;
}
template <class Half>
inline void store(Half* p, Vec a) {
  for (int i = 0; i < 4; ++i) from_float(a.v[i], p[i]);
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
