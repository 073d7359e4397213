// Layer norm forward and backward on small cases, for the sanitizers: fast and general kernels, all kinds of types.
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "layer_norm/layer_norm.h"
#include "sanitize.h"

namespace {

using namespace fastlm;

void run(int64_t rows, int64_t cols, DType x, DType h, DType w, bool rms, bool residual, bool bias, int shift) {
  const int64_t n = rows * cols, xs = size_of(x), hs = size_of(h), ws = size_of(w);
  const int s = shift;
  Buffer xb(n * xs, s), rb(n * hs, s), wb(cols * ws, s), bb(cols * ws, s), y(n * xs, s), hb(n * hs, s), mean(rows * 4, 0), rstd(rows * 4, 0);
  layer_norm_forward_cuda({xb.data, residual ? rb.data : nullptr, wb.data, bias ? bb.data : nullptr, y.data,
                           residual ? hb.data : nullptr, rms ? nullptr : reinterpret_cast<float*>(mean.data),
                           reinterpret_cast<float*>(rstd.data), rows, cols, cols, cols, 1e-5f, rms, x, h, w},
                          nullptr);
  constexpr int kSms = 1;
  Buffer dx(n * xs, s), dr(n * hs, s), dw(cols * ws, s), db(cols * ws, s);
  Buffer workspace(4 * layer_norm_backward_workspace_cuda(rows, cols, kSms), 0);
  layer_norm_backward_cuda({y.data, residual ? rb.data : nullptr, residual ? hb.data : xb.data, wb.data,
                            rms ? nullptr : reinterpret_cast<float*>(mean.data), reinterpret_cast<float*>(rstd.data), dx.data,
                            residual ? dr.data : nullptr, dw.data, bias ? db.data : nullptr,
                            reinterpret_cast<float*>(workspace.data), rows, cols, cols, cols, cols, rms, x, residual ? h : x, w},
                           kSms, nullptr);
}

}  // namespace

// With an argument also the cases with many threads: under ThreadSanitizer each costs a fiber, and those are slow to make.
int main(int arguments, char**) {
  const DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;
  try {
    run(9, 64, f32, f32, f32, false, true, false, 0);
    run(5, 264, bf16, f32, f32, true, true, false, 0);
    run(5, 31, bf16, f32, bf16, false, true, true, 0);
    if (arguments > 1) {
      run(7, 520, f16, f16, f16, false, true, true, 0);
      run(5, 64, f32, f32, f16, false, true, true, 4);
      run(1, 1, f32, f32, f32, false, false, true, 0);
      run(3, 6152, bf16, bf16, bf16, false, false, true, 0);
      run(2, 16392, bf16, bf16, bf16, true, true, false, 0);
    }
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 3;
  }
  return 0;
}
