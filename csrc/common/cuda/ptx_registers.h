// Registers that an asynchronous instruction writes or reads: where the compiler may first use them.
#pragma once
#include "common/cuda/platform.h"

namespace fastlm::ptx {

// After the wait for a wgmma: what is computed from its registers is computed here or later. The compiler does not know
// that the wait has to do with them, and could compute before it.
template <int kCount>
FASTLM_DEVICE void arrived([[maybe_unused]] float (&d)[kCount]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// After the wait for a wgmma with a in registers: until here they hold it.
template <int kCount>
FASTLM_DEVICE void held([[maybe_unused]] const uint32_t (&a)[kCount][4]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" ::"r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]) : "memory");
#endif
}

// Before a product that does not add to what was there: the compiler need not keep it.
template <int kCount>
FASTLM_DEVICE void forget([[maybe_unused]] float (&d)[kCount]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "=f"(d[i]));
#endif
}

// What `sum`, which is not negative, is computed from comes before what follows: ptxas, else, moves the wait for a product up
// to where the product is started. The nap, which never comes, is an effect that it keeps in its place.
FASTLM_DEVICE void complete([[maybe_unused]] float sum) {
#ifdef __CUDACC__
  asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p nanosleep.u32 0;\n}" ::"f"(sum) : "memory");
#endif
}

}  // namespace fastlm::ptx
