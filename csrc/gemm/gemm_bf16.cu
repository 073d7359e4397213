#include "gemm/gemm_kernel.h"

namespace fastlm::cuda {
FASTLM_GEMM_TYPE(, __nv_bfloat16)
}  // namespace fastlm::cuda
