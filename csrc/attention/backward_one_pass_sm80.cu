// attention.h on CUDA, backward: dq, dk and dv in one pass over the scores. A block of threads owns a block of keys of one
// head of k and v, and walks the blocks of queries that see it, of all heads that share it. dk and dv stay in registers.
// What it adds to dq goes to a float32 sum in memory, in a fixed order: of all blocks of keys that touch a block of
// queries the last is first, and each waits for its turn.
//
// The order is also that in which blocks of threads begin (they draw a ticket), so a block waits only for blocks that are
// running already, however few fit on the device. And it is the order in which they arrive by themselves: under a causal
// mask the last block of keys has the diagonal's queries to itself when the one before it is two steps away.
#include "attention/sm80/backward.h"
#include "common/cuda/ptx_memory.h"

namespace fastlm {
namespace cuda {
namespace {

// kLarge: for GPUs with at least 163 KB of shared memory a block (A100, H100); the others have 99 KB.
template <class T, int kWidth, bool kLarge>
struct Shape {
  static constexpr int kWarps = kLarge ? 8 : 4, kThreads = 32 * kWarps;
  static constexpr int kQueries = kLarge || kWidth <= 64 ? 64 : 32, kKeys = kLarge ? 128 : 64;
  static constexpr int kBlocksAtLeast = kWidth <= 64 ? 2 : 1;  // on a multiprocessor
  // Scores: each warp has 32 queries and this many keys.
  static constexpr int kScoreKeys = kKeys / (kWarps / (kQueries / 32)), kTiles = kScoreKeys / 8;
  // Gradients: each warp has 32 columns, and this many rows.
  static constexpr int kOutWarps = kWidth / 32, kOutTiles = 4;
  static constexpr int kKeyRows = kKeys / (kWarps / kOutWarps), kQueryRows = kQueries / (kWarps / kOutWarps);
  using Tile = cuda::Tile<T, kWidth>;
  using Scores = cuda::Tile<T, kKeys>;
  static constexpr int kStageBytes = Tile::bytes(2 * kQueries), kStatisticsBytes = 2 * kQueries * 4;
  static constexpr int kBytes = Tile::bytes(2 * kKeys) + 2 * (kStageBytes + kStatisticsBytes) + Scores::bytes(2 * kQueries);
  static constexpr int kSum = kQueries * kWidth;  // floats of a block of dq
};

// The blocks of queries of a sequence in the workspace: no two sequences share one, and packed ones need no count of others.
template <class S>
FASTLM_DEVICE int64_t first_sum(const AttentionInputs& p, int sequence, const Span& span) {
  return p.cu_seqlens == nullptr ? static_cast<int64_t>(sequence) * ((p.rows + S::kQueries - 1) / S::kQueries)
                                 : span.row / S::kQueries + sequence;
}

// A block of dq as this thread's accumulators: element i lies i * kThreads further on.
template <class S, int kRowTiles>
FASTLM_DEVICE void add_sum(float* to, const float (&part)[kRowTiles][S::kOutTiles][4], bool first) {
  to += threadIdx.x;
#pragma unroll
  for (int r = 0; r < kRowTiles; r++) {
#pragma unroll
    for (int n = 0; n < S::kOutTiles; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float* const p = to + ((r * S::kOutTiles + n) * 4 + e) * S::kThreads;
        if (first) *p = part[r][n][e];
        else atomicAdd(p, part[r][n][e]);  // in this block's turn: nothing has to come back, and nobody is beside it
      }
    }
  }
}

// A block of queries of a head, by its first row.
struct Step {
  int head, row;
};

// A turn to be passed on, once everybody has added to dq.
struct Turn {
  uint32_t* at;
  uint32_t turn;  // the next one
};

template <class T, int kWidth, bool kGeneral, bool kLarge>
__global__ void __launch_bounds__(Shape<T, kWidth, kLarge>::kThreads, Shape<T, kWidth, kLarge>::kBlocksAtLeast)
    attention_backward(const __grid_constant__ BackwardInputs in, const Grid grid, const OnePassWorkspace w,
                       T* __restrict__ dk, T* __restrict__ dv, int64_t dkv_row) {
  using S = Shape<T, kWidth, kLarge>;
  using Tile = typename S::Tile;
  using Scores = typename S::Scores;
  constexpr int kThreads = S::kThreads, kQueries = S::kQueries, kKeys = S::kKeys, kTiles = S::kTiles, kRowTiles = 2;
  FASTLM_SHARED(int, ticket, 1);
  FASTLM_SHARED(Turn, done, 1);  // of thread 0; here, since registers are short
  FASTLM_SHARED_DYNAMIC(shared, 128);
  if (threadIdx.x == 0) ticket[0] = static_cast<int>(atomicAdd(w.ticket, 1u));
  __syncthreads();
  const Tile k_tile{shared, ptx::shared_address(shared)};
  const Tile v_tile = k_tile.after(kKeys), stages = v_tile.after(kKeys), after_stages = stages.after(4 * kQueries);
  const Scores weights{after_stages.data, after_stages.address}, gradients = weights.after(kQueries);
  const Scores after_scores = gradients.after(kQueries);
  const float* statistics = reinterpret_cast<const float*>(after_scores.data);  // 2 stages of lse and delta

  const AttentionInputs& p = in.p;
  const Place place(grid, ticket[0]);
  const Span span = span_of(p, place.sequence), keys = span.transposed();
  const int batch = p.cu_seqlens == nullptr ? place.sequence : 0;
  const int key0 = (span.column & ~7) + (grid.blocks - 1 - place.block) * kKeys;
  if (key0 >= span.column_end) return;
  const int low = keys.low(max(key0, span.column)), high = keys.high(keys.last(key0 + kKeys));
  const int group = static_cast<int>(p.heads / p.kv_heads), head_end = (place.head + 1) * group;
  const int first_row = span.row + (low - span.row) / kQueries * kQueries;  // blocks of queries count from the sequence's first
  Step now{high > low ? head_end - group : head_end, first_row};

  const int chunks = static_cast<int>(p.width * sizeof(T) / 16);
  const Rows<T> k{static_cast<const T*>(p.k) + at(p.k_strides, batch, place.head), p.k_strides.row, chunks};
  const Rows<T> v{static_cast<const T*>(p.v) + at(p.v_strides, batch, place.head), p.v_strides.row, chunks};
  auto after = [&](Step s) { return s.row + kQueries < high ? Step{s.head, s.row + kQueries} : Step{s.head + 1, first_row}; };
  auto load_stage = [&](Step s, int stage) {
    const Tile q_tile = stages.after(stage * 2 * kQueries);
    const Rows<T> q{static_cast<const T*>(p.q) + at(p.q_strides, batch, s.head), p.q_strides.row, chunks};
    const Rows<T> dout{static_cast<const T*>(in.dout) + at(in.dout_strides, batch, s.head), in.dout_strides.row, chunks};
    load_tile<kQueries, kThreads>(q_tile, q, s.row, span.row, span.row_end);
    load_tile<kQueries, kThreads>(q_tile.after(kQueries), dout, s.row, span.row, span.row_end);
    const int64_t plane = (batch * p.heads + s.head) * p.rows;
    const uint32_t to = after_scores.address + stage * S::kStatisticsBytes;
    load_floats<kQueries>(to, in.lse + plane, s.row, span.row_end);
    load_floats<kQueries>(to + kQueries * 4, in.delta + plane, s.row, span.row_end);
  };
  auto sum_of = [&](Step s) {
    return (first_sum<S>(p, place.sequence, span) + (s.row - span.row) / kQueries) * p.heads + s.head;
  };
  // How many blocks of keys come before this one at these queries: those up to the last key that they see.
  auto turn_of = [&](Step s) {
    return static_cast<uint32_t>(min((span.high(span.last(s.row + kQueries)) - 1 - key0) / kKeys, place.block));
  };

  const int warp = threadIdx.x / 32, lane_row = lane_id() >> 2, lane_column = 2 * (lane_id() & 3);
  const int score_row = warp % (kQueries / 32) * 32, score_key = warp / (kQueries / 32) * S::kScoreKeys;
  const int out_first = warp % S::kOutWarps * S::kOutTiles, out_part = warp / S::kOutWarps;
  const int warp_column = key0 + score_key, column = warp_column + lane_column;
  const Dropout dropout(p);
  float dk_sum[S::kKeyRows / 16][S::kOutTiles][4] = {}, dv_sum[S::kKeyRows / 16][S::kOutTiles][4] = {};
  if (now.head < head_end) {
    load_tile<kKeys, kThreads>(k_tile, k, key0, span.column, span.column_end);
    load_tile<kKeys, kThreads>(v_tile, v, key0, span.column, span.column_end);
    load_stage(now, 0);
    ptx::cp_async_commit();
  }
  if (threadIdx.x == 0) done[0] = {nullptr, 0};
  for (int stage = 0; now.head < head_end; stage ^= 1) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there; everybody is done with the other one, with the scores, and has added to dq
    const uint32_t turn = turn_of(now);
    if (threadIdx.x == 0) {
      if (done[0].at != nullptr) ptx::store_release(done[0].at, done[0].turn);
      done[0] = {w.turns + sum_of(now), turn + 1};
    }
    const Step next = after(now);
    if (next.head < head_end) load_stage(next, stage ^ 1);
    ptx::cp_async_commit();
    if (threadIdx.x == kThreads - 32 && turn > 0) {  // the next barrier tells the others
      while (ptx::load_acquire(w.turns + sum_of(now)) != turn) {
      }
    }
    const Tile q_tile = stages.after(stage * 2 * kQueries), dout_tile = q_tile.after(kQueries);
    const Tile k_now{k_tile.data, ptx::opaque(k_tile.address)}, v_now = k_now.after(kKeys);  // addresses take no registers
    const int warp_row = now.row + score_row, row = warp_row + lane_row;
    float s[kRowTiles][kTiles][4] = {}, ds[kRowTiles][kTiles][4] = {};
    if (!span.sees_nothing(warp_row, warp_row + 32, warp_column, warp_column + S::kScoreKeys)) {
      rows_by_rows<4>(s, q_tile, score_row, k_now.after(score_key));
      rows_by_rows<4>(ds, dout_tile, score_row, v_now.after(score_key));
      const uint32_t plane = static_cast<uint32_t>(batch * p.heads + now.head);
      const Scoring<kGeneral> scoring(p, batch, now.head);
      const float* of_row = statistics + stage * 2 * kQueries + score_row + lane_row;
      float lse[kRowTiles][2], delta[kRowTiles][2];
      uint32_t kept[kRowTiles];
#pragma unroll
      for (int r = 0; r < kRowTiles; r++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int i = 16 * r + 8 * half;
          lse[r][half] = row + i < span.row_end ? of_row[i] : kInfinity;
          delta[r][half] = of_row[kQueries + i];
        }
        kept[r] = ~0u;
        if (kGeneral && p.rng_state != nullptr) kept[r] = dropout.kept_by_rows<kTiles>(row + 16 * r, column, plane);
      }
      weights_and_gradients<kGeneral>(
          s, ds, scoring, kept, p.dropout_scale, [&](int r, int, int e) { return lse[r][e / 2]; },
          [&](int r, int, int e) { return delta[r][e / 2]; },
          [&](int r, int n, int e) { return row + 16 * r + 8 * (e / 2) + span.diagonal - (column + 8 * n + e % 2); });
      if (!span.sees_all(warp_row, warp_row + 32, warp_column, warp_column + S::kScoreKeys)) hide(0.0f, span, row, column, s, ds);
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; r++) {
      put_rows(weights, score_row + 16 * r, s[r], 1.0f, 1.0f, score_key / 8);
      put_rows(gradients, score_row + 16 * r, ds[r], 1.0f, 1.0f, score_key / 8);
    }
    __syncthreads();
    float dq[S::kQueryRows / 16][S::kOutTiles][4] = {};
    tile_by_columns<false, kKeys>(dq, gradients, out_part * S::kQueryRows, k_now, out_first);
    add_sum<S>(w.dq + sum_of(now) * S::kSum, dq, turn == 0);
    tile_by_columns<true, kQueries>(dv_sum, weights, out_part * S::kKeyRows, dout_tile, out_first);
    tile_by_columns<true, kQueries>(dk_sum, gradients, out_part * S::kKeyRows, q_tile, out_first);
    now = next;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x == 0 && done[0].at != nullptr) ptx::store_release(done[0].at, done[0].turn);
  const float dv_factor = kGeneral ? p.dropout_scale : 1.0f;
  const int tile_row = out_part * S::kKeyRows;
#pragma unroll
  for (int r = 0; r < S::kKeyRows / 16; r++) {
    put_rows(k_tile, tile_row + 16 * r, dk_sum[r], p.scale, p.scale, out_first);
    put_rows(v_tile, tile_row + 16 * r, dv_sum[r], dv_factor, dv_factor, out_first);
  }
  __syncwarp();
  const int64_t offset = batch * p.columns * dkv_row + place.head * p.width;
  auto store = [&](const Tile& tile, T* to) {
    store_tile<S::kKeyRows>(tile, tile_row, out_first, S::kOutTiles, to + offset, dkv_row, key0 + tile_row, span.column,
                            span.column_end, chunks);
  };
  store(k_tile, dk);
  store(v_tile, dv);
}

// dq: from sums to rows of T. Queries that see nothing have no sum.
template <class T, int kWidth, bool kLarge>
__global__ void __launch_bounds__(Shape<T, kWidth, kLarge>::kThreads)
    attention_dq(const __grid_constant__ AttentionInputs p, const Grid grid, const OnePassWorkspace w, T* __restrict__ dq,
                 int64_t dq_row) {
  using S = Shape<T, kWidth, kLarge>;
  constexpr int kRowTiles = S::kQueryRows / 16;
  FASTLM_SHARED_DYNAMIC(shared, 128);
  const typename S::Tile tile{shared, ptx::shared_address(shared)};
  const Place place(grid);
  const Span span = span_of(p, place.sequence);
  const int row0 = span.row + place.block * S::kQueries;
  if (row0 >= span.row_end) return;
  const int64_t batch = p.cu_seqlens == nullptr ? place.sequence : 0;
  const int64_t sum = (first_sum<S>(p, place.sequence, span) + place.block) * p.heads + place.head;
  const int warp = threadIdx.x / 32, out_first = warp % S::kOutWarps * S::kOutTiles;
  const int tile_row = warp / S::kOutWarps * S::kQueryRows;
  const bool there = w.turns[sum] > 0;
  const float* from = w.dq + sum * S::kSum + threadIdx.x;
#pragma unroll
  for (int r = 0; r < kRowTiles; r++) {
    float part[S::kOutTiles][4];
#pragma unroll
    for (int n = 0; n < S::kOutTiles; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) part[n][e] = there ? from[((r * S::kOutTiles + n) * 4 + e) * S::kThreads] : 0.0f;
    }
    put_rows(tile, tile_row + 16 * r, part, p.scale, p.scale, out_first);
  }
  __syncwarp();
  store_tile<S::kQueryRows>(tile, tile_row, out_first, S::kOutTiles, dq + batch * p.rows * dq_row + place.head * p.width,
                            dq_row, row0 + tile_row, span.row, span.row_end, static_cast<int>(p.width * sizeof(T) / 16));
}

template <class T, int kWidth, bool kGeneral, bool kLarge>
void launch_both(const BackwardInputs& inputs, const OnePassWorkspace& w, const AttentionGradients& g, cudaStream_t stream) {
  using S = Shape<T, kWidth, kLarge>;
  const AttentionInputs& p = inputs.p;
  const bool packed = p.cu_seqlens != nullptr;
  // The blocks of a packed sequence begin at a multiple of 8, up to 7 keys before it.
  const Grid keys = grid_of(p, packed ? p.max_seqlen + 7 : p.columns, S::kKeys, p.kv_heads);
  if (keys.blocks * keys.sequences > 0) {
    launch("attention_backward", {blocks_of(keys), dim3(S::kThreads), S::kBytes, stream},
           attention_backward<T, kWidth, kGeneral, kLarge>, inputs, keys, w, static_cast<T*>(g.dk), static_cast<T*>(g.dv), g.dkv_row);
  }
  const Grid queries = grid_of(p, packed ? p.max_seqlen : p.rows, S::kQueries, p.heads);
  if (queries.blocks * queries.sequences > 0) {
    launch("attention_dq", {blocks_of(queries), dim3(S::kThreads), S::Tile::bytes(S::kQueries), stream},
           attention_dq<T, kWidth, kLarge>, p, queries, w, static_cast<T*>(g.dq), g.dq_row);
  }
}

template <class T, bool kGeneral>
void launch_width(const BackwardInputs& inputs, const OnePassWorkspace& w, const AttentionGradients& g, cudaStream_t stream) {
  using Large = Shape<T, 128, true>;
  if (inputs.p.width <= 64) launch_both<T, 64, kGeneral, false>(inputs, w, g, stream);
  else if (max_shared_memory() >= Large::kBytes + 1024) launch_both<T, 128, kGeneral, true>(inputs, w, g, stream);
  else launch_both<T, 128, kGeneral, false>(inputs, w, g, stream);
}

}  // namespace

void attention_backward_one_pass(const BackwardInputs& inputs, const OnePassWorkspace& w, const AttentionGradients& g,
                                 cudaStream_t stream) {
  const bool general = has_general_kernel(inputs.p);
  auto with_type = [&](auto type) {
    using T = decltype(type);
    if (general) launch_width<T, true>(inputs, w, g, stream);
    else launch_width<T, false>(inputs, w, g, stream);
  };
  inputs.p.type == DType::f16 ? with_type(__half()) : with_type(__nv_bfloat16());
}

}  // namespace cuda
}  // namespace fastlm
