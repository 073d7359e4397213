#include "gemm/gemm_kernel_sm90.h"

namespace fastlm::cuda {
FASTLM_WGMMA_TYPE(, __half)
}  // namespace fastlm::cuda
