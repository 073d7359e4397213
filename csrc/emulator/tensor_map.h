// The emulator's tensor map: what cuTensorMapEncodeTiled packs into 128 opaque bytes.
#pragma once
#include <cstdint>

namespace fastlm::emulator {

enum class ElementType : uint8_t { u8, u16, u32, s32, u64, s64, f16, f32, f64, bf16 };
enum class Swizzle : uint8_t { none, b32, b64, b128 };  // the width in bytes of the rows whose 16-byte pieces are exchanged

struct alignas(64) TensorMap {
  unsigned char* base;
  uint64_t size[5];    // elements
  uint64_t stride[5];  // bytes; stride[0] is the element's size
  uint16_t box[5];     // elements
  uint8_t rank;
  ElementType type;
  Swizzle swizzle;
  bool fill_nan;  // what is read out of bounds: NaN instead of zero
};
static_assert(sizeof(TensorMap) == 128, "as large as CUtensorMap");

// The permutation is a function of the shared address alone: bits 4 to 6 are changed by bits 7 to 9.
constexpr uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  const uint32_t bits = swizzle == Swizzle::b128 ? 0x70 : swizzle == Swizzle::b64 ? 0x30 : swizzle == Swizzle::b32 ? 0x10 : 0;
  return address ^ (address >> 3 & bits);
}
// After so many bytes the permutation repeats; tiles start at multiples of it.
constexpr uint32_t swizzle_period(Swizzle swizzle) {
  return swizzle == Swizzle::b128 ? 1024 : swizzle == Swizzle::b64 ? 512 : swizzle == Swizzle::b32 ? 256 : 128;
}

}  // namespace fastlm::emulator
