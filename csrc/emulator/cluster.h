// Thread block clusters: their barrier, and each other's shared memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "emulator/site.h"

namespace fastlm::emulator {

struct Cluster;
struct Thread;

struct ClusterBarrier {
  int arrived = 0;
  int phase = 0;
  int completed = 0;
  std::vector<Thread*> waiting;
  SyncTag tags[2];
};

uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive(bool releases, Site site);
void cluster_wait(bool acquires, Site site);
void thread_leaves_cluster(Cluster& cluster);

// The shared::cluster address of `address` in the block of this rank.
uint32_t map_shared(uint32_t address, uint32_t rank, Site site);
void load_shared(void* to, uint32_t address, size_t bytes, Site site);
void store_shared(uint32_t address, const void* from, size_t bytes, Site site);
// st.async: the store lands later, and then completes its bytes on an mbarrier of the same block.
void store_shared_async(uint32_t address, const void* from, size_t bytes, uint32_t mbarrier, Site site);

}  // namespace fastlm::emulator
