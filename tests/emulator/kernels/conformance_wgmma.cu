// wgmma of every width, from descriptors and from registers, K-major and MN-major, under every swizzle; setmaxnreg.
#include "common/cuda/ptx_tma.h"
#include "common/cuda/ptx_warpgroup.h"
#include "common/cuda/ptx_wgmma.h"
#include "harness.h"

namespace {

using namespace fastlm;
using ptx::Major;
using ptx::WgmmaType;

// in: for a and b each four words (offset of the first byte, leading, stride, swizzle), then the images of a (8 KiB, or the
// registers of a, four words a thread) and b (32 KiB) as they lie in shared memory. d starts at thread % 7.
constexpr int kHeader = 8, kA = 2048, kB = 8192;  // words

template <int kColumns, WgmmaType kType, bool kRegisters, Major kMajorA, Major kMajorB>
__global__ void __launch_bounds__(128) product(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED_DYNAMIC(s, 1024);
  auto* words = reinterpret_cast<uint32_t*>(s);
  for (int i = threadIdx.x; i < kA + kB; i += 128) words[i] = in[kHeader + i];
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t base = ptx::shared_address(s);
  const uint64_t a = ptx::wgmma_descriptor(base + in[0], in[1], in[2], static_cast<ptx::Swizzle>(in[3]));
  const uint64_t b = ptx::wgmma_descriptor(base + 4 * kA + in[4], in[5], in[6], static_cast<ptx::Swizzle>(in[7]));
  float d[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; i++) d[i] = static_cast<float>(threadIdx.x % 7);
  uint32_t registers[4];
#pragma unroll
  for (int i = 0; i < 4; i++) registers[i] = in[kHeader + 4 * threadIdx.x + i];
  ptx::wgmma_fence();
  if constexpr (kRegisters) ptx::Wgmma<kColumns, kType>::template rs<kMajorB>(d, registers, b, true);
  else ptx::Wgmma<kColumns, kType>::template ss<kMajorA, kMajorB>(d, a, b, true);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kColumns / 2; i++) out[kColumns / 2 * threadIdx.x + i] = __float_as_uint(d[i]);
}

template <int kColumns, WgmmaType kType, bool kRegisters, Major kMajorA, Major kMajorB>
void run(const uint32_t* in, uint32_t* out) {
  cuda::launch("wgmma", {dim3(1), dim3(128), 4 * (kA + kB)}, product<kColumns, kType, kRegisters, kMajorA, kMajorB>, in, out);
}

#define WGMMA(columns, type, from, a, b)                                                                               \
  static const harness::Register wgmma_##columns##type##from##a##b(                                                     \
      "wgmma_" #columns "_" #type "_" #from "_" #a "_" #b, kHeader + kA + kB, 64 * columns,                             \
      run<columns, WgmmaType::type, from##_registers, Major::a, Major::b>)
constexpr bool ss_registers = false, rs_registers = true;

#define WGMMA_MAJORS(columns, type)   \
  WGMMA(columns, type, ss, k, k);     \
  WGMMA(columns, type, ss, k, mn);    \
  WGMMA(columns, type, ss, mn, k);    \
  WGMMA(columns, type, ss, mn, mn);   \
  WGMMA(columns, type, rs, k, k);     \
  WGMMA(columns, type, rs, k, mn)
WGMMA_MAJORS(64, bf16);
WGMMA_MAJORS(64, f16);
WGMMA(64, tf32, ss, k, k);
WGMMA(64, tf32, rs, k, k);
WGMMA(8, bf16, rs, k, k);
WGMMA(256, bf16, rs, k, mn);
WGMMA(256, f16, ss, k, mn);

#define WGMMA_4(n0, n1, n2, n3)   \
  WGMMA(n0, bf16, ss, k, k);      \
  WGMMA(n1, bf16, ss, k, k);      \
  WGMMA(n2, bf16, ss, k, k);      \
  WGMMA(n3, bf16, ss, k, k)
WGMMA_4(8, 16, 24, 32);
WGMMA_4(40, 48, 56, 72);
WGMMA_4(80, 88, 96, 104);
WGMMA_4(112, 120, 128, 136);
WGMMA_4(144, 152, 160, 168);
WGMMA_4(176, 184, 192, 200);
WGMMA_4(208, 216, 224, 232);
WGMMA(240, bf16, ss, k, k);
WGMMA(248, bf16, ss, k, k);
WGMMA(256, bf16, ss, k, k);

// A producer warpgroup gives registers to two others, which cannot go on before.
__global__ void __launch_bounds__(384, 1) move_registers(const uint32_t* in, uint32_t* out) {
  const int group = threadIdx.x / 128;
  if (group == 0) ptx::setmaxnreg_decrease<40>();
  else ptx::setmaxnreg_increase<232>();
  out[threadIdx.x] = in[threadIdx.x];
}
HARNESS_CASE("setmaxnreg", move_registers, 1, 384, 0, 384, 384);

}  // namespace
