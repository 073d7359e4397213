// cp.async (sm_80): asynchronous copies from global to shared memory, by groups.
#pragma once
#include "common/cuda/ptx_shared.h"
#ifndef __CUDACC__
#include "emulator/cp_async.h"
#endif

namespace fastlm::ptx {

// Copies `present` bytes (0 to 16) from global memory and fills the rest of the 16 with zeros. Both are 16-byte aligned;
// of `from` no more than `present` bytes are read, so with 0 it may lie outside of any memory. Goes through L2 only.
FASTLM_DEVICE void cp_async_16(uint32_t to, const void* from, int present = 16 FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present) : "memory");
#else
  emulator::cp_async(to, from, 16, present, site);
#endif
}

// 16 bytes, or, where there are none, 16 zeros. Fewer instructions than a number of bytes takes.
FASTLM_DEVICE void cp_async_16_if(bool present, uint32_t to, const void* from FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("{\n.reg .pred ignore;\nsetp.eq.u32 ignore, %2, 0;\n"
               "cp.async.cg.shared.global [%0], [%1], 16, ignore;\n}" ::"r"(to), "l"(from), "r"(static_cast<uint32_t>(present))
               : "memory");
#else
  emulator::cp_async(to, from, 16, present ? 16 : 0, site);
#endif
}

// 4 or 8 bytes, aligned to their size, through L1.
template <int kBytes>
FASTLM_DEVICE void cp_async_small(uint32_t to, const void* from, int present = kBytes FASTLM_AND_SITE) {
  static_assert(kBytes == 4 || kBytes == 8, "cp.async copies 4, 8 or 16 bytes");
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(present) : "memory");
#else
  emulator::cp_async(to, from, kBytes, present, site);
#endif
}

FASTLM_DEVICE void cp_async_commit(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::cp_async_commit(site);
#endif
}

// Waits until at most kGroups of this thread's newest groups are under way.
template <int kGroups>
FASTLM_DEVICE void cp_async_wait(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#else
  emulator::cp_async_wait(kGroups, site);
#endif
}

FASTLM_DEVICE void cp_async_wait_all(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  emulator::cp_async_wait_all(site);
#endif
}

// One arrival on the mbarrier (which its count includes) when all earlier cp.async of this thread are done.
FASTLM_DEVICE void cp_async_mbarrier_arrive(uint32_t mbarrier FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(mbarrier) : "memory");
#else
  emulator::cp_async_arrive(mbarrier, site);
#endif
}

}  // namespace fastlm::ptx
