// cp.async: copies from global to shared memory that a thread starts now and that are done when it waits for them. Until
// then their destination is poison. They happen as late as possible: in the wait itself, or when an mbarrier needs them.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "emulator/site.h"

namespace fastlm::emulator {

struct CpAsyncGroup {
  struct Copy {
    unsigned char* to;
    const unsigned char* from;
    int bytes, present;  // the first `present` bytes are copied, the rest is zero
  };
  std::vector<Copy> copies;
  void complete();  // the second time there is nothing left to do
};

struct CpAsyncQueue {
  std::shared_ptr<CpAsyncGroup> open;  // null: nothing since the last commit
  std::vector<std::shared_ptr<CpAsyncGroup>> committed;
};

void cp_async(uint32_t to, const void* from, int bytes, int present, Site site);
void cp_async_commit(Site site);
void cp_async_wait(int groups, Site site);  // until at most so many of the newest groups are under way
void cp_async_wait_all(Site site);
void cp_async_arrive(uint32_t mbarrier, Site site);  // cp.async.mbarrier.arrive.noinc

}  // namespace fastlm::emulator
