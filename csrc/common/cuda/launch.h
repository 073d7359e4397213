// Launching a kernel: the one place that starts one, checks the launch and says what failed.
#pragma once
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/cuda/platform.h"

namespace fastlm::cuda {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared = 0;  // bytes of dynamic shared memory
  cudaStream_t stream = nullptr;
};

[[noreturn]] inline void throw_launch_error(const char* kernel, const Launch& l, const std::string& error) {
  auto text = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  throw std::runtime_error(std::string(kernel) + ": " + error + ", grid " + text(l.grid) + ", block " + text(l.block) +
                           ", " + std::to_string(l.shared) + " bytes of dynamic shared memory");
}

// Without opting in a kernel gets at most this much dynamic shared memory (CUDA C++ Programming Guide, compute capabilities).
constexpr size_t kSharedWithoutOptIn = 48 * 1024;

// Starts `kernel` on the stream. `name` is for the error message only. Throws std::runtime_error where the launch fails.
template <class... Parameters, class... Arguments>
void launch(const char* name, const Launch& l, void (*kernel)(Parameters...), Arguments&&... arguments) {
#ifdef __CUDACC__
  cudaError_t error = cudaSuccess;
  if (l.shared > kSharedWithoutOptIn) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(l.shared));
  }
  if (error == cudaSuccess) {
    kernel<<<l.grid, l.block, l.shared, l.stream>>>(Parameters(std::forward<Arguments>(arguments))...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) throw_launch_error(name, l, cudaGetErrorString(error));
#else
  try {
    std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
    emulator::launch_threads({l.grid, l.block, l.shared}, name, [&] { std::apply(kernel, values); });
  } catch (const emulator::LaunchError& error) {
    throw_launch_error(name, l, error.what());
  }
#endif
}

}  // namespace fastlm::cuda
