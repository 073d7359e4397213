// cross_entropy.h on the CPU. A row of logits (200 KB for GPT-2's vocabulary) stays in the second-level cache from the
// first pass over it to the last: the highest logit, the sum of the exponentials, the gradient. The exponentials are
// computed twice rather than stored between: a dozen instructions for 16 of them cost less than rounding them to 16 bits.
#include "cross_entropy/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "common/error.h"
#include "common/parallel.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/simd_math.h"

namespace fastlm::FASTLM_ISA {
namespace {

struct Statistics {
  float highest, mean;
};

// Pass 1: the row as floats, soft-capped, in z (which is `logits` itself for float), and its highest value and its mean.
template <class T>
Statistics read_row(const CrossEntropyBlock& p, const T* logits, float* z) {
  const bool copied = !std::is_same_v<T, float> || p.softcap != 0.0f;
  const Vec lowest = set1(-std::numeric_limits<float>::infinity()), cap = set1(p.softcap);
  Vec highest[kSums] = {lowest, lowest, lowest, lowest}, sums[kSums] = {zero(), zero(), zero(), zero()};
  over_row(p.cols, [&](auto at, int64_t i, int k) {
    Vec v = at.load(logits + i);
    if (p.softcap != 0.0f) v = cap * tanh(v / cap);
    if (copied) at.store(z + i, v);
    highest[k] = max(highest[k], at.keep(v, lowest));
    sums[k] += at.keep(v);
  });
  float lanes[Vec::size];
  store(lanes, max(max(highest[0], highest[1]), max(highest[2], highest[3])));
  return {*std::max_element(lanes, lanes + Vec::size), total(sums) / static_cast<float>(p.cols)};
}

float sum_of_exponentials(const float* z, int64_t cols, float shift) {
  Vec sums[kSums] = {zero(), zero(), zero(), zero()};
  over_row(cols, [&](auto at, int64_t i, int k) { sums[k] += at.keep(exp(at.load(z + i) - set1(shift))); });
  return total(sums);
}

template <class T>
void one_row(const CrossEntropyBlock& p, int64_t row, float* scratch) {
  T* logits = static_cast<T*>(p.logits) + row * p.cols;
  float* z = scratch;
  if constexpr (std::is_same_v<T, float>) z = logits;
  const int64_t target = p.targets[row];
  const Statistics statistics = read_row(p, logits, z);
  const float at_target = z[target];

  float shift = statistics.highest, inverse = 1.0f;  // softmax(z) = exp(z - shift) * inverse
  if (p.loss == nullptr) {
    shift = p.lse[row];
  } else {
    const float sum = sum_of_exponentials(z, p.cols, shift);
    inverse = 1.0f / sum;
    const double log_sum = std::log(static_cast<double>(sum)), lse = log_sum + shift;
    const double smooth = p.label_smoothing;
    // The mean may be infinite.
    const double smoothed = smooth == 0.0 ? 0.0 : smooth * ((static_cast<double>(shift) - statistics.mean) + log_sum);
    // (shift - z) + log_sum rather than lse - z: a small loss keeps its digits beside a large logit.
    const double loss = (1.0 - smooth) * ((static_cast<double>(shift) - at_target) + log_sum) + smoothed +
                        p.z_loss * lse * lse;
    p.loss[row] = static_cast<float>(loss);
    p.lse[row] = static_cast<float>(lse);
  }
  if (!p.gradient) return;

  const float scale = p.dloss != nullptr ? p.scale * p.dloss[row] : p.scale;
  const Vec weight = set1(scale * inverse * (1.0f + 2.0f * p.z_loss * p.lse[row]));
  const Vec spread = set1(scale * p.label_smoothing / static_cast<float>(p.cols));
  const auto gradient = [&](Vec v, Vec less) {
    const Vec d = fma(exp(v - set1(shift)), weight, zero() - less);
    if (p.softcap == 0.0f) return d;
    const Vec t = v / set1(p.softcap);
    return d * (set1(1.0f) - t * t);
  };
  over_row(p.cols, [&](auto at, int64_t i, int) { at.store(logits + i, gradient(at.load(z + i), spread)); });
  const Vec less = spread + set1(scale * (1.0f - p.label_smoothing));
  store_n(logits + target, gradient(set1(at_target), less), 1);
}

}  // namespace

void cross_entropy_block_cpu(const CrossEntropyBlock& p) {
  check(p.rows >= 0 && p.cols >= 1, "cross_entropy: wanted rows >= 0 and cols >= 1");
  check(p.loss != nullptr || p.gradient || p.rows == 0, "cross_entropy: wanted the loss or the gradient, got neither");
  const int64_t grain = std::max<int64_t>(1, kGrain / p.cols);
  with_type(p.type, [&](auto t) {
    using T = decltype(t);
    parallel_for(p.rows, grain, [&](int64_t begin, int64_t end) {
      std::unique_ptr<float[]> scratch;
      if (!std::is_same_v<T, float>) scratch.reset(new float[p.cols]);
      for (int64_t row = begin; row < end; ++row) one_row<T>(p, row, scratch.get());
    });
  });
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH(cross_entropy_block_cpu, (const CrossEntropyBlock& p), (p))
