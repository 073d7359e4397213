// Parallel loops on the OpenMP runtime that torch has loaded already.
#pragma once
#include <cstdint>

namespace fastlm {

// The number of threads a loop may use: torch.get_num_threads().
int max_threads();

using RangeFunction = void (*)(const void* context, int64_t begin, int64_t end);
void parallel_for_erased(int64_t n, int64_t grain, RangeFunction function, const void* context);

// Calls body(begin, end) for disjoint ranges that cover 0 .. n-1, one range a thread, each of at least `grain` items
// (but for the last). What is computed must not depend on where the ranges are cut. `body` must not throw.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  parallel_for_erased(
      n, grain, [](const void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      &body);
}

}  // namespace fastlm
