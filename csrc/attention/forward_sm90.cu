// attention.h on CUDA, forward, for Hopper (Shah et al.: FlashAttention-3, arXiv:2407.08608). Blocks of threads, one a
// multiprocessor, go from work to work: a block of query rows of one head. A warpgroup that only loads fills rings of key
// and value tiles by TMA; the others own 64 rows each, whose scores, weights and outputs stay in their registers.
//
// The tensor cores are to be busy all the time. So a warpgroup starts the scores of a tile together with the outputs of the
// tile before, and computes the weights of the one while the other is under way; and the warpgroups take turns at starting
// products, so that one's softmax falls into the others' products.
#include <algorithm>

#include "attention/sm80/launch.h"
#include "attention/sm90/forward.h"
#include "attention/sm90/forward_schedule.h"
#include "attention/sm90/forward_softmax.h"
#include "common/cuda/ptx_barrier.h"
#include "common/cuda/ptx_matrix.h"
#include "common/cuda/ptx_mbarrier.h"
#include "common/cuda/ptx_tma.h"
#include "common/cuda/ptx_warpgroup.h"
#include "common/cuda/ptx_wgmma.h"
#include "common/cuda/wgmma_element.h"

namespace fastlm {
namespace cuda {
namespace {

// Tiles lie in shared memory in panels of 64 elements, rows of 128 bytes whose 16-byte pieces the swizzle permutes.
constexpr int kPanel = 64, kPanelRow = 128, kAtomBytes = 8 * kPanelRow;

template <class T, int kWidth_>
struct Shape {
  static constexpr int kWidth = kWidth_, kPanels = kWidth / kPanel;
  static constexpr int kGroups = kWidth <= 64 ? 3 : 2;  // warpgroups that compute
  static constexpr int kRows = 64 * kGroups, kColumns = 128;
  static constexpr int kStages = kWidth <= 64 ? 3 : 2, kQStages = 2;  // of keys, and of values; of queries
  static constexpr int kThreads = 128 * (kGroups + 1);
  // Of a multiprocessor's 65536.
  static constexpr int kLoadRegisters = kGroups == 3 ? 32 : 40, kRegisters = kGroups == 3 ? 160 : 232;
  static constexpr int kRowsBytes = kRows * kWidth * 2, kTileBytes = kColumns * kWidth * 2;
  static constexpr int kOut = kQStages * kRowsBytes + 2 * kStages * kTileBytes;  // behind queries, keys and values: outputs
  static constexpr int kBytes = kOut + kRowsBytes, kBarriers = 2 * kQStages + 4 * kStages;
};

// Where a warpgroup is in a ring of stages.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  FASTLM_DEVICE void advance() {
    const bool last = stage == kStages - 1;
    parity ^= last ? 1 : 0;
    stage = last ? 0 : stage + 1;
  }
};

// The stages of a ring in shared memory, and their mbarriers: a stage is full, and empty again.
template <int kStages, int kPanels, int kBytes>
struct Stages {
  using Ring = cuda::Ring<kStages>;
  uint32_t data, full, empty;

  FASTLM_DEVICE Stages(uint32_t data, uint32_t barriers) : data(data), full(barriers), empty(barriers + 8 * kStages) {}
  FASTLM_DEVICE uint32_t data_end() const { return data + kStages * kBytes; }
  FASTLM_DEVICE uint32_t barriers_end() const { return empty + 8 * kStages; }

  FASTLM_DEVICE void init(int readers) const {
    for (int i = 0; i < kStages; i++) {
      ptx::mbarrier_init(full + 8 * i, 1);
      ptx::mbarrier_init(empty + 8 * i, readers);
    }
  }
  FASTLM_DEVICE uint32_t tile(const Ring& ring) const { return data + ring.stage * kBytes; }

  // The box of panels, from a row of a head on, into the ring's next stage.
  FASTLM_DEVICE void load(Ring& ring, const TensorMap* map, int row, int head, int batch) const {
    const uint32_t mbarrier = full + 8 * ring.stage;
    ptx::mbarrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(mbarrier, kBytes);
#pragma unroll
    for (int panel = 0; panel < kPanels; panel++) {
      const int at[4] = {panel * kPanel, row, head, batch};
      ptx::tma_load(tile(ring) + panel * (kBytes / kPanels), map, mbarrier, at);
    }
    ring.advance();
  }
  FASTLM_DEVICE void wait(const Ring& ring) const { ptx::mbarrier_wait(full + 8 * ring.stage, ring.parity); }
  // By a warp that has read the stage.
  FASTLM_DEVICE void give_back(Ring& ring) const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty + 8 * ring.stage);
    ring.advance();
  }
};

template <class S>
struct Shared {
  Stages<S::kQStages, S::kPanels, S::kRowsBytes> q;
  Stages<S::kStages, S::kPanels, S::kTileBytes> k, v;

  FASTLM_DEVICE Shared(uint32_t data, uint32_t barriers)
      : q(data, barriers), k(q.data_end(), q.barriers_end()), v(k.data_end(), k.barriers_end()) {}
  FASTLM_DEVICE void init() const {
    constexpr int kWarps = 4 * S::kGroups;
    q.init(kWarps);
    k.init(kWarps);
    v.init(kWarps);
    ptx::mbarrier_fence_init();
  }
};

// The one thread that loads. Keys come one tile ahead of the values.
template <class S>
FASTLM_DEVICE void load_all(const AttentionInputs& p, const Grid& grid, const Shared<S>& shared, const TensorMap* q_map,
                            const TensorMap* k_map, const TensorMap* v_map) {
  Ring<S::kQStages> q_ring;
  Ring<S::kStages> k_ring, v_ring;
  const int shared_heads = static_cast<int>(p.heads / p.kv_heads);
  ForwardWorks works(grid);
#pragma unroll 1
  for (int i = works.next(); i >= 0; i = works.next()) {
    const auto work = forward_work<S::kRows, S::kColumns>(p, grid, i);
    if (work.tiles == 0) continue;
    const int batch = p.cu_seqlens == nullptr ? work.sequence : 0, kv_head = work.head / shared_heads;
    int row = work.first + (work.tiles - 1) * S::kColumns;
    shared.q.load(q_ring, q_map, work.row0, work.head, batch);
    shared.k.load(k_ring, k_map, row, kv_head, batch);
#pragma unroll 1
    for (; row >= work.first; row -= S::kColumns) {
      if (row > work.first) shared.k.load(k_ring, k_map, row - S::kColumns, kv_head, batch);
      shared.v.load(v_ring, v_map, row, kv_head, batch);
    }
  }
}

// Starts the scores of 64 rows with a tile's keys.
template <class T, class S>
FASTLM_DEVICE void start_scores(float (&s)[S::kColumns / 2], uint32_t q, uint32_t k) {
  const uint64_t rows = ptx::wgmma_descriptor(q, 16, kAtomBytes, Swizzle::b128);
  const uint64_t columns = ptx::wgmma_descriptor(k, 16, kAtomBytes, Swizzle::b128);
#pragma unroll
  for (int step = 0; step < S::kWidth / 16; step++) {
    const int panel = step / 4, inside = step % 4 * 32;  // bytes
    ptx::Wgmma<S::kColumns, WgmmaElement<T>::kWgmma>::template ss<>(s, rows + (panel * S::kRows * kPanelRow + inside) / 16,
                                                          columns + (panel * S::kColumns * kPanelRow + inside) / 16, step > 0);
  }
  ptx::wgmma_commit();
}

// Starts adding a tile's values, times their weights.
template <class T, class S>
FASTLM_DEVICE void start_outputs(float (&out)[S::kWidth / 2], const uint32_t (&weights)[S::kColumns / 16][4], uint32_t v) {
  const uint64_t values = ptx::wgmma_descriptor(v, S::kColumns * kPanelRow, kAtomBytes, Swizzle::b128);
#pragma unroll
  for (int step = 0; step < S::kColumns / 16; step++) {
    const uint64_t rows = values + step * 2 * kAtomBytes / 16;
    ptx::Wgmma<S::kWidth, WgmmaElement<T>::kWgmma>::template rs<ptx::Major::mn>(out, weights[step], rows, true);
  }
  ptx::wgmma_commit();
}

// Values of another sequence's rows, which TMA has loaded behind the last of this one, become zeros: what is not seen has the
// weight 0, and 0 * NaN is NaN. Every warpgroup does it for itself, before its product; they write the same zeros.
template <class S>
FASTLM_DEVICE void clear_values(unsigned char* v, int first, int barrier) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  for (int i = 8 * first + thread; i < 8 * S::kColumns; i += 128) {
#pragma unroll
    for (int panel = 0; panel < S::kPanels; panel++) {
      *reinterpret_cast<uint4*>(v + panel * S::kColumns * kPanelRow + 16 * i) = make_uint4(0, 0, 0, 0);
    }
  }
  ptx::fence_proxy_async();
  ptx::barrier_sync(barrier, 128);
}

// A warpgroup's rows of a work, from `first` on. Those before the sequence's `begin` are none.
struct ForwardRows {
  int batch, head, first, begin;
};

// The outputs and the lse of a warp's 16 rows, through its part of shared memory, from where whole rows are stored.
template <class T, class S>
FASTLM_DEVICE void store_rows(const AttentionInputs& p, const ForwardRows& at, const float (&out)[S::kWidth / 2],
                              const ForwardSoftmax& softmax, unsigned char* staging, T* to, float* lse) {
  const int lane = threadIdx.x % 32, warp_row = at.first + 16 * (threadIdx.x / 32 % 4);
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float sum = softmax.whole_sum(half);
    factor[half] = sum == 0.0f ? 0.0f : ptx::reciprocal_approx(sum);
    const int row = warp_row + lane / 4 + 8 * half;
    if (lane % 4 == 0 && row >= at.begin) lse[(at.batch * p.heads + at.head) * p.rows + row] = softmax.lse(half, sum);
  }
  constexpr int kChunks = S::kWidth / 8, kPanelBytes = 16 * kPanelRow;
  auto offset = [](int row, int chunk) { return chunk / 8 * kPanelBytes + row * kPanelRow + ((chunk % 8 ^ row % 8) << 4); };
  __syncwarp();  // everybody has read what was there
  const uint32_t address = ptx::shared_address(staging);
#pragma unroll
  for (int j = 0; j < kChunks / 2; j++) {
    uint32_t r[4];  // rows 0 to 7 and 8 to 15 of 8 columns, then of the next 8
#pragma unroll
    for (int m = 0; m < 4; m++) {
      r[m] = pack(out[8 * j + 2 * m] * factor[m % 2], out[8 * j + 2 * m + 1] * factor[m % 2], T());
    }
    ptx::stmatrix(address + offset(lane % 16, 2 * j + lane / 16), r);
  }
  __syncwarp();
  // A lane has the same chunk of every kStep-th row.
  constexpr int kStep = 32 / kChunks;
  const int64_t step = kStep * p.heads * p.width;
  const int first = lane / kChunks, chunk = lane % kChunks, begin = chunk < static_cast<int>(p.width / 8) ? at.begin : kMaxLength;
  T* row = to + ((static_cast<int64_t>(at.batch) * p.rows + warp_row + first) * p.heads + at.head) * p.width + 8 * chunk;
#pragma unroll
  for (int i = 0; i < 16; i += kStep, row += step) {
    if (warp_row + first + i >= begin) {
      *reinterpret_cast<uint4*>(row) = *reinterpret_cast<const uint4*>(staging + offset(first + i, chunk));
    }
  }
}

// A warpgroup that computes. Its turn at starting products is the named barrier 1 + group, at which the group before arrives.
// Every group takes as many turns as there are tiles, those it sees nothing of included: nobody waits for a turn that never
// comes. A stage is given back only after it was full, so that no group is ahead by more than a phase of its barriers.
//
// A tile's outputs are started together with the next tile's scores, also where that is the next work's first: only then is
// a work stored. Until then the tile's values keep their stage, so that at most kStages - 1 other tiles can be skipped.
template <class T, class S>
struct Compute {
  const AttentionInputs& p;
  const Shared<S>& shared;
  const int group;
  unsigned char* const data;
  T* const to;
  float* const lse;

  Ring<S::kQStages> q_ring;
  Ring<S::kStages> k_ring, v_ring;
  bool pending = false;  // the last tile's outputs are not started yet
  Ring<S::kStages> pending_v;  // the stage of its values
  int pending_clear = S::kColumns;  // from this row of the tile on they are of another sequence
  ForwardRows rows;  // whose outputs these are
  ForwardSoftmax softmax;
  float out[S::kWidth / 2];
  uint32_t weights[S::kColumns / 16][4];

  FASTLM_DEVICE void take_turn() const { ptx::barrier_sync(1 + group, 256); }
  FASTLM_DEVICE void pass_turn() const { ptx::barrier_arrive(1 + (group + 1) % S::kGroups, 256); }
  FASTLM_DEVICE void store(const ForwardRows& at, const float (&values)[S::kWidth / 2], const ForwardSoftmax& of) const {
    const int warp = threadIdx.x / 32 % 4;
    store_rows<T, S>(p, at, values, of, data + S::kOut + (4 * group + warp) * 16 * S::kWidth * 2, to, lse);
  }

  FASTLM_DEVICE void skip(int tiles) {
#pragma unroll 1
    for (int t = 0; t < tiles; t++) {
      shared.k.wait(k_ring);
      take_turn();
      pass_turn();
      shared.k.give_back(k_ring);
      shared.v.wait(v_ring);
      shared.v.give_back(v_ring);
    }
  }

  FASTLM_DEVICE void wait_for_values() const {
    shared.v.wait(pending_v);
    if (pending_clear < S::kColumns) {
      clear_values<S>(data + (shared.v.tile(pending_v) - shared.q.data), pending_clear, 1 + S::kGroups + group);
    }
  }

  // The outputs of a tile, from `column` on, are pending; from column_end on its values are of another sequence.
  FASTLM_DEVICE void set_pending(int column, int column_end) {
    pending = true;
    pending_v = v_ring;
    v_ring.advance();
    if (p.cu_seqlens != nullptr) pending_clear = min(S::kColumns, column_end - column);
  }

  FASTLM_DEVICE void reset() {
#pragma unroll
    for (int i = 0; i < S::kWidth / 2; i++) out[i] = 0.0f;
  }

  // Ends what is pending, and stores it.
  FASTLM_DEVICE void flush() {
    if (!pending) return;
    wait_for_values();
    ptx::wgmma_fence();
    start_outputs<T, S>(out, weights, shared.v.tile(pending_v));
    ptx::wgmma_wait<0>();
    ptx::arrived(out);
    shared.v.give_back(pending_v);
    store(rows, out, softmax);
    pending = false;
  }

  FASTLM_DEVICE void run(const Grid& grid) {
    const float factor = p.scale * kLog2E;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    if (group == S::kGroups - 1) pass_turn();  // the first turn is group 0's
    ForwardWorks works(grid);
#pragma unroll 1
    for (int i = works.next(); i >= 0; i = works.next()) {
      const auto work = forward_work<S::kRows, S::kColumns>(p, grid, i);
      if (work.row0 + S::kRows <= work.span.row) continue;  // the sequence is shorter than the longest
      const int row = work.row0 + 64 * group;
      const ForwardRows here{p.cu_seqlens == nullptr ? work.sequence : 0, work.head, row, work.span.row};
      const ForwardTiles seen = ForwardTiles::seen<S::kColumns>(work, row);
      const bool sees = seen.begin < seen.end;
      if (work.tiles > 0) shared.q.wait(q_ring);
      if (!sees || seen.begin >= S::kStages) flush();
      skip(seen.begin);
      if (sees) {
        const uint32_t q = shared.q.tile(q_ring) + group * 64 * kPanelRow;
        const int row_of_thread = row + 16 * warp + lane / 4;
        float s[S::kColumns / 2], decay[2];
        int t = seen.begin, column = work.first + (work.tiles - 1 - t) * S::kColumns;
        if (!pending) {
          shared.k.wait(k_ring);
          take_turn();
          ptx::wgmma_fence();
          start_scores<T, S>(s, q, shared.k.tile(k_ring));
          pass_turn();
          ptx::wgmma_wait<0>();
          ptx::arrived(s);
          shared.k.give_back(k_ring);
          hide(work.span, row, column, row_of_thread, column + 2 * (lane % 4), s);
          softmax = {};
          softmax.add(s, factor, decay);
          pack_weights<T>(s, weights);
          reset();
          rows = here;
          set_pending(column, work.span.column_end);
          t++;
          column -= S::kColumns;
        }
#pragma unroll 1
        for (; t < seen.end; t++, column -= S::kColumns) {
          shared.k.wait(k_ring);
          wait_for_values();
          take_turn();
          ptx::wgmma_fence();
          start_scores<T, S>(s, q, shared.k.tile(k_ring));
          start_outputs<T, S>(out, weights, shared.v.tile(pending_v));
          pass_turn();
          ptx::wgmma_wait<1>();
          ptx::arrived(s);
          shared.k.give_back(k_ring);
          hide(work.span, row, column, row_of_thread, column + 2 * (lane % 4), s);
          const bool fresh = t == seen.begin;  // the outputs are another work's
          const ForwardSoftmax before = softmax;
          if (fresh) softmax = {};
          softmax.add(s, factor, decay);
          ptx::complete(softmax.sum[0] + softmax.sum[1]);
          ptx::wgmma_wait<0>();
          ptx::arrived(out);
          ptx::arrived(s);
          shared.v.give_back(pending_v);
          pack_weights<T>(s, weights);
          if (fresh) {
            store(rows, out, before);
            reset();
            rows = here;
          } else {
            rescale(out, decay);
          }
          set_pending(column, work.span.column_end);
        }
      }
      if (work.tiles > 0) shared.q.give_back(q_ring);
      if (seen.end < work.tiles) flush();
      skip(work.tiles - seen.end);
      if (!sees) {
        const float nothing[S::kWidth / 2] = {};
        store(here, nothing, ForwardSoftmax());
      }
    }
    flush();
    if (group == 0) take_turn();  // the last one that was passed
  }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(Shape<T, kWidth>::kThreads, 1)
    attention_forward_wgmma(const __grid_constant__ AttentionInputs p, const Grid grid, const __grid_constant__ TensorMap q_map,
                            const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, T* __restrict__ out,
                            float* __restrict__ lse) {
#ifdef FASTLM_SM90A
  using S = Shape<T, kWidth>;
  FASTLM_SHARED_DYNAMIC(data, 1024);
  FASTLM_SHARED(uint64_t, barriers, S::kBarriers);
  const Shared<S> shared(ptx::shared_address(data), ptx::shared_address(barriers));
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&q_map, &k_map, &v_map}) ptx::prefetch_tensor_map(map);
    shared.init();
  }
  __syncthreads();
  // The same in a warp, as the compiler now knows.
  const int group = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 0) {
    ptx::setmaxnreg_decrease<S::kLoadRegisters>();
    if (threadIdx.x < 32 && ptx::elect_one()) load_all<S>(p, grid, shared, &q_map, &k_map, &v_map);
  } else {
    ptx::setmaxnreg_increase<S::kRegisters>();
    Compute<T, S>{p, shared, group - 1, data, out, lse}.run(grid);
  }
#endif
}

// (width, rows, heads, batch), a panel of box_rows rows at a time.
template <class T>
TensorMap map_of(const void* data, const Strides& s, int64_t batch, int64_t rows, int64_t heads, int64_t width, int box_rows) {
  auto stride = [&](int64_t size, int64_t elements) {  // of one element nobody takes a step, but TMA checks the stride
    return static_cast<uint64_t>(size == 1 ? width : elements) * sizeof(T);
  };
  TensorMapSpec spec{data, WgmmaElement<T>::kMap, 4, {}, {}, {}, Swizzle::b128};
  const int64_t sizes[] = {width, rows, heads, batch}, boxes[] = {kPanel, box_rows, 1, 1};
  for (int d = 0; d < 4; d++) spec.size[d] = static_cast<uint64_t>(sizes[d]), spec.box[d] = static_cast<uint32_t>(boxes[d]);
  spec.stride_bytes[1] = stride(rows, s.row);
  spec.stride_bytes[2] = stride(heads, s.head);
  spec.stride_bytes[3] = stride(batch, s.batch);
  return make_tensor_map(spec);
}

template <class T, int kWidth>
void launch_forward(const AttentionInputs& p, void* out, float* lse, cudaStream_t stream) {
  using S = Shape<T, kWidth>;
  static_assert(S::kBytes + 1024 <= 227 * 1024 && 8 * S::kBarriers <= 1024, "more shared memory than a block can have");
  const Grid grid = grid_of(p, p.cu_seqlens == nullptr ? p.rows : p.max_seqlen, S::kRows, p.heads);
  const int works = grid.blocks * grid.heads * grid.sequences;
  if (works == 0) return;
  const dim3 blocks(static_cast<unsigned>(std::min(works, multiprocessors())));
  launch("attention_forward", {blocks, dim3(S::kThreads), S::kBytes, stream}, attention_forward_wgmma<T, kWidth>, p, grid,
         map_of<T>(p.q, p.q_strides, p.batch, p.rows, p.heads, p.width, S::kRows),
         map_of<T>(p.k, p.k_strides, p.batch, p.columns, p.kv_heads, p.width, S::kColumns),
         map_of<T>(p.v, p.v_strides, p.batch, p.columns, p.kv_heads, p.width, S::kColumns), static_cast<T*>(out), lse);
}

}  // namespace

bool attention_forward_sm90_takes(const AttentionInputs& p) {
  auto readable = [&](const Strides& s, int64_t rows, int64_t heads) {  // by TMA: not rows that lie over each other
    auto fine = [](int64_t size, int64_t stride) { return size == 1 || (stride > 0 && stride < int64_t{1} << 38); };
    return fine(p.batch, s.batch) && fine(rows, s.row) && fine(heads, s.head);
  };
  return p.wgmma && !has_general_kernel(p) && p.width <= 128 && p.columns > 0 && readable(p.q_strides, p.rows, p.heads) &&
         readable(p.k_strides, p.columns, p.kv_heads) && readable(p.v_strides, p.columns, p.kv_heads);
}

void attention_forward_sm90(const AttentionInputs& p, void* out, float* lse, void* stream) {
  auto with_type = [&](auto type) {
    using T = decltype(type);
    p.width <= 64 ? launch_forward<T, 64>(p, out, lse, static_cast<cudaStream_t>(stream))
                  : launch_forward<T, 128>(p, out, lse, static_cast<cudaStream_t>(stream));
  };
  p.type == DType::f16 ? with_type(__half()) : with_type(__nv_bfloat16());
}

}  // namespace cuda
}  // namespace fastlm
