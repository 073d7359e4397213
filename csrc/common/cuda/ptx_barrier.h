// Named barriers of a block. Barrier 0 is __syncthreads's. The number is a template parameter where it can be: with a
// register, ptxas reserves all 16.
#pragma once
#include "common/cuda/platform.h"
#ifndef __CUDACC__
#include "emulator/barrier.h"
#endif

namespace fastlm::ptx {

// Waits until `threads` threads (a multiple of 32) have come to barrier `id`, 1 to 15.
FASTLM_DEVICE void barrier_sync(int id, int threads FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::named_barrier_sync(id, threads, site);
#endif
}

template <int kId, int kThreads>
FASTLM_DEVICE void barrier_sync(FASTLM_SITE) {
  static_assert(kId > 0 && kId < 16 && kThreads % 32 == 0, "barriers 1 to 15, whole warps");
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
#else
  emulator::named_barrier_sync(kId, kThreads, site);
#endif
}

// Counts as one of the threads, without waiting.
FASTLM_DEVICE void barrier_arrive(int id, int threads FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulator::named_barrier_arrive(id, threads, site);
#endif
}

}  // namespace fastlm::ptx
