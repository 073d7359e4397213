#include "common/parallel.h"

#include <algorithm>

// The entry points of libgomp that GCC itself compiles `#pragma omp parallel` to (LLVM's libomp has them too, on Linux).
// They are declared weak and no OpenMP library is linked: they bind to the one that torch brought into the process, so
// that torch.set_num_threads holds here as well and two thread pools do not fight for the cores. Where torch has none
// (macOS), they stay null and the loops run on one thread. It also makes the source independent of the compiler's own
// OpenMP support.
#if defined(__APPLE__)
#define FASTLM_WEAK __attribute__((weak_import))
#else
#define FASTLM_WEAK __attribute__((weak))
#endif
extern "C" {
FASTLM_WEAK void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
FASTLM_WEAK int omp_get_max_threads();
FASTLM_WEAK int omp_get_thread_num();
FASTLM_WEAK int omp_get_num_threads();
FASTLM_WEAK int omp_in_parallel();
}

namespace fastlm {
namespace {

bool have_openmp() {
  return GOMP_parallel && omp_get_max_threads && omp_get_thread_num && omp_get_num_threads && omp_in_parallel;
}

struct Loop {
  int64_t n;
  RangeFunction function;
  const void* context;
};

void run_share(void* data) {
  const Loop& loop = *static_cast<const Loop*>(data);
  const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
  const int64_t begin = loop.n * thread / threads, end = loop.n * (thread + 1) / threads;
  if (begin < end) loop.function(loop.context, begin, end);
}

}  // namespace

int max_threads() { return have_openmp() ? omp_get_max_threads() : 1; }

void parallel_for_erased(int64_t n, int64_t grain, RangeFunction function, const void* context) {
  if (n <= 0) return;
  const int64_t useful = (n + grain - 1) / grain;
  if (useful <= 1 || !have_openmp() || omp_in_parallel()) return function(context, 0, n);
  const int64_t threads = std::min<int64_t>(useful, omp_get_max_threads());
  if (threads <= 1) return function(context, 0, n);
  Loop loop{n, function, context};
  GOMP_parallel(run_share, &loop, static_cast<unsigned>(threads), 0);
}

}  // namespace fastlm
