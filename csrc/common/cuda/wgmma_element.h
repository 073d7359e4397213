// What wgmma and TMA call the 16-bit types.
#pragma once
#include "common/cuda/ptx_wgmma.h"
#include "common/cuda/tensor_map.h"

namespace fastlm::cuda {

template <class T>
struct WgmmaElement;
template <>
struct WgmmaElement<__nv_bfloat16> {
  static constexpr auto kWgmma = ptx::WgmmaType::bf16;
  static constexpr auto kMap = ElementType::bf16;
};
template <>
struct WgmmaElement<__half> {
  static constexpr auto kWgmma = ptx::WgmmaType::f16;
  static constexpr auto kMap = ElementType::f16;
};

}  // namespace fastlm::cuda
