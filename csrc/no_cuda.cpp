// What stands in for the .cu files in a build without CUDA (setup.py compiles either them or this file).
#include <stdexcept>

#include "attention/attention.h"
#include "common/build_info.h"
#include "cross_entropy/cross_entropy.h"
#include "decode_attention/append.h"
#include "decode_attention/decode_attention.h"
#include "embedding/embedding.h"
#include "gemm/gemm.h"
#include "gpt/row_linear.h"
#include "layer_norm/layer_norm.h"
#include "linear/column_sums.h"
#include "optimizer/adamw.h"
#include "optimizer/grad_norm.h"
#include "rotary/rotary.h"
#include "sampling/sample.h"

namespace fastlm {
namespace {

[[noreturn]] void no_cuda() { throw std::runtime_error("fastlm was built without CUDA: " + build_info().cuda_reason); }

}  // namespace

void cross_entropy_block_cuda(const CrossEntropyBlock&, const CrossEntropyRows&, void*) { no_cuda(); }
int64_t gemm_workspace_cuda(const Gemm&) { no_cuda(); }
void gemm_cuda(const Gemm&, void*) { no_cuda(); }
int64_t activation_backward_workspace_cuda(int64_t, int64_t) { no_cuda(); }
void activation_backward_cuda(const ActivationBackward&, void*) { no_cuda(); }
void attention_forward_cuda(const AttentionInputs&, void*, float*, void*) { no_cuda(); }
void attention_backward_cuda(const AttentionInputs&, const AttentionGradients&, float*, void*) { no_cuda(); }
int64_t layer_norm_backward_workspace_cuda(int64_t, int64_t, int) { no_cuda(); }
void layer_norm_forward_cuda(const LayerNormForward&, void*) { no_cuda(); }
void layer_norm_backward_cuda(const LayerNormBackward&, int, void*) { no_cuda(); }
int64_t column_sums_workspace_cuda(int64_t, int64_t) { no_cuda(); }
void column_sums_cuda(const ColumnSums&, void*) { no_cuda(); }
void rotary_cuda(const Rotary&, void*) { no_cuda(); }
void embedding_forward_cuda(const EmbeddingForward&, void*) { no_cuda(); }
int64_t embedding_backward_workspace_cuda(int64_t, int64_t) { no_cuda(); }
void embedding_backward_cuda(const EmbeddingBackward&, void*) { no_cuda(); }
void sample_cuda(const Sample&, void*) { no_cuda(); }
void adamw_step_cuda(const AdamWRow*, int64_t, int64_t, const AdamWStep&, const float*, void*) { no_cuda(); }
void grad_norm_cuda(const GradNormTensor*, int64_t, int64_t, double*, float, float*, float*, void*) { no_cuda(); }
void cache_append_cuda(const CacheAppend&, void*) { no_cuda(); }
void decode_attention_cuda(const DecodeAttention&, void*) { no_cuda(); }
bool row_linear_takes(int64_t, DType) { return false; }
void row_linear_cuda(const RowLinear&, void*) { no_cuda(); }

}  // namespace fastlm
