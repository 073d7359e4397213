// The 16-bit floating-point types in memory. Arithmetic is done in float (simd.h converts).
#pragma once
#include <cstdint>

namespace fastlm {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
struct Pair {  // of elements that are multiplied together and added
  bf16 first, second;
};

}  // namespace fastlm
