// Products in every layout with every epilogue, and the loss of a block of logits, for the sanitizers.
#include <cstdio>
#include <stdexcept>

#include "cross_entropy/cross_entropy.h"
#include "gemm/gemm.h"
#include "linear/column_sums.h"
#include "sanitize.h"

namespace {

using namespace fastlm;

struct Layout {
  bool transposed_a, transposed_b;
  int shift;  // bytes, of every address
};

// a (m, k) @ b (n, k).T with an epilogue on the whole result; `n` counts both halves of a gated pre-activation.
void product(int64_t m, int64_t n, int64_t k, DType type, Layout layout, EpilogueKind kind, Activation activation, int sms,
             bool wgmma = false) {
  const int64_t size = size_of(type), wide = kind == EpilogueKind::activate_backward && is_gated(activation) ? 2 * n : n;
  const int s = layout.shift;
  Buffer a(m * k * size, s), b(n * k * size, s), bias(n * size, s), out(m * wide * size, s), pre(m * wide * size, s);
  Buffer hidden(m * n * size, s), dbias(wide * size, s), scale(4);
  const bool stores = kind == EpilogueKind::store, backward = kind == EpilogueKind::activate_backward;
  Epilogue e{kind, activation, backward ? nullptr : bias.data, stores ? scale.floats() : nullptr, out.data, n, type, false,
             stores ? nullptr : pre.data, backward ? hidden.data : nullptr, backward ? dbias.data : nullptr, type};
  Gemm p{{a.data, layout.transposed_a ? m : k, layout.transposed_a}, {b.data, layout.transposed_b ? n : k, layout.transposed_b},
         m, n, k, type, e, nullptr, sms, wgmma};
  Buffer workspace(4 * gemm_workspace_cuda(p));
  p.workspace = workspace.floats();
  gemm_cuda(p, nullptr);
}

void accumulate(int64_t m, int64_t n, int64_t k, DType type) {
  Buffer a(m * k * size_of(type)), b(n * k * size_of(type)), out(4 * m * n);
  const Epilogue e{EpilogueKind::store, Activation::relu, nullptr, nullptr, out.data, n, DType::f32, true, nullptr, nullptr, nullptr, DType::f32};
  gemm_cuda({{a.data, m, true}, {b.data, n, true}, m, n, k, type, e, nullptr, 1, false}, nullptr);
}

void activation_backward(int64_t rows, int64_t cols, DType type, Activation activation) {
  const int64_t wide = is_gated(activation) ? 2 * cols : cols, size = size_of(type);
  Buffer pre(rows * wide * size), dhidden(rows * cols * size), dpre(rows * wide * size), dbias(wide * size);
  Buffer workspace(4 * activation_backward_workspace_cuda(rows, wide));
  activation_backward_cuda({pre.data, dhidden.data, dpre.data, nullptr, dbias.data, workspace.floats(), rows, cols, activation, type, type},
                           nullptr);
}

void cross_entropy(int64_t rows, int64_t cols, DType type) {
  const int64_t stride = (cols + 7) / 8 * 8;
  Buffer logits(rows * stride * size_of(type)), targets(8 * rows), loss(4 * rows), lse(4 * rows);
  for (int64_t i = 0; i < rows; i++) reinterpret_cast<int64_t*>(targets.data)[i] = i % 3 == 2 ? -100 : i % 3 == 1 ? cols : cols - 1;
  cross_entropy_block_cuda({logits.data, reinterpret_cast<int64_t*>(targets.data), loss.floats(), lse.floats(), nullptr, rows, cols,
                            0.1f, 0.01f, 5.0f, 1.0f, true, type},
                           {stride, -100}, nullptr);
}

void column_sums(int64_t rows, int64_t cols, int64_t stride, DType type) {
  Buffer x(((rows - 1) * stride + cols) * size_of(type)), sums(cols * size_of(type)), workspace(4 * column_sums_workspace_cuda(rows, cols));
  column_sums_cuda({x.data, sums.data, workspace.floats(), rows, cols, stride, type, type}, nullptr);
}

}  // namespace

// With an argument also the cases with many threads: under ThreadSanitizer each costs a fiber, and those are slow to make.
int main(int arguments, char**) {
  const DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;
  const Layout rows{false, false, 0}, columns{false, true, 0}, both{true, true, 0};
  const auto store = EpilogueKind::store, activate = EpilogueKind::activate, backward = EpilogueKind::activate_backward;
  try {
    product(40, 56, 168, bf16, rows, store, Activation::relu, 1);
    product(33, 35, 37, bf16, {false, true, 2}, backward, Activation::geglu, 1);
    product(24, 40, 40, f32, both, store, Activation::relu, 1);
    cross_entropy(3, 300, bf16);
    column_sums(70, 13, 16, bf16);
    product(256, 128, 72, bf16, rows, activate, Activation::swiglu, 2, true);
    if (arguments > 1) {
      product(136, 144, 72, bf16, rows, activate, Activation::swiglu, 1);
      product(136, 136, 72, f16, columns, backward, Activation::gelu, 1);
      product(136, 136, 72, f16, both, store, Activation::relu, 1);
      product(70, 66, 600, bf16, rows, activate, Activation::geglu, 64);  // k is split
      product(70, 65, 33, f32, {false, false, 4}, activate, Activation::silu, 1);
      product(65, 33, 530, f32, columns, backward, Activation::swiglu, 64);
      product(1, 1, 1, f16, {true, true, 2}, store, Activation::relu, 1);
      for (const Layout layout : {rows, columns, both}) product(264, 392, 456, bf16, layout, store, Activation::relu, 2, true);
      product(264, 256, 72, f16, columns, activate, Activation::gelu, 2, true);
      product(520, 184, 72, bf16, rows, activate, Activation::gelu, 2, true);  // tiles of 192 columns
      product(520, 184, 72, f16, rows, backward, Activation::silu, 2, true);
      product(520, 136, 72, bf16, columns, backward, Activation::geglu, 4, true);
      product(130, 136, 4104, f16, rows, activate, Activation::swiglu, 2, true);
      product(130, 136, 4104, f16, rows, activate, Activation::swiglu, 16, false);  // k is split
      product(130, 384, 8264, bf16, rows, activate, Activation::swiglu, 16, true);  // by wgmma
      accumulate(72, 67, 41, bf16);
      activation_backward(70, 70, f16, Activation::swiglu);
      cross_entropy(4, 5001, f32);
      cross_entropy(2, 1, f16);
      column_sums(5, 300, 301, f32);
      column_sums(140, 264, 264, f16);
    }
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 3;
  }
  return 0;
}
