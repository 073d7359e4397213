// wgmma: matrix products of four warps, asynchronous, with operands in shared memory. A warp's operations run when it
// waits for them; until then its accumulators hold NaN.
//
// Each warp computes its own 16 of the 64 rows by itself, so that the emulation adds no synchronisation between the four
// warps that the hardware does not give. That they ran the same operations is checked when the block ends.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "emulator/matrix.h"
#include "emulator/site.h"

namespace fastlm::emulator {

struct Wgmma {
  struct Accumulator {
    float* registers[32];  // of each lane
    int columns;
    float values[16][256];
    int operations;  // under way
  };
  struct Operation {
    MmaType type;
    int columns;
    bool add;  // false: d = a b
    bool a_in_registers, a_transposed, b_transposed;
    uint64_t a_descriptor, b_descriptor;
    uint32_t a[32][4];
    Accumulator* d;
    Site site;
  };
  bool fenced = false;
  std::vector<Operation> open;
  std::deque<std::vector<Operation>> committed;
  std::vector<std::unique_ptr<Accumulator>> accumulators;
  uint64_t history = 0;  // a hash of what the warp has done
  void note(uint64_t value) { history = (history ^ value) * 0x100000001b3ull + 7; }
};

struct Block;

// d (64 x columns) = a b (+ d). a: four registers a lane, or null: the descriptor.
struct WgmmaOperands {
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool a_transposed, b_transposed;  // stored with the rows (of b: columns) contiguous instead of k
};
void wgmma(MmaType type, int columns, float* d, const WgmmaOperands& operands, bool add, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int groups, Site site);

void check_no_wgmma_at_exit();
// A message where the four warps of a warpgroup did different things, else empty.
const char* diverged_warpgroup(const Block& block);

}  // namespace fastlm::emulator
