// Loads and stores with a memory order at GPU scope: semaphores between the blocks of a grid.
#pragma once
#include "common/cuda/platform.h"
#ifndef __CUDACC__
#include "emulator/memory.h"
#endif

namespace fastlm::ptx {

// What the thread that released this value did before is visible after it. Made to be called in a loop.
FASTLM_DEVICE uint32_t load_acquire(const uint32_t* p FASTLM_AND_SITE) {
#ifdef __CUDACC__
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
#else
  return emulator::load_acquire(p, site);
#endif
}

FASTLM_DEVICE uint32_t load_relaxed(const uint32_t* p FASTLM_AND_SITE) {
#ifdef __CUDACC__
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
#else
  return emulator::load_relaxed(p, site);
#endif
}

FASTLM_DEVICE void store_release(uint32_t* p, uint32_t v FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#else
  emulator::store_release(p, v, site);
#endif
}

FASTLM_DEVICE void store_relaxed(uint32_t* p, uint32_t v FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#else
  emulator::store_relaxed(p, v, site);
#endif
}

FASTLM_DEVICE void add_release(uint32_t* p, uint32_t v FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#else
  emulator::add_release(p, v, site);
#endif
}

}  // namespace fastlm::ptx
