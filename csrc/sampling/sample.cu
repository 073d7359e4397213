// sample.h on CUDA: a block a row. The row is read again for each pass; it is some hundred KB and lies in the L2 cache.
//
// The thresholds of top-k and top-p are found from the top bits down, two a pass: each thread sums the weights above three
// candidates in registers. As soon as what is left to choose from fits, it is gathered in shared memory, and the passes that
// follow read that instead of the row. Integers: neither atomics nor an order of addition can show in the result.
#include "sampling/sample.h"

#include <stdexcept>
#include <string>

#include "common/cuda/launch.h"
#include "common/cuda/reduce.h"
#include "common/cuda/convert.h"

namespace fastlm {
namespace cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kCandidates = 3;    // two bits a pass
constexpr int kRoom = 8192;       // keys in shared memory: 32 KB
constexpr int kGatherShift = 20;  // the first try: sign, exponent and a bit of the mantissa are known then
using Sum = unsigned long long;

struct Scratch {
  Sum sums[kWarps][kCandidates];
  float maxima[kWarps];
  int count;
  uint32_t keys[kRoom];
};

FASTLM_DEVICE uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

FASTLM_DEVICE float float_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

FASTLM_DEVICE Sum weight_of(float x, float maximum) { return static_cast<Sum>(expf(x - maximum) * kSampleOne); }

// The block's sums: every thread gets them.
FASTLM_DEVICE void block_sum(Sum (&v)[kCandidates], Scratch& scratch) {
#pragma unroll
  for (int j = 0; j < kCandidates; j++) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v[j] += __shfl_xor_sync(kFullWarp, v[j], offset);
  }
  __syncthreads();  // the last sums have been read
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int j = 0; j < kCandidates; j++) scratch.sums[threadIdx.x / 32][j] = v[j];
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kCandidates; j++) {
    v[j] = scratch.sums[threadIdx.x % 32][j];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v[j] += __shfl_xor_sync(kFullWarp, v[j], offset);
  }
}

// The row's keys from `low` to `high` to scratch.keys, in any order. Returns their number, or -1 where there is no room.
template <class ForEachKey>
FASTLM_DEVICE int gather(const ForEachKey& row, uint32_t low, uint32_t high, Scratch& scratch) {
  if (threadIdx.x == 0) scratch.count = 0;
  __syncthreads();
  row([&](uint32_t key) {
    if (key < low || key > high) return;
    const int place = atomicAdd(&scratch.count, 1);
    if (place < kRoom) scratch.keys[place] = key;
  });
  __syncthreads();
  return scratch.count <= kRoom ? scratch.count : -1;
}

// The largest key at which the weights of all keys >= it sum to `target` or more. row(f): f(key) for each key of the row.
// weight(key) is 0 below `least`.
template <class ForEachKey, class Weight>
FASTLM_DEVICE uint32_t select(const ForEachKey& row, const Weight& weight, uint32_t least, Sum target, Scratch& scratch) {
  uint32_t found = 0;
  Sum above = 0;      // of the keys too large to be the one, from found + 2^(shift + 2) on; of those too large to be gathered
  int gathered = -1;  // the number of keys that are gathered
  const int first_try = least > 0 ? 30 : kGatherShift;
#pragma unroll 1
  for (int shift = 30; shift >= 0; shift -= 2) {
    if (gathered < 0 && shift <= first_try && (first_try - shift) % 4 == 0) {
      gathered = gather(row, found > least ? found : least, found + (4u << shift) - 1, scratch);
    }
    Sum sums[kCandidates] = {0, 0, 0};
    const auto add = [&](uint32_t key) {
      const Sum w = weight(key);
#pragma unroll
      for (int j = 0; j < kCandidates; j++) sums[j] += key >= found + (uint32_t(j + 1) << shift) ? w : 0;
    };
    if (gathered < 0) {
      row(add);
    } else {
      for (int i = threadIdx.x; i < gathered; i += kThreads) add(scratch.keys[i]);
    }
    block_sum(sums, scratch);
    uint32_t digit = 0;
    Sum next = above;
#pragma unroll
    for (int j = kCandidates - 1; j >= 0; j--) {
      const Sum sum = gathered < 0 ? sums[j] : sums[j] + above;
      if (sum >= target) digit++;
      else next = sum;
    }
    if (gathered < 0) above = next;
    found += digit << shift;
  }
  return found;
}

// The largest of the block's values, and whether one is NaN: then it is NaN.
FASTLM_DEVICE float block_max(float v, bool nan, Scratch& scratch) {
  v = warp_max(v);
  if (threadIdx.x % 32 == 0) scratch.maxima[threadIdx.x / 32] = v;
  const bool any = __syncthreads_or(nan);
  v = warp_max(scratch.maxima[threadIdx.x % 32]);
  return any ? __int_as_float(0x7fc00000) : v;
}

FASTLM_DEVICE Sum random_bits(const Sample& p, int64_t row) {
  const int64_t* state = p.rng_state + (p.state_a_row ? 2 * row : 0);
  const uint64_t seed = static_cast<uint64_t>(state[0]);
  uint32_t c0 = p.state_a_row ? 0 : static_cast<uint32_t>(row), c1 = 0, c2 = 0, c3 = static_cast<uint32_t>(state[1]);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t even = uint64_t{0xD2511F53u} * c0, odd = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(odd >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(odd);
    c2 = static_cast<uint32_t>(even >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(even);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Sum{c1} << 32 | c0;
}

// What is drawn from: the tokens over `key`, and so many of those at it.
struct Kept {
  uint32_t key;
  Sum at_key;
};

// The first place at which the sum of the weights exceeds a random part of the whole. Each warp sums a stretch of the row;
// the one in whose stretch the place lies goes through it again, 32 places at a time.
template <class T>
FASTLM_DEVICE void draw(const Sample& p, int64_t row, const T* logits, float maximum, const Kept& kept, Scratch& scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t stretch = (p.vocabulary + kThreads - 1) / kThreads * 32, begin = warp * stretch;
  const int64_t end = begin + stretch < p.vocabulary ? begin + stretch : p.vocabulary;
  const float least = maximum + p.log_min_p;
  const auto x_of = [&](int64_t i) { return to_float(logits[i]) / p.temperature + 0.0f; };
  Sum over = 0, ties = 0;
  for (int64_t i = begin + lane; i < end; i += 32) {
    const float x = x_of(i);
    const uint32_t key = key_of(x);
    if (x < least) continue;
    over += key > kept.key ? weight_of(x, maximum) : 0;
    ties += key == kept.key ? 1 : 0;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    over += __shfl_xor_sync(kFullWarp, over, offset);
    ties += __shfl_xor_sync(kFullWarp, ties, offset);
  }
  __syncthreads();  // what was in the scratch has been read
  if (lane == 0) {
    scratch.sums[warp][0] = over;
    scratch.sums[warp][1] = ties;
  }
  __syncthreads();
  const float x_at_key = float_of(kept.key);
  const Sum tie_weight = kept.key == 0 || x_at_key < least ? 0 : weight_of(x_at_key, maximum);
  const auto sum_of = [&](int w, Sum before) {  // of a warp's stretch, with so many ties in front of it
    const Sum room = kept.at_key > before ? kept.at_key - before : 0, own = scratch.sums[w][1];
    return scratch.sums[w][0] + (own < room ? own : room) * tie_weight;
  };
  Sum all = 0, before = 0;
  for (int w = 0; w < kWarps; w++) {
    all += sum_of(w, before);
    before += scratch.sums[w][1];
  }
  Sum left = __umul64hi(random_bits(p, row), all);
  before = 0;
  for (int w = 0; w < warp; w++) {
    const Sum sum = sum_of(w, before);
    if (left < sum) return;  // in a stretch before this warp's
    left -= sum;
    before += scratch.sums[w][1];
  }
  if (left >= sum_of(warp, before)) return;
  for (int64_t first = begin; first < end; first += 32) {
    const bool there = first + lane < end;
    const float x = there ? x_of(first + lane) : 0.0f;
    const uint32_t key = key_of(x);
    const bool allowed = there && x >= least, tie = allowed && key == kept.key;
    const unsigned tied = __ballot_sync(kFullWarp, tie);
    const Sum rank = before + __popc(tied & ((1u << lane) - 1));
    const bool counts = allowed && (key > kept.key || (tie && rank < kept.at_key));
    Sum sum = counts ? weight_of(x, maximum) : 0;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const Sum other = __shfl_up_sync(kFullWarp, sum, offset);
      sum += lane >= offset ? other : 0;
    }
    const unsigned reached = __ballot_sync(kFullWarp, sum > left);
    if (reached != 0) {
      if (lane == 0) p.ids[row] = first + __ffs(static_cast<int>(reached)) - 1;
      return;
    }
    left -= __shfl_sync(kFullWarp, sum, 31);
    before += __popc(tied);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sample_rows(const Sample p) {
  FASTLM_SHARED(Scratch, shared, 1);
  Scratch& scratch = shared[0];
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(p.logits) + row * p.stride;
  const bool greedy = p.temperature == 0.0f;
  const float temperature = greedy ? 1.0f : p.temperature;
  const auto for_each_x = [&](auto f) {
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < p.vocabulary; i += kThreads) f(i, to_float(logits[i]) / temperature + 0.0f);
  };

  float largest = -__int_as_float(0x7f800000);
  bool nan = false;
  for_each_x([&](int64_t, float x) {
    largest = fmaxf(largest, x);
    nan = nan || x != x;
  });
  const float maximum = block_max(largest, nan, scratch);
  if (!(fabsf(maximum) < __int_as_float(0x7f800000))) {
    if (threadIdx.x == 0) p.ids[row] = -1;
    return;
  }
  if (greedy) {
    int64_t place = p.vocabulary;  // the first of the largest
    for_each_x([&](int64_t i, float x) { place = x == maximum && i < place ? i : place; });
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const int64_t other = __shfl_xor_sync(kFullWarp, place, offset);
      place = other < place ? other : place;
    }
    if (threadIdx.x % 32 == 0) scratch.sums[threadIdx.x / 32][0] = static_cast<Sum>(place);
    __syncthreads();
    if (threadIdx.x == 0) {
      Sum first = scratch.sums[0][0];
      for (int w = 1; w < kWarps; w++) first = scratch.sums[w][0] < first ? scratch.sums[w][0] : first;
      p.ids[row] = static_cast<int64_t>(first);
    }
    return;
  }

  const auto for_each_key = [&](auto f) { for_each_x([&](int64_t, float x) { f(key_of(x)); }); };
  Kept kept{0, ~Sum{0}};
  if (p.top_k > 0 && p.top_k < p.vocabulary) {
    kept.key = select(for_each_key, [](uint32_t) { return Sum{1}; }, 0, static_cast<Sum>(p.top_k), scratch);
  }
  if (p.top_p < 1.0) {
    const uint32_t kth = kept.key;
    const auto weight_at = [&](uint32_t key) { return key < kth ? Sum{0} : weight_of(float_of(key), maximum); };
    Sum sums[kCandidates] = {0, 0, 0};
    for_each_key([&](uint32_t key) { sums[0] += weight_at(key); });
    block_sum(sums, scratch);
    const double part = ceil(p.top_p * static_cast<double>(sums[0]));
    const Sum wanted = part < 1.0 ? 1 : static_cast<Sum>(part);
    kept.key = select(for_each_key, weight_at, kth, wanted, scratch);
    sums[0] = sums[1] = sums[2] = 0;
    for_each_key([&](uint32_t key) {
      const Sum weight = weight_at(key);
      sums[0] += key > kept.key ? weight : 0;
      sums[1] += key == kept.key ? weight : 0;
      sums[2] += key == kept.key ? 1 : 0;
    });
    block_sum(sums, scratch);
    const Sum weight = sums[1] / sums[2];  // of each of those at the threshold
    kept.at_key = (wanted - sums[0] + weight - 1) / weight;
  }
  draw(p, row, logits, maximum, kept, scratch);
}

}  // namespace
}  // namespace cuda

void sample_cuda(const Sample& p, void* stream) {
  if (p.rows == 0) return;
  if (p.rows > 2147483647) {
    throw std::invalid_argument("sample: " + std::to_string(p.rows) + " rows; a CUDA grid holds at most 2147483647");
  }
  const cuda::Launch config{dim3(static_cast<unsigned>(p.rows)), dim3(cuda::kThreads), 0, static_cast<cudaStream_t>(stream)};
  switch (p.type) {
    case DType::f32: return cuda::launch("sample", config, cuda::sample_rows<float>, p);
    case DType::f16: return cuda::launch("sample", config, cuda::sample_rows<__half>, p);
    case DType::bf16: return cuda::launch("sample", config, cuda::sample_rows<__nv_bfloat16>, p);
  }
}

}  // namespace fastlm
