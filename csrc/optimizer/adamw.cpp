// adamw.h on the CPU. All tensors are cut into blocks of equal length and the blocks are shared out among the threads,
// so that many small tensors cost no more than one large one. Each element is computed on its own: the number of
// threads cannot change the result.
#include "optimizer/adamw_constants.h"

#include <algorithm>
#include <memory>

#include "common/error.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // elements; a block of float state and gradient is 64 KB
constexpr int64_t kGrain = 8;     // blocks to a thread at the least: below, waking a thread costs more than it saves

template <class P, class G>
void update(const AdamWTensor& t, const AdamWConstants& c, int64_t begin, int64_t end) {
  P* param = static_cast<P*>(t.param);
  const G* grad = static_cast<const G*>(t.grad);
  bf16* shadow = static_cast<bf16*>(t.shadow);
  const auto step = [&](auto at, int64_t i) {
    fetch_ahead(grad + i);
    fetch_ahead_to_write(param + i);
    fetch_ahead_to_write(t.exp_avg + i);
    fetch_ahead_to_write(t.exp_avg_sq + i);
    const Vec g = at.load(grad + i) * set1(c.grad_scale);
    const Vec m = fma(set1(c.beta1), at.load(t.exp_avg + i), set1(c.one_minus_beta1) * g);
    const Vec v = fma(set1(c.beta2), at.load(t.exp_avg_sq + i), set1(c.one_minus_beta2) * g * g);
    at.store(t.exp_avg + i, m);
    at.store(t.exp_avg_sq + i, v);
    Vec v_used = v;
    if (t.max_exp_avg_sq != nullptr) {
      v_used = max(at.load(t.max_exp_avg_sq + i), v);
      at.store(t.max_exp_avg_sq + i, v_used);
    }
    const Vec ratio = m / fma(sqrt(v_used), set1(c.v_scale), set1(c.eps));
    const Vec p = at.load(param + i) * set1(c.decay) - set1(c.step_size) * ratio;
    at.store(param + i, p);
    if (shadow != nullptr) at.store(shadow + i, p);
  };
  int64_t i = begin;
  for (; i + Vec::size <= end; i += Vec::size) step(Whole{}, i);
  if (i < end) step(Rest{end - i}, i);
}

}  // namespace

void adamw_step_cpu(const AdamWTensor* tensors, int64_t count, const AdamWStep& s) {
  check(s.step >= 1, "adamw: steps are counted from 1");
  const AdamWConstants c = constants_of(s);
  const std::unique_ptr<int64_t[]> first(new int64_t[count + 1]);  // tensor k has the blocks first[k] .. first[k+1]-1
  first[0] = 0;
  for (int64_t k = 0; k < count; ++k) first[k + 1] = first[k] + (tensors[k].numel + kBlock - 1) / kBlock;
  parallel_for(first[count], kGrain, [&](int64_t begin, int64_t end) {
    int64_t k = std::upper_bound(&first[0], &first[count + 1], begin) - &first[0] - 1;
    while (begin < end) {
      const int64_t last = std::min(end, first[k + 1]);  // of this tensor, in this thread's share
      if (begin < last) {
        const AdamWTensor& t = tensors[k];
        const int64_t from = (begin - first[k]) * kBlock, to = std::min(t.numel, (last - first[k]) * kBlock);
        with_type(t.p_type, [&](auto p) {
          with_type(t.g_type, [&](auto g) { update<decltype(p), decltype(g)>(t, c, from, to); });
        });
      }
      begin = last;
      ++k;
    }
  });
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH(adamw_step_cpu, (const AdamWTensor* tensors, int64_t count, const AdamWStep& s), (tensors, count, s))
