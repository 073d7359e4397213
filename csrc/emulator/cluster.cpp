#include "emulator/cluster.h"

#include <cstring>

#include "emulator/mbarrier.h"
#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"

namespace fastlm::emulator {
namespace {

int live_threads(const Cluster& cluster) {
  int live = 0;
  for (const auto& block : cluster.blocks) live += block->live;
  return live;
}

void complete(ClusterBarrier& b) {
  b.arrived = 0;
  b.phase ^= 1;
  b.completed++;
  for (Thread* t : b.waiting) make_ready(t);
  b.waiting.clear();
  note_progress();
}

}  // namespace

uint32_t cluster_rank() { return static_cast<uint32_t>(current->block->rank); }
uint32_t cluster_size() { return static_cast<uint32_t>(current->block->cluster->blocks.size()); }

void cluster_arrive(bool releases, Site site) {
  Ignored ignored;
  enter("barrier.cluster.arrive", site);
  Cluster& cluster = *current->block->cluster;
  ClusterBarrier& b = cluster.barrier;
  if (current->cluster_phase >= 0) fail(site, "barrier.cluster.arrive twice without a barrier.cluster.wait between");
  current->cluster_phase = b.phase;
  if (releases) release(&b.tags[b.phase]);
  if (++b.arrived == live_threads(cluster)) complete(b);
}

void cluster_wait(bool acquires, Site site) {
  Ignored ignored;
  enter("barrier.cluster.wait", site);
  ClusterBarrier& b = current->block->cluster->barrier;
  const int phase = current->cluster_phase;
  if (phase < 0) fail(site, "barrier.cluster.wait without a barrier.cluster.arrive before it");
  current->cluster_phase = -1;
  if (b.phase == phase) {
    b.waiting.push_back(current);
    suspend();
  }
  if (acquires) acquire(&b.tags[phase]);
}

void thread_leaves_cluster(Cluster& cluster) {
  ClusterBarrier& b = cluster.barrier;
  if (b.arrived > 0 && b.arrived >= live_threads(cluster)) complete(b);
}

uint32_t map_shared(uint32_t address, uint32_t rank, Site site) {
  if (rank >= cluster_size()) fail(site, "mapa: block %u of a cluster of %u", rank, cluster_size());
  return (address & ((1u << kRankShift) - 1)) | (rank + 1) << kRankShift;
}

void load_shared(void* to, uint32_t address, size_t bytes, Site site) {
  Ignored ignored;
  enter("ld.shared::cluster", site);
  const unsigned char* p = shared_place(address, bytes, bytes, "ld.shared::cluster", site).data;
  kernel_reads(p, bytes);
  std::memcpy(to, p, bytes);
}

void store_shared(uint32_t address, const void* from, size_t bytes, Site site) {
  Ignored ignored;
  enter("st.shared::cluster", site);
  unsigned char* p = shared_place(address, bytes, bytes, "st.shared::cluster", site).data;
  kernel_writes(p, bytes);
  std::memcpy(p, from, bytes);
}

void store_shared_async(uint32_t address, const void* from, size_t bytes, uint32_t mbarrier, Site site) {
  Ignored ignored;
  enter("st.async", site);
  const SharedPlace place = shared_place(address, bytes, bytes, "st.async", site);
  const SharedPlace barrier = shared_place(mbarrier, 8, 8, "st.async", site);
  if (place.block != barrier.block) fail(site, "st.async: the destination and the mbarrier are in different blocks");
  check_mbarrier(mbarrier, site);
  uint64_t value[2] = {};
  std::memcpy(value, from, bytes);
  kernel_writes(place.data, bytes);
  fill_quietly(place.data, kPoison, bytes);
  const uint64_t low = value[0], high = value[1];
  defer(place.block, site, [=] {
    const uint64_t landed[2] = {low, high};
    kernel_writes(place.data, bytes);
    std::memcpy(place.data, landed, bytes);
    std::memcpy(place.block->shared.async_view + place.offset, landed, bytes);
    mbarrier_complete_tx(*barrier.block, barrier.offset, static_cast<uint32_t>(bytes), site);
  });
}

}  // namespace fastlm::emulator
