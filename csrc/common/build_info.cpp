#include "common/build_info.h"

#include <sstream>

#include "common/cpu.h"
#include "fastlm_build_config.h"  // written by setup.py into the build folder: the FASTLM_BUILD_ macros

namespace fastlm {

BuildInfo build_info() {
  BuildInfo info;
  info.version = FASTLM_BUILD_VERSION;
  info.git_commit = FASTLM_BUILD_GIT_COMMIT;
  info.compiler = FASTLM_BUILD_COMPILER;
  info.cpu_isas = compiled_isas();
  info.cuda = FASTLM_BUILD_CUDA;
  info.cuda_reason = FASTLM_BUILD_CUDA_REASON;
  std::istringstream archs(FASTLM_BUILD_CUDA_ARCHS);
  for (std::string arch; archs >> arch;) info.cuda_archs.push_back(arch);
  return info;
}

}  // namespace fastlm
