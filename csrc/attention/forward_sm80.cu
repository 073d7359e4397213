// attention.h on CUDA, forward, for sm_80 and newer (Dao: FlashAttention-2, arXiv:2307.08691). A block of threads owns
// a block of query rows of one head; its warps own 16 or 32 rows each, whose scores, weights and outputs stay in their
// registers. Keys and values come through shared memory, a tile at a time, in two stages: one is worked on, the other filled.
#include "attention/sm80/fragments.h"
#include "attention/sm80/launch.h"
#include "attention/sm80/scores.h"
#include "attention/sm90/forward.h"

namespace fastlm {
namespace cuda {
namespace {

// Tiles. 32 rows a warp read each key and value from shared memory half as often as 16 would; at 256 wide the outputs
// of 16 rows take 128 registers. 64 columns at 128 wide would leave too few registers. No kernel has more than 96 KB of
// shared memory, which every GPU from sm_80 on has; at 64 and 128 wide two blocks of threads fit an A100 or an H100.
template <class T, int kWidth>
struct Shape {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kRowTiles = kHalf && kWidth <= 128 ? 2 : 1;
  static constexpr int kSplit = kHalf || kWidth <= 128 ? 1 : 2;  // warps that share their rows, each with its part of the outputs
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps / kSplit * kWarpRows;
  static constexpr int kColumns = kWidth <= 64 ? (kHalf ? 64 : 32) : kHalf ? 32 : 16;
  static constexpr int kBytes = Tile<T, kWidth>::bytes(kRows + 4 * kColumns);
};

// The softmax of a thread's two rows of a row tile over the columns so far: maxima and sums, the latter over this lane's
// columns alone.
struct Softmax {
  float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {0.0f, 0.0f};

  // Scores become weights e^(score - maximum); out, summed under the former maximum, is scaled to the new one.
  template <int kTiles, int kOutTiles, class Scoring>
  FASTLM_DEVICE void add(float (&s)[kTiles][4], float (&out)[kOutTiles][4], const Scoring& scoring) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float largest = maximum[half];
#pragma unroll
      for (int n = 0; n < kTiles; n++) largest = fmaxf(largest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
      const float base = largest == -kInfinity ? 0.0f : scoring.base_of(largest);  // -inf - -inf would be NaN
      const float decay = scoring.weight(maximum[half], base);
      maximum[half] = largest;
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          s[n][e] = scoring.weight(s[n][e], base);
          total += s[n][e];
        }
      }
      sum[half] = sum[half] * decay + total;
      if (__any_sync(kFullWarp, decay != 1.0f)) {  // later on a new maximum is rare
#pragma unroll
        for (int n = 0; n < kOutTiles; n++) {
          out[n][2 * half] *= decay;
          out[n][2 * half + 1] *= decay;
        }
      }
    }
  }
};

template <class T, int kWidth, bool kGeneral>
__global__ void __launch_bounds__(Shape<T, kWidth>::kThreads)
    attention_forward(const __grid_constant__ AttentionInputs p, const Grid grid, T* __restrict__ out, float* __restrict__ lse) {
  using S = Shape<T, kWidth>;
  using Tile = Tile<T, kWidth>;
  constexpr int kRowTiles = S::kRowTiles, kThreads = S::kThreads, kColumns = S::kColumns, kTiles = kColumns / 8;
  constexpr int kOutTiles = kWidth / 8 / S::kSplit, kOutChunks = Tile::kChunks / S::kSplit;
  FASTLM_SHARED_DYNAMIC(shared, 128);
  const Tile q_tile{shared, ptx::shared_address(shared)};
  const Tile stages = q_tile.after(S::kRows);

  const Place place(grid);
  const Span span = span_of(p, place.sequence);
  const int head = place.head;
  const int64_t batch = p.cu_seqlens == nullptr ? place.sequence : 0;
  // The last rows first: under a causal mask they see the most.
  const int row0 = span.row + (grid.blocks - 1 - place.block) * S::kRows;
  if (row0 >= span.row_end) return;
  // Tiles begin at multiples of 8, which dropout's counters need.
  const int first = span.low(row0) & ~7, end = span.high(span.last(row0 + S::kRows));
  const int tiles = end > first ? (end - first + kColumns - 1) / kColumns : 0;

  const int kv_head = head / static_cast<int>(p.heads / p.kv_heads);
  const int chunks = static_cast<int>(p.width * sizeof(T) / 16);
  const Rows<T> q{static_cast<const T*>(p.q) + at(p.q_strides, batch, head), p.q_strides.row, chunks};
  const Rows<T> k{static_cast<const T*>(p.k) + at(p.k_strides, batch, kv_head), p.k_strides.row, chunks};
  const Rows<T> v{static_cast<const T*>(p.v) + at(p.v_strides, batch, kv_head), p.v_strides.row, chunks};
  auto load_stage = [&](int t) {
    const Tile k_tile = stages.after(t % 2 * 2 * kColumns);
    load_tile<kColumns, kThreads>(k_tile, k, first + t * kColumns, span.column, span.column_end);
    load_tile<kColumns, kThreads>(k_tile.after(kColumns), v, first + t * kColumns, span.column, span.column_end);
  };

  const int lane_row = lane_id() >> 2, lane_column = 2 * (lane_id() & 3);
  const int warp = threadIdx.x / 32, part = warp % S::kSplit;
  const int warp_tile_row = warp / S::kSplit * S::kWarpRows, warp_row = row0 + warp_tile_row;
  const Scoring<kGeneral> scoring(p, batch, head);
  const Dropout dropout(p);
  const uint32_t plane = static_cast<uint32_t>(batch * p.heads + head);

  Softmax softmax[kRowTiles];
  float result[kRowTiles][kOutTiles][4] = {};
  if (tiles > 0) {
    load_tile<S::kRows, kThreads>(q_tile, q, row0, span.row, span.row_end);
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
    float s[kRowTiles][kTiles][4];
    rows_by_rows(s, q_tile, warp_tile_row, k_tile);
    const int row = warp_row + lane_row;
    if constexpr (kGeneral) {
#pragma unroll
      for (int r = 0; r < kRowTiles; r++) {
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int i = row + 16 * r + 8 * (e / 2), j = column + lane_column + 8 * n + e % 2;
            float slope;
            s[r][n][e] = scoring.score(s[r][n][e], i + span.diagonal - j, slope);
          }
        }
      }
    }
    if (!span.sees_all(warp_row, warp_row + S::kWarpRows, column, column + kColumns)) {
      hide(-kInfinity, span, row, column + lane_column, s);
    }
    Weights<T, kTiles> weights[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; r++) {
      softmax[r].add(s[r], result[r], scoring);
      if (kGeneral && p.rng_state != nullptr) {
        const uint32_t kept = dropout.kept_by_rows<kTiles>(row + 16 * r, column + lane_column, plane);
#pragma unroll
        for (int n = 0; n < kTiles; n++) {
#pragma unroll
          for (int e = 0; e < 4; e++) s[r][n][e] = kept >> (4 * n + e) & 1 ? s[r][n][e] : 0.0f;
        }
      }
      weights[r].set(s[r]);
    }
    weights_by_columns(result, weights, v_tile, part * kOutTiles);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

#pragma unroll
  for (int r = 0; r < kRowTiles; r++) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = softmax[r].sum[half];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      factor[half] = sum > 0.0f ? (kGeneral ? p.dropout_scale : 1.0f) / sum : 0.0f;
      if (sum != sum) factor[half] = sum;  // NaN stays NaN
      const int row = warp_row + lane_row + 16 * r + 8 * half;
      if (part == 0 && lane_column == 0 && row < span.row_end) {
        lse[(batch * p.heads + head) * p.rows + row] =
            sum == 0.0f ? -kInfinity : scoring.natural(softmax[r].maximum[half]) + logf(sum);
      }
    }
    put_rows(q_tile, warp_tile_row + 16 * r, result[r], factor[0], factor[1], part * kOutTiles);
  }
  __syncwarp();
  store_tile<S::kWarpRows>(q_tile, warp_tile_row, part * kOutChunks, kOutChunks,
                           out + (batch * p.rows * p.heads + head) * p.width, p.heads * p.width, warp_row, span.row, span.row_end, chunks);
}

}  // namespace
}  // namespace cuda

void attention_forward_cuda(const AttentionInputs& p, void* out, float* lse, void* stream) {
  using namespace cuda;
  check_inputs(p);
  if (p.batch == 0 || p.rows == 0) return;
  if (attention_forward_sm90_takes(p)) return attention_forward_sm90(p, out, lse, stream);
  with_variant(p, [&](auto variant) {
    using V = decltype(variant);
    using T = typename V::type;
    using S = Shape<T, V::kWidth>;
    const Grid grid = grid_of(p, p.cu_seqlens == nullptr ? p.rows : p.max_seqlen, S::kRows, p.heads);
    if (grid.blocks == 0) return;
    launch("attention_forward", {blocks_of(grid), dim3(S::kThreads), S::kBytes, static_cast<cudaStream_t>(stream)},
           attention_forward<T, V::kWidth, V::kGeneral>, p, grid, static_cast<T*>(out), lse);
  });
}

}  // namespace fastlm
