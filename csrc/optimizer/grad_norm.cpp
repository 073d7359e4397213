// grad_norm.h on the CPU.
#include "optimizer/grad_norm.h"

#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "common/rows.h"
#include "common/simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

double squares(const GradNormTensor& t, int64_t begin, int64_t end) {
  double result = 0.0;
  with_type(static_cast<DType>(t.type), [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(t.data) + begin;
    Vec sums[kSums] = {zero(), zero(), zero(), zero()};
    over_row(end - begin, [&](auto at, int64_t i, int k) {
      fetch_ahead(data + i);
      const Vec g = at.load(data + i);
      sums[k] = fma(g, g, sums[k]);
    });
    result = total(sums);
  });
  return result;
}

}  // namespace

void grad_norm_cpu(const GradNormTensor* tensors, int64_t count, int64_t chunks, double* sums, float max_norm, float* norm,
                   float* scale) {
  parallel_for(chunks, 8, [&](int64_t begin, int64_t end) {
    const auto after = [](int64_t chunk, const GradNormTensor& t) { return chunk < t.first_chunk; };
    const GradNormTensor* t = std::upper_bound(tensors, tensors + count, begin, after) - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (t + 1 < tensors + count && t[1].first_chunk <= chunk) ++t;
      const int64_t first = (chunk - t->first_chunk) * kGradNormChunk;
      sums[chunk] = squares(*t, first, std::min(t->numel, first + kGradNormChunk));
    }
  });
  double all = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) all += sums[chunk];
  *norm = static_cast<float>(std::sqrt(all));
  *scale = std::isfinite(*norm) ? std::min(1.0f, max_norm / (*norm + 1e-6f)) : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH(grad_norm_cpu,
                (const GradNormTensor* tensors, int64_t count, int64_t chunks, double* sums, float max_norm, float* norm,
                 float* scale),
                (tensors, count, chunks, sums, max_norm, norm, scale))
