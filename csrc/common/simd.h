// Vec: as many floats as a register of the instruction set at hand holds, and the few operations that the kernels need.
// Memory may be float, bf16 or f16; arithmetic is always float. Rounding to bf16 and f16 is to nearest, ties to even;
// NaN stays NaN and infinity stays infinity.
//
//   load(p), store(p, v)            Vec::size elements, any alignment
//   load_n(p, n), store_n(p, v, n)  the first n < Vec::size elements; load_n fills the rest with zeros
//   set1, + - * /, fma(a, b, c) = a * b + c, sqrt, abs, copysign(a, sign), sum(v) in a fixed order
//   max(a, b) = a > b ? a : b,  min(a, b) = a < b ? a : b: b where either is NaN
//   first_n(a, b, n)                the first n < Vec::size lanes of a, the others of b
//   if_less(a, b, yes, no) = a < b ? yes : no,  ldexp(a, n) = a * 2^n for a whole number n, |n| < 250
//
//   Products<T>                     of a dot product of numbers of type T in memory: how many a step takes (size), load,
//                                   load_n, and add(a, b, c) = c + a b, whose lanes sum() puts together
//   prefetch(p), prefetch_to_write(p)  the cache line at p, which may lie past the end of an array
//
// The operations compute the same on every instruction set but for fma, which rounds twice where there is none
// (baseline x86-64), and sum, whose order follows the width.
#pragma once
#include <cstring>

#include "common/dtype.h"
#include "common/half.h"
#include "common/isa.h"

namespace fastlm::FASTLM_ISA {
template <class T>
struct Products;  // a page may have a better one for a type
}  // namespace fastlm::FASTLM_ISA

#if defined(__AVX512F__)
#include "common/simd_avx512.h"
#elif defined(__AVX2__)
#include "common/simd_avx2.h"
#elif defined(__aarch64__)
#include "common/simd_neon.h"
#else
#include "common/simd_portable.h"
#endif

namespace fastlm::FASTLM_ISA {

inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
inline Vec zero() { return set1(0.0f); }

template <class T>
struct Products {
  static constexpr int64_t size = Vec::size;
  static constexpr bool pairs = false;
  static Vec load(const T* p) { return FASTLM_ISA::load(p); }
  static Vec load_n(const T* p, int64_t n) { return FASTLM_ISA::load_n(p, n); }
  static Vec add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

// Inlined always: GCC takes a function that does nothing but fetch for one without effects, and drops calls of it.
[[gnu::always_inline]] inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
[[gnu::always_inline]] inline void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }

// How far ahead of a loop that goes through long arrays their lines are fetched: far enough for memory's latency, near
// enough that they are still in the first-level cache. The processor's own prefetcher starts anew at every page, and
// fetches too late for a store.
constexpr int64_t kLine = 64, kBytesAhead = 1024;  // bytes
template <class T>
[[gnu::always_inline]] inline void fetch_ahead(const T* p) {
  prefetch(reinterpret_cast<const char*>(p) + kBytesAhead);
}
template <class T>
[[gnu::always_inline]] inline void fetch_ahead_to_write(const T* p) {
  prefetch_to_write(reinterpret_cast<const char*>(p) + kBytesAhead);
}

// How a loop body reads and writes: a whole vector, or the n elements that are left at the end of an array.
struct Whole {
  template <class T>
  Vec load(const T* p) const {
    return FASTLM_ISA::load(p);
  }
  template <class T>
  void store(T* p, Vec a) const {
    FASTLM_ISA::store(p, a);
  }
  Vec keep(Vec a, Vec = zero()) const { return a; }
};
struct Rest {
  int64_t n;
  template <class T>
  Vec load(const T* p) const {
    return load_n(p, n);
  }
  template <class T>
  void store(T* p, Vec a) const {
    store_n(p, a, n);
  }
  Vec keep(Vec a, Vec past = zero()) const {  // `past` in the lanes past the end
    return first_n(a, past, n);
  }
};

// Calls body(T{}) with the type in memory that `type` names.
template <class Body>
inline void with_type(DType type, const Body& body) {
  switch (type) {
    case DType::f32: return body(float{});
    case DType::f16: return body(f16{});
    case DType::bf16: return body(bf16{});
  }
}

}  // namespace fastlm::FASTLM_ISA
