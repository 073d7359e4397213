// One source, several instruction sets.
//
// A .cpp file with FASTLM_DISPATCH in it is compiled once per instruction set: the build defines FASTLM_ISA as the set's
// name (baseline, avx2, avx512, avx512_bf16) and passes the flags. The file puts its code in
// `namespace fastlm::FASTLM_ISA` and publishes a function by FASTLM_DISPATCH, which the baseline compilation alone
// expands to a function in `namespace fastlm` that calls the copy for the processor at hand.
//
// Why the namespace: an inline function of the same name in two objects is merged by the linker into one, and the copy
// that survives could be the one for AVX-512. As a second guard the build links objects from the plainest instruction
// set up, since the first copy is the one that is kept: it matters for what a std:: template leaves behind.
#pragma once
#include "common/cpu.h"

#ifndef FASTLM_ISA
#error "the build compiles this file once per instruction set, with -DFASTLM_ISA=<name> (build_tools/toolchain.py)"
#endif

// FASTLM_DISPATCH: the file is compiled for baseline, avx2 and avx512. FASTLM_DISPATCH_BF16: for avx512_bf16 too; for
// kernels that multiply bf16 numbers.
#define FASTLM_DISPATCH(name, parameters, arguments) FASTLM_DISPATCH_UP_TO(avx512, name, parameters, arguments)
#define FASTLM_DISPATCH_BF16(name, parameters, arguments) FASTLM_DISPATCH_UP_TO(avx512_bf16, name, parameters, arguments)

#if defined(FASTLM_ISA_IS_BASELINE) && defined(__x86_64__)
#define FASTLM_DISPATCH_UP_TO(best, name, parameters, arguments) \
  namespace fastlm {                                             \
  namespace avx2 {                                               \
  void name parameters;                                          \
  }                                                              \
  namespace avx512 {                                             \
  void name parameters;                                          \
  }                                                              \
  namespace best {                                               \
  void name parameters;                                          \
  }                                                              \
  void name parameters {                                         \
    switch (cpu_isa()) {                                         \
      case CpuIsa::baseline: return baseline::name arguments;    \
      case CpuIsa::avx2: return avx2::name arguments;            \
      case CpuIsa::avx512: return avx512::name arguments;        \
      case CpuIsa::avx512_bf16: return best::name arguments;     \
    }                                                            \
  }                                                              \
  }
#elif defined(FASTLM_ISA_IS_BASELINE)
#define FASTLM_DISPATCH_UP_TO(best, name, parameters, arguments) \
  namespace fastlm {                                             \
  void name parameters {                                         \
    cpu_isa(); /* refuses a set that was forced and is not here */ \
    baseline::name arguments;                                    \
  }                                                              \
  }
#else
#define FASTLM_DISPATCH_UP_TO(best, name, parameters, arguments)
#endif
