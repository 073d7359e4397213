// attention.h on CUDA, backward: dk and dv where one pass does not fit, of float32 and of heads wider than 128. A block of
// threads owns a block of keys of one head of k and v, and goes through the queries of all heads that share it, in a fixed
// order. Scores are made transposed, k q^T: so the weights and their gradients are in the registers of the warp that owns
// the keys, in the layout in which the next products take them.
#include "attention/sm80/backward.h"

namespace fastlm {
namespace cuda {
namespace {

// kSplit: warps that share their keys, each with its part of the columns of dk and dv. At 256 wide both together would be
// 256 registers of 16 keys; so each of two warps makes all scores, and half of the gradients. float32 needs more room.
template <class T, int kWidth>
struct Shape {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kSplit = kHalf ? kWidth / 128 : kWidth / 64;
  static constexpr int kWarps = kHalf ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16;
  static constexpr int kRows = kWarps / kSplit * kWarpRows;
  static constexpr int kColumns = 16;
  static constexpr int kStageBytes = Tile<T, kWidth>::bytes(2 * kColumns);
  static constexpr int kBytes = Tile<T, kWidth>::bytes(2 * kRows) + 2 * kStageBytes + 4 * kColumns * 4;
};

template <class T, int kWidth, bool kGeneral>
__global__ void __launch_bounds__(Shape<T, kWidth>::kThreads)
    attention_backward_dkv(const __grid_constant__ BackwardInputs in, const Grid grid, T* __restrict__ dk, T* __restrict__ dv,
                           int64_t dkv_row) {
  using S = Shape<T, kWidth>;
  using Tile = Tile<T, kWidth>;
  constexpr int kThreads = S::kThreads, kColumns = S::kColumns, kTiles = kColumns / 8;
  constexpr int kOutTiles = kWidth / 8 / S::kSplit;
  FASTLM_SHARED_DYNAMIC(shared, 128);
  const Tile k_tile{shared, ptx::shared_address(shared)};
  const Tile v_tile = k_tile.after(S::kRows), stages = v_tile.after(S::kRows);
  const float* statistics = reinterpret_cast<const float*>(stages.data + 2 * S::kStageBytes);  // 2 stages of lse and delta
  const uint32_t statistics_address = stages.address + 2 * S::kStageBytes;

  const AttentionInputs& p = in.p;
  const Place place(grid);
  const Span span = span_of(p, place.sequence).transposed();  // its rows are keys, its columns queries
  const int64_t batch = p.cu_seqlens == nullptr ? place.sequence : 0;
  const int row0 = (span.row & ~7) + place.block * S::kRows;
  if (row0 >= span.row_end) return;
  const int first = span.low(max(row0, span.row)), end = span.high(span.last(row0 + S::kRows));
  const int tiles = end > first ? (end - first + kColumns - 1) / kColumns : 0;
  const int group = static_cast<int>(p.heads / p.kv_heads), total = group * tiles, head0 = place.head * group;

  const int chunks = static_cast<int>(p.width * sizeof(T) / 16);
  const Rows<T> k{static_cast<const T*>(p.k) + at(p.k_strides, batch, place.head), p.k_strides.row, chunks};
  const Rows<T> v{static_cast<const T*>(p.v) + at(p.v_strides, batch, place.head), p.v_strides.row, chunks};
  // The queries of tile t % tiles of head head0 + t / tiles.
  auto load_stage = [&](int t) {
    const int head = head0 + t / tiles, column = first + t % tiles * kColumns;
    const Tile q_tile = stages.after(t % 2 * 2 * kColumns);
    const Rows<T> q{static_cast<const T*>(p.q) + at(p.q_strides, batch, head), p.q_strides.row, chunks};
    const Rows<T> dout{static_cast<const T*>(in.dout) + at(in.dout_strides, batch, head), in.dout_strides.row, chunks};
    load_tile<kColumns, kThreads>(q_tile, q, column, span.column, span.column_end);
    load_tile<kColumns, kThreads>(q_tile.after(kColumns), dout, column, span.column, span.column_end);
    const int64_t plane = (batch * p.heads + head) * p.rows;
    const uint32_t to = statistics_address + t % 2 * 2 * kColumns * 4;
    load_floats<kColumns>(to, in.lse + plane, column, span.column_end);
    load_floats<kColumns>(to + kColumns * 4, in.delta + plane, column, span.column_end);
  };

  const int lane_row = lane_id() >> 2, lane_column = 2 * (lane_id() & 3);
  const int warp = threadIdx.x / 32, out_first = warp % S::kSplit * kOutTiles;
  const int warp_tile_row = warp / S::kSplit * S::kWarpRows, warp_row = row0 + warp_tile_row, row = warp_row + lane_row;
  const Dropout dropout(p);
  float dk_sum[1][kOutTiles][4] = {}, dv_sum[1][kOutTiles][4] = {};
  if (total > 0) {
    load_tile<S::kRows, kThreads>(k_tile, k, row0, span.row, span.row_end);
    load_tile<S::kRows, kThreads>(v_tile, v, row0, span.row, span.row_end);
    load_stage(0);
    ptx::cp_async_commit();
  }
  for (int t = 0; t < total; t++) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this stage is there, and everybody is done with the other one
    if (t + 1 < total) load_stage(t + 1);
    ptx::cp_async_commit();
    const int column = first + t % tiles * kColumns;
    if (span.sees_nothing(warp_row, warp_row + S::kWarpRows, column, column + kColumns)) continue;
    const Tile q_tile = stages.after(t % 2 * 2 * kColumns), dout_tile = q_tile.after(kColumns);
    float s[1][kTiles][4], ds[1][kTiles][4];
    rows_by_rows(s, k_tile, warp_tile_row, q_tile);
    rows_by_rows(ds, v_tile, warp_tile_row, dout_tile);
    const int head = head0 + t / tiles;
    const Scoring<kGeneral> scoring(p, batch, head);
    uint32_t kept[1] = {~0u};
    if (kGeneral && p.rng_state != nullptr) {
      kept[0] = dropout.kept_by_columns<kTiles>(row, column + lane_column, static_cast<uint32_t>(batch * p.heads + head));
    }
    const float* lse = statistics + t % 2 * 2 * kColumns + lane_column;
    weights_and_gradients<kGeneral>(
        s, ds, scoring, kept, p.dropout_scale, [&](int, int n, int e) { return lse[8 * n + e % 2]; },
        [&](int, int n, int e) { return lse[kColumns + 8 * n + e % 2]; },
        [&](int, int n, int e) { return row + 8 * (e / 2) + span.diagonal - (column + lane_column + 8 * n + e % 2); });
    if (!span.sees_all(warp_row, warp_row + S::kWarpRows, column, column + kColumns)) {
      hide(0.0f, span, row, column + lane_column, s, ds);
    }
    Weights<T, kTiles> weights[1], gradients[1];
    weights[0].set(s[0]);
    gradients[0].set(ds[0]);
    weights_by_columns(dv_sum, weights, dout_tile, out_first);
    weights_by_columns(dk_sum, gradients, q_tile, out_first);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  const float dv_factor = kGeneral ? p.dropout_scale : 1.0f;
  put_rows(k_tile, warp_tile_row, dk_sum[0], p.scale, p.scale, out_first);
  put_rows(v_tile, warp_tile_row, dv_sum[0], dv_factor, dv_factor, out_first);
  __syncwarp();
  constexpr int kOutChunks = Tile::kChunks / S::kSplit;
  const int64_t offset = batch * p.columns * dkv_row + place.head * p.width;
  const int first_chunk = warp % S::kSplit * kOutChunks;
  store_tile<S::kWarpRows>(k_tile, warp_tile_row, first_chunk, kOutChunks, dk + offset, dkv_row, warp_row, span.row, span.row_end, chunks);
  store_tile<S::kWarpRows>(v_tile, warp_tile_row, first_chunk, kOutChunks, dv + offset, dkv_row, warp_row, span.row, span.row_end, chunks);
}

}  // namespace

void attention_backward_columns(const BackwardInputs& inputs, const AttentionGradients& g, cudaStream_t stream) {
  const AttentionInputs& p = inputs.p;
  with_variant<true>(p, [&](auto variant) {
    using V = decltype(variant);
    using T = typename V::type;
    using S = Shape<T, V::kWidth>;
    // The blocks of a packed sequence begin at a multiple of 8, up to 7 keys before it.
    const Grid grid = grid_of(p, p.cu_seqlens == nullptr ? p.columns : p.max_seqlen + 7, S::kRows, p.kv_heads);
    if (grid.blocks * grid.sequences == 0) return;
    launch("attention_backward_dkv", {blocks_of(grid), dim3(S::kThreads), S::kBytes, stream},
           attention_backward_dkv<T, V::kWidth, V::kGeneral>, inputs, grid, static_cast<T*>(g.dk), static_cast<T*>(g.dv),
           g.dkv_row);
  });
}

}  // namespace cuda
}  // namespace fastlm
