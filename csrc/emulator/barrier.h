// The barriers of a block: __syncthreads (barrier 0 of all threads) and named barriers, bar.sync and bar.arrive.
#pragma once
#include <vector>

#include "emulator/site.h"

namespace fastlm::emulator {

struct Block;
struct Thread;

struct NamedBarrier {
  int arrived = 0;
  int wanted = 0;  // the threads it waits for; 0: every thread of the block that has not exited
  int phase = 0;
  int counted = 0, count = 0;  // predicates of __syncthreads_count: so far, and of the phase that just completed
  Site first;                  // where the first thread arrived
  std::vector<Thread*> waiting;
  SyncTag tags[2];             // for even and odd phases
};

void named_barrier_sync(int id, int threads, Site site);
void named_barrier_arrive(int id, int threads, Site site);
void thread_leaves_barriers(Block& block);  // an exited thread no longer takes part in __syncthreads

}  // namespace fastlm::emulator
