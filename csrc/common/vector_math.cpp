#include "common/vector_math.h"

#include "common/parallel.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/simd_math.h"

namespace fastlm::FASTLM_ISA {
namespace {

Vec apply(VectorFunction f, Vec x) {
  switch (f) {
    case VectorFunction::exp: return exp(x);
    case VectorFunction::logistic: return logistic(x);
    case VectorFunction::tanh: return tanh(x);
    case VectorFunction::normal_cdf: return normal(x).cdf;
    case VectorFunction::normal_density: return normal(x).density;
  }
  return x;
}

}  // namespace

void vector_math_cpu(VectorFunction f, const float* in, float* out, int64_t n) {
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    over_row(end - begin, [&](auto at, int64_t i, int) { at.store(out + begin + i, apply(f, at.load(in + begin + i))); });
  });
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH(vector_math_cpu, (VectorFunction f, const float* in, float* out, int64_t n), (f, in, out, n))
