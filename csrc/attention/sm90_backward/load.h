// The thread that draws tickets and has TMA load what they are for.
#pragma once
#include "attention/sm90_backward/work.h"
#include "common/cuda/ptx_mbarrier.h"
#include "common/cuda/ptx_tma.h"

namespace fastlm::cuda::sm90_backward {

// (head dim, head, row, batch entry): boxes of 64 of the head dim by the rows of a block.
struct Maps {
  TensorMap q, k, v, dout, dk, dv;
};

// kRows rows of a head from row `row` on.
template <int kRows, int kHalves>
FASTLM_DEVICE void load_rows(uint32_t to, const TensorMap* map, uint32_t full, int head, int row, int batch) {
#pragma unroll
  for (int half = 0; half < kHalves; half++) {
    const int at[4] = {half * kColumns, head, row, batch};
    ptx::tma_load(to + half * kRows * kRowBytes, map, full, at);
  }
}

template <class S>
FASTLM_DEVICE void load(const S& s, const Task& task, const float* lse, const float* delta, uint32_t* next_ticket,
                        const Maps& maps, int* tickets) {
  constexpr int kQueries = S::kQueries;
  int step = 0;
  for (int n = 0;; n++) {
    const int slot = n % S::kKeyStages;
    const uint32_t keys_full = s.keys_full(slot);
    ptx::mbarrier_wait(s.keys_empty(slot), n / S::kKeyStages % 2 ^ 1);
    const int ticket = static_cast<int>(atomicAdd(next_ticket, 1u));
    tickets[slot] = ticket;
    if (ticket >= task.works()) {
      ptx::mbarrier_arrive(keys_full);
      return;
    }
    const Work<kQueries> work(task, ticket);
    ptx::mbarrier_arrive_expect_tx(keys_full, 2 * S::kKeyTile);
    load_rows<kKeys, S::kHalves>(s.k(slot), &maps.k, keys_full, work.kv_head, work.key0, work.batch);
    load_rows<kKeys, S::kHalves>(s.v(slot), &maps.v, keys_full, work.kv_head, work.key0, work.batch);
#pragma unroll 1
    for (Step now = work.first(); work.has(now); now = work.after(now), step++) {
      const int stage = step % kStages;
      const int64_t statistics = int64_t{work.batch * task.heads + now.head} * task.padded_rows + now.row;
      ptx::mbarrier_wait(s.empty(stage), step / kStages % 2 ^ 1);
      ptx::mbarrier_arrive_expect_tx(s.q_full(stage), S::kQueryTile + S::kStatistics);
      load_rows<kQueries, S::kHalves>(s.q(stage), &maps.q, s.q_full(stage), now.head, now.row, work.batch);
      ptx::bulk_load(s.lse(stage), lse + statistics, S::kStatistics, s.q_full(stage));
      ptx::mbarrier_arrive_expect_tx(s.dout_full(stage), S::kQueryTile + S::kStatistics);
      load_rows<kQueries, S::kHalves>(s.dout(stage), &maps.dout, s.dout_full(stage), now.head, now.row, work.batch);
      ptx::bulk_load(s.delta(stage), delta + statistics, S::kStatistics, s.dout_full(stage));
    }
  }
}

}  // namespace fastlm::cuda::sm90_backward
