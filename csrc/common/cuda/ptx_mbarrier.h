// mbarrier (sm_90): 8 bytes of shared memory, 8-byte aligned, that count arrivals and the bytes of asynchronous copies.
#pragma once
#include "common/cuda/ptx_shared.h"
#ifndef __CUDACC__
#include "emulator/mbarrier.h"
#endif

namespace fastlm::ptx {

// `count` arrivals make a phase. One thread does it; then mbarrier_fence_init() and a barrier of the block (or cluster).
FASTLM_DEVICE void mbarrier_init(uint32_t mbarrier, uint32_t count FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(count) : "memory");
#else
  emulator::mbarrier_init(mbarrier, count, site);
#endif
}

FASTLM_DEVICE void mbarrier_fence_init(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  emulator::fence_mbarrier_init(site);
#endif
}

FASTLM_DEVICE void mbarrier_invalidate(uint32_t mbarrier FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(mbarrier) : "memory");
#else
  emulator::mbarrier_invalidate(mbarrier, site);
#endif
}

FASTLM_DEVICE void mbarrier_arrive(uint32_t mbarrier FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
#else
  emulator::mbarrier_arrive(mbarrier, 1, site);
#endif
}

// On an mbarrier of any block of the cluster: an address from map_shared().
FASTLM_DEVICE void mbarrier_arrive_cluster(uint32_t mbarrier FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(mbarrier) : "memory");
#else
  emulator::mbarrier_arrive(mbarrier, 1, site);
#endif
}

// The same without publishing anything: for "I have read it". A release to the cluster waits for the thread's writes.
FASTLM_DEVICE void mbarrier_arrive_cluster_relaxed(uint32_t mbarrier FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(mbarrier) : "memory");
#else
  emulator::mbarrier_arrive(mbarrier, 1, site);
#endif
}

// Arrives, and makes the phase wait for this many bytes more.
FASTLM_DEVICE void mbarrier_arrive_expect_tx(uint32_t mbarrier, uint32_t bytes FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
#else
  emulator::mbarrier_arrive_expect_tx(mbarrier, bytes, site);
#endif
}

FASTLM_DEVICE void mbarrier_expect_tx(uint32_t mbarrier, uint32_t bytes FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
#else
  emulator::mbarrier_expect_tx(mbarrier, bytes, site);
#endif
}

// Whether the phase of this parity is complete. The first phase has parity 0; before it, parity 1 counts as complete.
FASTLM_DEVICE bool mbarrier_test_wait(uint32_t mbarrier, uint32_t parity FASTLM_AND_SITE) {
#ifdef __CUDACC__
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(done) : "r"(mbarrier), "r"(parity) : "memory");
  return done != 0;
#else
  return emulator::mbarrier_test_wait(mbarrier, parity, site);
#endif
}

// Waits until it is.
FASTLM_DEVICE void mbarrier_wait(uint32_t mbarrier, uint32_t parity FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}"
      ::"r"(mbarrier), "r"(parity) : "memory");
#else
  emulator::mbarrier_wait(mbarrier, parity, site);
#endif
}

}  // namespace fastlm::ptx
