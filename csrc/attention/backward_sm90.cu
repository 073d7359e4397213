// attention.h on Hopper (sm_90a), backward: dq, dk and dv in one pass as in backward_one_pass_sm80.cu, dq in a fixed order
// as there, with TMA and wgmma. As many blocks of threads run as there are multiprocessors; each draws one ticket after the
// other. So a block waits for turns of smaller tickets only, and the smallest that is not done waits for nobody.
#include "attention/sm90_backward/consume.h"
#include "attention/sm90_backward/load.h"
#include "attention/sm90_backward/sum.h"

namespace fastlm {
namespace cuda {
namespace {

using namespace sm90_backward;

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_sm90(const __grid_constant__ Task task, float scale, const float* __restrict__ lse,
                            const float* __restrict__ delta, const OnePassWorkspace w, const __grid_constant__ Maps maps) {
#ifdef FASTLM_SM90A
  using S = Shape<T, kWidth>;
  FASTLM_SHARED_DYNAMIC(shared, 1024);
  FASTLM_SHARED(uint64_t, barriers, S::kBarriers);
  FASTLM_SHARED(int, tickets, S::kKeyStages);
  const S s{ptx::shared_address(shared), ptx::shared_address(barriers)};
  // By a shuffle, so that ptxas sees that all lanes have the same: descriptors are then computed once for the warp.
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 32, 0), group = warp / 4;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kKeyStages; i++) {
      ptx::mbarrier_init(s.keys_full(i), 1);
      ptx::mbarrier_init(s.keys_empty(i), 2 + kSums);  // the threads that have stored dk and dv, and those that add to dq
    }
    for (int i = 0; i < kStages; i++) {
      ptx::mbarrier_init(s.q_full(i), 1);
      ptx::mbarrier_init(s.dout_full(i), 1);
      ptx::mbarrier_init(s.empty(i), 8);  // warps that multiply
    }
    ptx::mbarrier_init(s.ds_full(), 8);
    ptx::mbarrier_init(s.ds_empty(), 8);
    for (int i = 0; i < kSums; i++) {
      ptx::mbarrier_init(s.sum_full(i), 8);
      ptx::mbarrier_init(s.sum_empty(i), 1);
    }
    ptx::mbarrier_fence_init();
  }
  __syncthreads();
  if (group == 0) {
    ptx::setmaxnreg_decrease<24>();
    if (warp == 0 && ptx::elect_one()) load(s, task, lse, delta, w.ticket, maps, tickets);
    if (warp >= 1 && warp <= kSums && ptx::elect_one()) add_sums(s, task, w, tickets, warp - 1);
    __syncwarp();
  } else {
    ptx::setmaxnreg_increase<240>();
    consume(s, shared, task, scale, maps, tickets, group - 1);
  }
#endif
}

constexpr int kDqThreads = 256;

// dq: from sums to rows of T, a block of threads for a warpgroup's half of each. Queries that see nothing have no sum. A thread
// takes 8 columns of the rows g and g + 8 of one of the four warps.
template <class T, int kWidth>
__global__ void __launch_bounds__(kDqThreads)
    attention_dq_sm90(const __grid_constant__ AttentionInputs p, const OnePassWorkspace w, T* __restrict__ dq, int64_t dq_row) {
  using S = Shape<T, kWidth>;
  const unsigned blocks = static_cast<unsigned>((p.rows + S::kQueries - 1) / S::kQueries), heads = static_cast<unsigned>(p.heads);
  const unsigned part = blockIdx.x % 2, number = blockIdx.x / 2, head = number % heads;
  const int64_t block = number / heads % blocks, batch = number / heads / blocks;
  const int n = threadIdx.x % 8, g = threadIdx.x / 8 % 8, warp = threadIdx.x / 64;
  const int64_t row0 = block * S::kQueries + (S::kHalves == 1 ? part * 64 : 0) + 16 * warp + g;
  const int column = (S::kHalves == 1 ? 0 : static_cast<int>(part) * kColumns) + 8 * n;
  float v[2][8] = {};
  if (w.turns[number] > 0) {
    const auto* from = reinterpret_cast<const float4*>(w.dq + int64_t{blockIdx.x} * (kSum / 2)) + 128 * n + 32 * warp + 4 * g;
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const float4 x = from[t];
      v[0][2 * t] = x.x, v[0][2 * t + 1] = x.y, v[1][2 * t] = x.z, v[1][2 * t + 1] = x.w;
    }
  }
  if (column >= p.width) return;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t row = row0 + 8 * half;
    if (row >= p.rows) continue;
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) packed[i] = pack(v[half][2 * i] * p.scale, v[half][2 * i + 1] * p.scale, T());
    *reinterpret_cast<uint4*>(dq + (batch * p.rows + row) * dq_row + head * p.width + column) =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

// TMA's view of a tensor (batch, rows, heads, width).
template <class T>
TensorMap map_of(const void* data, const Strides& s, int64_t batch, int64_t rows, int64_t heads, int64_t width, int box_rows) {
  auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  auto stride = [&](int64_t n, int64_t elements) { return size((n > 1 ? elements : width) * static_cast<int64_t>(sizeof(T))); };
  return make_tensor_map({data, WgmmaElement<T>::kMap, 4, {size(width), size(heads), size(rows), size(batch)},
                          {0, stride(heads, s.head), stride(rows, s.row), stride(batch, s.batch)},
                          {kColumns, 1, static_cast<uint32_t>(box_rows), 1}, Swizzle::b128});
}

template <class T, int kWidth>
void run(const BackwardInputs& inputs, const OnePassWorkspace& w, const AttentionGradients& g, cudaStream_t stream) {
  using S = Shape<T, kWidth>;
  const AttentionInputs& p = inputs.p;
  auto queries = [&](const void* data, const Strides& s) {
    return map_of<T>(data, s, p.batch, p.rows, p.heads, p.width, S::kQueries);
  };
  auto keys = [&](const void* data, const Strides& s, int box_rows) {
    return map_of<T>(data, s, p.batch, p.columns, p.kv_heads, p.width, box_rows);
  };
  const Strides dkv_strides{p.columns * g.dkv_row, g.dkv_row, p.width};
  const Maps maps{queries(p.q, p.q_strides),          keys(p.k, p.k_strides, kKeys),     keys(p.v, p.v_strides, kKeys),
                  queries(inputs.dout, inputs.dout_strides), keys(g.dk, dkv_strides, kGroupKeys), keys(g.dv, dkv_strides, kGroupKeys)};
  const Grid grid = grid_of(p, p.columns, kKeys, p.kv_heads);
  const int works = static_cast<int>(blocks_of(grid).x), sms = multiprocessors();
  auto narrow = [](int64_t n) { return static_cast<int>(n); };
  auto side = [&](int64_t n) { return n < 0 || n > kUnbounded ? kUnbounded : narrow(n); };
  const int rows = narrow(p.rows), columns = narrow(p.columns);
  Task task{};
  task.span = {0, rows, 0, columns, columns - rows, side(p.window_left), side(p.window_right)};
  task.heads = narrow(p.heads), task.kv_heads = narrow(p.kv_heads), task.shared_by = task.heads / task.kv_heads;
  task.key_blocks = grid.blocks, task.query_blocks = (rows + S::kQueries - 1) / S::kQueries;
  task.pairs = grid.heads * grid.sequences;
  // The next block of keys of a head is to begin kApart / 2 or more steps later, at the same queries: then this one's sums of
  // them are in memory. With all blocks of threads at work one begins every steps / sms, or twice as often under a causal
  // mask. Twice as far apart was as fast on an H200 at 8192 rows, and slower at 1024.
  constexpr int kApart = 2 * kKeys / S::kQueries + 2;
  const int64_t seen = std::min<int64_t>(rows, int64_t{kKeys} + task.span.left + task.span.right);
  const int64_t steps = (seen + S::kQueries - 1) / S::kQueries * task.shared_by;
  task.group = narrow(std::min<int64_t>(task.pairs, kApart * sms / steps + 1));
  task.padded_rows = (rows + 127) / 128 * 128;
  task.factor = p.scale * kLog2E;
  launch("attention_backward", {dim3(static_cast<unsigned>(std::min(works, sms))), dim3(kThreads), S::kBytes, stream},
         attention_backward_sm90<T, kWidth>, task, p.scale, inputs.lse, inputs.delta, w, maps);
  const Grid sums = grid_of(p, p.rows, S::kQueries / 2, p.heads);
  const unsigned blocks = static_cast<unsigned>(2 * task.query_blocks * sums.heads * sums.sequences);
  launch("attention_dq", {dim3(blocks), dim3(kDqThreads), 0, stream}, attention_dq_sm90<T, kWidth>, p, w, static_cast<T*>(g.dq),
         g.dq_row);
}

// Strides of 16-byte multiples, as check_rows has seen; TMA wants none of 0 and none of 2^40 or more.
bool tma_reads(const Strides& s, int64_t batch, int64_t rows, int64_t heads, int64_t size) {
  auto fits = [&](int64_t n, int64_t stride) { return n < 2 || (stride > 0 && stride * size < int64_t{1} << 40); };
  return fits(batch, s.batch) && fits(rows, s.row) && fits(heads, s.head);
}

}  // namespace

bool attention_backward_takes_sm90(const BackwardInputs& inputs) {
  const AttentionInputs& p = inputs.p;
  const int64_t size = size_of(p.type);
  const bool any = p.batch > 0 && p.rows > 0 && p.columns > 0 && p.heads > 0 && p.kv_heads > 0;
  return p.wgmma && attention_backward_has_one_pass(p) && !has_general_kernel(p) && p.cu_seqlens == nullptr && any &&
         tma_reads(p.q_strides, p.batch, p.rows, p.heads, size) &&
         tma_reads(p.k_strides, p.batch, p.columns, p.kv_heads, size) &&
         tma_reads(p.v_strides, p.batch, p.columns, p.kv_heads, size) &&
         tma_reads(inputs.dout_strides, p.batch, p.rows, p.heads, size);
}

void attention_backward_sm90(const BackwardInputs& inputs, const OnePassWorkspace& w, const AttentionGradients& g,
                             cudaStream_t stream) {
  auto with_type = [&](auto type) {
    using T = decltype(type);
    inputs.p.width <= 64 ? run<T, 64>(inputs, w, g, stream) : run<T, 128>(inputs, w, g, stream);
  };
  inputs.p.type == DType::f16 ? with_type(__half()) : with_type(__nv_bfloat16());
}

}  // namespace cuda
}  // namespace fastlm
