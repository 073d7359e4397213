// Thread block clusters (sm_90): their barrier and distributed shared memory.
#pragma once
#include "common/cuda/ptx_shared.h"
#ifndef __CUDACC__
#include "emulator/cluster.h"
#endif

namespace fastlm::ptx {

// This block's number in its cluster, and how many blocks the cluster has.
FASTLM_DEVICE uint32_t cluster_rank() {
#ifdef __CUDACC__
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
#else
  return emulator::cluster_rank();
#endif
}

FASTLM_DEVICE uint32_t cluster_size() {
#ifdef __CUDACC__
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;\n" : "=r"(r));
  uint32_t y, z;
  asm volatile("mov.u32 %0, %%cluster_nctaid.y;\n" : "=r"(y));
  asm volatile("mov.u32 %0, %%cluster_nctaid.z;\n" : "=r"(z));
  return r * y * z;
#else
  return emulator::cluster_size();
#endif
}

// All threads of the cluster arrive, then wait: what they wrote before is visible after. Between the two a thread may do
// what needs no one else.
FASTLM_DEVICE void cluster_arrive(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  emulator::cluster_arrive(true, site);
#endif
}

FASTLM_DEVICE void cluster_wait(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  emulator::cluster_wait(true, site);
#endif
}

// An arrival that publishes nothing: for "I shall not touch your shared memory any more".
FASTLM_DEVICE void cluster_arrive_relaxed(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#else
  emulator::cluster_arrive(false, site);
#endif
}

// The address of the same place in the shared memory of another block of the cluster.
FASTLM_DEVICE uint32_t map_shared(uint32_t address, uint32_t rank FASTLM_AND_SITE) {
#ifdef __CUDACC__
  uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
#else
  return emulator::map_shared(address, rank, site);
#endif
}

FASTLM_DEVICE uint32_t load_cluster(uint32_t address FASTLM_AND_SITE) {
  uint32_t v;
#ifdef __CUDACC__
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
#else
  emulator::load_shared(&v, address, 4, site);
#endif
  return v;
}

FASTLM_DEVICE void store_cluster(uint32_t address, uint32_t v FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
#else
  emulator::store_shared(address, &v, 4, site);
#endif
}

// A store that lands later and then completes 4 bytes on an mbarrier of the block that it goes to.
FASTLM_DEVICE void store_cluster_async(uint32_t address, uint32_t v, uint32_t mbarrier FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address), "r"(v),
               "r"(mbarrier) : "memory");
#else
  emulator::store_shared_async(address, &v, 4, mbarrier, site);
#endif
}

}  // namespace fastlm::ptx
