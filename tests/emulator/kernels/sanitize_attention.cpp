// Attention forward and backward on small cases, for the sanitizers: each type, width, and the plain and general kernels.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "attention/attention.h"

namespace {

using namespace fastlm;

// A buffer of exactly this many bytes, of small numbers in every type.
struct Buffer {
  void* block = nullptr;
  explicit Buffer(int64_t bytes) {
    if (posix_memalign(&block, 128, static_cast<size_t>(bytes)) != 0) std::abort();
    auto* data = static_cast<unsigned char*>(block);
    for (int64_t i = 0; i < bytes; i++) data[i] = static_cast<unsigned char>(i % 2 == 1 ? 0x3c : 0x10 + i % 7);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(block); }
};

struct Options {
  bool causal = false, dropout = false, alibi = false;
  bool hopper = false;  // the kernels for sm_90a
  int64_t left = -1;
  float softcap = 0.0f;
  std::vector<int32_t> cu_seqlens;
};

void run(DType type, int64_t rows, int64_t columns, int64_t heads, int64_t kv_heads, int64_t width, const Options& o) {
  const int64_t size = size_of(type), q_bytes = rows * heads * width * size, k_bytes = columns * kv_heads * width * size;
  Buffer q(q_bytes), k(k_bytes), v(k_bytes), out(q_bytes), dout(q_bytes), dq(q_bytes), dk(k_bytes), dv(k_bytes);
  Buffer lse(4 * heads * rows), dlse(4 * heads * rows), slopes(4 * heads), state(16);
  const Strides q_strides{rows * heads * width, heads * width, width}, k_strides{columns * kv_heads * width, kv_heads * width, width};
  AttentionInputs p{};
  p.q = q.block, p.k = k.block, p.v = v.block;
  p.q_strides = q_strides, p.k_strides = p.v_strides = k_strides;
  p.alibi_slopes = o.alibi ? static_cast<float*>(slopes.block) : nullptr;
  p.cu_seqlens = o.cu_seqlens.empty() ? nullptr : o.cu_seqlens.data();
  p.sequences = o.cu_seqlens.empty() ? 0 : static_cast<int64_t>(o.cu_seqlens.size()) - 1;
  p.rng_state = o.dropout ? static_cast<int64_t*>(state.block) : nullptr;
  p.dropout_threshold = 1u << 30;
  p.dropout_scale = 4.0f / 3.0f;
  p.batch = 1, p.rows = rows, p.columns = columns, p.heads = heads, p.kv_heads = kv_heads, p.width = width;
  p.window_left = o.left, p.window_right = o.causal ? 0 : -1, p.max_seqlen = rows;
  p.scale = 0.1f, p.softcap = o.softcap, p.type = type, p.wgmma = o.hopper;
  Buffer workspace(4 * attention_backward_workspace(p));
  attention_forward_cuda(p, out.block, static_cast<float*>(lse.block), nullptr);
  const AttentionGradients g{out.block,   static_cast<float*>(lse.block), dout.block, q_strides, static_cast<float*>(dlse.block),
                             dq.block, dk.block, dv.block, heads * width, kv_heads * width};
  attention_backward_cuda(p, g, static_cast<float*>(workspace.block), nullptr);
}

}  // namespace

// With an argument also the cases with many threads: under ThreadSanitizer each costs a fiber, and those are slow to make.
int main(int arguments, char**) {
  const DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;
  Options plain, causal, everything, packed, hopper;
  causal.causal = true;
  hopper.causal = hopper.hopper = true;
  hopper.left = 150;
  everything.dropout = everything.alibi = true;
  everything.left = 9;
  everything.softcap = 3.0f;
  packed.causal = packed.dropout = true;
  packed.cu_seqlens = {0, 13, 13, 50, 61};
  try {
    run(bf16, 70, 90, 2, 1, 64, causal);
    run(f16, 37, 75, 1, 1, 40, everything);
    run(f32, 21, 50, 1, 1, 64, everything);
    run(bf16, 140, 150, 2, 1, 64, hopper);
    run(bf16, 200, 210, 2, 1, 40, hopper);  // two blocks, each with two turns
    run(f16, 260, 250, 2, 1, 128, hopper);
    if (arguments > 1) {
      run(bf16, 61, 61, 2, 1, 64, packed);
      run(bf16, 150, 140, 1, 1, 104, plain);
      run(f16, 40, 70, 2, 1, 128, everything);
      run(bf16, 33, 50, 1, 1, 256, causal);
      run(f16, 70, 140, 2, 1, 104, hopper);
      run(f32, 35, 40, 2, 1, 128, causal);
      run(f32, 20, 35, 1, 1, 200, everything);
    }
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 3;
  }
  return 0;
}
