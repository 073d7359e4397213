// Many tensors in one launch: all are cut into chunks, and a block finds its tensor in a table on the device.
#pragma once
#include "common/cuda/platform.h"

namespace fastlm::cuda {

constexpr int64_t kChunk = 4096;  // elements: 2 vectors of 8 for each of 256 threads
constexpr int kChunkThreads = 256;

// The last k with first[k * stride] <= chunk; first[0] is 0 and the numbers ascend. Every thread searches by itself.
FASTLM_DEVICE int64_t tensor_of(const int64_t* first, int64_t stride, int64_t count, int64_t chunk) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first[middle * stride] <= chunk) low = middle;
    else high = middle;
  }
  return low;
}

}  // namespace fastlm::cuda
