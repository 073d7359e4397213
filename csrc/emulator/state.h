// What the emulator knows of a running grid: clusters of blocks of warps of threads. What belongs to one topic (a queue
// of copies, a barrier) is declared in that topic's header.
#pragma once
#include <cuda_runtime.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulator/barrier.h"
#include "emulator/cluster.h"
#include "emulator/cp_async.h"
#include "emulator/fiber.h"
#include "emulator/mbarrier.h"
#include "emulator/memory.h"
#include "emulator/options.h"
#include "emulator/registers.h"
#include "emulator/shared_memory.h"
#include "emulator/site.h"
#include "emulator/tma.h"
#include "emulator/warp.h"
#include "emulator/wgmma.h"

namespace fastlm::emulator {

struct Block;
struct Cluster;

struct Warp {
  Block* block = nullptr;
  int index = 0;
  uint32_t live = 0;  // lanes that have not exited
  SyncTag synchronised;  // by __syncwarp
  std::vector<Rendezvous> rendezvous;
  Wgmma wgmma;
  int registers = 0;  // that each of its threads may use
};

struct Thread {
  Fiber fiber;
  uint3 index{};
  int linear = 0;
  int lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
  const char* doing = "its own code";  // the last emulated instruction, and where it stands
  Site site;
  Fences fences;
  CpAsyncQueue cp_async;
  BulkGroups bulk;
  int cluster_phase = -1;  // of the cluster barrier at which it has arrived; -1: none
};

struct Block {
  uint3 index{};
  Cluster* cluster = nullptr;
  int rank = 0;  // in the cluster
  int live = 0;  // threads that have not exited
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  SharedMemory shared;
  NamedBarrier barriers[16];
  Mbarriers mbarriers;
  RegisterPool registers;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  ClusterBarrier barrier;
};

}  // namespace fastlm::emulator
