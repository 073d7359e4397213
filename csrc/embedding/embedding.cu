// embedding.h on CUDA. The backward pass has no atomics: the sorted places are cut into tiles of kTile, whatever the ids.
// A block sums the segments of its tile. Those that lie in one tile are done; of one that goes on into further tiles each
// tile leaves its part in the workspace, and a second kernel adds the parts up in their order.
#include "embedding/embedding.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/cuda/launch.h"
#include "common/cuda/vector.h"

namespace fastlm {
namespace cuda {
namespace {

constexpr int kTile = 32;      // places a block sums: few enough to fill the device at a batch of some thousand tokens
constexpr int kThreads = 128;  // with a vector each: 1024 columns, GPT-2's width in one go

template <class T>
__global__ void __launch_bounds__(kThreads) gather(const EmbeddingForward p, const bool vectors) {
  const int64_t i = blockIdx.x;
  const int64_t id = p.wide_ids ? static_cast<const int64_t*>(p.ids)[i] : static_cast<const int32_t*>(p.ids)[i];
  T* to = static_cast<T*>(p.y) + i * p.cols;
  if (id < 0 || id >= p.vocabulary) {
    for (int64_t c = threadIdx.x; c < p.cols; c += kThreads) to[c] = from_float<T>(__int_as_float(0x7fc00000));  // NaN
    return;
  }
  const T* from = static_cast<const T*>(p.weight) + id * p.weight_stride;
  if (vectors) {
#pragma unroll 1
    for (int64_t c = threadIdx.x * int64_t{kVector}; c < p.cols; c += kThreads * kVector) {
      store_vector(to + c, load_vector(from + c));
    }
  } else {
    for (int64_t c = threadIdx.x; c < p.cols; c += kThreads) to[c] = from[c];
  }
}

// Where a tile leaves its parts: of the segment that came in from the tile before, and of the one that goes on.
FASTLM_DEVICE float* part_of(const EmbeddingBackward& p, int64_t tile, bool goes_on) {
  return p.workspace + (2 * tile + (goes_on ? 1 : 0)) * p.cols;
}

FASTLM_DEVICE bool has_gradient(const EmbeddingBackward& p, int64_t key) {
  return key >= 0 && key < p.vocabulary && key != p.padding;
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_tiles(const EmbeddingBackward p, const bool vectors) {
  FASTLM_SHARED(int64_t, keys, kTile + 2);  // with the neighbours on both sides
  FASTLM_SHARED(int64_t, places, kTile);
  const int64_t tile = blockIdx.x, first = tile * kTile;
  const int count = static_cast<int>(p.count - first < kTile ? p.count - first : kTile);
  for (int i = threadIdx.x; i < count + 2; i += kThreads) {
    const int64_t at = first + i - 1;
    keys[i] = at >= 0 && at < p.count ? p.keys[at] : -1;
    if (i > 0 && i <= count) places[i - 1] = p.order[at];
  }
  __syncthreads();
  const int step = vectors ? kVector : 1;
  for (int64_t c = (blockIdx.y * int64_t{kThreads} + threadIdx.x) * step; c < p.cols; c += gridDim.y * int64_t{kThreads} * step) {
    float sum[kVector] = {};
    for (int i = 0; i < count; i++) {
      const int64_t key = keys[i + 1];
      float row[kVector];
      const T* dy = static_cast<const T*>(p.dy) + places[i] * p.dy_stride + c;
      if (vectors) {
        const Vector<T> v = load_vector(dy);
#pragma unroll
        for (int j = 0; j < kVector; j++) row[j] = to_float(v.v[j]);
      } else {
        row[0] = to_float(*dy);
      }
      const bool begins = i == 0 || keys[i] != key;
#pragma unroll
      for (int j = 0; j < kVector; j++) {
        if (j < step) sum[j] = begins ? row[j] : sum[j] + row[j];
      }
      if (i + 1 < count && keys[i + 2] == key) continue;
      // The segment ends here, or the tile does.
      const bool came_in = keys[0] == key && keys[1] == key, goes_on = i + 1 == count && keys[i + 2] == key;
      if (!has_gradient(p, key)) continue;
      if (came_in || goes_on) {
        float* part = part_of(p, tile, !came_in);
#pragma unroll
        for (int j = 0; j < kVector; j++) {
          if (j < step) part[c + j] = sum[j];
        }
      } else if (vectors) {
        store_vector(static_cast<T*>(p.dweight) + key * p.cols + c, vector_from_float<T>(sum));
      } else {
        static_cast<T*>(p.dweight)[key * p.cols + c] = from_float<T>(sum[0]);
      }
    }
  }
}

// A block for each tile: where a segment begins in it and goes on, its parts.
template <class T>
__global__ void __launch_bounds__(kThreads) add_parts(const EmbeddingBackward p) {
  const int64_t tile = blockIdx.x, last = tile * kTile + kTile - 1;  // of the tile; the last tile of all goes nowhere
  if (last + 1 >= p.count) return;
  const int64_t key = p.keys[last];
  const bool came_in = tile > 0 && p.keys[tile * kTile - 1] == key && p.keys[tile * kTile] == key;
  if (p.keys[last + 1] != key || came_in || !has_gradient(p, key)) return;
  for (int64_t c = blockIdx.y * int64_t{kThreads} + threadIdx.x; c < p.cols; c += gridDim.y * int64_t{kThreads}) {
    float sum = part_of(p, tile, true)[c];
    for (int64_t next = tile + 1; next * kTile < p.count && p.keys[next * kTile] == key; next++) {
      sum += part_of(p, next, false)[c];
    }
    static_cast<T*>(p.dweight)[key * p.cols + c] = from_float<T>(sum);
  }
}

unsigned blocks(int64_t n) {
  if (n > 2147483647) {
    throw std::invalid_argument("embedding: " + std::to_string(n) + " blocks wanted, but a CUDA grid holds at most 2147483647");
  }
  return static_cast<unsigned>(n);
}

template <class T>
void forward(const EmbeddingForward& p, cudaStream_t stream) {
  const bool vectors = p.cols % kVector == 0 && vector_aligned(p.weight, p.weight_stride, sizeof(T)) &&
                       vector_aligned(p.y, p.cols, sizeof(T));
  launch("embedding_forward", {dim3(blocks(p.count)), dim3(kThreads), 0, stream}, gather<T>, p, vectors);
}

template <class T>
void backward(const EmbeddingBackward& p, cudaStream_t stream) {
  const bool vectors = p.cols % kVector == 0 && vector_aligned(p.dy, p.dy_stride, sizeof(T)) &&
                       vector_aligned(p.dweight, p.cols, sizeof(T));
  const unsigned tiles = blocks(ceil_div(p.count, kTile));
  const auto slices = [&](int64_t step) {
    return static_cast<unsigned>(std::min<int64_t>(64, ceil_div(p.cols, kThreads * step)));
  };
  launch("embedding_backward", {dim3(tiles, slices(vectors ? kVector : 1)), dim3(kThreads), 0, stream}, sum_tiles<T>, p, vectors);
  if (tiles > 1) launch("embedding_backward_parts", {dim3(tiles, slices(1)), dim3(kThreads), 0, stream}, add_parts<T>, p);
}

}  // namespace
}  // namespace cuda

void embedding_forward_cuda(const EmbeddingForward& p, void* stream) {
  if (p.count == 0 || p.cols == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.type) {
    case DType::f32: return cuda::forward<float>(p, s);
    case DType::f16: return cuda::forward<__half>(p, s);
    case DType::bf16: return cuda::forward<__nv_bfloat16>(p, s);
  }
}

int64_t embedding_backward_workspace_cuda(int64_t count, int64_t cols) {
  return 2 * cuda::ceil_div(count, cuda::kTile) * cols;
}

void embedding_backward_cuda(const EmbeddingBackward& p, void* stream) {
  if (p.count == 0 || p.cols == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.type) {
    case DType::f32: return cuda::backward<float>(p, s);
    case DType::f16: return cuda::backward<__half>(p, s);
    case DType::bf16: return cuda::backward<__nv_bfloat16>(p, s);
  }
}

}  // namespace fastlm
