// Bulk asynchronous copies between global and shared memory: TMA (cp.async.bulk.tensor) and its one-dimensional sibling
// (cp.async.bulk), loads that an mbarrier counts, stores and reductions in groups that a thread waits for.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "emulator/site.h"
#include "emulator/tensor_map.h"

namespace fastlm::emulator {

struct BulkStore;  // tma.cpp

struct BulkGroups {
  using Group = std::vector<std::shared_ptr<BulkStore>>;
  Group open;
  std::vector<Group> committed;
};

enum class BulkReduction : uint8_t { none, add, min, max };

// Loads one box into every block of the cluster in `blocks` (a bit for each rank; 0: the block of `to`), at the same offset.
void tma_load(uint32_t to, const TensorMap* map, uint32_t mbarrier, const int* coordinates, int rank, uint16_t blocks, Site site);
void tma_store(const TensorMap* map, uint32_t from, const int* coordinates, int rank, BulkReduction reduction, Site site);
void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier, uint16_t blocks, Site site);
void bulk_store(void* to, uint32_t from, uint32_t bytes, BulkReduction reduction, ElementType type, Site site);
void bulk_commit(Site site);
void bulk_wait(int groups, bool only_read, Site site);
void fence_proxy_async(Site site);

void check_no_stores_at_exit();

}  // namespace fastlm::emulator
