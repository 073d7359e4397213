// dq: a block of queries goes from shared memory to its sum in global memory, in its turn.
//
// A sum lies as the accumulators do: of each warpgroup four floats of thread t for each 8 columns n, at 4 (128 n + t).
#pragma once
#include "attention/sm90_backward/work.h"
#include "common/cuda/ptx_mbarrier.h"
#include "common/cuda/ptx_memory.h"
#include "common/cuda/ptx_tma.h"

namespace fastlm::cuda::sm90_backward {

// By kSums threads that take the steps in turns, each from its own place: until a sum is complete in memory and the turn is
// passed on, more time may go by than a step takes. The next in turn is another bulk copy, behind a proxy of its own: hence the fences on both sides.
template <class S>
FASTLM_DEVICE void add_sums(const S& s, const Task& task, const OnePassWorkspace& w, const int* tickets, int own) {
  int step = 0;
  for (int n = 0;; n++) {
    const int slot = n % S::kKeyStages;
    ptx::mbarrier_wait(s.keys_full(slot), n / S::kKeyStages % 2);
    const int ticket = tickets[slot];
    ptx::mbarrier_arrive(s.keys_empty(slot));
    if (ticket >= task.works()) return;
    const Work<S::kQueries> work(task, ticket);
#pragma unroll 1
    for (Step now = work.first(); work.has(now); now = work.after(now), step++) {
      if (step % kSums != own) continue;
      const int sum = work.sum_of(task, now);
      const uint32_t turn = work.turn_of(task, now);
      if (turn > 0) {  // as a rule it has come before this one's part is there
        while (ptx::load_acquire(w.turns + sum) != turn) {
        }
        ptx::fence_proxy_async_global();
      }
      ptx::mbarrier_wait(s.sum_full(own), step / kSums % 2);
      if (turn == 0) ptx::bulk_store(w.dq + int64_t{sum} * kSum, s.sum(own), kSumBytes);
      else ptx::bulk_reduce_add_f32(w.dq + int64_t{sum} * kSum, s.sum(own), kSumBytes);
      ptx::bulk_commit();
      ptx::bulk_wait_read<0>();
      ptx::mbarrier_arrive(s.sum_empty(own));
      ptx::bulk_wait<0>();
      ptx::fence_proxy_async_global();
      ptx::store_release(w.turns + sum, turn + 1);
    }
  }
}

}  // namespace fastlm::cuda::sm90_backward
