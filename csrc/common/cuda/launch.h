// Launching a kernel: the one place that starts one, checks the launch and says what failed.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/cuda/platform.h"

namespace fastlm::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared = 0;  // bytes of dynamic shared memory
  cudaStream_t stream = nullptr;
  dim3 cluster = {1, 1, 1};   // sm_90: blocks that run together and share their shared memory
  bool programmatic = false;  // sm_90: may begin early; the kernel waits by ptx::grid_dependency_wait()
  bool most_shared = false;   // as little L1 cache as there can be, so that several blocks' shared memory fits
};

[[noreturn]] inline void throw_launch_error(const char* kernel, const Launch& l, const std::string& error) {
  auto text = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  throw std::runtime_error(std::string(kernel) + ": " + error + ", grid " + text(l.grid) + ", block " + text(l.block) +
                           ", " + std::to_string(l.shared) + " bytes of dynamic shared memory");
}

// A kernel that has more dynamic shared memory opts in. It has to from 48 KB on, its static arrays included (CUDA C++
// Programming Guide, compute capabilities), of which no kernel here has more than the difference.
constexpr size_t kOptInFrom = 48 * 1024 - 8 * 1024;

// The most shared memory that a block may have on the current device, bytes.
inline size_t max_shared_memory() {
#ifdef __CUDACC__
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) {
    cudaGetLastError();  // taken: nobody else is to find it later
    throw std::runtime_error(std::string("the device's shared memory is not known: ") + cudaGetErrorString(error));
  }
  return static_cast<size_t>(bytes);
#else
  return emulator::max_shared_memory();
#endif
}

// The multiprocessors of the current device: how many blocks that fill one each run at a time.
inline int multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) {
    cudaGetLastError();  // taken: nobody else is to find it later
    throw std::runtime_error(std::string("the device's multiprocessors are not known: ") + cudaGetErrorString(error));
  }
  return count;
#else
  return emulator::multiprocessors();
#endif
}

// Starts `kernel` on the stream. `name` is for the error message only. Throws std::runtime_error where the launch fails.
template <class... Parameters, class... Arguments>
void launch(const char* name, const Launch& l, void (*kernel)(Parameters...), Arguments&&... arguments) {
#ifdef __CUDACC__
  cudaError_t error = cudaSuccess;
  if (l.shared > kOptInFrom) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(l.shared));
  }
  if (error == cudaSuccess && l.most_shared) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {l.cluster.x, l.cluster.y, l.cluster.z};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    const bool clusters = l.cluster.x * l.cluster.y * l.cluster.z > 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = l.grid;
    config.blockDim = l.block;
    config.dynamicSmemBytes = l.shared;
    config.stream = l.stream;
    config.attrs = attributes + (clusters ? 0 : 1);
    config.numAttrs = (clusters ? 1 : 0) + (l.programmatic ? 1 : 0);
    error = cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // taken: nobody else is to find it later
    std::string text = cudaGetErrorString(error);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
      text += ": fastlm was built for compute capability 8.0 and newer, or for what FASTLM_CUDA_ARCHS said";
    }
    throw_launch_error(name, l, text);
  }
#else
  try {
    std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
    const emulator::LaunchConfig config{l.grid, l.block, l.shared, l.cluster, l.programmatic, l.shared > kOptInFrom};
    emulator::launch_threads(config, [&] { std::apply(kernel, values); });
  } catch (const emulator::LaunchError& error) {
    throw_launch_error(name, l, error.what());
  }
#endif
}

}  // namespace fastlm::cuda
