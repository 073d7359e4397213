// What was built, and from what: for fastlm.info and bug reports.
#pragma once
#include <string>
#include <vector>

namespace fastlm {

struct BuildInfo {
  std::string version;
  std::string git_commit;            // empty: not built from a git checkout
  std::string compiler;
  std::vector<std::string> cpu_isas;
  std::string cuda;                  // nvcc's version; empty: built without CUDA
  std::vector<std::string> cuda_archs;
  std::string cuda_reason;           // why not, where built without CUDA
};

BuildInfo build_info();

}  // namespace fastlm
