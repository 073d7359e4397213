// What stands between the matrix products of an MLP block: bias and activation, and their backward pass.
#pragma once
#include "common/dtype.h"

namespace fastlm {

// The codes stand once more in fastlm/ops/mlp/native.py. The last two are gated: a row of the pre-activation is the gate
// (cols), then what it multiplies (cols).
enum class Activation : int32_t { gelu_tanh = 0, gelu, relu, relu2, silu, swiglu, geglu };

inline bool is_gated(Activation a) { return a == Activation::swiglu || a == Activation::geglu; }

//   pre += bias;  hidden = act(pre), gated act(gate) * up
// The activation is that of the rounded pre, so that the backward pass sees what the forward saw.
struct ActivationForward {
  void* pre;         // (rows, cols), gated (rows, 2 cols)
  const void* bias;  // (cols), gated (2 cols); null: none
  void* hidden;      // (rows, cols)
  int64_t rows, cols;
  Activation activation;
  DType type;        // of every tensor; arithmetic is in float32
};

//   dpre = dhidden * act'(pre), gated (dhidden * up * act'(gate), dhidden * act(gate));  dbias = sum over rows of dpre
// The sum is taken in an order that does not depend on the number of threads.
struct ActivationBackward {
  const void* pre;
  const void* dhidden;  // (rows, cols)
  void* dpre;           // as pre; may be dhidden, where the activation is not gated
  void* hidden;         // (rows, cols), the activation once more; null: not wanted
  void* dbias;          // as the bias; null: not wanted
  float* workspace;     // activation_backward_workspace(rows, columns of pre) floats; null without dbias
  int64_t rows, cols;
  Activation activation;
  DType type;           // of every tensor but dbias
  DType dbias_type;
};

void activation_forward_cpu(const ActivationForward& p);
void activation_backward_cpu(const ActivationBackward& p);
int64_t activation_backward_workspace_cpu(int64_t rows, int64_t pre_cols);

}  // namespace fastlm
