// attention.h on CUDA, backward: what all of its kernels need first, and which of them run (sm80/backward.h).
#include "attention/sm80/backward.h"

namespace fastlm {
namespace cuda {
namespace {

constexpr int kLanes = 8;  // of a row: 8 vectors are 64 elements
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
__global__ void __launch_bounds__(kThreads)
    attention_delta(const __grid_constant__ AttentionInputs p, const __grid_constant__ AttentionGradients g, float lse_factor,
                    int64_t stride, float* __restrict__ lse, float* __restrict__ delta, uint32_t* __restrict__ zero,
                    int64_t zeros) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, index = thread / kLanes;  // of (B, T, H)
  for (int64_t i = thread; i < zeros; i += static_cast<int64_t>(gridDim.x) * kThreads) zero[i] = 0;
  const bool there = index < p.batch * p.rows * p.heads;
  const int64_t rows = p.rows > 0 ? p.rows : 1;  // without any the grid is there for the zeros
  const Index place = p.batch * p.rows * p.heads < int64_t{1} << 31 ? Index(static_cast<uint32_t>(index), p.heads, rows)
                                                                    : Index(index, p.heads, rows);
  const int64_t head = place.head, row = place.row, batch = place.batch;
  float sum = 0.0f;
  if (there) {
    const int64_t dout = at(g.dout_strides, batch, head) + row * g.dout_strides.row;
    for (int64_t c = threadIdx.x % kLanes * kVector; c < p.width; c += kLanes * kVector) {
      float a[kVector], b[kVector];
      load_vector_as_float(g.out, index * p.width + c, p.type, true, kVector, a);
      load_vector_as_float(g.dout, dout + c, p.type, true, kVector, b);
#pragma unroll
      for (int i = 0; i < kVector; i++) sum += a[i] * b[i];
    }
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
  if (there && threadIdx.x % kLanes == 0) {
    const int64_t plane = batch * p.heads + head, from = plane * p.rows + row, to = plane * stride + row;
    lse[to] = g.lse[from] == -kInfinity ? kInfinity : g.lse[from] * lse_factor;
    delta[to] = sum - (g.dlse == nullptr ? 0.0f : g.dlse[from]);
  }
  if (there && row == p.rows - 1) {
    float *const lse_end = lse + (batch * p.heads + head) * stride, *const delta_end = delta + (batch * p.heads + head) * stride;
    for (int64_t i = p.rows + threadIdx.x % kLanes; i < stride; i += kLanes) {
      lse_end[i] = kInfinity;
      delta_end[i] = 0.0f;
    }
  }
}

}  // namespace
}  // namespace cuda

void attention_backward_cuda(const AttentionInputs& p, const AttentionGradients& g, float* workspace, void* stream) {
  using namespace cuda;
  check_inputs(p);
  check_rows("dout", g.dout, g.dout_strides, p.batch, p.rows, p.heads, p.type);
  check_rows("out", g.out, {0, 0, 0}, 1, 1, 1, p.type);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const bool one_pass = attention_backward_has_one_pass(p);
  const AttentionBackwardSizes sizes = attention_backward_sizes(p);
  float *const lse = workspace, *const delta = lse + sizes.rows, *const dq = delta + sizes.rows;
  auto* const counters = reinterpret_cast<uint32_t*>(dq + sizes.dq);
  const BackwardInputs inputs{p, g.dout, g.dout_strides, lse, delta};
  const bool sm90 = attention_backward_takes_sm90(inputs);
  const int64_t stride = sm90 ? (p.rows + 127) / 128 * 128 : p.rows;
  const int64_t blocks = (p.batch * p.heads * p.rows * kLanes + kThreads - 1) / kThreads;
  if (blocks > 2147483647) {
    throw std::invalid_argument("attention: " + std::to_string(blocks) + " blocks wanted, but a CUDA grid holds at most 2147483647");
  }
  if (blocks > 0 || one_pass) {
    launch("attention_delta", {dim3(static_cast<unsigned>(blocks > 0 ? blocks : 1)), dim3(kThreads), 0, cuda_stream}, attention_delta, p,
           g, has_general_kernel(p) ? 1.0f : kLog2E, stride, lse, delta, counters, sizes.counters);
  }
  const OnePassWorkspace one{dq, counters, counters + sizes.counters - 1};
  if (sm90) {
    attention_backward_sm90(inputs, one, g.dq, g.dk, g.dv, cuda_stream);
  } else if (one_pass) {
    attention_backward_one_pass(inputs, one, g.dq, g.dk, g.dv, cuda_stream);
  } else {
    attention_backward_rows(inputs, g.dq, cuda_stream);
    attention_backward_columns(inputs, g.dk, g.dv, cuda_stream);
  }
}

}  // namespace fastlm
