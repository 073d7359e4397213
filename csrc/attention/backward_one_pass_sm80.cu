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
template <class T_, int kWidth_, bool kGeneral_, bool kLarge>
struct Shape {
  using T = T_;
  static constexpr int kWidth = kWidth_;
  static constexpr bool kGeneral = kGeneral_;
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

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksAtLeast)
    attention_backward(const __grid_constant__ BackwardInputs in, const Grid grid, const OnePassWorkspace w,
                       typename S::T* __restrict__ dk, typename S::T* __restrict__ dv) {
  using T = typename S::T;
  using Tile = typename S::Tile;
  using Scores = typename S::Scores;
  constexpr int kThreads = S::kThreads, kQueries = S::kQueries, kKeys = S::kKeys, kTiles = S::kTiles, kRowTiles = 2;
  constexpr bool kGeneral = S::kGeneral;
  FASTLM_SHARED(int, ticket, 1);
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
  const int64_t batch = p.cu_seqlens == nullptr ? place.sequence : 0;
  const int block = grid.blocks - 1 - place.block, key_base = span.column & ~7, key0 = key_base + block * kKeys;
  if (key0 >= span.column_end) return;
  const int low = keys.low(max(key0, span.column)), high = keys.high(keys.last(key0 + kKeys));
  const int first = (low - span.row) / kQueries;  // blocks of queries, from the sequence's first
  const int tiles = high > low ? (high - span.row + kQueries - 1) / kQueries - first : 0;
  const int group = static_cast<int>(p.heads / p.kv_heads), total = group * tiles, head0 = place.head * group;

  const int chunks = static_cast<int>(p.width * sizeof(T) / 16);
  const Rows<T> k{static_cast<const T*>(p.k) + at(p.k_strides, batch, place.head), p.k_strides.row, chunks};
  const Rows<T> v{static_cast<const T*>(p.v) + at(p.v_strides, batch, place.head), p.v_strides.row, chunks};
  auto row_of = [&](int t) { return span.row + (first + t % tiles) * kQueries; };
  // Block t % tiles of the queries of head head0 + t / tiles.
  auto load_stage = [&](int t) {
    const int head = head0 + t / tiles, row = row_of(t);
    const Tile q_tile = stages.after(t % 2 * 2 * kQueries);
    const Rows<T> q{static_cast<const T*>(p.q) + at(p.q_strides, batch, head), p.q_strides.row, chunks};
    const Rows<T> dout{static_cast<const T*>(in.dout) + at(in.dout_strides, batch, head), in.dout_strides.row, chunks};
    load_tile<kQueries, kThreads>(q_tile, q, row, span.row, span.row_end);
    load_tile<kQueries, kThreads>(q_tile.after(kQueries), dout, row, span.row, span.row_end);
    const int64_t plane = (batch * p.heads + head) * p.rows;
    const uint32_t to = after_scores.address + t % 2 * S::kStatisticsBytes;
    load_floats<kQueries>(to, in.lse + plane, row, span.row_end);
    load_floats<kQueries>(to + kQueries * 4, in.delta + plane, row, span.row_end);
  };
  auto sum_of = [&](int t) { return (first_sum<S>(p, place.sequence, span) + first + t % tiles) * p.heads + head0 + t / tiles; };
  // How many blocks of keys come before this one at t's queries: those up to the last key that they see.
  auto turn_of = [&](int t) {
    const int last = (span.high(span.last(row_of(t) + kQueries)) - 1 - key_base) / kKeys;
    return static_cast<uint32_t>(min(last, grid.blocks - 1) - block);
  };

  const int warp = threadIdx.x / 32, lane_row = lane_id() >> 2, lane_column = 2 * (lane_id() & 3);
  const int score_row = warp % (kQueries / 32) * 32, score_key = warp / (kQueries / 32) * S::kScoreKeys;
  const int out_first = warp % S::kOutWarps * S::kOutTiles, out_part = warp / S::kOutWarps;
  const int warp_column = key0 + score_key, column = warp_column + lane_column;
  const Dropout dropout(p);
  float dk_sum[S::kKeyRows / 16][S::kOutTiles][4] = {}, dv_sum[S::kKeyRows / 16][S::kOutTiles][4] = {};
  if (total > 0) {
    load_tile<kKeys, kThreads>(k_tile, k, key0, span.column, span.column_end);
    load_tile<kKeys, kThreads>(v_tile, v, key0, span.column, span.column_end);
    load_stage(0);
    ptx::cp_async_commit();
  }
  for (int t = 0; t < total; t++) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there; everybody is done with the other one, with the scores, and has added to dq
    if (threadIdx.x == 0 && t > 0) ptx::store_release(w.turns + sum_of(t - 1), turn_of(t - 1) + 1);
    if (t + 1 < total) load_stage(t + 1);
    ptx::cp_async_commit();
    const uint32_t turn = turn_of(t);
    if (threadIdx.x == kThreads - 32 && turn > 0) {  // the next barrier tells the others
      while (ptx::load_acquire(w.turns + sum_of(t)) != turn) {
      }
    }
    const Tile q_tile = stages.after(t % 2 * 2 * kQueries), dout_tile = q_tile.after(kQueries);
    const int warp_row = row_of(t) + score_row, row = warp_row + lane_row;
    float s[kRowTiles][kTiles][4] = {}, ds[kRowTiles][kTiles][4] = {};
    if (!span.sees_nothing(warp_row, warp_row + 32, warp_column, warp_column + S::kScoreKeys)) {
      rows_by_rows(s, q_tile, score_row, k_tile.after(score_key));
      rows_by_rows(ds, dout_tile, score_row, v_tile.after(score_key));
      const int head = head0 + t / tiles;
      const uint32_t plane = static_cast<uint32_t>(batch * p.heads + head);
      const Scoring<kGeneral> scoring(p, batch, head);
      const float* of_row = statistics + t % 2 * 2 * kQueries + score_row + lane_row;
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
      if (!span.sees_all(warp_row, warp_row + 32, warp_column, warp_column + S::kScoreKeys)) hide(s, ds, span, row, column);
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; r++) {
      put_rows(weights, score_row + 16 * r, s[r], 1.0f, 1.0f, score_key / 8);
      put_rows(gradients, score_row + 16 * r, ds[r], 1.0f, 1.0f, score_key / 8);
    }
    __syncthreads();
    float dq[S::kQueryRows / 16][S::kOutTiles][4] = {};
    tile_by_columns<false, kKeys>(dq, gradients, out_part * S::kQueryRows, k_tile, out_first);
    add_sum<S>(w.dq + sum_of(t) * S::kSum, dq, turn == 0);
    tile_by_columns<true, kQueries>(dv_sum, weights, out_part * S::kKeyRows, dout_tile, out_first);
    tile_by_columns<true, kQueries>(dk_sum, gradients, out_part * S::kKeyRows, q_tile, out_first);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x == 0 && total > 0) ptx::store_release(w.turns + sum_of(total - 1), turn_of(total - 1) + 1);
  const float dv_factor = kGeneral ? p.dropout_scale : 1.0f;
  const int tile_row = out_part * S::kKeyRows;
#pragma unroll
  for (int r = 0; r < S::kKeyRows / 16; r++) {
    put_rows(k_tile, tile_row + 16 * r, dk_sum[r], p.scale, p.scale, out_first);
    put_rows(v_tile, tile_row + 16 * r, dv_sum[r], dv_factor, dv_factor, out_first);
  }
  __syncwarp();
  const int64_t offset = (batch * p.columns * p.kv_heads + place.head) * p.width, stride = p.kv_heads * p.width;
  auto store = [&](const Tile& tile, T* to) {
    store_tile<S::kKeyRows>(tile, tile_row, out_first, S::kOutTiles, to + offset, stride, key0 + tile_row, span.column,
                            span.column_end, chunks);
  };
  store(k_tile, dk);
  store(v_tile, dv);
}

// dq: from sums to rows of T. Queries that see nothing have no sum.
template <class S>
__global__ void __launch_bounds__(S::kThreads)
    attention_dq(const __grid_constant__ AttentionInputs p, const Grid grid, const OnePassWorkspace w, typename S::T* __restrict__ dq) {
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
  store_tile<S::kQueryRows>(tile, tile_row, out_first, S::kOutTiles, dq + (batch * p.rows * p.heads + place.head) * p.width,
                            p.heads * p.width, row0 + tile_row, span.row, span.row_end, static_cast<int>(p.width * sizeof(typename S::T) / 16));
}

template <class S>
void launch_both(const BackwardInputs& inputs, const OnePassWorkspace& w, void* dq, void* dk, void* dv, cudaStream_t stream) {
  using T = typename S::T;
  const AttentionInputs& p = inputs.p;
  const bool packed = p.cu_seqlens != nullptr;
  // The blocks of a packed sequence begin at a multiple of 8, up to 7 keys before it.
  const Grid keys = grid_of(p, packed ? p.max_seqlen + 7 : p.columns, S::kKeys, p.kv_heads);
  if (keys.blocks * keys.sequences > 0) {
    launch("attention_backward", {blocks_of(keys), dim3(S::kThreads), S::kBytes, stream}, attention_backward<S>, inputs, keys, w,
           static_cast<T*>(dk), static_cast<T*>(dv));
  }
  const Grid queries = grid_of(p, packed ? p.max_seqlen : p.rows, S::kQueries, p.heads);
  if (queries.blocks * queries.sequences > 0) {
    launch("attention_dq", {blocks_of(queries), dim3(S::kThreads), S::Tile::bytes(S::kQueries), stream}, attention_dq<S>, p, queries, w,
           static_cast<T*>(dq));
  }
}

template <class T, bool kGeneral>
void launch_width(const BackwardInputs& inputs, const OnePassWorkspace& w, void* dq, void* dk, void* dv, cudaStream_t stream) {
  using Large = Shape<T, 128, kGeneral, true>;
  if (inputs.p.width <= 64) launch_both<Shape<T, 64, kGeneral, false>>(inputs, w, dq, dk, dv, stream);
  else if (max_shared_memory() >= Large::kBytes + 1024) launch_both<Large>(inputs, w, dq, dk, dv, stream);
  else launch_both<Shape<T, 128, kGeneral, false>>(inputs, w, dq, dk, dv, stream);
}

}  // namespace

void attention_backward_one_pass(const BackwardInputs& inputs, const OnePassWorkspace& w, void* dq, void* dk, void* dv,
                                 cudaStream_t stream) {
  const bool general = has_general_kernel(inputs.p);
  auto with_type = [&](auto type) {
    using T = decltype(type);
    if (general) launch_width<T, true>(inputs, w, dq, dk, dv, stream);
    else launch_width<T, false>(inputs, w, dq, dk, dv, stream);
  };
  inputs.p.type == DType::f16 ? with_type(__half()) : with_type(__nv_bfloat16());
}

}  // namespace cuda
}  // namespace fastlm
