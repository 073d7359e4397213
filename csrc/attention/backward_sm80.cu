// attention.h on CUDA, backward: what all of its kernels need first, and which of them run (sm80/backward.h).
#include "attention/sm80/backward.h"

namespace fastlm {
namespace cuda {
namespace {

constexpr int kLanes = 8;  // of a row: 8 vectors are 64 elements
constexpr int kRows = 4;   // of a group of lanes, read together
constexpr int kThreads = 128;

// Of (B, T, H). Divisions of 64 bits would take longer than all that is loaded.
struct Index {
  int64_t batch, row, head;
  template <class Int>
  FASTLM_DEVICE Index(Int i, int64_t heads, int64_t rows) {
    const Int h = static_cast<Int>(heads), r = static_cast<Int>(rows);
    head = i % h, row = i / h % r, batch = i / h / r;
  }
};

// lse and delta of sm80/backward.h, a head's `stride` after the one before it; the rows between weigh nothing. lse_factor:
// log2e where the kernels that follow are the plain ones. Sets `zeros` words from `zero` on to 0.
template <class T>
__global__ void __launch_bounds__(kThreads)
    attention_delta(const __grid_constant__ AttentionInputs p, const __grid_constant__ AttentionGradients g, float lse_factor,
                    int64_t stride, float* __restrict__ lse, float* __restrict__ delta, uint32_t* __restrict__ zero,
                    int64_t zeros) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, count = p.batch * p.rows * p.heads;
  for (int64_t i = thread; i < zeros; i += static_cast<int64_t>(gridDim.x) * kThreads) zero[i] = 0;
  const int lane = threadIdx.x % kLanes;
  const int64_t first = thread / kLanes * kRows, rows = p.rows > 0 ? p.rows : 1;  // without any the grid is there for the zeros
  auto place_of = [&](int64_t index) {  // index: of (B, T, H)
    return count < int64_t{1} << 31 ? Index(static_cast<uint32_t>(index), p.heads, rows) : Index(index, p.heads, rows);
  };
  const T *out[kRows], *dout[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const int64_t index = min(first + r, count - 1);  // what is too much is computed, and not written
    const Index place = place_of(index);
    out[r] = static_cast<const T*>(g.out) + index * p.width;
    dout[r] = static_cast<const T*>(g.dout) + at(g.dout_strides, place.batch, place.head) + place.row * g.dout_strides.row;
  }
  float sum[kRows] = {};
  for (int64_t c = lane * kVector; c < p.width && count > 0; c += kLanes * kVector) {
    Vector<T> a[kRows], b[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) a[r] = load_vector(out[r] + c), b[r] = load_vector(dout[r] + c);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
#pragma unroll
      for (int i = 0; i < kVector; i++) sum[r] += to_float(a[r].v[i]) * to_float(b[r].v[i]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) sum[r] += __shfl_xor_sync(kFullWarp, sum[r], offset);
  }
  if (lane >= kRows || first + lane >= count) return;
  float own = sum[0];
#pragma unroll
  for (int r = 1; r < kRows; r++) own = lane == r ? sum[r] : own;
  const Index place = place_of(first + lane);
  const int64_t plane = place.batch * p.heads + place.head, from = plane * p.rows + place.row, to = plane * stride + place.row;
  lse[to] = g.lse[from] == -kInfinity ? kInfinity : g.lse[from] * lse_factor;
  delta[to] = own - (g.dlse == nullptr ? 0.0f : g.dlse[from]);
  if (place.row != p.rows - 1) return;
  for (int64_t i = to + 1; i < (plane + 1) * stride; i++) {
    lse[i] = kInfinity;
    delta[i] = 0.0f;
  }
}

}  // namespace
}  // namespace cuda

void attention_backward_cuda(const AttentionInputs& p, const AttentionGradients& g, float* workspace, void* stream) {
  using namespace cuda;
  check_inputs(p);
  check_rows("dout", g.dout, g.dout_strides, p.batch, p.rows, p.heads, p.type);
  check_rows("out", g.out, {0, 0, 0}, 1, 1, 1, p.type);
  check_rows("dq", g.dq, {0, g.dq_row, 0}, 1, p.batch * p.rows, 1, p.type);
  check_rows("dk", g.dk, {0, g.dkv_row, 0}, 1, p.batch * p.columns, 1, p.type);
  check_rows("dv", g.dv, {0, g.dkv_row, 0}, 1, p.batch * p.columns, 1, p.type);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const bool one_pass = attention_backward_has_one_pass(p);
  const AttentionBackwardSizes sizes = attention_backward_sizes(p);
  float *const lse = workspace, *const delta = lse + sizes.rows, *const dq = delta + sizes.rows;
  auto* const counters = reinterpret_cast<uint32_t*>(dq + sizes.dq);
  const BackwardInputs inputs{p, g.dout, g.dout_strides, lse, delta};
  const bool sm90 = attention_backward_takes_sm90(inputs);
  const int64_t stride = sm90 ? (p.rows + 127) / 128 * 128 : p.rows;
  constexpr int64_t kBlockRows = kThreads / kLanes * kRows;
  const int64_t blocks = (p.batch * p.heads * p.rows + kBlockRows - 1) / kBlockRows;
  if (blocks > 2147483647) {
    throw std::invalid_argument("attention: " + std::to_string(blocks) + " blocks wanted, but a CUDA grid holds at most 2147483647");
  }
  if (blocks > 0 || one_pass) {
    const auto run_delta = [&](auto type) {
      launch("attention_delta", {dim3(static_cast<unsigned>(blocks > 0 ? blocks : 1)), dim3(kThreads), 0, cuda_stream},
             attention_delta<decltype(type)>, p, g, has_general_kernel(p) ? 1.0f : kLog2E, stride, lse, delta, counters, sizes.counters);
    };
    if (p.type == DType::f32) run_delta(float());
    else if (p.type == DType::f16) run_delta(__half());
    else run_delta(__nv_bfloat16());
  }
  const OnePassWorkspace one{dq, counters, counters + sizes.counters - 1};
  if (sm90) {
    attention_backward_sm90(inputs, one, g, cuda_stream);
  } else if (one_pass) {
    attention_backward_one_pass(inputs, one, g, cuda_stream);
  } else {
    attention_backward_rows(inputs, g, cuda_stream);
    attention_backward_columns(inputs, g, cuda_stream);
  }
}

}  // namespace fastlm
