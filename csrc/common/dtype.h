// Element types as they cross the Python boundary. The codes stand once more in fastlm/ops/native.py.
#pragma once
#include <cstdint>

namespace fastlm {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

constexpr int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

}  // namespace fastlm
