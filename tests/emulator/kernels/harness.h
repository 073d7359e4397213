// A table of small kernels that read an array of 32-bit words and write another. The same file is compiled for the emulator
// and for a GPU, and called through the C functions at the end.
#pragma once
#include <string>
#include <vector>

#include "common/cuda/launch.h"

namespace harness {

struct Case {
  const char* name;
  int in_words, out_words;
  void (*run)(const uint32_t* in, uint32_t* out);  // both in the device's memory
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Register {
  Register(const char* name, int in_words, int out_words, void (*run)(const uint32_t*, uint32_t*)) {
    cases().push_back({name, in_words, out_words, run});
  }
};

// A case whose kernel is kernel(in, out).
#define HARNESS_CASE(name, kernel, grid, block, shared, in_words, out_words)                          \
  static const harness::Register kernel##_case(name, in_words, out_words, [](const uint32_t* in, uint32_t* out) { \
    fastlm::cuda::launch(name, {dim3(grid), dim3(block), shared}, kernel, in, out);                   \
  })

}  // namespace harness

#define HARNESS_EXPORT extern "C" __attribute__((visibility("default")))
