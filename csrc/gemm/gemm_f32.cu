#include "gemm/gemm_kernel.h"

namespace fastlm::cuda {
FASTLM_GEMM_TYPE(, float)
}  // namespace fastlm::cuda
