// Matrix products on the GPU (sm_80 and newer) with what follows them done in the same pass.
//
//   c = a @ b.T,   a (m, k), b (n, k), then the epilogue
//
// as a linear layer has it. Its backward pass is made of the same product: dx = dy @ w is dy @ (w.T).T, and
// dw = dy.T @ x is (dy.T) @ (x.T).T; a transposed view costs nothing (Matrix::transposed).
//
// Sums are taken in float32, in an order that depends on the sizes, the layout and the device alone. float32 operands are split into two
// tf32 values each, and three products of them are added (3xTF32): errors as those of float32 arithmetic. An infinite
// float32 element makes NaN of what it is multiplied into.
#pragma once
#include "common/dtype.h"
#include "mlp/mlp.h"

namespace fastlm {

// A matrix (rows, cols): its rows are `stride` elements apart, and contiguous. Transposed: its columns are.
struct Matrix {
  const void* data;
  int64_t stride;
  bool transposed;
};

enum class EpilogueKind : int32_t { store = 0, activate, activate_backward };

// What happens to c, in float32. `cols`: n; of a gated activation n / 2. Matrices without a stride are packed.
//   store              out = scale * c + bias, or out += it
//   activate           pre = c + bias (rounded to `type`);  out = act(pre), gated act(gate) * up: the gate is the first
//                      half of pre's columns. The activation is that of the rounded pre, as the backward pass sees it.
//   activate_backward  c is the gradient of act(pre);  out = dpre;  hidden = act(pre) once more;  dbias = sum of dpre's rows
struct Epilogue {
  EpilogueKind kind;
  Activation activation;
  const void* bias;     // (n); null: none
  const float* scale;   // one float on the device (store only); null: 1
  void* out;            // store: (m, n) of out_type; activate: (m, cols); activate_backward: (m, columns of pre)
  int64_t out_stride;   // store only
  DType out_type;       // store only: `type`, or float32
  bool accumulate;      // store only: add to what is there
  void* pre;            // (m, columns of pre); written by activate (null: not kept), read by activate_backward
  void* hidden;         // activate_backward: (m, cols); null: not wanted
  void* dbias;          // activate_backward: (columns of pre); null: not wanted
  DType dbias_type;
};

struct Gemm {
  Matrix a, b;          // not a transposed and b not
  int64_t m, n, k;
  DType type;           // of a, b, bias, pre, hidden, and of out but for out_type
  Epilogue epilogue;
  float* workspace;     // gemm_workspace_cuda floats
  int sms;              // multiprocessors of the device
  bool wgmma;           // the device runs code for sm_90a, and it is compiled in
};

int64_t gemm_workspace_cuda(const Gemm& p);  // looks at no pointer
void gemm_cuda(const Gemm& p, void* stream);

// dpre, hidden and dbias from the gradient of act(pre) that is in memory: mlp.h's ActivationBackward on the GPU.
int64_t activation_backward_workspace_cuda(int64_t rows, int64_t pre_cols);
void activation_backward_cuda(const ActivationBackward& p, void* stream);

}  // namespace fastlm
