// Bank conflicts of ldmatrix and stmatrix, counted a launch: FASTLM_EMULATOR_COUNTS names the file that gets a line of JSON
// for each. Shared memory has 32 banks of 4 bytes; a matrix of eight rows of 16 bytes is read in one go (a wavefront) where
// the rows lie in eight different groups of four banks, and in as many as rows of different addresses share a group.
#pragma once
#include <cstdint>

#include <cuda_runtime.h>

namespace fastlm::emulator {

// How many wavefronts one matrix takes: `address[i]` is that of its row i.
int wavefronts(const uint32_t (&address)[8]);

// The matrices of one instruction: lane 8 i + j holds the address of row j of matrix i.
void count_matrices(const uint32_t* address, int count);

void begin_counts();
// Adds the line to the file, where one is wanted.
void write_counts(dim3 grid, dim3 block, size_t dynamic_shared);

}  // namespace fastlm::emulator
