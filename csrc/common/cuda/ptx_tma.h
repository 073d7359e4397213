// Bulk asynchronous copies (sm_90): TMA, cp.async.bulk.tensor, of rank 1 to 5, and the one-dimensional cp.async.bulk.
//
// Loads complete their bytes on an mbarrier. Stores and reductions are committed in groups by the thread that issued them,
// which waits for them; before them comes fence_proxy_async(), which shows ordinary writes to shared memory to the async proxy.
// A tile in shared memory is 128-byte aligned, with a swizzle to its period of 256, 512 or 1024 bytes.
#pragma once
#include "common/cuda/ptx_shared.h"
#include "common/cuda/tensor_map.h"
#ifndef __CUDACC__
#include "emulator/tma.h"
#endif

namespace fastlm::ptx {

using cuda::TensorMap;

FASTLM_DEVICE void fence_proxy_async(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emulator::fence_proxy_async(site);
#endif
}

// The same for global memory: between an ordinary access to it and one by a bulk copy, in either order.
FASTLM_DEVICE void fence_proxy_async_global() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

FASTLM_DEVICE void prefetch_tensor_map([[maybe_unused]] const TensorMap* map) {
#ifdef __CUDACC__
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// Loads the box at these coordinates (elements, the fastest dimension first; outside the tensor: zeros).
template <int kRank>
FASTLM_DEVICE void tma_load(uint32_t to, const TensorMap* map, uint32_t mbarrier, const int (&c)[kRank] FASTLM_AND_SITE) {
  static_assert(kRank >= 1 && kRank <= 5, "TMA knows ranks 1 to 5");
#ifdef __CUDACC__
  if constexpr (kRank == 1) {
    asm volatile("cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3}], [%2];"
                 ::"r"(to), "l"(map), "r"(mbarrier), "r"(c[0]) : "memory");
  } else if constexpr (kRank == 2) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(to), "l"(map), "r"(mbarrier), "r"(c[0]), "r"(c[1]) : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(to), "l"(map), "r"(mbarrier), "r"(c[0]), "r"(c[1]), "r"(c[2]) : "memory");
  } else if constexpr (kRank == 4) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
                 ::"r"(to), "l"(map), "r"(mbarrier), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]) : "memory");
  } else {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
                 ::"r"(to), "l"(map), "r"(mbarrier), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]) : "memory");
  }
#else
  emulator::tma_load(to, map, mbarrier, c, kRank, 0, site);
#endif
}

// The same box into every block of the cluster whose bit is set in `blocks`, at the same address in each, on the mbarrier at
// the same address in each.
template <int kRank>
FASTLM_DEVICE void tma_load_multicast(uint32_t to, const TensorMap* map, uint32_t mbarrier, const int (&c)[kRank],
                                      uint16_t blocks FASTLM_AND_SITE) {
  static_assert(kRank >= 1 && kRank <= 5, "TMA knows ranks 1 to 5");
#ifdef __CUDACC__
  if constexpr (kRank == 1) {
    asm volatile("cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%4}], [%2], %3;"
                 ::"r"(to), "l"(map), "r"(mbarrier), "h"(blocks), "r"(c[0]) : "memory");
  } else if constexpr (kRank == 2) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%4, %5}], [%2], %3;"
                 ::"r"(to), "l"(map), "r"(mbarrier), "h"(blocks), "r"(c[0]), "r"(c[1]) : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%4, %5, %6}], [%2], %3;"
                 ::"r"(to), "l"(map), "r"(mbarrier), "h"(blocks), "r"(c[0]), "r"(c[1]), "r"(c[2]) : "memory");
  } else if constexpr (kRank == 4) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%4, %5, %6, %7}], [%2], %3;"
                 ::"r"(to), "l"(map), "r"(mbarrier), "h"(blocks), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]) : "memory");
  } else {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;"
                 ::"r"(to), "l"(map), "r"(mbarrier), "h"(blocks), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]) : "memory");
  }
#else
  emulator::tma_load(to, map, mbarrier, c, kRank, blocks, site);
#endif
}

// Stores the box; what is outside the tensor is left out.
template <int kRank>
FASTLM_DEVICE void tma_store(const TensorMap* map, uint32_t from, const int (&c)[kRank] FASTLM_AND_SITE) {
  static_assert(kRank >= 1 && kRank <= 5, "TMA knows ranks 1 to 5");
#ifdef __CUDACC__
  if constexpr (kRank == 1) {
    asm volatile("cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%0, {%2}], [%1];"
                 ::"l"(map), "r"(from), "r"(c[0]) : "memory");
  } else if constexpr (kRank == 2) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
                 ::"l"(map), "r"(from), "r"(c[0]), "r"(c[1]) : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];"
                 ::"l"(map), "r"(from), "r"(c[0]), "r"(c[1]), "r"(c[2]) : "memory");
  } else if constexpr (kRank == 4) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 ::"l"(map), "r"(from), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]) : "memory");
  } else {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
                 ::"l"(map), "r"(from), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]) : "memory");
  }
#else
  emulator::tma_store(map, from, c, kRank, emulator::BulkReduction::none, site);
#endif
}

// Adds the box to the tensor, element by element and atomically, in no particular order.
template <int kRank>
FASTLM_DEVICE void tma_reduce_add(const TensorMap* map, uint32_t from, const int (&c)[kRank] FASTLM_AND_SITE) {
  static_assert(kRank >= 1 && kRank <= 5, "TMA knows ranks 1 to 5");
#ifdef __CUDACC__
  if constexpr (kRank == 1) {
    asm volatile("cp.reduce.async.bulk.tensor.1d.global.shared::cta.add.bulk_group [%0, {%2}], [%1];"
                 ::"l"(map), "r"(from), "r"(c[0]) : "memory");
  } else if constexpr (kRank == 2) {
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%2, %3}], [%1];"
                 ::"l"(map), "r"(from), "r"(c[0]), "r"(c[1]) : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4}], [%1];"
                 ::"l"(map), "r"(from), "r"(c[0]), "r"(c[1]), "r"(c[2]) : "memory");
  } else if constexpr (kRank == 4) {
    asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 ::"l"(map), "r"(from), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]) : "memory");
  } else {
    asm volatile("cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
                 ::"l"(map), "r"(from), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]) : "memory");
  }
#else
  emulator::tma_store(map, from, c, kRank, emulator::BulkReduction::add, site);
#endif
}

// `bytes` contiguous bytes; everything a multiple of 16.
FASTLM_DEVICE void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(mbarrier) : "memory");
#else
  emulator::bulk_load(to, from, bytes, mbarrier, 0, site);
#endif
}

FASTLM_DEVICE void bulk_store(void* to, uint32_t from, uint32_t bytes FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
#else
  emulator::bulk_store(to, from, bytes, emulator::BulkReduction::none, emulator::ElementType::u32, site);
#endif
}

FASTLM_DEVICE void bulk_reduce_add_f32(float* to, uint32_t from, uint32_t bytes FASTLM_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
#else
  emulator::bulk_store(to, from, bytes, emulator::BulkReduction::add, emulator::ElementType::f32, site);
#endif
}

FASTLM_DEVICE void bulk_commit(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  emulator::bulk_commit(site);
#endif
}

// Waits until at most kGroups of this thread's newest groups are under way.
template <int kGroups>
FASTLM_DEVICE void bulk_wait(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroups) : "memory");
#else
  emulator::bulk_wait(kGroups, false, site);
#endif
}

// The same, but only until they have read their shared memory, which may then be used again.
template <int kGroups>
FASTLM_DEVICE void bulk_wait_read(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
#else
  emulator::bulk_wait(kGroups, true, site);
#endif
}

}  // namespace fastlm::ptx
