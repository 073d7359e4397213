// Kernels with a mistake built in, one at a time. `none` is the right kernel; what a wrong one writes is compared with it.
#pragma once
#include "harness.h"

// Bug::name of the kernel in scope; the case is "kernel/name".
#define BUG_CASE(kernel, bug, grid, block, shared, in_words, out_words)                                             \
  static const harness::Register kernel##_##bug(#kernel "/" #bug, in_words, out_words, [](const uint32_t* in, uint32_t* out) { \
    fastlm::cuda::launch(#kernel, {grid, block, shared}, kernel<Bug::bug>, in, out);                                \
  })

// The same in a cluster.
#define CLUSTER_BUG_CASE(kernel, bug, grid, block, cluster, in_words, out_words)                                    \
  static const harness::Register kernel##_##bug(#kernel "/" #bug, in_words, out_words, [](const uint32_t* in, uint32_t* out) { \
    fastlm::cuda::launch(#kernel, {grid, block, 0, nullptr, cluster}, kernel<Bug::bug>, in, out);                   \
  })
