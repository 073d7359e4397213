// A warpgroup that multiplies: 64 keys, whose dk and dv it keeps in registers, and half of the block's dq.
//
// Products run while their warpgroup works on another's result: dV beside dS, the next step's S^T and dP^T while dq is on
// its way and beside the weights. Else the tensor cores are the other warpgroup's. The two meet once a step: dQ takes the dS of
// both, after dK, which takes this one's own.
#pragma once
#include <type_traits>

#include "attention/sm90_backward/load.h"
#include "attention/sm90_backward/multiply.h"
#include "attention/sm90_backward/work.h"
#include "common/cuda/ptx_barrier.h"
#include "common/cuda/ptx_matrix.h"
#include "common/cuda/ptx_registers.h"
#include "common/cuda/ptx_warpgroup.h"

namespace fastlm::cuda::sm90_backward {

// Accumulators: keys `key` and key + 8, of queries query + 8 n and the one after it. Both are this lane's first ones.
struct Lane {
  int key, query;
};

// s: from products to weights P^T.
template <class S>
FASTLM_DEVICE void to_weights(float (&s)[S::kQueries / 2], float factor, const float* lse) {
#pragma unroll
  for (int n = 0; n < S::kQueries / 8; n++) {
    const float2 base = *reinterpret_cast<const float2*>(lse + 8 * n);
#pragma unroll
    for (int e = 0; e < 4; e++) s[4 * n + e] = ptx::exp2_approx(s[4 * n + e] * factor - (e % 2 == 0 ? base.x : base.y));
  }
}

// dp: from products to dS^T.
template <class S>
FASTLM_DEVICE void to_gradients(float (&dp)[S::kQueries / 2], const float (&weights)[S::kQueries / 2], const float* delta) {
#pragma unroll
  for (int n = 0; n < S::kQueries / 8; n++) {
    const float2 d = *reinterpret_cast<const float2*>(delta + 8 * n);
#pragma unroll
    for (int e = 0; e < 4; e++) dp[4 * n + e] = weights[4 * n + e] * (dp[4 * n + e] - (e % 2 == 0 ? d.x : d.y));
  }
}

// What is not visible becomes 0, whatever it was.
template <class S>
FASTLM_DEVICE void hide(const Span& span, Lane lane, float (&values)[S::kQueries / 2]) {
  const Span keys = span.transposed();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int key = lane.key + 8 * half, low = keys.low(key) - lane.query;
    const int high = key < span.column_end ? keys.high(key) - lane.query : low;
#pragma unroll
    for (int n = 0; n < S::kQueries / 8; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        if (8 * n + e < low || 8 * n + e >= high) values[4 * n + 2 * half + e] = 0.0f;
      }
    }
  }
}

// In 16 bits: 16 columns of accumulators are the registers of an a with 16 of k.
template <class T, int kCount>
FASTLM_DEVICE void pack_all(uint32_t (&to)[kCount / 8][4], const float (&from)[kCount], float factor = 1.0f) {
#pragma unroll
  for (int i = 0; i < kCount / 2; i++) to[i / 4][i % 4] = pack(from[2 * i] * factor, from[2 * i + 1] * factor, T());
}

// 16 rows of a warp by 16 kCount columns, to rows of 64 columns in shared memory. tile: its row 0. rows: how many there are.
template <int kCount>
FASTLM_DEVICE void put(uint32_t tile, int rows, int first_row, const uint32_t (&a)[kCount][4]) {
  const int lane = threadIdx.x % 32, row = first_row + lane % 16;
  const uint32_t to = ptx::opaque(tile + row * kRowBytes + ((lane / 16 ^ (row & 7)) << 4));
#pragma unroll
  for (int i = 0; i < kCount; i++) ptx::stmatrix<4>((to ^ 32 * (i % 4)) + i / 4 * rows * kRowBytes, a[i]);
}

template <class S>
FASTLM_DEVICE void consume(const S& s, unsigned char* shared, const Task& task, float scale, const Maps& maps, const int* tickets,
                           int group) {
  using T = typename S::T;
  constexpr int kQueries = S::kQueries;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int first_key = group * kGroupKeys, warp_key = first_key + thread / 32 * 16;
  const float* const statistics = reinterpret_cast<const float*>(shared + S::kStatisticsAt);
  float* const sum = reinterpret_cast<float*>(shared + S::kSumAt + group * kSumBytes / 2) + 4 * thread;
  auto arrive = [&](uint32_t barrier) {  // of a warp, which is together
    if (lane == 0) ptx::mbarrier_arrive(barrier);
  };
  int step = 0;
  for (int n = 0;; n++) {
    const int slot = n % S::kKeyStages;
    ptx::mbarrier_wait(s.keys_full(slot), n / S::kKeyStages % 2);
    const int ticket = tickets[slot];
    if (ticket >= task.works()) return;
    const Work<kQueries> work(task, ticket);
    const uint32_t k = s.k(slot), v = s.v(slot);
    float dk[S::kWidth / 2] = {}, dv[S::kWidth / 2] = {};
    int left = work.steps(), row = work.high_row;
    const int key0 = work.key0 + first_key;
    auto key = [&] { return static_cast<int>(ptx::opaque(work.key0 + warp_key + lane / 4)); };  // this lane's first one
    // Its part of dQ: 64 of the queries, or of the columns, whichever there are 128 of.
    const uint32_t dq_rows = s.ds() + (S::kHalves == 1 ? group * kKeys * kRowBytes : 0);
    const uint32_t dq_columns = k + (S::kHalves == 1 ? 0 : group * kKeys * kRowBytes);
    // The first rows of the blocks of queries that see all of these keys.
    const bool past_end = key0 + kGroupKeys > task.span.column_end;
    const int seen_from = past_end ? work.high_row + 1 : key0 + kGroupKeys - task.span.diagonal - task.span.right - 1;
    const int seen_to = key0 - task.span.diagonal + task.span.left + 1 - kQueries;
    if (left > 0) {
      float score[kQueries / 2], gradient[kQueries / 2];
      auto begin_scores = [&](int i) {
        ptx::mbarrier_wait(s.q_full(i % kStages), i / kStages % 2);
        ptx::forget(score);
        ptx::wgmma_fence();
        rows_by_rows<S>(score, k + first_key * kRowBytes, s.q(i % kStages));
        ptx::wgmma_commit();
      };
      auto begin_gradients = [&](int i) {
        ptx::mbarrier_wait(s.dout_full(i % kStages), i / kStages % 2);
        ptx::forget(gradient);
        ptx::wgmma_fence();
        rows_by_rows<S>(gradient, v + first_key * kRowBytes, s.dout(i % kStages));
        ptx::wgmma_commit();
      };
      const float* lse;
      bool partly_hidden;
      auto weigh = [&](int i) {
        lse = statistics + i % kStages * 2 * kQueries + 2 * (lane % 4);
        partly_hidden = row < seen_from || row > seen_to;
        ptx::wgmma_wait<1>();
        ptx::arrived(score);
        to_weights<S>(score, task.factor, lse);
        if (partly_hidden) hide<S>(task.span, {key(), row + 2 * (lane % 4)}, score);
        ptx::wgmma_wait<0>();
        ptx::arrived(gradient);
      };
      // From weights and dP^T to what is added to dv, dk and dq. Before the last step the next one's products begin.
      auto add = [&](auto is_last) {
        const int stage = step % kStages;
        Weights<S> p, ds;
        pack_all<T>(p, score);
        ptx::wgmma_fence();
        add_weighted_rows<S>(dv, p, s.dout(stage));
        ptx::wgmma_commit();
        to_gradients<S>(gradient, score, lse + kQueries);
        if (partly_hidden) hide<S>(task.span, {key(), row + 2 * (lane % 4)}, gradient);
        pack_all<T>(ds, gradient);
        ptx::mbarrier_wait(s.ds_empty(), step % 2 ^ 1);
        put(s.ds(), kKeys, warp_key, ds);
        ptx::fence_proxy_async();
        __syncwarp();
        arrive(s.ds_full());
        ptx::wgmma_fence();
        add_weighted_rows<S>(dk, ds, s.q(stage));
        ptx::wgmma_commit();
        ptx::mbarrier_wait(s.ds_full(), step % 2);
        ptx::wgmma_fence();
        float dq[32];
        dq_of<S>(dq, dq_rows, dq_columns);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        ptx::held(p);
        ptx::held(ds);
        arrive(s.empty(stage));
        if constexpr (is_last) {
          ptx::wgmma_wait<0>();
        } else {
          begin_scores(step + 1);
          ptx::wgmma_wait<1>();
        }
        ptx::arrived(dq);
        arrive(s.ds_empty());
        const int place = step % kSums;
        ptx::mbarrier_wait(s.sum_empty(place), step / kSums % 2 ^ 1);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          *reinterpret_cast<float4*>(sum + place * kSum + 512 * i) = make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
        }
        if constexpr (!is_last) begin_gradients(step + 1);
        ptx::fence_proxy_async();
        __syncwarp();
        arrive(s.sum_full(place));
        step++;
      };
      begin_scores(step);
      begin_gradients(step);
      weigh(step);
#pragma unroll 1
      for (; left > 1; left--) {
        add(std::false_type());
        row = work.row_after(row);
        weigh(step);
      }
      add(std::true_type());
    }
    ptx::arrived(dk);
    ptx::arrived(dv);
    // Out by way of this warpgroup's rows of K and V. The other one has read K when its last dQ is done.
    ptx::mbarrier_wait(s.ds_empty(), step % 2 ^ 1);
    uint32_t rows[S::kWidth / 16][4];
    pack_all<T>(rows, dk, scale);
    put(k, kKeys, warp_key, rows);
    pack_all<T>(rows, dv);
    put(v, kKeys, warp_key, rows);
    ptx::fence_proxy_async();
    group == 0 ? ptx::barrier_sync<1, 128>() : ptx::barrier_sync<2, 128>();
    if (thread / 32 == 0 && ptx::elect_one()) {
      const Work<kQueries> done(task, tickets[slot]);  // once more, so that it takes no registers in between
#pragma unroll
      for (int half = 0; half < S::kHalves; half++) {
        const int at[4] = {half * kColumns, done.kv_head, done.key0 + first_key, done.batch};
        const uint32_t from = (half * kKeys + first_key) * kRowBytes;
        ptx::tma_store(&maps.dk, k + from, at);
        ptx::tma_store(&maps.dv, v + from, at);
      }
      ptx::bulk_commit();
      ptx::bulk_wait_read<0>();
      ptx::mbarrier_arrive(s.keys_empty(slot));
    }
    __syncwarp();
  }
}

}  // namespace fastlm::cuda::sm90_backward
