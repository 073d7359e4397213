// The main loop of every GEMM here: a block of four warps, two by two, adds up a kM x kN tile of a @ b.T.
//
// Four stages of k (64 bytes of it each) are under way by cp.async. A warp holds the fragments of two steps: while the
// tensor cores work on one, ldmatrix brings the other, also across the barrier between two stages.
#pragma once
#include "gemm/operand_tile.h"

namespace fastlm::cuda {

constexpr int kGemmStages = 4;

// An operand's 16 rows by one step of k, ready for mma.sync.
template <class T>
struct Fragment {
  uint32_t r[4];
  FASTLM_DEVICE void prepare() {}
};

template <>
struct Fragment<float> {
  uint32_t r[4];    // after prepare(): rounded to tf32
  uint32_t low[4];  // what the rounding left, rounded to tf32
  FASTLM_DEVICE void prepare() {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float v = __uint_as_float(r[i]);
      r[i] = ptx::to_tf32(v);
      low[i] = ptx::to_tf32(v - __uint_as_float(r[i]));
    }
  }
};

// c += a b, where b is columns 8 kHalf to 8 kHalf + 7 of the fragment.
template <int kHalf>
FASTLM_DEVICE void multiply(float (&c)[4], const Fragment<__nv_bfloat16>& a, const Fragment<__nv_bfloat16>& b) {
  ptx::mma_bf16(c, a.r, b.r[2 * kHalf], b.r[2 * kHalf + 1]);
}
template <int kHalf>
FASTLM_DEVICE void multiply(float (&c)[4], const Fragment<__half>& a, const Fragment<__half>& b) {
  ptx::mma_f16(c, a.r, b.r[2 * kHalf], b.r[2 * kHalf + 1]);
}
// The product of the two low parts is below float32's resolution. The sum of eight products is taken apart and added in
// float32: the tensor core truncates where it adds, and over a long k that would show.
template <int kHalf>
FASTLM_DEVICE void multiply(float (&c)[4], const Fragment<float>& a, const Fragment<float>& b) {
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  ptx::mma_tf32(sum, a.low, b.r[2 * kHalf], b.r[2 * kHalf + 1]);
  ptx::mma_tf32(sum, a.r, b.low[2 * kHalf], b.low[2 * kHalf + 1]);
  ptx::mma_tf32(sum, a.r, b.r[2 * kHalf], b.r[2 * kHalf + 1]);
#pragma unroll
  for (int i = 0; i < 4; i++) c[i] += sum[i];
}

template <class T, int kM, int kN, bool kTransposedA, bool kTransposedB, bool kAligned>
struct MainLoop {
  using TileA = OperandTile<T, kM, kTransposedA, false>;
  using TileB = OperandTile<T, kN, kTransposedB, true>;
  using LoaderA = OperandLoader<T, kM, kTransposedA, kAligned>;
  using LoaderB = OperandLoader<T, kN, kTransposedB, kAligned>;

  static constexpr int kStageBytes = TileA::kBytes + TileB::kBytes;
  static constexpr int kSharedBytes = kGemmStages * kStageBytes;
  static constexpr int kSteps = kStageRow / kStepBytes;
  static constexpr int kFragmentsM = kM / 32, kFragmentsN = kN / 32;  // of 16 rows each, of a warp's half of the tile

  // c[i][2 j + h] is rows 16 i to 16 i + 15 and columns 16 j + 8 h to 16 j + 8 h + 7 of the warp's quarter.
  using Accumulators = float[kFragmentsM][2 * kFragmentsN][4];

  struct Fragments {
    Fragment<T> a[kFragmentsM], b[kFragmentsN];
  };

  static FASTLM_DEVICE int warp_row() { return threadIdx.x / 64 * (kM / 2); }
  static FASTLM_DEVICE int warp_col() { return threadIdx.x / 32 % 2 * (kN / 2); }

  // A float32 sum over a long k is taken in parts of so many elements, so that its rounding grows with the parts and not
  // with k. For 16-bit operands the float32 sum is far better than they are.
  static constexpr int64_t kPart = 1024;
  static constexpr bool kParts = sizeof(T) == 4;

  static FASTLM_DEVICE void add_and_clear(Accumulators& total, Accumulators& part) {
#pragma unroll
    for (int i = 0; i < kFragmentsM; i++) {
#pragma unroll
      for (int j = 0; j < 2 * kFragmentsN; j++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
          total[i][j][r] += part[i][j][r];
          part[i][j][r] = 0.0f;
        }
      }
    }
  }

  // The product over `k` elements is added to c. Ends with every copy done and every thread past its last use of `shared`.
  static FASTLM_DEVICE void run(Accumulators& c, LoaderA& load_a, LoaderB& load_b, int64_t k, unsigned char* shared) {
    const uint32_t address = ptx::shared_address(shared);
    const int lane_a = TileA::lane_offset(warp_row(), threadIdx.x % 32);
    const int lane_b = TileA::kBytes + TileB::lane_offset(warp_col(), threadIdx.x % 32);
    auto copy = [&](unsigned stage, int64_t left) {
      const unsigned at = stage * kStageBytes;
      if (left > 0) {
        load_a.copy(shared + at, address + at, left);
        load_b.copy(shared + at + TileA::kBytes, address + at + TileA::kBytes, left);
      }
      ptx::cp_async_commit();
    };
    auto load = [&](Fragments& f, unsigned stage, int step) {
      const unsigned at = stage * kStageBytes;
#pragma unroll
      for (int i = 0; i < kFragmentsM; i++) TileA::fragment(f.a[i].r, shared + at, address + at, lane_a, i, step);
#pragma unroll
      for (int j = 0; j < kFragmentsN; j++) TileB::fragment(f.b[j].r, shared + at, address + at, lane_b, j, step);
    };

#pragma unroll
    for (int i = 0; i < kGemmStages - 1; i++) copy(i, k - int64_t{i} * kDepth<T>);
    ptx::cp_async_wait<kGemmStages - 2>();
    __syncthreads();
    Fragments f[2];
    load(f[0], 0, 0);
    Accumulators part = {};
    Accumulators& sum = kParts ? part : c;
    unsigned stage = 0;
    int64_t next = (kGemmStages - 1) * kDepth<T>;  // where the next copy begins
#pragma unroll 1
    for (int64_t at = 0; at < k; at += kDepth<T>) {
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        if (step + 1 < kSteps) {
          load(f[(step + 1) % 2], stage, step + 1);
        } else {
          // The next stage has come; and nobody reads the one that the next copy goes into.
          ptx::cp_async_wait<kGemmStages - 2>();
          __syncthreads();
          stage = (stage + 1) % kGemmStages;
          load(f[0], stage, 0);  // past the end: read, and not used
        }
        if (step == 0) {
          copy((stage + kGemmStages - 1) % kGemmStages, k - next);
          next += kDepth<T>;
        }
        Fragments& now = f[step % 2];
#pragma unroll
        for (int i = 0; i < kFragmentsM; i++) now.a[i].prepare();
#pragma unroll
        for (int j = 0; j < kFragmentsN; j++) now.b[j].prepare();
#pragma unroll
        for (int i = 0; i < kFragmentsM; i++) {
#pragma unroll
          for (int j = 0; j < kFragmentsN; j++) {
            multiply<0>(sum[i][2 * j], now.a[i], now.b[j]);
            multiply<1>(sum[i][2 * j + 1], now.a[i], now.b[j]);
          }
        }
      }
      if (kParts && next % kPart == 0) add_and_clear(c, part);
    }
    if (kParts) add_and_clear(c, part);
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  // Row by row, kRowFloats apart: no two lanes of a half-warp's 8-byte stores meet in a bank.
  static constexpr int kRowFloats = kN + 8;
  static constexpr int kStagingBytes = kM * kRowFloats * static_cast<int>(sizeof(float));

  static FASTLM_DEVICE void store(const Accumulators& c, float* staging) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kFragmentsM; i++) {
#pragma unroll
      for (int j = 0; j < 2 * kFragmentsN; j++) {
        float* to = staging + (warp_row() + 16 * i + g) * kRowFloats + warp_col() + 8 * j + 2 * t;
        *reinterpret_cast<float2*>(to) = make_float2(c[i][j][0], c[i][j][1]);
        *reinterpret_cast<float2*>(to + 8 * kRowFloats) = make_float2(c[i][j][2], c[i][j][3]);
      }
    }
  }
};

}  // namespace fastlm::cuda
