// The functions of simd_math.h on arrays, for the tests of their error bounds.
#pragma once
#include <cstdint>

namespace fastlm {

enum class VectorFunction : int32_t { exp = 0, logistic, tanh, normal_cdf, normal_density };

void vector_math_cpu(VectorFunction f, const float* in, float* out, int64_t n);

}  // namespace fastlm
