// Elements in memory by their type: sizes, and the reductions of bulk copies.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>

#include "emulator/tma.h"

namespace fastlm::emulator {

constexpr uint32_t size_of(ElementType t) {
  switch (t) {
    case ElementType::u8: return 1;
    case ElementType::u16:
    case ElementType::f16:
    case ElementType::bf16: return 2;
    case ElementType::u64:
    case ElementType::s64:
    case ElementType::f64: return 8;
    default: return 4;
  }
}

template <class T, class To, class From>
void combine_as(BulkReduction reduction, void* to, const void* value, To to_number, From from_number) {
  T a, b;
  std::memcpy(&a, to, sizeof(T));
  std::memcpy(&b, value, sizeof(T));
  const auto x = to_number(a), y = to_number(b);
  const auto r = reduction == BulkReduction::add ? x + y : reduction == BulkReduction::min ? std::min(x, y) : std::max(x, y);
  a = from_number(r);
  std::memcpy(to, &a, sizeof(T));
}

// *to = *to (reduction) *value
inline void combine(BulkReduction reduction, ElementType type, void* to, const void* value) {
  auto same = [](auto v) { return v; };
  switch (type) {
    case ElementType::f32: return combine_as<float>(reduction, to, value, same, same);
    case ElementType::f64: return combine_as<double>(reduction, to, value, same, same);
    case ElementType::u32: return combine_as<uint32_t>(reduction, to, value, same, same);
    case ElementType::s32: return combine_as<int32_t>(reduction, to, value, same, same);
    case ElementType::u64: return combine_as<uint64_t>(reduction, to, value, same, same);
    case ElementType::s64: return combine_as<int64_t>(reduction, to, value, same, same);
    case ElementType::f16:
      return combine_as<__half>(reduction, to, value, [](__half v) { return __half2float(v); },
                                [](float v) { return __float2half_rn(v); });
    case ElementType::bf16:
      return combine_as<__nv_bfloat16>(reduction, to, value, [](__nv_bfloat16 v) { return __bfloat162float(v); },
                                       [](float v) { return __float2bfloat16_rn(v); });
    default: return;  // PTX has no reduction of 8 and 16-bit integers; the wrapper refuses them
  }
}

}  // namespace fastlm::emulator
