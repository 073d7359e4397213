// The forward kernel for Hopper (forward_sm90.cu), as attention_forward_cuda sees it.
#pragma once
#include "attention/attention.h"

namespace fastlm::cuda {

// Whether it takes these inputs; what it leaves is for sm80/.
bool attention_forward_sm90_takes(const AttentionInputs& p);
void attention_forward_sm90(const AttentionInputs& p, void* out, float* lse, void* stream);

}  // namespace fastlm::cuda
