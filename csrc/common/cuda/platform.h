// The seam between the two compilers of a .cu file. nvcc builds it for the device; g++ builds it for the emulator
// (csrc/emulator), which runs every thread as a fiber on the CPU. What differs between the two stands here and in the
// PTX wrappers (ptx_*.h), so kernels contain no <<<>>>, no __shared__ and no asm.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

#define FASTLM_DEVICE __device__ __forceinline__
// A shared array of n elements, and the block's dynamic shared memory as bytes.
#define FASTLM_SHARED(T, name, n) __shared__ T name[n]
#define FASTLM_SHARED_DYNAMIC(name, alignment) extern __shared__ __align__(alignment) unsigned char name[]
// The caller's file and line, an argument of every emulated instruction. The device build has no such argument.
#define FASTLM_SITE
#define FASTLM_AND_SITE
// Defined where code for sm_90a is compiled: kernels of wgmma and setmaxnreg have a body there alone.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FASTLM_SM90A
#endif

#else

#define FASTLM_SM90A

#define FASTLM_DEVICE inline
#define FASTLM_SITE ::fastlm::emulator::Site site = ::fastlm::emulator::Site::here()
#define FASTLM_AND_SITE , FASTLM_SITE
#include "emulator/cuda.h"

#endif
