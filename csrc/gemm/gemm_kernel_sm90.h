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
#include "common/cuda/wgmma_element.h"
#include "gemm/epilogue_sm90.h"
#include "gemm/gemm_kernel.h"

namespace fastlm::cuda {

// An operand's part of a stage: kWgmmaDepth of k, in rows of 128 bytes whose 16-byte pieces the swizzle permutes. Where k
// is contiguous a row is all of k, for each of m or n. Transposed, a row is 64 elements of m or n; for these come all of k
// before the next 64.
constexpr int kWgmmaDepth = 64, kAtom = 8 * kSwizzleRow;

constexpr int kGateRows = 16;  // of the gate's columns, then as many of those that it multiplies: so a gated product's tile

template <int kN>
struct WgmmaTile {
  static constexpr int kABytes = kWgmmaRows * kSwizzleRow, kBBytes = kN * kSwizzleRow, kStageBytes = kABytes + kBBytes;
  static constexpr int kStages = kN <= 128 ? 5 : 4;
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

// A row of a beyond m is zeros, so its products are too, or NaN where b is infinite: no sum is to have it.
// row0: the warp's first.
template <int kN>
FASTLM_DEVICE void clear_rows(WgmmaAccumulators<kN>& c, int row0, int64_t m) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = row0 + 64 * half + static_cast<int>(threadIdx.x % 32 / 4);
#pragma unroll
    for (int j = 0; j < kN / 2; j++) {
      if (row + j % 4 / 2 * 8 >= m) c[half][j] = 0.0f;
    }
  }
}

// body(activation) with those alone that are gated, or are not.
template <bool kGated, class Body>
FASTLM_DEVICE void with_activation_of(Activation a, const Body& body) {
  if constexpr (kGated) {
    a == Activation::swiglu ? body(Silu{}) : body(Gelu{});
  } else {
    switch (a) {
      case Activation::gelu_tanh: return body(GeluTanh{});
      case Activation::gelu: return body(Gelu{});
      case Activation::relu: return body(Relu{});
      case Activation::relu2: return body(Relu2{});
      default: return body(Silu{});
    }
  }
}

// The end of a tile, number `turn` of this cluster's tiles. staging: of the block; slots: the barriers of its slots of pre.
// "Full" has one for each slot of a tile of each warpgroup, since a barrier's parity tells two phases apart, not three; then
// come those for "empty", one for each slot of the ring.
template <class T, int kN, EpilogueKind kKind, bool kGated>
FASTLM_DEVICE void finish_wgmma(const WgmmaTask& p, const EpilogueMaps& maps, const WgmmaWork& work, int turn,
                                WgmmaAccumulators<kN>& c, unsigned char* staging, uint32_t slots) {
  const EpilogueTask& task = p.epilogue;
  const int warp = static_cast<int>(ptx::opaque(threadIdx.x) / 32) - 4, strip = warp % 4;
  const PiecePlace tile{work.col0, work.split, work.row0 + kPieceRows * strip};
  unsigned char* mine = staging + warp * kPieces * kPieceBytes;
  if constexpr (kKind == EpilogueKind::store) {
    if (task.e.out_type == DType::f32) finish_store_floats<T, kN>(task, &maps.out, tile, c, mine);
    else finish_store_pairs<T, kN>(task, &maps.out, tile, c, ptx::shared_address(mine));
  } else if constexpr (kKind == EpilogueKind::activate) {
    with_activation_of<kGated>(task.e.activation, [&](auto act) {
      using Act = decltype(act);
      if constexpr (kGated) finish_activate_gated<T, Act>(task, maps, tile, c, ptx::shared_address(mine));
      else finish_activate<T, kN, Act>(task, maps, tile, c, ptx::shared_address(mine));
    });
  } else {
    constexpr int kCount = kTileSlots<kN, kGated>;
    const PreSlots pre{ptx::shared_address(staging) + strip * kPieceBytes, static_cast<uint32_t>(turn * kCount) % kSlots,
                       slots + 8 * (turn % 2 * kCount), slots + 8 * 2 * kSlots, turn / 2 % 2};
    if (work.row0 + kWgmmaRows > task.m) clear_rows<kN>(c, tile.row, task.m);
    with_activation_of<kGated>(task.e.activation, [&](auto act) {
      finish_activate_backward<T, kN, kGated, decltype(act)>(task, maps, tile, work.tile * kWgmmaStrips + strip, c, pre);
    });
  }
}

// Loads the slots of pre, tile after tile. slots: as above.
template <int kN, bool kGated>
FASTLM_DEVICE void load_pre_slots(const WgmmaTask& p, const TensorMap* map, int rank, uint32_t staging, uint32_t slots) {
  constexpr int kParts = kGated ? 2 : 1, kCount = kTileSlots<kN, kGated>;
  static_assert(kCount <= kSlots, "a tile's last slot may be filled before its first is empty");
  int n = 0, group = 0;  // the slot's number, and the warpgroup whose tile it is
  for (int i = static_cast<int>(blockIdx.x) / 2; i < p.works; i += p.clusters, group ^= 1) {
    const WgmmaWork work = wgmma_work<kN>(p, i, rank);
#pragma unroll 1
    for (int j = 0; j < kCount; j++, n++) {
      const int slot = n % kSlots, at[3] = {work.col0 + j / kParts * kPairColumns, j % kParts, work.row0};
      const uint32_t full = slots + 8 * (group * kCount + j);
      ptx::mbarrier_wait(slots + 8 * (2 * kSlots + slot), n / kSlots % 2 ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, kSlotBytes);
      ptx::tma_load(staging + slot * kSlotBytes, map, full, at);
    }
  }
}

template <class T, int kN, bool kTransposedA, bool kTransposedB, EpilogueKind kKind, bool kGated>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    gemm_kernel_sm90(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                     const __grid_constant__ EpilogueMaps maps, const __grid_constant__ WgmmaTask p) {
#ifdef FASTLM_SM90A
  using Tile = WgmmaTile<kN>;
  FASTLM_SHARED_DYNAMIC(shared, 1024);
  FASTLM_SHARED(uint64_t, barriers, 2 * Tile::kStages + 3 * kSlots);
  const uint32_t stages = ptx::shared_address(shared), full = ptx::shared_address(barriers), empty = full + 8 * Tile::kStages;
  const uint32_t slots = empty + 8 * Tile::kStages;
  unsigned char* staging = shared + Tile::kStages * Tile::kStageBytes;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = static_cast<int>(blockIdx.x) % 2;  // in the cluster
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; i++) {
      ptx::mbarrier_init(full + 8 * i, 1);
      ptx::mbarrier_init(empty + 8 * i, 8);  // the four warps that have read it, of both blocks
    }
    for (int i = 0; i < kSlots; i++) {
      ptx::mbarrier_init(slots + 8 * i, 1);
      ptx::mbarrier_init(slots + 8 * (kSlots + i), 1);
      ptx::mbarrier_init(slots + 8 * (2 * kSlots + i), 4);  // the warps of the group that has used it
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
    // By another warp: neither the stages nor pre wait for each other's room.
    if (kKind == EpilogueKind::activate_backward && warp == 1 && ptx::elect_one()) {
      load_pre_slots<kN, kGated>(p, &maps.in, rank, ptx::shared_address(staging), slots);
    }
    __syncwarp();
  } else {
    ptx::setmaxnreg_increase<240>();
    auto release = [&](int stage) {  // in both blocks: b's half comes from the other one
      if (lane == 0) ptx::mbarrier_arrive(empty + 8 * stage);
      if (lane == 1) ptx::mbarrier_arrive_cluster_relaxed(ptx::map_shared(empty + 8 * stage, rank ^ 1));
    };
    int i = static_cast<int>(blockIdx.x) / 2, turn = group - 1;
    if (group == 2) {
      step = stages_of(p, i);
      i += p.clusters;
    }
    for (; i < p.works; i += 2 * p.clusters, turn += 2) {
      const WgmmaWork work = wgmma_work<kN>(p, i, rank);
      WgmmaAccumulators<kN> c;
      // The other warpgroup has seen every stage before: a barrier's parity tells two phases apart, not three.
      if (i >= p.clusters) ptx::barrier_sync(group, 256);
      auto multiply = [&](bool first) {
        const int stage = step % Tile::kStages;
        const uint32_t a = stages + stage * Tile::kStageBytes;
        ptx::mbarrier_wait(full + 8 * stage, step / Tile::kStages % 2);
        ptx::wgmma_fence();
        multiply_stage<T, kN, kTransposedA, kTransposedB>(c, a, a + Tile::kABytes, !first);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (!first) release((step - 1) % Tile::kStages);
        step++;
      };
      // Not in the loop: ptxas sees that no accumulator lives on, and gives the epilogue the registers of what it is done with.
      multiply(true);
#pragma unroll 1
      for (int s = 1; s < work.stages; s++) multiply(false);
      if (i + p.clusters < p.works) ptx::barrier_arrive(3 - group, 256);
      ptx::wgmma_wait<0>();
      release((step - 1) % Tile::kStages);
      finish_wgmma<T, kN, kKind, kGated>(p, maps, work, turn, c, staging, slots);
      step += stages_of(p, i + p.clusters);  // the other warpgroup's
    }
    wait_for_pieces<0>();  // shared memory must last until its stores have read it
  }
  ptx::cluster_arrive();  // nobody arrives at a barrier of a block that has ended
  ptx::cluster_wait();
#endif
}

// TMA's view of an operand with `rows` of m or n. A box has box_rows of them, or, transposed, 64 of them and box_k of k.
template <class T>
TensorMap operand_map(const Matrix& p, int64_t rows, int64_t k, int box_rows, int box_k) {
  const auto r = static_cast<uint64_t>(rows), depth = static_cast<uint64_t>(k);
  const auto stride = static_cast<uint64_t>(p.stride) * sizeof(T);
  TensorMapSpec spec{p.data, WgmmaElement<T>::kMap, 2, {depth, r}, {0, stride}, {}, Swizzle::b128};
  spec.box[0] = kSwizzleRow / sizeof(T);
  spec.box[1] = static_cast<uint32_t>(p.transposed ? box_k : box_rows);
  if (p.transposed) std::swap(spec.size[0], spec.size[1]);
  return make_tensor_map(spec);
}

// A matrix of the epilogue: `parts` matrices of m x cols, so far apart (bytes), with so far between rows. The parts of a row
// lie side by side, or those of a matrix one behind the other.
struct EpilogueMatrix {
  const void* data;
  ElementType type;
  int64_t cols, parts, m;
  int64_t part_bytes, row_bytes;
};

// TMA's view of it. The dimension that lies closer together comes first.
inline TensorMap epilogue_map(const EpilogueMatrix& p, int box_rows) {
  if (p.data == nullptr) return {};
  const int part = p.part_bytes <= p.row_bytes ? 1 : 2, row = 3 - part;
  TensorMapSpec spec{p.data, p.type, 3, {static_cast<uint64_t>(p.cols)}, {}, {}, Swizzle::b128};
  spec.size[part] = static_cast<uint64_t>(p.parts);
  spec.size[row] = static_cast<uint64_t>(p.m);
  spec.stride_bytes[part] = static_cast<uint64_t>(p.part_bytes);
  spec.stride_bytes[row] = static_cast<uint64_t>(p.row_bytes);
  spec.box[0] = static_cast<uint32_t>(kSwizzleRow / size_of(p.type));
  spec.box[part] = 1;
  spec.box[row] = static_cast<uint32_t>(box_rows);
  return make_tensor_map(spec);
}

template <class T>
EpilogueMaps epilogue_maps(const GemmTask& gemm, const WgmmaTask& task) {
  const EpilogueTask& t = task.epilogue;
  constexpr auto kType = WgmmaElement<T>::kMap;
  const EpilogueMatrix rows{nullptr, kType, t.cols, 1, gemm.m, t.cols * 2, t.cols * 2};
  EpilogueMatrix pre = rows, out = rows, hidden = rows;
  if (t.gated) pre.parts = 2, pre.row_bytes = t.cols * 4;
  pre.data = t.e.pre;
  hidden.data = t.e.hidden;
  out.data = t.e.out;
  switch (t.e.kind) {
    case EpilogueKind::store:
      if (t.e.out_type == DType::f32) out.type = ElementType::f32;
      out.row_bytes = t.e.out_stride * size_of(out.type);
      out.parts = task.splits;
      out.part_bytes = gemm.m * out.row_bytes;
      return {{}, epilogue_map(out, kPieceRows), {}};
    case EpilogueKind::activate: return {{}, epilogue_map(out, kPieceRows), epilogue_map(pre, kPieceRows)};
    case EpilogueKind::activate_backward: break;
  }
  const TensorMap in = epilogue_map(pre, kWgmmaRows);
  pre.data = t.e.out;
  return {in, epilogue_map(pre, kPieceRows), epilogue_map(hidden, kPieceRows)};
}

template <class T, int kN, bool kTransposedA, bool kTransposedB, EpilogueKind kKind, bool kGated>
void launch_wgmma(const GemmTask& gemm, const WgmmaTask& task, cudaStream_t stream) {
  Launch l{dim3(static_cast<unsigned>(2 * task.clusters)), dim3(kWgmmaThreads), WgmmaTile<kN>::kSharedBytes, stream};
  l.cluster = dim3(2, 1, 1);
  launch("gemm", l, gemm_kernel_sm90<T, kN, kTransposedA, kTransposedB, kKind, kGated>,
         operand_map<T>(gemm.a, gemm.m, gemm.k, kWgmmaRows, kWgmmaDepth),
         operand_map<T>(gemm.b, gemm.n, gemm.k, task.gate_rows > 0 ? task.gate_rows : kN / 2, kWgmmaDepth / 2),
         epilogue_maps<T>(gemm, task), task);
}

// a is transposed for a plain product alone, b not for a gated one (wgmma_takes).
template <class T, int kN, EpilogueKind kKind, bool kGated = false>
void launch_wgmma(const GemmTask& gemm, const WgmmaTask& task, cudaStream_t stream) {
  if constexpr (kKind == EpilogueKind::store) {
    if (gemm.a.transposed) return launch_wgmma<T, kN, true, true, kKind, false>(gemm, task, stream);
  }
  if constexpr (kKind != EpilogueKind::activate || !kGated) {
    if (gemm.b.transposed) return launch_wgmma<T, kN, false, true, kKind, kGated>(gemm, task, stream);
  }
  launch_wgmma<T, kN, false, false, kKind, kGated>(gemm, task, stream);
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
  EpilogueTask& t = task.epilogue;
  if (plan.splits > 1) {
    t.e = Epilogue{};
    t.e.out = gemm.partials;
    t.e.out_stride = t.cols = gemm.n;
    t.e.out_type = DType::f32;
    t.gated = false;
  }
  const bool wide = plan.cols == 192;
  switch (t.e.kind) {
    case EpilogueKind::store:
      return wide ? launch_wgmma<T, 192, EpilogueKind::store>(gemm, task, stream)
                  : launch_wgmma<T, 128, EpilogueKind::store>(gemm, task, stream);
    case EpilogueKind::activate:
      if (!t.gated) {
        return wide ? launch_wgmma<T, 192, EpilogueKind::activate>(gemm, task, stream)
                    : launch_wgmma<T, 128, EpilogueKind::activate>(gemm, task, stream);
      }
      task.gate_rows = kGateRows;
      return launch_wgmma<T, 128, EpilogueKind::activate, true>(gemm, task, stream);
    case EpilogueKind::activate_backward:
      if (t.gated) return launch_wgmma<T, 128, EpilogueKind::activate_backward, true>(gemm, task, stream);
      return wide ? launch_wgmma<T, 192, EpilogueKind::activate_backward>(gemm, task, stream)
                  : launch_wgmma<T, 128, EpilogueKind::activate_backward>(gemm, task, stream);
  }
}

// One file each, so that they compile side by side.
#define FASTLM_WGMMA_TYPE(EXTERN, T) \
  EXTERN template void run_wgmma<T>(const GemmTask&, const GemmPlan&, int, cudaStream_t);

}  // namespace fastlm::cuda
