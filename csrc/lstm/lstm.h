// The recurrence of an LSTM (Hochreiter & Schmidhuber 1997; with a forget gate, Gers et al. 2000), float32.
//
//   (i, f, g, o) = x_t + W h_{t-1}      x_t: the input's part of the gates, biases included, made for all steps at once
//   i, f, o = logistic,  g = tanh
//   c_t = f c_{t-1} + i g,   h_t = o tanh(c_t)
//
// A step is a small matrix product and a pass over its result. Here the pass follows each block of columns of the product
// at once, while the block is in the cache; W is packed once for all steps.
#pragma once
#include "common/dtype.h"

namespace fastlm {

struct LstmForward {
  const float* gates;   // (B, T, 4H): x
  const float* h0;      // (B, H)
  const float* c0;      // (B, H)
  const float* weight;  // (4H, H): W; null: the product is in `gates` already (T = 1)
  float* y;             // (B, T, H): h_1 .. h_T
  float* c;             // (B, T, H): c_1 .. c_T
  float* activations;   // (B, T, 4H): i, f, g, o
  float* workspace;     // lstm_forward_workspace_cpu floats
  int64_t batch, steps, hidden;
};

struct LstmBackward {
  const float* dy;           // (B, T, H)
  const float* dc_last;      // (B, H), the gradient of c_T; null: zero
  const float* c0;           // (B, H)
  const float* c;            // (B, T, H)
  const float* activations;  // (B, T, 4H)
  const float* weight;       // (4H, H)
  float* dgates;             // (B, T, 4H)
  float* dh0;                // (B, H)
  float* dc0;                // (B, H)
  float* workspace;          // lstm_backward_workspace_cpu floats
  int64_t batch, steps, hidden;
};

void lstm_forward_cpu(const LstmForward& p);
void lstm_backward_cpu(const LstmBackward& p);
int64_t lstm_forward_workspace_cpu(int64_t batch, int64_t hidden);
int64_t lstm_backward_workspace_cpu(int64_t batch, int64_t hidden);

}  // namespace fastlm
