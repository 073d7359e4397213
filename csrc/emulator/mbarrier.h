// mbarrier: a barrier in shared memory that counts arrivals and bytes. A phase is complete when all arrivals have come
// and the bytes of all transactions that were expected have landed.
#pragma once
#include <cstdint>
#include <vector>

#include "emulator/site.h"

namespace fastlm::emulator {

struct Block;
struct Thread;

struct Mbarriers {
  struct Waiter {
    Thread* thread;
    uint32_t offset, parity;
  };
  std::vector<Waiter> waiting;
  bool unfenced = false;  // one was initialised, and the async proxy and other blocks do not know of it yet
};

void mbarrier_init(uint32_t address, uint32_t count, Site site);
void mbarrier_invalidate(uint32_t address, Site site);
void fence_mbarrier_init(Site site);
void mbarrier_expect_tx(uint32_t address, uint32_t bytes, Site site);
void mbarrier_arrive(uint32_t address, uint32_t count, Site site);
void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes, Site site);
void mbarrier_wait(uint32_t address, uint32_t parity, Site site);
bool mbarrier_test_wait(uint32_t address, uint32_t parity, Site site);

// ---- for asynchronous copies
void check_mbarrier(uint32_t address, Site site);  // that it is one, and known to the async proxy
void mbarrier_complete_tx(Block& block, uint32_t offset, uint32_t bytes, Site site);
void mbarrier_arrive_later(Block& block, uint32_t offset, Site site);

}  // namespace fastlm::emulator
