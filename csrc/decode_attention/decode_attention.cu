// decode_attention.h on CUDA: a block for each part of a sequence and head of keys and values, then a block for each row of the output.
// The time is that of reading the cache once: every access to it is 16 bytes wide, and the query heads that share keys and
// values share the block.
#include "decode_attention/decode_attention.h"

#include <stdexcept>
#include <string>

#include "common/cuda/launch.h"
#include "common/cuda/reduce.h"
#include "common/cuda/vector.h"

namespace fastlm {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kPart = kDecodePartCuda;
constexpr int kAhead = 4;  // rows of the cache that a thread loads before it works on them
constexpr int kMaxWidth = 256;

FASTLM_DEVICE float infinity() { return __int_as_float(0x7f800000); }

// Eight elements from column d of a row; zeros beyond the width.
template <class T>
FASTLM_DEVICE void load_eight(const T* row, int d, int width, bool vectors, float (&to)[kVector]) {
  if (vectors) {
    if (d < width) {
      const Vector<T> v = load_vector(row + d);
#pragma unroll
      for (int i = 0; i < kVector; i++) to[i] = to_float(v.v[i]);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kVector; i++) to[i] = d + i < width ? to_float(row[d + i]) : 0.0f;
}

FASTLM_DEVICE int64_t length_of(const DecodeAttention& p, int64_t b) {
  const int64_t length = p.lengths[b];
  return length < 0 ? 0 : length < p.capacity ? length : p.capacity;
}

// The columns that at least one row of sequence b sees.
FASTLM_DEVICE int64_t first_visible(const DecodeAttention& p, int64_t length) {
  const int64_t first = p.window < 0 ? 0 : length - p.rows - p.window;
  return first < 0 ? 0 : first;
}

// The batch entry or page, and the row in it, of a column; -1 where the table has no such page.
struct Place {
  int64_t entry, row;
};
FASTLM_DEVICE Place place_of(const DecodeAttention& p, int64_t b, int64_t j) {
  if (p.table == nullptr) return {b, j};
  const int64_t page = p.table[b * p.table_width + j / p.page];
  return {page >= 0 && page < p.pages ? page : -1, j % p.page};
}

FASTLM_DEVICE float* partial(const DecodeAttention& p, int64_t b, int64_t part, int64_t head, int64_t t) {
  const int64_t parts = (p.capacity + kPart - 1) / kPart;
  return p.workspace + (((b * parts + part) * p.heads + head) * p.rows + t) * (p.width + 2);
}

// kRows: (head, row) pairs worked on at a time. 4: 32 sums and 32 numbers of q in registers; 1 where there is one.
template <class T, int kRows>
__global__ void __launch_bounds__(kThreads) decode_parts_kernel(const DecodeAttention p, const int lanes, const bool vectors) {
  FASTLM_SHARED(float, scores, kRows* kPart);
  FASTLM_SHARED(Place, places, kPart);
  FASTLM_SHARED(float, sums, kThreads* kRows* kVector);
  const int64_t part = blockIdx.x, kv_head = blockIdx.y, b = blockIdx.z;
  const int64_t length = length_of(p, b), lowest = first_visible(p, length);
  const int64_t first = lowest > part * kPart ? lowest : part * kPart;
  const int64_t last = length < (part + 1) * kPart ? length : (part + 1) * kPart;
  if (first >= last) return;
  const int n = static_cast<int>(last - first), width = static_cast<int>(p.width);
  const int group = static_cast<int>(p.heads / p.kv_heads), rows = group * static_cast<int>(p.rows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // `lanes` threads, a power of two, take a row of the cache, eight elements each.
  const int d = threadIdx.x % lanes * kVector, slot = threadIdx.x / lanes, slots = kThreads / lanes;
  const T *k = static_cast<const T*>(p.k), *v = static_cast<const T*>(p.v);

  for (int j = threadIdx.x; j < n; j += kThreads) places[j] = place_of(p, b, first + j);
#pragma unroll 1
  for (int r0 = 0; r0 < rows; r0 += kRows) {
    float q[kRows][kVector];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int row = r0 + r < rows ? r0 + r : rows - 1;  // what pads repeats the last one and is not stored
      const int64_t head = kv_head * group + row / p.rows, t = row % p.rows;
      load_eight(static_cast<const T*>(p.q) + ((b * p.rows + t) * p.heads + head) * p.width, d, width, vectors, q[r]);
    }
    __syncthreads();  // places are there; the scores and sums of the rows before have been read
    for (int j0 = 0; j0 < n; j0 += kAhead * slots) {
      float key[kAhead][kVector];
      bool there[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; a++) {
        const int j = j0 + a * slots + slot;
        const Place at = places[j < n ? j : n - 1];
        there[a] = at.entry >= 0;
        load_eight(k + (there[a] ? at.entry * p.k_strides[0] : 0) + at.row * p.k_strides[1] + kv_head * p.k_strides[2], d, width,
                   vectors, key[a]);
      }
#pragma unroll
      for (int a = 0; a < kAhead; a++) {
        const int j = j0 + a * slots + slot;
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          float s = 0.0f;
#pragma unroll
          for (int i = 0; i < kVector; i++) s = fmaf(q[r][i], key[a][i], s);
          for (int offset = lanes / 2; offset > 0; offset /= 2) s += __shfl_xor_sync(kFullWarp, s, offset);
          if (d == 0 && j < n) scores[r * kPart + j] = there[a] ? s * p.scale : -infinity();
        }
      }
    }
    __syncthreads();

    for (int r = warp; r < kRows && r0 + r < rows; r += kWarps) {
      const int64_t head = kv_head * group + (r0 + r) / p.rows, t = (r0 + r) % p.rows, i = length - p.rows + t;
      const float slope = p.alibi_slopes == nullptr ? 0.0f : p.alibi_slopes[b * p.alibi_batch_stride + head];
      float* s = scores + r * kPart;
      float maximum = -infinity();
      bool nan = false;
      for (int j = lane; j < n; j += 32) {
        const int64_t column = first + j, distance = i < column ? column - i : i - column;
        float score = s[j];
        if (p.softcap > 0.0f && score > -infinity()) score = p.softcap * tanhf(score / p.softcap);
        score -= slope * static_cast<float>(distance);
        if (column > i || (p.window >= 0 && column < i - p.window)) score = -infinity();
        s[j] = score;
        maximum = fmaxf(maximum, score);
        nan = nan || score != score;
      }
      maximum = warp_max(maximum);
      if (__any_sync(kFullWarp, nan)) maximum = __int_as_float(0x7fc00000);
      const float base = maximum == -infinity() ? 0.0f : maximum;
      float sum = 0.0f;
      for (int j = lane; j < n; j += 32) {
        const float weight = expf(s[j] - base);
        s[j] = weight;
        sum += weight;
      }
      sum = warp_sum(sum);
      float* to = partial(p, b, part, head, t);
      if (lane == 0) {
        to[p.width] = maximum;
        to[p.width + 1] = sum;
      }
    }
    __syncthreads();

    float out[kRows][kVector] = {};
    for (int j0 = slot; j0 < n; j0 += kAhead * slots) {
      float value[kAhead][kVector];
      bool there[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; a++) {
        const int j = j0 + a * slots;
        const Place at = places[j < n ? j : n - 1];
        there[a] = j < n && at.entry >= 0;  // what is not there may be NaN, and must not be weighed, not even with 0
        if (there[a]) {
          load_eight(v + at.entry * p.v_strides[0] + at.row * p.v_strides[1] + kv_head * p.v_strides[2], d, width, vectors, value[a]);
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; a++) {
        if (!there[a]) continue;
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          const float weight = r0 + r < rows ? scores[r * kPart + j0 + a * slots] : 0.0f;
#pragma unroll
          for (int i = 0; i < kVector; i++) out[r][i] = fmaf(weight, value[a][i], out[r][i]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
#pragma unroll
      for (int i = 0; i < kVector; i++) sums[(r * slots + slot) * lanes * kVector + d + i] = out[r][i];
    }
    __syncthreads();
    for (int r = 0; r < kRows && r0 + r < rows; r++) {
      float* to = partial(p, b, part, kv_head * group + (r0 + r) / p.rows, (r0 + r) % p.rows);
      for (int c = threadIdx.x; c < width; c += kThreads) {
        float sum = 0.0f;
        for (int s = 0; s < slots; s++) sum += sums[(r * slots + s) * lanes * kVector + c];
        to[c] = sum;
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) combine(const DecodeAttention p) {
  const int64_t head = blockIdx.x / p.rows, t = blockIdx.x % p.rows, b = blockIdx.y;
  const int64_t length = length_of(p, b), begin = first_visible(p, length) / kPart, end = (length + kPart - 1) / kPart;
  float maximum = -infinity();
  bool nan = false;
  for (int64_t part = begin; part < end; part++) {
    const float own = partial(p, b, part, head, t)[p.width];
    maximum = fmaxf(maximum, own);
    nan = nan || own != own;
  }
  if (nan) maximum = __int_as_float(0x7fc00000);
  T* out = static_cast<T*>(p.out) + ((b * p.rows + t) * p.heads + head) * p.width;
  for (int64_t c = threadIdx.x; c < p.width; c += kThreads) {
    float sum = 0.0f, all = 0.0f;
    for (int64_t part = begin; part < end && maximum != -infinity(); part++) {
      const float* from = partial(p, b, part, head, t);
      const float factor = from[p.width] == -infinity() ? 0.0f : expf(from[p.width] - maximum);
      sum = fmaf(from[c], factor, sum);
      all = fmaf(from[p.width + 1], factor, all);
    }
    out[c] = from_float<T>(maximum == -infinity() ? 0.0f : sum / all);
  }
}

template <class T>
void run(const DecodeAttention& p, cudaStream_t stream) {
  const int64_t size = sizeof(T);
  bool vectors = p.width % kVector == 0 && vector_aligned(p.q, p.width, size);
  for (int i = 0; i < 3; i++) {
    vectors = vectors && vector_aligned(p.k, p.k_strides[i], size) && vector_aligned(p.v, p.v_strides[i], size);
  }
  int lanes = 1;
  while (lanes * kVector < p.width) lanes *= 2;
  const dim3 parts(static_cast<unsigned>(decode_parts(p.capacity, kPart)), static_cast<unsigned>(p.kv_heads), static_cast<unsigned>(p.batch));
  const bool one = p.heads == p.kv_heads && p.rows == 1;
  launch("decode_attention_parts", {parts, dim3(kThreads), 0, stream}, one ? decode_parts_kernel<T, 1> : decode_parts_kernel<T, 4>,
         p, lanes, vectors);
  const dim3 rows(static_cast<unsigned>(p.heads * p.rows), static_cast<unsigned>(p.batch));
  launch("decode_attention", {rows, dim3(kThreads), 0, stream}, combine<T>, p);
}

}  // namespace
}  // namespace cuda

void decode_attention_cuda(const DecodeAttention& p, void* stream) {
  if (p.batch == 0 || p.rows == 0) return;
  if (p.width > cuda::kMaxWidth) {
    throw std::invalid_argument("decode_attention: a head dim of " + std::to_string(p.width) + "; wanted at most 256");
  }
  if (p.batch > 65535 || p.kv_heads > 65535) {
    throw std::invalid_argument("decode_attention: " + std::to_string(p.batch) + " sequences and " + std::to_string(p.kv_heads) +
                                " heads of keys; a CUDA grid holds at most 65535 of each");
  }
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.capacity == 0) throw std::invalid_argument("decode_attention: the cache has room for no token");
  switch (p.type) {
    case DType::f32: return cuda::run<float>(p, s);
    case DType::f16: return cuda::run<__half>(p, s);
    case DType::bf16: return cuda::run<__nv_bfloat16>(p, s);
  }
}

}  // namespace fastlm
