// layer_norm and rms_norm, backward. The contract is in layer_norm.h.
//
// The gradients of weight and bias are sums over all rows. A fixed number of blocks walks over the rows, each sums its
// own rows and writes one row of partial sums to the workspace, and a second kernel adds those up in a fixed order: no
// atomics, and the same bits in every run.
#include "common/cuda/launch.h"
#include "common/cuda/reduce.h"
#include "layer_norm/layer_norm_types.h"

namespace fastlm {
namespace cuda {
namespace {

// A thread keeps kVectors * 8 columns: their weight and bias gradients, g and xhat of this row (32 registers a vector),
// and, at one vector a thread, the next row as loaded. The most threads a block may have sets the registers a thread may
// have: 80 at 24 warps, 128 at 16. At two vectors a thread, loading ahead would spill.
template <int kVectors>
constexpr int kMaxWarps = kVectors == 1 ? 24 : 16;
template <int kVectors>
constexpr int64_t kMaxCols = int64_t{32} * kVector * kVectors * kMaxWarps<kVectors>;  // 6144, 8192
constexpr int64_t kMaxRows = int64_t{1} << 30;  // of the kernel that counts rows in 32 bits

// Blocks that a multiprocessor holds, of so many warps; at most kBlocksPerSm, since blocks have five warps and more. Each
// one's partial sums are a row of the workspace.
constexpr int kBlocksPerSm = 4;
template <int kVectors>
int blocks_per_sm(int warps) { return std::max(1, std::min(kBlocksPerSm, kMaxWarps<kVectors> / warps)); }

int64_t partial_rows(int64_t rows, int sms) { return std::min<int64_t>(rows, int64_t{kBlocksPerSm} * sms); }

// workspace: (2, blocks, cols): the partial sums of dweight, then those of dbias.
FASTLM_DEVICE float* partial_row(const LayerNormBackward& p, int which, int64_t block, int64_t blocks) {
  return p.workspace + (which * blocks + block) * p.cols;
}

// dh of one element. c = (mean(g), mean(g * xhat)) over the row, without mean(g) for RMS norm.
FASTLM_DEVICE float gradient(float g, float xhat, float rstd, float2 c) { return rstd * (g - c.x - xhat * c.y); }

// What is read of a row before anything is computed.
template <class X, class H, int kVectors>
struct LoadedRow {
  Vector<X> dy[kVectors];
  Vector<H> h[kVectors];
  float mean, rstd;
};

// `groups.warps` warps hold one row in registers; where registers allow, the next row is loaded before this one is
// reduced, to keep the memory busy. Every input is read once. All rows and pointers are 16-byte aligned.
template <class X, class H, class W, int kVectors>
__global__ void __launch_bounds__(32 * kMaxWarps<kVectors>) backward_in_registers(const LayerNormBackward p, const RowGroups groups) {
  constexpr bool kLoadAhead = kVectors == 1;
  FASTLM_SHARED(float2, scratch, 2 * kMaxWarps<kVectors>);
  FASTLM_SHARED_DYNAMIC(shared, 16);
  const int warp = threadIdx.x / 32 % groups.warps;
  const int group = threadIdx.x / 32 / groups.warps;
  const int first = kVector * (32 * warp + threadIdx.x % 32);
  const int step = kVector * 32 * groups.warps;
  const int cols = static_cast<int>(p.cols);
  const int rows = static_cast<int>(p.rows);
  const int rows_a_turn = gridDim.x * groups.rows;

  auto load_row = [&](int row, LoadedRow<X, H, kVectors>& in) {
    if (row >= rows) return;
    const X* __restrict__ dy = static_cast<const X*>(p.dy) + row * p.dy_stride;
    const H* __restrict__ h = static_cast<const H*>(p.h) + row * p.h_stride;
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      const int c = first + i * step;
      if (c < cols) {
        in.dy[i] = load_vector(dy + c);
        in.h[i] = load_vector(h + c);
      }
    }
    in.mean = p.rms ? 0.0f : p.mean[row];
    in.rstd = p.rstd[row];
  };

  float dweight[kVectors][kVector] = {};
  float dbias[kVectors][kVector] = {};

  // The rows of a block are blockIdx.x * groups.rows + group, then one whole grid further on at every turn.
  int row = blockIdx.x * groups.rows + group;
  LoadedRow<X, H, kVectors> in;
  if (kLoadAhead) load_row(row, in);
  int turn = 0;
  for (; row - group < rows; row += rows_a_turn, turn ^= 1) {
    const bool active = row < rows;
    float g[kVectors][kVector], xhat[kVectors][kVector];
    float2 sum = make_float2(0.0f, 0.0f);
    if (!kLoadAhead) load_row(row, in);
    const float rstd = in.rstd;
    if (active) {
#pragma unroll
      for (int i = 0; i < kVectors; i++) {
        if (first + i * step < cols) {
          const Vector<W> weight = load_vector(static_cast<const W*>(p.weight) + first + i * step);
#pragma unroll
          for (int j = 0; j < kVector; j++) {
            const float dy = to_float(in.dy[i].v[j]);
            g[i][j] = dy * to_float(weight.v[j]);
            xhat[i][j] = (to_float(in.h[i].v[j]) - in.mean) * rstd;
            sum.x += g[i][j];
            sum.y += g[i][j] * xhat[i][j];
            dweight[i][j] += dy * xhat[i][j];
            dbias[i][j] += dy;
          }
        }
      }
    }
    if (kLoadAhead) load_row(row + rows_a_turn, in);
    // Two scratch areas in turn: a warp may be one row ahead of the others, never two.
    sum = group_sum(sum, scratch + turn * kMaxWarps<kVectors> + group * groups.warps, warp, groups.warps);
    if (!active) continue;
    const float2 c = make_float2(p.rms ? 0.0f : sum.x / cols, sum.y / cols);
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      const int col = first + i * step;
      if (col < cols) {
        float dh[kVector];
#pragma unroll
        for (int j = 0; j < kVector; j++) dh[j] = gradient(g[i][j], xhat[i][j], rstd, c);
        if (p.dh_in != nullptr) {
          const Vector<H> dh_in = load_vector(static_cast<const H*>(p.dh_in) + row * p.dh_in_stride + col);
#pragma unroll
          for (int j = 0; j < kVector; j++) dh[j] += to_float(dh_in.v[j]);
        }
        store_vector(static_cast<X*>(p.dx) + row * p.cols + col, vector_from_float<X>(dh));
        if (p.dresidual != nullptr) {
          store_vector(static_cast<H*>(p.dresidual) + row * p.cols + col, vector_from_float<H>(dh));
        }
      }
    }
  }

  // The groups of a block add up one after the other, so that the order of the sum is fixed.
  float* dweight_sum = reinterpret_cast<float*>(shared);
  float* dbias_sum = dweight_sum + cols;
#pragma unroll 1
  for (int g = 0; g < groups.rows; g++) {
    if (g == group) {
#pragma unroll
      for (int i = 0; i < kVectors; i++) {
        if (first + i * step < cols) {
#pragma unroll
          for (int j = 0; j < kVector; j++) {
            const int c = first + i * step + j;
            if (g > 0) {
              dweight[i][j] += dweight_sum[c];
              dbias[i][j] += dbias_sum[c];
            }
            if (g + 1 < groups.rows) {
              dweight_sum[c] = dweight[i][j];
              dbias_sum[c] = dbias[i][j];
            }
          }
          if (g + 1 == groups.rows) {
            store_vector(partial_row(p, 0, blockIdx.x, gridDim.x) + first + i * step, vector_from_float<float>(dweight[i]));
            store_vector(partial_row(p, 1, blockIdx.x, gridDim.x) + first + i * step, vector_from_float<float>(dbias[i]));
          }
        }
      }
    }
    __syncthreads();
  }
}

constexpr int kAnyWarps = 16;

// Any width, alignment and types: dx (and dresidual), one block a row.
__global__ void __launch_bounds__(32 * kAnyWarps) backward_dx_any(const LayerNormBackward p, const bool vectors) {
  FASTLM_SHARED(float2, scratch, kAnyWarps);
  const int64_t row = blockIdx.x;
  const float mean = p.rms ? 0.0f : p.mean[row];
  const float rstd = p.rstd[row];
  auto count = [&](int64_t c) { return static_cast<int>(p.cols - c < kVector ? p.cols - c : kVector); };
  // g = dy * weight and xhat of eight columns; elements past the row have g = 0.
  auto load = [&](int64_t c, float (&g)[kVector], float (&xhat)[kVector]) {
    float w[kVector];
    load_vector_as_float(p.dy, row * p.dy_stride + c, p.x_type, vectors, count(c), g);
    load_vector_as_float(p.h, row * p.h_stride + c, p.h_type, vectors, count(c), xhat);
    load_vector_as_float(p.weight, c, p.w_type, vectors, count(c), w);
#pragma unroll
    for (int j = 0; j < kVector; j++) {
      g[j] = __fmul_rn(g[j], w[j]);  // rounded here as in the sum, so that one column alone has no gradient
      xhat[j] = (xhat[j] - mean) * rstd;
    }
  };
  const int64_t first = kVector * threadIdx.x;
  const int64_t step = kVector * blockDim.x;
  float2 sum = make_float2(0.0f, 0.0f);
  for (int64_t c = first; c < p.cols; c += step) {
    float g[kVector], xhat[kVector];
    load(c, g, xhat);
#pragma unroll
    for (int j = 0; j < kVector; j++) {
      if (j < count(c)) {
        sum.x += g[j];
        sum.y += g[j] * xhat[j];
      }
    }
  }
  sum = group_sum(sum, scratch, threadIdx.x / 32, blockDim.x / 32);
  const float2 means = make_float2(p.rms ? 0.0f : sum.x / p.cols, sum.y / p.cols);
  for (int64_t c = first; c < p.cols; c += step) {
    float dh[kVector], xhat[kVector];
    load(c, dh, xhat);
#pragma unroll
    for (int j = 0; j < kVector; j++) dh[j] = gradient(dh[j], xhat[j], rstd, means);
    if (p.dh_in != nullptr) {
      float in[kVector];
      load_vector_as_float(p.dh_in, row * p.dh_in_stride + c, p.h_type, vectors, count(c), in);
#pragma unroll
      for (int j = 0; j < kVector; j++) dh[j] += in[j];
    }
    store_vector_from_float(p.dx, row * p.cols + c, p.x_type, vectors, count(c), dh);
    if (p.dresidual != nullptr) {
      store_vector_from_float(p.dresidual, row * p.cols + c, p.h_type, vectors, count(c), dh);
    }
  }
}

// Any width, alignment and types: the partial sums of dweight and dbias, one thread a column and gridDim.y chunks of rows.
__global__ void __launch_bounds__(128) backward_partials_any(const LayerNormBackward p) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= p.cols) return;
  float dweight = 0.0f, dbias = 0.0f;
#pragma unroll 4
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const float dy = load_as_float(p.dy, row * p.dy_stride + c, p.x_type);
    const float h = load_as_float(p.h, row * p.h_stride + c, p.h_type);
    dweight += dy * (h - (p.rms ? 0.0f : p.mean[row])) * p.rstd[row];
    dbias += dy;
  }
  partial_row(p, 0, blockIdx.y, gridDim.y)[c] = dweight;
  partial_row(p, 1, blockIdx.y, gridDim.y)[c] = dbias;
}

constexpr int kSumRows = 32;  // a 32 x 32 block: a warp reads 32 neighbouring columns, 32 warps share the partial rows

// blockIdx.y = 0: dweight, 1: dbias.
__global__ void __launch_bounds__(32 * kSumRows) sum_partials(const LayerNormBackward p, const int64_t partials) {
  FASTLM_SHARED(float, sums, 32 * kSumRows);
  const int64_t c = 32 * static_cast<int64_t>(blockIdx.x) + threadIdx.x;
  float sum = 0.0f;
  if (c < p.cols) {
    for (int64_t i = threadIdx.y; i < partials; i += kSumRows) sum += partial_row(p, blockIdx.y, i, partials)[c];
  }
  sums[32 * threadIdx.y + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || c >= p.cols) return;
  for (int i = 1; i < kSumRows; i++) sum += sums[32 * i + threadIdx.x];
  store_from_float(blockIdx.y == 0 ? p.dweight : p.dbias, c, p.w_type, sum);
}

bool all_vector_aligned(const LayerNormBackward& p) {
  const int64_t x = size_of(p.x_type), h = size_of(p.h_type);
  return p.cols % kVector == 0 && vector_aligned(p.dy, p.dy_stride, x) && vector_aligned(p.dh_in, p.dh_in_stride, h) &&
         vector_aligned(p.h, p.h_stride, h) && vector_aligned(p.dx, p.cols, x) && vector_aligned(p.dresidual, p.cols, h) &&
         vector_aligned(p.weight, 0, 1) && vector_aligned(p.workspace, 0, 1);
}

// Returns the number of rows of partial sums.
template <class X, class H, class W, int kVectors>
int64_t launch_in_registers(const LayerNormBackward& p, int sms, cudaStream_t stream) {
  const RowGroups groups = row_groups(p.cols, kVectors, 8);
  const int64_t resident = int64_t{sms} * blocks_per_sm<kVectors>(groups.threads() / 32);
  const int64_t blocks = std::min(ceil_div(p.rows, groups.rows), resident);
  const size_t shared = groups.rows > 1 ? 2 * p.cols * sizeof(float) : 0;
  launch("layer_norm_backward_in_registers", {dim3(blocks), dim3(groups.threads()), shared, stream},
         backward_in_registers<X, H, W, kVectors>, p, groups);
  return blocks;
}

}  // namespace
}  // namespace cuda

int64_t layer_norm_backward_workspace_cuda(int64_t rows, int64_t cols, int sms) {
  return 2 * cuda::partial_rows(rows, sms) * cols;
}

void layer_norm_backward_cuda(const LayerNormBackward& p, int sms, void* stream) {
  using namespace cuda;
  if (p.cols == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const bool vectors = all_vector_aligned(p);
  int64_t partials = partial_rows(p.rows, sms);  // none where there are no rows: the sums are then zero
  bool done = p.rows == 0;
  if (!done && vectors && p.cols <= kMaxCols<2> && p.rows < kMaxRows) {
    done = with_common_types(p.x_type, p.h_type, p.w_type, [&](auto x, auto h, auto w) {
      using X = typename decltype(x)::type;
      using H = typename decltype(h)::type;
      using W = typename decltype(w)::type;
      partials = p.cols <= kMaxCols<1> ? launch_in_registers<X, H, W, 1>(p, sms, cuda_stream)
                                       : launch_in_registers<X, H, W, 2>(p, sms, cuda_stream);
    });
  }
  if (!done) {
    const int threads = std::min(kAnyWarps, row_groups(p.cols, 1, 1).warps) * 32;
    launch("layer_norm_backward_dx_any", {blocks_for(p.rows), dim3(threads), 0, cuda_stream}, backward_dx_any, p, vectors);
    // About eight blocks of 128 threads an SM.
    const int64_t columns = ceil_div(p.cols, 128);
    partials = std::min(partials, std::max<int64_t>(1, 8 * sms / columns));
    launch("layer_norm_backward_partials_any", {dim3(columns, partials), dim3(128), 0, cuda_stream}, backward_partials_any, p);
  }
  launch("layer_norm_backward_sum_partials", {dim3(ceil_div(p.cols, 32), p.dbias != nullptr ? 2 : 1), dim3(32, kSumRows), 0, cuda_stream},
         sum_partials, p, partials);
}

}  // namespace fastlm
