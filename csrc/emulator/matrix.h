// Matrix fragments in registers: ldmatrix, stmatrix and mma.sync. Fragment layouts: PTX ISA, "Matrix Fragments for mma".
#pragma once
#include <cstdint>

#include "emulator/site.h"

namespace fastlm::emulator {

enum class MmaType { f16, bf16, tf32 };

// `count` 8x8 matrices of 16-bit elements; lane 8 i + j holds the address of row j of matrix i.
void ldmatrix(uint32_t* r, int count, bool transposed, uint32_t address, Site site);
void stmatrix(const uint32_t* r, int count, bool transposed, uint32_t address, Site site);
// d = a b + c: 16x16 by 16x8 (f16, bf16) or 16x8 by 8x8 (tf32), in float32.
void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b, const float* c, Site site);

float half_to_float(uint16_t bits);
inline float bfloat16_to_float(uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}

}  // namespace fastlm::emulator
