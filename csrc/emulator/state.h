// What the emulator knows of a running grid: clusters of blocks of warps of threads. What belongs to one topic (a queue
// of copies, a barrier) is declared in that topic's header.
#pragma once
#include <cuda_runtime.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulator/barrier.h"
#include "emulator/fiber.h"
#include "emulator/memory.h"
#include "emulator/options.h"
#include "emulator/shared_memory.h"
#include "emulator/site.h"
#include "emulator/warp.h"

namespace fastlm::emulator {

struct Block;
struct Cluster;

struct Warp {
  Block* block = nullptr;
  int index = 0;
  uint32_t live = 0;  // lanes that have not exited
  char synchronised = 0;  // ThreadSanitizer's tag of __syncwarp
  std::vector<Rendezvous> rendezvous;
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
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int live_blocks = 0;
};

}  // namespace fastlm::emulator
