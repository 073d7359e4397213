// attention.h on CUDA, backward: dq where one pass does not fit, of float32 and of heads wider than 128. A block of threads
// owns a block of query rows, as in the forward pass; its warps keep 16 rows of scores, weights and dq in registers, while
// keys and values come through shared memory in two stages.
#include "attention/sm80/backward.h"

namespace fastlm {
namespace cuda {
namespace {

// kSplit: warps that share their rows, each with its part of the columns of dq: float32 of 256 columns needs the room.
template <class T, int kWidth>
struct Shape {
  static constexpr int kSplit = sizeof(T) == 2 || kWidth <= 128 ? 1 : 4;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16;
  static constexpr int kRows = kWarps / kSplit * kWarpRows;
  static constexpr int kColumns = kWidth <= 64 ? 32 : 16;
  static constexpr int kBytes = Tile<T, kWidth>::bytes(2 * kRows + 4 * kColumns);
};

template <class T, int kWidth, bool kGeneral>
__global__ void __launch_bounds__(Shape<T, kWidth>::kThreads)
    attention_backward_dq(const __grid_constant__ BackwardInputs in, const Grid grid, T* __restrict__ dq, int64_t dq_row) {
  using S = Shape<T, kWidth>;
  using Tile = Tile<T, kWidth>;
  constexpr int kThreads = S::kThreads, kColumns = S::kColumns, kTiles = kColumns / 8;
  constexpr int kOutTiles = kWidth / 8 / S::kSplit, kOutChunks = Tile::kChunks / S::kSplit;
  FASTLM_SHARED_DYNAMIC(shared, 128);
  const Tile q_tile{shared, ptx::shared_address(shared)};
  const Tile dout_tile = q_tile.after(S::kRows), stages = dout_tile.after(S::kRows);

  const AttentionInputs& p = in.p;
  const Place place(grid);
  const Span span = span_of(p, place.sequence);
  const int head = place.head;
  const int64_t batch = p.cu_seqlens == nullptr ? place.sequence : 0;
  const int row0 = span.row + (grid.blocks - 1 - place.block) * S::kRows;  // those that see the most first
  if (row0 >= span.row_end) return;
  const int first = span.low(row0) & ~7, end = span.high(span.last(row0 + S::kRows));
  const int tiles = end > first ? (end - first + kColumns - 1) / kColumns : 0;

  const int kv_head = head / static_cast<int>(p.heads / p.kv_heads);
  const int chunks = static_cast<int>(p.width * sizeof(T) / 16);
  const Rows<T> q{static_cast<const T*>(p.q) + at(p.q_strides, batch, head), p.q_strides.row, chunks};
  const Rows<T> dout{static_cast<const T*>(in.dout) + at(in.dout_strides, batch, head), in.dout_strides.row, chunks};
  const Rows<T> k{static_cast<const T*>(p.k) + at(p.k_strides, batch, kv_head), p.k_strides.row, chunks};
  const Rows<T> v{static_cast<const T*>(p.v) + at(p.v_strides, batch, kv_head), p.v_strides.row, chunks};
  auto load_stage = [&](int t) {
    const Tile k_tile = stages.after(t % 2 * 2 * kColumns);
    load_tile<kColumns, kThreads>(k_tile, k, first + t * kColumns, span.column, span.column_end);
    load_tile<kColumns, kThreads>(k_tile.after(kColumns), v, first + t * kColumns, span.column, span.column_end);
  };

  const int lane_row = lane_id() >> 2, lane_column = 2 * (lane_id() & 3);
  const int warp = threadIdx.x / 32, part = warp % S::kSplit;  // of dq's columns
  const int warp_tile_row = warp / S::kSplit * S::kWarpRows, warp_row = row0 + warp_tile_row, row = warp_row + lane_row;
  const uint32_t plane = static_cast<uint32_t>(batch * p.heads + head);
  const Scoring<kGeneral> scoring(p, batch, head);
  const Dropout dropout(p);
  float lse[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int i = row + 8 * half;
    const int64_t index = plane * p.rows + i;
    lse[half] = i < span.row_end ? in.lse[index] : kInfinity;
    delta[half] = i < span.row_end ? in.delta[index] : 0.0f;
  }

  float result[1][kOutTiles][4] = {};
  if (tiles > 0) {
    load_tile<S::kRows, kThreads>(q_tile, q, row0, span.row, span.row_end);
    load_tile<S::kRows, kThreads>(dout_tile, dout, row0, span.row, span.row_end);
    load_stage(0);
    ptx::cp_async_commit();
  }
  for (int t = 0; t < tiles; t++) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there, and everybody is done with the other one
    if (t + 1 < tiles) load_stage(t + 1);
    ptx::cp_async_commit();
    const int column = first + t * kColumns;
    if (span.sees_nothing(warp_row, warp_row + S::kWarpRows, column, column + kColumns)) continue;
    const Tile k_tile = stages.after(t % 2 * 2 * kColumns), v_tile = k_tile.after(kColumns);
    float s[1][kTiles][4], ds[1][kTiles][4];
    rows_by_rows(s, q_tile, warp_tile_row, k_tile);
    rows_by_rows(ds, dout_tile, warp_tile_row, v_tile);
    uint32_t kept[1] = {~0u};
    if (kGeneral && p.rng_state != nullptr) kept[0] = dropout.kept_by_rows<kTiles>(row, column + lane_column, plane);
    weights_and_gradients<kGeneral>(
        s, ds, scoring, kept, p.dropout_scale, [&](int, int, int e) { return lse[e / 2]; },
        [&](int, int, int e) { return delta[e / 2]; },
        [&](int, int n, int e) { return row + 8 * (e / 2) + span.diagonal - (column + lane_column + 8 * n + e % 2); });
    if (!span.sees_all(warp_row, warp_row + S::kWarpRows, column, column + kColumns)) {
      hide(0.0f, span, row, column + lane_column, s, ds);
    }
    Weights<T, kTiles> gradients[1];
    gradients[0].set(ds[0]);
    weights_by_columns(result, gradients, k_tile, part * kOutTiles);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  put_rows(q_tile, warp_tile_row, result[0], p.scale, p.scale, part * kOutTiles);
  __syncwarp();
  store_tile<S::kWarpRows>(q_tile, warp_tile_row, part * kOutChunks, kOutChunks,
                           dq + batch * p.rows * dq_row + head * p.width, dq_row, warp_row, span.row, span.row_end, chunks);
}

}  // namespace

void attention_backward_rows(const BackwardInputs& inputs, const AttentionGradients& g, cudaStream_t stream) {
  const AttentionInputs& p = inputs.p;
  with_variant<true>(p, [&](auto variant) {
    using V = decltype(variant);
    using T = typename V::type;
    using S = Shape<T, V::kWidth>;
    const Grid grid = grid_of(p, p.cu_seqlens == nullptr ? p.rows : p.max_seqlen, S::kRows, p.heads);
    if (grid.blocks * grid.sequences == 0) return;
    launch("attention_backward_dq", {blocks_of(grid), dim3(S::kThreads), S::kBytes, stream},
           attention_backward_dq<T, V::kWidth, V::kGeneral>, inputs, grid, static_cast<T*>(g.dq), g.dq_row);
  });
}

}  // namespace cuda
}  // namespace fastlm
