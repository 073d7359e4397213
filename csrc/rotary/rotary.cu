// rotary.h on CUDA: a block turns a token, all of its heads of queries and keys. It moves every element once and
// computes next to nothing, so all that matters is 16-byte accesses and enough of them in flight.
#include "rotary/rotary.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/cuda/launch.h"
#include "common/cuda/vector.h"

namespace fastlm {
namespace cuda {
namespace {

constexpr int kMaxThreads = 256;

FASTLM_DEVICE int64_t position_of(const Rotary& p, int64_t b, int64_t t) {
  if (p.positions == nullptr) return t;
  const int64_t i = b * p.positions_batch + t;
  return p.wide_positions ? static_cast<const int64_t*>(p.positions)[i] : static_cast<const int32_t*>(p.positions)[i];
}

// kWidth pairs a thread: 8 where everything may be read in vectors, else 1. The threads after those of the pairs copy the
// dimensions that are not turned, kWidth at a time.
template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads) turn(const Rotary p) {
  const int64_t b = blockIdx.x / p.rows, t = blockIdx.x % p.rows;
  const int64_t position = position_of(p, b, t);
  const bool known = p.positions == nullptr || (position >= 0 && position < p.table_rows);
  const int64_t table = known ? position * p.pairs + (p.positions == nullptr ? b * p.table_batch : 0) : 0;
  const int pairs = static_cast<int>(p.pairs), turned = 2 * pairs;
  const int pair_units = pairs / kWidth, units = pair_units + (static_cast<int>(p.width) - turned) / kWidth;
  const int q_heads = p.tensors[0].x == nullptr ? 0 : static_cast<int>(p.tensors[0].heads);
  const int heads = q_heads + (p.tensors[1].x == nullptr ? 0 : static_cast<int>(p.tensors[1].heads));
  const float sign = p.inverse ? -1.0f : 1.0f;

  auto load = [](const T* from, float (&to)[kWidth]) {
    if constexpr (kWidth == kVector) {
      const Vector<T> v = load_vector(from);
#pragma unroll
      for (int j = 0; j < kVector; j++) to[j] = to_float(v.v[j]);
    } else {
      to[0] = to_float(*from);
    }
  };
  auto store = [](T* to, const float (&from)[kWidth]) {
    if constexpr (kWidth == kVector) {
      store_vector(to, vector_from_float<T>(from));
    } else {
      *to = from_float<T>(from[0]);
    }
  };

  for (int i = threadIdx.x; i < heads * units; i += blockDim.x) {
    const int head = i / units, unit = i % units;
    const RotaryTensor& tensor = p.tensors[head < q_heads ? 0 : 1];
    const int64_t h = head < q_heads ? head : head - q_heads;
    const T* x = static_cast<const T*>(tensor.x) + b * tensor.x_batch + t * tensor.x_row + h * tensor.x_head;
    T* y = static_cast<T*>(tensor.y) + b * tensor.y_batch + t * tensor.y_row + h * tensor.y_head;
    if (unit >= pair_units) {
      const int at = turned + (unit - pair_units) * kWidth;
      float copied[kWidth];
      load(x + at, copied);
      if (x != y) store(y + at, copied);
      continue;
    }
    // Two groups of kWidth elements: the first and the second of each pair, or the pairs one after the other.
    const int first = p.interleaved ? 2 * kWidth * unit : kWidth * unit;
    const int second = p.interleaved ? first + kWidth : first + pairs;
    float low[kWidth], high[kWidth], a[kWidth], c[kWidth];
    load(x + first, low);
    load(x + second, high);
#pragma unroll
    for (int j = 0; j < kWidth; j++) {
      const float nan = __int_as_float(0x7fc00000);
      a[j] = known ? sign * p.sin[table + kWidth * unit + j] : nan;
      c[j] = known ? p.cos[table + kWidth * unit + j] : nan;
    }
    if (p.interleaved && kWidth > 1) {
#pragma unroll
      for (int j = 0; j < kWidth; j++) {
        float& even = 2 * j < kWidth ? low[2 * j % kWidth] : high[2 * j % kWidth];
        float& odd = 2 * j < kWidth ? low[(2 * j + 1) % kWidth] : high[(2 * j + 1) % kWidth];
        const float u = even, v = odd;
        even = u * c[j] - v * a[j];
        odd = v * c[j] + u * a[j];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; j++) {
        const float u = low[j], v = high[j];
        low[j] = u * c[j] - v * a[j];
        high[j] = v * c[j] + u * a[j];
      }
    }
    store(y + first, low);
    store(y + second, high);
  }
}

bool in_vectors(const Rotary& p) {
  const int64_t size = size_of(p.type);
  bool fits = p.pairs % kVector == 0 && p.width % kVector == 0;
  for (const RotaryTensor& t : p.tensors) {
    if (t.x == nullptr) continue;
    for (const int64_t stride : {t.x_batch, t.x_row, t.x_head}) fits = fits && vector_aligned(t.x, stride, size);
    for (const int64_t stride : {t.y_batch, t.y_row, t.y_head}) fits = fits && vector_aligned(t.y, stride, size);
  }
  return fits;
}

template <class T>
void launch_turn(const Rotary& p, int64_t heads, cudaStream_t stream) {
  const bool vectors = in_vectors(p);
  const int64_t units = heads * (p.width - p.pairs) / (vectors ? kVector : 1);
  const unsigned threads = static_cast<unsigned>(std::min<int64_t>(kMaxThreads, (units + 31) / 32 * 32));
  const Launch config{dim3(static_cast<unsigned>(p.batch * p.rows)), dim3(threads), 0, stream};
  launch("rotary", config, vectors ? turn<T, kVector> : turn<T, 1>, p);
}

}  // namespace
}  // namespace cuda

void rotary_cuda(const Rotary& p, void* stream) {
  const int64_t tokens = p.batch * p.rows;
  int64_t heads = 0;
  for (const RotaryTensor& t : p.tensors) heads += t.x == nullptr ? 0 : t.heads;
  if (tokens == 0 || heads == 0) return;
  if (tokens > 2147483647 || heads * p.width > 2147483647) {
    throw std::invalid_argument("rotary: " + std::to_string(tokens) + " tokens of " + std::to_string(heads * p.width) +
                                " elements; a CUDA launch takes at most 2147483647 of each");
  }
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.type) {
    case DType::f32: return cuda::launch_turn<float>(p, heads, s);
    case DType::f16: return cuda::launch_turn<__half>(p, heads, s);
    case DType::bf16: return cuda::launch_turn<__nv_bfloat16>(p, heads, s);
  }
}

}  // namespace fastlm
