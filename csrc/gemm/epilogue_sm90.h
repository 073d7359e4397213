// What happens to a tile of gemm_kernel_sm90.h, in the registers of the warpgroup that has made it.
//
// Every warp finishes its own rows, 16 of each of the tile's two halves, in pieces of 16 rows by 128 bytes. stmatrix lays a
// piece out in shared memory, a TMA store carries it away while the warp works on the next one. What the backward pass reads
// of pre comes by TMA too, long before it is needed, and dpre takes its place in shared memory. Nothing here waits for
// another warp, and no thread computes an address in global memory.
#pragma once
#include "common/cuda/ptx_matrix.h"
#include "common/cuda/ptx_mbarrier.h"
#include "common/cuda/ptx_tma.h"
#include "gemm/epilogue.h"
#include "gemm/gemm_plan.h"

namespace fastlm::cuda {

constexpr int kSwizzleRow = 128;  // bytes of a row of every tile in shared memory, whose 16-byte parts the swizzle permutes

constexpr int kPieceRows = 16, kPieceBytes = kPieceRows * kSwizzleRow, kPieces = 4;  // of each of the eight warps
constexpr int kStagingBytes = 8 * kPieces * kPieceBytes;
constexpr int kPairColumns = 64;  // of a piece of 16-bit elements

// In the backward pass the same memory is a ring of slots, each for 64 columns of pre in all the tile's rows, in the order
// in which they are used: of a gated activation first the gate's, then those of what it multiplies.
constexpr int kSlotBytes = kWgmmaRows * kSwizzleRow, kSlots = kStagingBytes / kSlotBytes;
template <int kN, bool kGated>
constexpr int kTileSlots = kN / kPairColumns * (kGated ? 2 : 1);  // that a tile takes

// TMA's views of the epilogue's matrices. store: as (column, row, split of k). Else as (column, part, row): the halves of a
// gated pre are its parts.
struct EpilogueMaps {
  TensorMap in;      // pre, read a slot at a time
  TensorMap out;     // and the others, written piece by piece
  TensorMap second;  // activate: pre; activate_backward: hidden
};

template <int kN>
using WgmmaAccumulators = float[2][kN / 2];  // of rows 0 to 63 and 64 to 127

// Where a warp's piece lies in c: its first row and column, and its part. Those of a tile: its first piece's.
struct PiecePlace {
  int col, part, row;
};

// Where this lane's row of a piece lies, as ldmatrix and stmatrix want it: the 16 bytes that it sees to of columns 16 q and
// up, of 16-bit elements. Of a piece that lies so many bytes further on, so many bytes further on.
struct LaneRow {
  uint32_t at[4];

  FASTLM_DEVICE explicit LaneRow(uint32_t piece) {
    const uint32_t lane = ptx::opaque(threadIdx.x) % 32, row = lane % 16;  // not kept in registers between the tiles
#pragma unroll
    for (uint32_t q = 0; q < 4; q++) at[q] = piece + row * kSwizzleRow + ((2 * q + lane / 16) ^ row % 8) * 16;
  }
};

// The warp's writes to a piece are there for TMA, once one of its lanes has come out of this.
FASTLM_DEVICE void publish_piece() {
  ptx::fence_proxy_async();
  __syncwarp();
}

// Of an activation's matrix.
FASTLM_DEVICE void store_piece(const TensorMap* map, uint32_t piece, const PiecePlace& to) {
  const int at[3] = {to.col, to.part, to.row};
  ptx::tma_store(map, piece, at);
}

// All but the newest kGroups of the warp's stores have read their pieces. Lane 0 issues all of a warp's stores.
template <int kGroups>
FASTLM_DEVICE void wait_for_pieces() {
  if (threadIdx.x % 32 == 0) ptx::bulk_wait_read<kGroups>();
  __syncwarp();
}

// The bias of the columns that a lane holds, in its accumulators' order: two of every eight.
template <class T, int kN>
struct LaneBias {
  uint32_t pairs[kN / 8];

  // Of columns col0 and up, of which there are `cols`.
  FASTLM_DEVICE void load(const void* bias, int col0, int cols) {
    const int first = col0 + 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int j = 0; j < kN / 8; j++) {
      pairs[j] = 0;
      if (bias == nullptr || first + 8 * j >= cols) continue;
      pairs[j] = *reinterpret_cast<const uint32_t*>(static_cast<const T*>(bias) + first + 8 * j);
    }
  }
};

// out = scale c + bias in 16-bit elements.
template <class T, int kN>
FASTLM_DEVICE void finish_store_pairs(const EpilogueTask& task, const TensorMap* out, const PiecePlace& tile,
                                      const WgmmaAccumulators<kN>& c, uint32_t pieces) {
  const float scale = task.e.scale != nullptr ? *task.e.scale : 1.0f;
  const LaneRow to(pieces);
  LaneBias<T, kPairColumns> bias;
#pragma unroll
  for (int u = 0; u < kN / 32; u++) {
    const int columns = u / 2, half = u % 2;
    if (half == 0) bias.load(task.e.bias, tile.col + kPairColumns * columns, static_cast<int>(task.cols));
    if (u == 0) wait_for_pieces<0>();
    if (u >= kPieces) wait_for_pieces<kPieces - 1>();
    const int piece = u % kPieces * kPieceBytes;
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const float* v = c[half] + 32 * columns + 8 * q;
      uint32_t r[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 b = unpack_pair<T>(bias.pairs[2 * q + j / 2]);
        r[j] = pack_pair<T>(v[2 * j] * scale + b.x, v[2 * j + 1] * scale + b.y);
      }
      ptx::stmatrix(to.at[q] + piece, r);
    }
    publish_piece();
    if (threadIdx.x % 32 == 0) {
      const int at[3] = {tile.col + kPairColumns * columns, tile.row + 64 * half, tile.part};
      ptx::tma_store(out, pieces + piece, at);
      ptx::bulk_commit();
    }
  }
}

// out = scale c + bias in float32, or out += it, which TMA does in the L2 cache.
template <class T, int kN>
FASTLM_DEVICE void finish_store_floats(const EpilogueTask& task, const TensorMap* out, const PiecePlace& tile,
                                       const WgmmaAccumulators<kN>& c, unsigned char* pieces) {
  constexpr int kColumns = kSwizzleRow / 4;
  const uint32_t lane = threadIdx.x % 32;
  const float scale = task.e.scale != nullptr ? *task.e.scale : 1.0f;
  LaneBias<T, kColumns> bias;
  const uint32_t row = lane / 4, at_first = row * kSwizzleRow + ((lane % 4 / 2 ^ row) << 4) + lane % 2 * 8;
#pragma unroll
  for (int u = 0; u < kN / 16; u++) {
    const int columns = u / 2, half = u % 2;
    if (half == 0) bias.load(task.e.bias, tile.col + kColumns * columns, static_cast<int>(task.cols));
    if (u == 0) wait_for_pieces<0>();
    if (u >= kPieces) wait_for_pieces<kPieces - 1>();
    unsigned char* piece = pieces + u % kPieces * kPieceBytes;
#pragma unroll
    for (int j = 0; j < kColumns / 8; j++) {
      const float* v = c[half] + 4 * (kColumns / 8 * columns + j);
      const float2 b = unpack_pair<T>(bias.pairs[j]);
      unsigned char* to = piece + (at_first ^ 32 * j);
      *reinterpret_cast<float2*>(to) = make_float2(v[0] * scale + b.x, v[1] * scale + b.y);
      *reinterpret_cast<float2*>(to + 8 * kSwizzleRow) = make_float2(v[2] * scale + b.x, v[3] * scale + b.y);
    }
    publish_piece();
    if (lane == 0) {
      const int at[3] = {tile.col + kColumns * columns, tile.row + 64 * half, tile.part};
      const uint32_t from = ptx::shared_address(piece);
      if (task.e.accumulate) ptx::tma_reduce_add(out, from, at);
      else ptx::tma_store(out, from, at);
      ptx::bulk_commit();
    }
  }
}

// pre = c + bias, rounded to T;  out = act(pre).
template <class T, int kN, class Act>
FASTLM_DEVICE void finish_activate(const EpilogueTask& task, const EpilogueMaps& maps, const PiecePlace& tile,
                                   const WgmmaAccumulators<kN>& c, uint32_t pieces) {
  constexpr int kGroups = kN / kPairColumns;
  const bool keep_pre = task.e.pre != nullptr;
  const LaneRow to(pieces);
  LaneBias<T, kPairColumns> bias[kGroups];
  auto load_bias = [&](int columns) {
    bias[columns].load(task.e.bias, tile.col + kPairColumns * columns, static_cast<int>(task.cols));
  };
  load_bias(0);
#pragma unroll
  for (int u = 0; u < 2 * kGroups; u++) {
    const int columns = u / 2, half = u % 2;
    if (half == 1 && columns + 1 < kGroups) load_bias(columns + 1);  // into what were accumulators
    if (u == 0) wait_for_pieces<0>();
    if (u >= 2) wait_for_pieces<1>();
    const int pre = u % 2 * 2 * kPieceBytes, out = pre + kPieceBytes;
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const float* v = c[half] + 32 * columns + 8 * q;
      uint32_t r[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 b = unpack_pair<T>(bias[columns].pairs[2 * q + j / 2]);
        r[j] = pack_pair<T>(v[2 * j] + b.x, v[2 * j + 1] + b.y);
      }
      if (keep_pre) ptx::stmatrix(to.at[q] + pre, r);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 h = unpack_pair<T>(r[j]);
        r[j] = pack_pair<T>(Act::value(h.x), Act::value(h.y));
      }
      ptx::stmatrix(to.at[q] + out, r);
    }
    publish_piece();
    if (threadIdx.x % 32 == 0) {
      const PiecePlace place{tile.col + kPairColumns * columns, 0, tile.row + 64 * half};
      if (keep_pre) store_piece(&maps.second, pieces + pre, place);
      store_piece(&maps.out, pieces + out, place);
      ptx::bulk_commit();
    }
  }
}

// The same of a gated activation: of every 32 columns of c the first 16 are the gate's, the others those that it multiplies.
template <class T, class Act>
FASTLM_DEVICE void finish_activate_gated(const EpilogueTask& task, const EpilogueMaps& maps, const PiecePlace& tile,
                                         const WgmmaAccumulators<128>& c, uint32_t pieces) {
  const bool keep_pre = task.e.pre != nullptr;
  const int cols = static_cast<int>(task.cols);
  const LaneRow to(pieces);
  LaneBias<T, kPairColumns> gate_bias, up_bias;
  gate_bias.load(task.e.bias, tile.col, cols);
  up_bias.load(task.e.bias == nullptr ? nullptr : static_cast<const T*>(task.e.bias) + cols, tile.col, cols);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    wait_for_pieces<0>();
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const float* v = c[half] + 16 * q;
      uint32_t gate[4], up[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 a = unpack_pair<T>(gate_bias.pairs[2 * q + j / 2]), b = unpack_pair<T>(up_bias.pairs[2 * q + j / 2]);
        gate[j] = pack_pair<T>(v[2 * j] + a.x, v[2 * j + 1] + a.y);
        up[j] = pack_pair<T>(v[8 + 2 * j] + b.x, v[8 + 2 * j + 1] + b.y);
      }
      if (keep_pre) {
        ptx::stmatrix(to.at[q], gate);
        ptx::stmatrix(to.at[q] + kPieceBytes, up);
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 g = unpack_pair<T>(gate[j]), x = unpack_pair<T>(up[j]);
        gate[j] = pack_pair<T>(Act::value(g.x) * x.x, Act::value(g.y) * x.y);
      }
      ptx::stmatrix(to.at[q] + 2 * kPieceBytes, gate);
    }
    publish_piece();
    if (threadIdx.x % 32 == 0) {
      const int row = tile.row + 64 * half;
      if (keep_pre) {
        store_piece(&maps.second, pieces, {tile.col, 0, row});
        store_piece(&maps.second, pieces + kPieceBytes, {tile.col, 1, row});
      }
      store_piece(&maps.out, pieces + 2 * kPieceBytes, {tile.col, 0, row});
      ptx::bulk_commit();
    }
  }
}

// A lane gives half of its sums to the lane whose number differs in bit kLanes, and takes the same of that one's other half.
template <int kCount, int kLanes>
FASTLM_DEVICE void halve_sums(float* v) {
  const bool upper = (threadIdx.x & kLanes) != 0;
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    const float mine = upper ? v[kCount + i] : v[i], other = upper ? v[i] : v[kCount + i];
    v[i] = mine + __shfl_xor_sync(0xffffffff, other, kLanes);
  }
}

// The slots of pre that belong to a tile, one behind the other in the ring.
struct PreSlots {
  uint32_t memory;       // shared address of the warp's first row in the ring's first slot
  uint32_t first;        // the tile's first slot
  uint32_t full, empty;  // the barriers that say that a slot of the tile is full, and one of the ring empty
  int turn;              // the phase of `full`

  FASTLM_DEVICE uint32_t in_ring(int slot) const { return (first + slot) % kSlots; }
};

// dpre = c act'(pre);  hidden = act(pre);  and the sums of dpre's columns, one row of them for each warp.
//
// dpre takes pre's place in the slot. Hidden is kept in registers, which were those columns' accumulators, until the store of
// the same columns' dpre has read the slot, and then follows it.
template <class T, int kN, bool kGated, class Act>
FASTLM_DEVICE void finish_activate_backward(const EpilogueTask& task, const EpilogueMaps& maps, const PiecePlace& tile,
                                            int strip, const WgmmaAccumulators<kN>& c, const PreSlots& slots) {
  constexpr int kParts = kGated ? 2 : 1, kGroups = kN / kPairColumns;
  constexpr int kHalf = 64 * kSwizzleRow;  // from a warp's rows in the upper half of the tile to those in the lower
  const bool keep_hidden = task.e.hidden != nullptr;
  const int lane = static_cast<int>(ptx::opaque(threadIdx.x) % 32);
  // Where this lane stores its sums: of which of the tile's columns, of every 32, and how many columns there are from it on.
  const int cols = static_cast<int>(task.cols);
  const int sums_col = tile.col + (lane & 4) * 4 + (lane & 16) / 2 + lane % 4 * 2 + (lane & 8) / 8;
  const bool keep_sums = task.column_sums != nullptr && strip / kWgmmaStrips * kWgmmaRows < task.m;
  const int sums_columns = keep_sums ? cols - sums_col : 0;
  float* sums_row = task.column_sums + int64_t{strip} * kParts * cols + sums_col;
  const LaneRow rows(slots.memory);
  uint32_t hidden[kGroups][2][4][4];  // by column, half, 16 columns

  auto offset_of = [&](int columns, int part) { return slots.in_ring(columns * kParts + part) * kSlotBytes; };
  auto store_slot = [&](const TensorMap* map, int columns, int part) {  // by lane 0
#pragma unroll
    for (int half = 0; half < 2; half++) {
      store_piece(map, slots.memory + offset_of(columns, part) + half * kHalf,
                  {tile.col + kPairColumns * columns, part, tile.row + 64 * half});
    }
  };
  auto store_hidden = [&](int columns) {  // dpre's store has read the slot
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int q = 0; q < 4; q++) {
        ptx::stmatrix(rows.at[q] + offset_of(columns, 0) + half * kHalf, hidden[columns][half][q]);
      }
    }
    publish_piece();
    if (lane == 0) {
      store_slot(&maps.second, columns, 0);
      ptx::bulk_commit();
    }
  };
  auto release = [&](int columns) {  // by lane 0
#pragma unroll
    for (int part = 0; part < kParts; part++) ptx::mbarrier_arrive(slots.empty + 8 * slots.in_ring(columns * kParts + part));
  };

#pragma unroll
  for (int columns = 0; columns < kGroups; columns++) {
#pragma unroll
    for (int part = 0; part < kParts; part++) ptx::mbarrier_wait(slots.full + 8 * (columns * kParts + part), slots.turn);
    float pairs_sum[kParts];  // of an even q
#pragma unroll
    for (int q = 0; q < 4; q++) {
      if (columns > 0 && q == 2) {
        if (lane == 0) {
          ptx::bulk_wait_read<0>();
          if (columns > 1) release(columns - 2);
        }
        __syncwarp();
        if (keep_hidden) store_hidden(columns - 1);
      }
      const uint32_t gate_row = rows.at[q] + offset_of(columns, 0), up_row = rows.at[q] + offset_of(columns, kParts - 1);
      uint32_t gate[2][4], up[2][4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        ptx::ldmatrix(gate[half], gate_row + half * kHalf);
        if (kGated) ptx::ldmatrix(up[half], up_row + half * kHalf);
      }
      float sums[kParts][4] = {};
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float* d = c[half] + 32 * columns + 8 * q;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float2 h = unpack_pair<T>(gate[half][j]);
          const ValueSlope x = Act::both(h.x), y = Act::both(h.y);
          float2 value = make_float2(x.value, y.value), dh = make_float2(d[2 * j] * x.slope, d[2 * j + 1] * y.slope);
          const int to = j / 2 * 2;
          if (kGated) {
            const float2 v = unpack_pair<T>(up[half][j]), dv = make_float2(d[2 * j] * value.x, d[2 * j + 1] * value.y);
            value.x *= v.x, value.y *= v.y;
            dh.x *= v.x, dh.y *= v.y;
            sums[kParts - 1][to] += dv.x, sums[kParts - 1][to + 1] += dv.y;
            up[half][j] = pack_pair<T>(dv.x, dv.y);
          }
          sums[0][to] += dh.x, sums[0][to + 1] += dh.y;
          gate[half][j] = pack_pair<T>(dh.x, dh.y);
          hidden[columns][half][q][j] = pack_pair<T>(value.x, value.y);
        }
      }
      __syncwarp();  // everybody has read what is now overwritten
#pragma unroll
      for (int half = 0; half < 2; half++) {
        ptx::stmatrix(gate_row + half * kHalf, gate[half]);
        if (kGated) ptx::stmatrix(up_row + half * kHalf, up[half]);
      }
      if (kN > 128 && !keep_sums) continue;  // a branch: without it ptxas begins the next columns early, and spills registers
      // A lane has sums of four of the 16 columns over four rows. In the end it has one of the 32 of two q, over all rows.
#pragma unroll
      for (int part = 0; part < kParts; part++) {
        halve_sums<2, 16>(sums[part]);
        halve_sums<1, 8>(sums[part]);
        if (q % 2 == 0) {
          pairs_sum[part] = sums[part][0];
          continue;
        }
        float both[2] = {pairs_sum[part], sums[part][0]};
        halve_sums<1, 4>(both);
        const int col = kPairColumns * columns + 16 * (q - 1);
        if (col < sums_columns) sums_row[part * cols + col] = both[0];
      }
    }
    publish_piece();
    if (lane == 0) {
#pragma unroll
      for (int part = 0; part < kParts; part++) store_slot(&maps.out, columns, part);
      ptx::bulk_commit();
    }
  }
  if (lane == 0) {  // the last columns' store may be under way, those of the columns before are not
    ptx::bulk_wait_read<1>();
    release(kGroups - 2);
    ptx::bulk_wait_read<0>();
  }
  __syncwarp();
  if (keep_hidden) {
    store_hidden(kGroups - 1);
    if (lane == 0) ptx::bulk_wait_read<0>();
  }
  if (lane == 0) release(kGroups - 1);
  __syncwarp();
}

}  // namespace fastlm::cuda
