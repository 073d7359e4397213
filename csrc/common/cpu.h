// What the processor can do, and which of the compiled instruction sets the kernels use.
#pragma once
#include <string>
#include <vector>

namespace fastlm {

// In rising order: a processor that has one has those before it.
enum class CpuIsa { baseline = 0, avx2, avx512, avx512_bf16 };

const char* cpu_isa_name(CpuIsa isa);

// The best instruction set that the processor and the operating system support, or the one that the environment
// variable FASTLM_CPU_ISA names. Decided at the first call.
// Throws std::invalid_argument where FASTLM_CPU_ISA is no such name, std::runtime_error where the processor lacks it.
CpuIsa cpu_isa();

std::vector<std::string> compiled_isas();   // names, plainest first
std::vector<std::string> supported_isas();  // those of compiled_isas() that run here
std::vector<std::string> cpu_features();    // e.g. "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"
std::string cpu_name();

}  // namespace fastlm
