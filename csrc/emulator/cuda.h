// What CUDA C++ has and g++ has not: the built-in variables and functions, shared memory and launches, for a .cu file
// that is compiled for the emulator. The types (dim3, float4, __half, __nv_bfloat16) and their conversions come from
// CUDA's own headers, which g++ can read.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "emulator/site.h"

#if !defined(__x86_64__)
#error "the CUDA emulator switches stacks in x86-64 assembly"
#endif

#undef __shared__
#define __shared__ static_assert(false, "declare shared memory by FASTLM_SHARED or FASTLM_SHARED_DYNAMIC")
#undef __grid_constant__
#define __grid_constant__
#undef __launch_bounds__
#define __launch_bounds__(...)

// The running thread's; the scheduler sets them whenever it switches threads.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace fastlm::emulator {

// ---- launch.cpp
class LaunchError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct LaunchConfig {
  dim3 grid, block;
  size_t shared = 0;
  dim3 cluster = {1, 1, 1};
  bool programmatic = false;  // may begin before the kernel in front of it has ended
  bool opted_in = false;      // to more than 48 KB of shared memory
};

// Of a block, in bytes.
size_t max_shared_memory();
int multiprocessors();

// Runs the grid to its end. Throws LaunchError at the first mistake, with file, line, thread and seed.
void launch_threads(const LaunchConfig& config, const std::function<void()>& thread);

// ---- shared_memory.cpp
void* dynamic_shared(size_t alignment, Site site);
void* static_shared(const void* tag, size_t bytes, size_t alignment, Site site);

// ---- barrier.cpp
void syncthreads(Site site);
int syncthreads_count(int predicate, Site site);

// ---- warp.cpp
enum class Shuffle { index, exclusive_or, down, up };
void syncwarp(uint32_t mask, Site site);
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);
uint32_t match_any(uint32_t mask, uint64_t value, Site site);
enum class Reduction { add, min, max, bit_and, bit_or, bit_xor };
uint32_t reduce(Reduction kind, uint32_t mask, uint32_t value, bool is_signed, Site site);
uint32_t active_mask();

// ---- memory.cpp
void thread_fence(Site site);
void before_atomic(const void* address, size_t bytes, Site site);
void after_atomic(const void* address);
void nanosleep(Site site);

template <class T>
T shuffle_value(Shuffle kind, uint32_t mask, T value, int argument, int width, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, argument, width, site);
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

}  // namespace fastlm::emulator

#define FASTLM_SHARED_DYNAMIC(name, alignment) \
  unsigned char* name =                        \
      static_cast<unsigned char*>(::fastlm::emulator::dynamic_shared(alignment, ::fastlm::emulator::Site::here()))
#define FASTLM_SHARED(T, name, n)                                                             \
  static const char name##_tag = 0;                                                           \
  T(&name)[n] = *static_cast<T(*)[n]>(::fastlm::emulator::static_shared(&name##_tag, sizeof(T) * (n), alignof(T), \
                                                                        ::fastlm::emulator::Site::here()))

// ---- the functions of CUDA C++ under their own names

#define FASTLM_EMULATED_SITE ::fastlm::emulator::Site site = ::fastlm::emulator::Site::here()

inline void __syncthreads(FASTLM_EMULATED_SITE) { fastlm::emulator::syncthreads(site); }
inline int __syncthreads_count(int predicate, FASTLM_EMULATED_SITE) {
  return fastlm::emulator::syncthreads_count(predicate, site);
}
inline int __syncthreads_or(int predicate, FASTLM_EMULATED_SITE) {
  return fastlm::emulator::syncthreads_count(predicate, site) != 0;
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, FASTLM_EMULATED_SITE) { fastlm::emulator::syncwarp(mask, site); }

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, FASTLM_EMULATED_SITE) {
  return fastlm::emulator::shuffle_value(fastlm::emulator::Shuffle::index, mask, value, lane, width, site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, FASTLM_EMULATED_SITE) {
  return fastlm::emulator::shuffle_value(fastlm::emulator::Shuffle::exclusive_or, mask, value, lanes, width, site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32, FASTLM_EMULATED_SITE) {
  return fastlm::emulator::shuffle_value(fastlm::emulator::Shuffle::down, mask, value, delta, width, site);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32, FASTLM_EMULATED_SITE) {
  return fastlm::emulator::shuffle_value(fastlm::emulator::Shuffle::up, mask, value, delta, width, site);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, FASTLM_EMULATED_SITE) {
  return fastlm::emulator::ballot(mask, predicate != 0, site);
}
inline int __any_sync(uint32_t mask, int predicate, FASTLM_EMULATED_SITE) {
  return fastlm::emulator::ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, FASTLM_EMULATED_SITE) {
  return fastlm::emulator::ballot(mask, predicate != 0, site) == mask;
}
template <class T>
uint32_t __match_any_sync(uint32_t mask, T value, FASTLM_EMULATED_SITE) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return fastlm::emulator::match_any(mask, bits, site);
}
inline uint32_t __activemask() { return fastlm::emulator::active_mask(); }

template <class T>
T __reduce_add_sync(uint32_t mask, T value, FASTLM_EMULATED_SITE) {
  return static_cast<T>(fastlm::emulator::reduce(fastlm::emulator::Reduction::add, mask, value, std::is_signed_v<T>, site));
}
template <class T>
T __reduce_min_sync(uint32_t mask, T value, FASTLM_EMULATED_SITE) {
  return static_cast<T>(fastlm::emulator::reduce(fastlm::emulator::Reduction::min, mask, value, std::is_signed_v<T>, site));
}
template <class T>
T __reduce_max_sync(uint32_t mask, T value, FASTLM_EMULATED_SITE) {
  return static_cast<T>(fastlm::emulator::reduce(fastlm::emulator::Reduction::max, mask, value, std::is_signed_v<T>, site));
}
inline unsigned __reduce_and_sync(uint32_t mask, unsigned value, FASTLM_EMULATED_SITE) {
  return fastlm::emulator::reduce(fastlm::emulator::Reduction::bit_and, mask, value, false, site);
}
inline unsigned __reduce_or_sync(uint32_t mask, unsigned value, FASTLM_EMULATED_SITE) {
  return fastlm::emulator::reduce(fastlm::emulator::Reduction::bit_or, mask, value, false, site);
}
inline unsigned __reduce_xor_sync(uint32_t mask, unsigned value, FASTLM_EMULATED_SITE) {
  return fastlm::emulator::reduce(fastlm::emulator::Reduction::bit_xor, mask, value, false, site);
}

inline void __threadfence(FASTLM_EMULATED_SITE) { fastlm::emulator::thread_fence(site); }
inline void __threadfence_block(FASTLM_EMULATED_SITE) { fastlm::emulator::thread_fence(site); }
inline void __threadfence_system(FASTLM_EMULATED_SITE) { fastlm::emulator::thread_fence(site); }
inline void __nanosleep(unsigned, FASTLM_EMULATED_SITE) { fastlm::emulator::nanosleep(site); }

// CUDA's atomics are relaxed: they order nothing but themselves. `update` computes the new value from the old one.
template <class T, class Update>
T fastlm_emulated_atomic(T* p, Update update, fastlm::emulator::Site site) {
  fastlm::emulator::before_atomic(p, sizeof(T), site);
  T old, fresh;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    fresh = update(old);
  } while (!__atomic_compare_exchange(p, &old, &fresh, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  fastlm::emulator::after_atomic(p);
  return old;
}
template <class T>
T atomicAdd(T* p, T v, FASTLM_EMULATED_SITE) {
  return fastlm_emulated_atomic(p, [v](T old) { return static_cast<T>(old + v); }, site);
}
template <class T>
T atomicSub(T* p, T v, FASTLM_EMULATED_SITE) {
  return fastlm_emulated_atomic(p, [v](T old) { return static_cast<T>(old - v); }, site);
}
template <class T>
T atomicMax(T* p, T v, FASTLM_EMULATED_SITE) {
  return fastlm_emulated_atomic(p, [v](T old) { return old < v ? v : old; }, site);
}
template <class T>
T atomicMin(T* p, T v, FASTLM_EMULATED_SITE) {
  return fastlm_emulated_atomic(p, [v](T old) { return v < old ? v : old; }, site);
}
template <class T>
T atomicExch(T* p, T v, FASTLM_EMULATED_SITE) {
  return fastlm_emulated_atomic(p, [v](T) { return v; }, site);
}
template <class T>
T atomicCAS(T* p, T expected, T v, FASTLM_EMULATED_SITE) {
  return fastlm_emulated_atomic(p, [=](T old) { return old == expected ? v : old; }, site);
}
template <class T>
T atomicAnd(T* p, T v, FASTLM_EMULATED_SITE) {
  return fastlm_emulated_atomic(p, [v](T old) { return old & v; }, site);
}
template <class T>
T atomicOr(T* p, T v, FASTLM_EMULATED_SITE) {
  return fastlm_emulated_atomic(p, [v](T old) { return old | v; }, site);
}
template <class T>
T atomicXor(T* p, T v, FASTLM_EMULATED_SITE) {
  return fastlm_emulated_atomic(p, [v](T old) { return old ^ v; }, site);
}
// Counts up to `limit` and begins again at 0.
inline unsigned atomicInc(unsigned* p, unsigned limit, FASTLM_EMULATED_SITE) {
  return fastlm_emulated_atomic(p, [limit](unsigned old) { return old >= limit ? 0 : old + 1; }, site);
}

template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcs(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }
template <class T>
void __stcs(T* p, T v) { *p = v; }
template <class T>
void __stcg(T* p, T v) { *p = v; }

template <class To, class From>
To fastlm_emulated_bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To r;
  std::memcpy(&r, &v, sizeof(r));
  return r;
}
inline int __float_as_int(float v) { return fastlm_emulated_bits<int>(v); }
inline unsigned __float_as_uint(float v) { return fastlm_emulated_bits<unsigned>(v); }
inline float __int_as_float(int v) { return fastlm_emulated_bits<float>(v); }
inline float __uint_as_float(unsigned v) { return fastlm_emulated_bits<float>(v); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (v >> i & 1u) << (31 - i);
  return r;
}

// glibc declares __expf and its like without exporting them, so these are macros.
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)
#define __fdividef(a, b) ((a) / (b))
#define __frcp_rn(x) (1.0f / (x))
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { volatile float r = a * b; return r; }
inline float __fadd_rn(float a, float b) { volatile float r = a + b; return r; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
using std::max;
using std::min;
