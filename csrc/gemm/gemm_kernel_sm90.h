// The GEMM of Hopper (sm_90a): TMA brings the operands, wgmma multiplies them.
//
// Two blocks make a cluster and work on tiles one above the other: of their 128 rows of a each loads its own, of the
// columns' b each loads half, into both blocks at once. A block has three warpgroups. The first only loads, stage after
// stage of a ring in shared memory; the two others take tiles in turn, so that the tensor cores work for one while the
// other finishes its tile. The blocks are as many as fit on the device and go from tile to tile.
#pragma once
#include "common/cuda/ptx_barrier.h"
#include "common/cuda/ptx_cluster.h"
#include "common/cuda/ptx_mbarrier.h"
#include "common/cuda/ptx_tma.h"
#include "common/cuda/ptx_warpgroup.h"
#include "common/cuda/ptx_wgmma.h"
#include "gemm/gemm_kernel.h"

namespace fastlm::cuda {

template <class T>
struct WgmmaElement;
template <>
struct WgmmaElement<__nv_bfloat16> {
  static constexpr auto kWgmma = ptx::WgmmaType::bf16;
  static constexpr auto kMap = ElementType::bf16;
};
template <>
struct WgmmaElement<__half> {
  static constexpr auto kWgmma = ptx::WgmmaType::f16;
  static constexpr auto kMap = ElementType::f16;
};

// An operand's part of a stage: kWgmmaDepth of k, in rows of 128 bytes whose 16-byte pieces the swizzle permutes. Where k
// is contiguous a row is all of k, for each of m or n. Transposed, a row is 64 elements of m or n; for these come all of k
// before the next 64.
constexpr int kWgmmaDepth = 64, kSwizzleRow = 128, kAtom = 8 * kSwizzleRow;

template <int kN>
struct WgmmaTile {
  static constexpr int kABytes = kWgmmaRows * kSwizzleRow, kBBytes = kN * kSwizzleRow, kStageBytes = kABytes + kBBytes;
  static constexpr int kStages = kN <= 128 ? 5 : 4;
  // A warp's 2 x 16 rows by 32 columns of c, on their way to whole rows: no two lanes of a half-warp's stores meet in a bank.
  static constexpr int kChunk = 32, kStripFloats = kChunk + 8, kStrip = 32 * kStripFloats;
  static constexpr int kStagingBytes = 8 * kStrip * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = kStages * kStageBytes + kStagingBytes;
};

// How the blocks of a cluster share a product out, in pairs of tiles. Of a product whose k is split the epilogue stores the
// parts in float32, one matrix behind the other.
struct WgmmaTask {
  EpilogueTask epilogue;
  int k, split_k;
  int pairs;                // of tiles one above the other: a cluster's rows
  int tiles_n, splits;
  int works, clusters;      // pairs of tiles in all, with every split of k; how many there are to do them
  int64_t split_elements;   // of a part's matrix
  int gate_rows;            // of b, loaded in turn from the gate's rows and from those of what it multiplies; 0: not gated
};

// One pair of tiles and one split of k: what a cluster does at a time.
struct WgmmaWork {
  int tile, row0, col0, split;  // tile and row0 are this block's
  int k0, stages;
};

// Of work number i.
FASTLM_DEVICE int stages_of(const WgmmaTask& p, int i) {
  const int k = min(p.k - i / (p.pairs * p.tiles_n) * p.split_k, p.split_k);
  return (k + kWgmmaDepth - 1) / kWgmmaDepth;
}

template <int kN>
FASTLM_DEVICE WgmmaWork wgmma_work(const WgmmaTask& p, int i, int rank) {
  const int tiles = p.pairs * p.tiles_n;
  const int2 at = tile_at<int, int2>(i % tiles, p.pairs, p.tiles_n);
  WgmmaWork r;
  r.tile = 2 * at.x + rank;
  r.row0 = r.tile * kWgmmaRows;
  r.col0 = at.y * (p.gate_rows > 0 ? kN / 2 : kN);
  r.split = i / tiles;
  r.k0 = r.split * p.split_k;
  r.stages = stages_of(p, i);
  return r;
}

// This block's a, and its half of the cluster's b, for one stage.
template <int kN, bool kTransposedA, bool kTransposedB>
FASTLM_DEVICE void load_stage(const WgmmaTask& p, const TensorMap* a_map, const TensorMap* b_map, const WgmmaWork& work, int k,
                              int rank, uint32_t a, uint32_t full) {
  const uint32_t b = a + WgmmaTile<kN>::kABytes;
  const int row0 = work.row0, col0 = work.col0;
  if constexpr (kTransposedA) {
#pragma unroll 1
    for (int i = 0; i < kWgmmaRows / 64; i++) {
      const int at[2] = {row0 + 64 * i, k};
      ptx::tma_load(a + i * kWgmmaDepth * kSwizzleRow, a_map, full, at);
    }
  } else {
    const int at[2] = {k, row0};
    ptx::tma_load(a, a_map, full, at);
  }
  constexpr uint16_t kBoth = 3;
  if constexpr (kTransposedB) {  // half of k
    const int k_half = rank * kWgmmaDepth / 2;
#pragma unroll 1
    for (int i = 0; i < kN / 64; i++) {
      const int at[2] = {col0 + 64 * i, k + k_half};
      ptx::tma_load_multicast(b + (i * kWgmmaDepth + k_half) * kSwizzleRow, b_map, full, at, kBoth);
    }
  } else if (p.gate_rows == 0) {  // half of the columns
    const int half = rank * kN / 2;
    const int at[2] = {k, col0 + half};
    ptx::tma_load_multicast(b + half * kSwizzleRow, b_map, full, at, kBoth);
  } else {  // block 0 the gate's columns, block 1 those of what it multiplies
    const int first = col0 + rank * static_cast<int>(p.epilogue.cols);
#pragma unroll 1
    for (int i = 0; i < kN / 2; i += p.gate_rows) {
      const int at[2] = {k, first + i};
      ptx::tma_load_multicast(b + (2 * i + rank * p.gate_rows) * kSwizzleRow, b_map, full, at, kBoth);
    }
  }
}

template <int kN>
using WgmmaAccumulators = float[2][kN / 2];  // of rows 0 to 63 and 64 to 127

// Adds one stage's product, asynchronously. a, b: shared addresses.
template <class T, int kN, bool kTransposedA, bool kTransposedB>
FASTLM_DEVICE void multiply_stage(WgmmaAccumulators<kN>& c, uint32_t a, uint32_t b, bool add) {
  using Product = ptx::Wgmma<kN, WgmmaElement<T>::kWgmma>;
  constexpr auto kMajorA = kTransposedA ? ptx::Major::mn : ptx::Major::k;
  constexpr auto kMajorB = kTransposedB ? ptx::Major::mn : ptx::Major::k;
  constexpr uint32_t kLeading = kWgmmaDepth * kSwizzleRow;  // transposed: from 64 rows or columns to the next
  constexpr int kStepA = kTransposedA ? 2 * kAtom : 32, kStepB = kTransposedB ? 2 * kAtom : 32;  // 16 of k, bytes
#pragma unroll
  for (int step = 0; step < kWgmmaDepth / 16; step++) {
    const uint64_t columns = ptx::wgmma_descriptor(b + step * kStepB, kLeading, kAtom, Swizzle::b128);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint64_t rows = ptx::wgmma_descriptor(a + half * 64 * kSwizzleRow + step * kStepA, kLeading, kAtom, Swizzle::b128);
      Product::template ss<kMajorA, kMajorB>(c[half], rows, columns, add || step > 0);
    }
  }
}

// Lays 16 of a warp's rows by kChunk columns of c into its strip of shared memory.
template <class Tile>
FASTLM_DEVICE void fill_strip(float* strip, const float* c) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < Tile::kChunk / 8; j++) {
    float* to = strip + lane / 4 * Tile::kStripFloats + 8 * j + 2 * (lane % 4);
    *reinterpret_cast<float2*>(to) = make_float2(c[4 * j], c[4 * j + 1]);
    *reinterpret_cast<float2*>(to + 8 * Tile::kStripFloats) = make_float2(c[4 * j + 2], c[4 * j + 3]);
  }
}

// Eight floats of a strip. Every second four lanes read their halves the other way round: no two of eight meet in a bank.
FASTLM_DEVICE void read_strip(const float* from, float (&v)[kVector]) {
  const bool turned = threadIdx.x / 4 % 2 != 0;
  const auto* p = reinterpret_cast<const float4*>(from);
  const float4 x = p[turned ? 1 : 0], y = p[turned ? 0 : 1];
  const float4 low = turned ? y : x, high = turned ? x : y;
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
  v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

// What the lanes with the same columns have summed, in the order of their rows.
template <class Tile>
FASTLM_DEVICE void store_strip_sums(const EpilogueTask& task, int64_t part, int64_t col0, float (&sums)[2][kVector]) {
  constexpr int kVectors = Tile::kChunk / kVector;
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int j = 0; j < kVector; j++) {
#pragma unroll
      for (int other = kVectors; other < 32; other *= 2) sums[h][j] += __shfl_xor_sync(0xffffffff, sums[h][j], other);
    }
  }
  const int lane = threadIdx.x % 32;
  const int64_t col = col0 + lane % kVectors * kVector, pre_cols = pre_columns(task);
  if (lane >= kVectors || col >= task.cols) return;
  float* to = task.column_sums + part * pre_cols + col;
#pragma unroll
  for (int j = 0; j < kVector; j++) {
    to[j] = sums[0][j];
    if (task.gated) to[task.cols + j] = sums[1][j];
  }
}

// The end of a tile: every warp for its own rows, kChunk columns at a time.
template <class T, int kN, EpilogueKind kKind>
FASTLM_DEVICE void finish_wgmma(const WgmmaTask& p, const WgmmaWork& work, const WgmmaAccumulators<kN>& c, float* strip) {
  using Tile = WgmmaTile<kN>;
  EpilogueTask task = p.epilogue;
  task.e.kind = kKind;
  task.vectors = true;  // the plan saw to it
  if (kKind == EpilogueKind::store && p.splits > 1) task.e.out = static_cast<float*>(task.e.out) + work.split * p.split_elements;
  const bool gated = kKind == EpilogueKind::activate && p.gate_rows > 0;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int width = gated ? Tile::kChunk / 2 : Tile::kChunk, shift = gated ? 1 : 2;  // 2 or 4 lanes share a row
  const Share share{(lane & ((1 << shift) - 1)) * kVector, lane >> shift, 32 >> shift, 16};
#pragma unroll
  for (int chunk = 0; chunk < kN / Tile::kChunk; chunk++) {
    __syncwarp();  // everybody has read what was there
#pragma unroll
    for (int half = 0; half < 2; half++) {
      fill_strip<Tile>(strip + half * 16 * Tile::kStripFloats, c[half] + Tile::kChunk / 2 * chunk);
    }
    __syncwarp();
    const int col0 = work.col0 + chunk * width;
    float sums[2][kVector] = {};
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      const float* rows = strip + half * 16 * Tile::kStripFloats;
      auto load = [&](int r, int col, float (&v)[kVector], float (&up)[kVector]) {
        read_strip(rows + r * Tile::kStripFloats + col, v);
        if (gated) read_strip(rows + r * Tile::kStripFloats + col + Tile::kChunk / 2, up);
      };
      finish_rows<T, kKind != EpilogueKind::store, true>(task, share, work.row0 + 64 * half + 16 * warp, col0, load, sums);
    }
    if (kKind == EpilogueKind::activate_backward && task.column_sums != nullptr && work.row0 < task.m) {
      store_strip_sums<Tile>(task, int64_t{work.tile} * kWgmmaStrips + warp, col0, sums);
    }
  }
}

template <class T, int kN, bool kTransposedA, bool kTransposedB, EpilogueKind kKind>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    gemm_kernel_sm90(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, const WgmmaTask p) {
#ifdef FASTLM_SM90A
  using Tile = WgmmaTile<kN>;
  FASTLM_SHARED_DYNAMIC(shared, 1024);
  FASTLM_SHARED(uint64_t, barriers, 2 * Tile::kStages);
  const uint32_t stages = ptx::shared_address(shared), full = ptx::shared_address(barriers), empty = full + 8 * Tile::kStages;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = static_cast<int>(blockIdx.x) % 2;  // in the cluster
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; i++) {
      ptx::mbarrier_init(full + 8 * i, 1);
      ptx::mbarrier_init(empty + 8 * i, 8);  // the four warps that have read it, of both blocks
    }
    ptx::mbarrier_fence_init();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  int step = 0;  // number of the stage, over all works
  if (group == 0) {
    ptx::setmaxnreg_decrease<24>();
    if (warp == 0 && ptx::elect_one()) {
      for (int i = static_cast<int>(blockIdx.x) / 2; i < p.works; i += p.clusters) {
        const WgmmaWork work = wgmma_work<kN>(p, i, rank);
        for (int s = 0; s < work.stages; s++, step++) {
          const int stage = step % Tile::kStages;
          ptx::mbarrier_wait(empty + 8 * stage, step / Tile::kStages % 2 ^ 1);
          ptx::mbarrier_arrive_expect_tx(full + 8 * stage, Tile::kStageBytes);
          load_stage<kN, kTransposedA, kTransposedB>(p, &a_map, &b_map, work, work.k0 + s * kWgmmaDepth, rank,
                                                     stages + stage * Tile::kStageBytes, full + 8 * stage);
        }
      }
    }
    __syncwarp();
  } else {
    ptx::setmaxnreg_increase<240>();
    float* strip = reinterpret_cast<float*>(shared + Tile::kStages * Tile::kStageBytes) + (warp - 4) * Tile::kStrip;
    auto release = [&](int stage) {  // in both blocks: b's half comes from the other one
      if (lane == 0) ptx::mbarrier_arrive(empty + 8 * stage);
      if (lane == 1) ptx::mbarrier_arrive_cluster_relaxed(ptx::map_shared(empty + 8 * stage, rank ^ 1));
    };
    int i = static_cast<int>(blockIdx.x) / 2;
    if (group == 2) {
      step = stages_of(p, i);
      i += p.clusters;
    }
    for (; i < p.works; i += 2 * p.clusters) {
      const WgmmaWork work = wgmma_work<kN>(p, i, rank);
      WgmmaAccumulators<kN> c;
      // The other warpgroup has seen every stage before: a barrier's parity tells two phases apart, not three.
      if (i >= p.clusters) ptx::barrier_sync(group, 256);
#pragma unroll 1
      for (int s = 0; s < work.stages; s++, step++) {
        const int stage = step % Tile::kStages;
        const uint32_t a = stages + stage * Tile::kStageBytes;
        ptx::mbarrier_wait(full + 8 * stage, step / Tile::kStages % 2);
        ptx::wgmma_fence();
        multiply_stage<T, kN, kTransposedA, kTransposedB>(c, a, a + Tile::kABytes, s > 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (s > 0) release((step - 1) % Tile::kStages);
      }
      if (i + p.clusters < p.works) ptx::barrier_arrive(3 - group, 256);
      ptx::wgmma_wait<0>();
      release((step - 1) % Tile::kStages);
      finish_wgmma<T, kN, kKind>(p, work, c, strip);
      step += stages_of(p, i + p.clusters);  // the other warpgroup's
    }
  }
  ptx::cluster_arrive();  // nobody arrives at a barrier of a block that has ended
  ptx::cluster_wait();
#endif
}

// TMA's view of an operand with `rows` of m or n. A box has box_rows of them, or, transposed, 64 of them and box_k of k.
template <class T>
TensorMap operand_map(const Matrix& p, int64_t rows, int64_t k, int box_rows, int box_k) {
  const auto r = static_cast<uint64_t>(rows), depth = static_cast<uint64_t>(k), stride = static_cast<uint64_t>(p.stride) * sizeof(T);
  TensorMapSpec spec{p.data, WgmmaElement<T>::kMap, 2, {depth, r}, {0, stride}, {}, Swizzle::b128};
  spec.box[0] = kSwizzleRow / sizeof(T);
  spec.box[1] = static_cast<uint32_t>(p.transposed ? box_k : box_rows);
  if (p.transposed) std::swap(spec.size[0], spec.size[1]);
  return make_tensor_map(spec);
}

template <class T, int kN, bool kTransposedA, bool kTransposedB, EpilogueKind kKind>
void launch_wgmma(const GemmTask& gemm, const WgmmaTask& task, cudaStream_t stream) {
  Launch l{dim3(static_cast<unsigned>(2 * task.clusters)), dim3(kWgmmaThreads), WgmmaTile<kN>::kSharedBytes, stream};
  l.cluster = dim3(2, 1, 1);
  launch("gemm", l, gemm_kernel_sm90<T, kN, kTransposedA, kTransposedB, kKind>,
         operand_map<T>(gemm.a, gemm.m, gemm.k, kWgmmaRows, kWgmmaDepth),
         operand_map<T>(gemm.b, gemm.n, gemm.k, task.gate_rows > 0 ? task.gate_rows : kN / 2, kWgmmaDepth / 2), task);
}

template <class T, int kN, EpilogueKind kKind>
void launch_wgmma(const GemmTask& gemm, const WgmmaTask& task, cudaStream_t stream) {
  if constexpr (kKind == EpilogueKind::store) {
    if (gemm.a.transposed) return launch_wgmma<T, kN, true, true, kKind>(gemm, task, stream);
  }
  gemm.b.transposed ? launch_wgmma<T, kN, false, true, kKind>(gemm, task, stream)
                    : launch_wgmma<T, kN, false, false, kKind>(gemm, task, stream);
}

template <class T>
void run_wgmma(const GemmTask& gemm, const GemmPlan& plan, int sms, cudaStream_t stream) {
  WgmmaTask task{};
  task.epilogue = gemm.epilogue;
  task.k = static_cast<int>(gemm.k);
  task.split_k = static_cast<int>(plan.split_k);
  task.pairs = static_cast<int>(ceil_div(plan.tiles_m, 2));
  task.tiles_n = static_cast<int>(plan.tiles_n);
  task.splits = static_cast<int>(plan.splits);
  task.works = task.pairs * task.tiles_n * task.splits;
  task.clusters = std::min(task.works, sms / 2);
  task.split_elements = gemm.m * gemm.n;
  Epilogue& e = task.epilogue.e;
  if (plan.splits > 1) {
    e = Epilogue{};
    e.out = gemm.partials;
    e.out_stride = task.epilogue.cols = gemm.n;
    e.out_type = DType::f32;
  }
  switch (e.kind) {
    case EpilogueKind::store:
      return plan.cols == 128 ? launch_wgmma<T, 128, EpilogueKind::store>(gemm, task, stream)
                              : launch_wgmma<T, 192, EpilogueKind::store>(gemm, task, stream);
    case EpilogueKind::activate:
      if (task.epilogue.gated) task.gate_rows = WgmmaTile<128>::kChunk / 2;
      return launch_wgmma<T, 128, EpilogueKind::activate>(gemm, task, stream);
    case EpilogueKind::activate_backward:
      return launch_wgmma<T, 128, EpilogueKind::activate_backward>(gemm, task, stream);
  }
}

// One file each, so that they compile side by side.
#define FASTLM_WGMMA_TYPE(EXTERN, T) \
  EXTERN template void run_wgmma<T>(const GemmTask&, const GemmPlan&, int, cudaStream_t);

}  // namespace fastlm::cuda
