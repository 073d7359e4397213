#include "common/cpu.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastlm {
namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

bool bit(uint32_t word, int i) { return (word >> i) & 1; }

// XCR0: the register files that the operating system saves on a context switch. A set that it does not save must not be
// used, whatever cpuid says.
uint64_t os_saved_state() {
  if (!bit(cpuid(1).ecx, 27)) return 0;  // OSXSAVE
  uint32_t eax, edx;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (uint64_t(edx) << 32) | eax;
}

std::vector<std::string> detect_features() {
  const Registers one = cpuid(1), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const uint64_t saved = os_saved_state();
  const bool ymm = (saved & 0x6) == 0x6;            // SSE and AVX state
  const bool zmm = (saved & 0xe6) == 0xe6;          // and opmask, ZMM_Hi256, Hi16_ZMM
  const bool tiles = (saved & 0x60000) == 0x60000;  // AMX: XTILECFG and XTILEDATA
  const struct {
    const char* name;
    bool present;
  } table[] = {
      {"sse4_2", bit(one.ecx, 20)},
      {"avx", ymm && bit(one.ecx, 28)},
      {"f16c", ymm && bit(one.ecx, 29)},
      {"fma", ymm && bit(one.ecx, 12)},
      {"avx2", ymm && bit(seven.ebx, 5)},
      {"bmi2", bit(seven.ebx, 8)},
      {"avx512f", zmm && bit(seven.ebx, 16)},
      {"avx512dq", zmm && bit(seven.ebx, 17)},
      {"avx512cd", zmm && bit(seven.ebx, 28)},
      {"avx512bw", zmm && bit(seven.ebx, 30)},
      {"avx512vl", zmm && bit(seven.ebx, 31)},
      {"avx512_vnni", zmm && bit(seven.ecx, 11)},
      {"avx512_bf16", zmm && bit(seven_one.eax, 5)},
      {"avx512_fp16", zmm && bit(seven.edx, 23)},
      {"amx_tile", tiles && bit(seven.edx, 24)},
      {"amx_bf16", tiles && bit(seven.edx, 22)},
      {"amx_int8", tiles && bit(seven.edx, 25)},
  };
  std::vector<std::string> features;
  for (const auto& row : table) {
    if (row.present) features.emplace_back(row.name);
  }
  return features;
}

#elif defined(__aarch64__)
std::vector<std::string> detect_features() { return {"neon"}; }
#else
std::vector<std::string> detect_features() { return {}; }
#endif

// The flags that setup.py compiles each set with.
std::vector<const char*> needed_features(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::baseline: return {};
    case CpuIsa::avx2: return {"avx2", "fma", "f16c", "bmi2"};
    case CpuIsa::avx512:
      return {"avx2", "fma", "f16c", "bmi2", "avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"};
    case CpuIsa::avx512_bf16:
      return {"avx2",     "fma",      "f16c",     "bmi2",        "avx512f",    "avx512dq",
              "avx512cd", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"};
  }
  return {};
}

std::vector<CpuIsa> compiled() {
#if defined(__x86_64__)
  return {CpuIsa::baseline, CpuIsa::avx2, CpuIsa::avx512, CpuIsa::avx512_bf16};
#else
  return {CpuIsa::baseline};
#endif
}

// The first feature that the processor lacks for `isa`; null: it has them all.
const char* missing_feature(CpuIsa isa) {
  static const std::vector<std::string> features = detect_features();
  for (const char* name : needed_features(isa)) {
    if (std::find(features.begin(), features.end(), name) == features.end()) return name;
  }
  return nullptr;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

CpuIsa choose_isa() {
  const char* forced = std::getenv("FASTLM_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    CpuIsa best = CpuIsa::baseline;
    for (CpuIsa isa : compiled()) {
      if (missing_feature(isa) == nullptr) best = isa;
    }
    return best;
  }
  for (CpuIsa isa : compiled()) {
    if (std::strcmp(forced, cpu_isa_name(isa)) != 0) continue;
    if (const char* missing = missing_feature(isa)) {
      throw std::runtime_error("FASTLM_CPU_ISA=" + std::string(forced) + ": this processor (" + cpu_name() + ") lacks " +
                               missing + "; it can run: " + join(supported_isas()));
    }
    return isa;
  }
  throw std::invalid_argument("FASTLM_CPU_ISA=" + std::string(forced) + " is not an instruction set of this build; wanted one of: " +
                              join(compiled_isas()));
}

}  // namespace

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::baseline: return "baseline";
    case CpuIsa::avx2: return "avx2";
    case CpuIsa::avx512: return "avx512";
    case CpuIsa::avx512_bf16: return "avx512_bf16";
  }
  return "?";
}

CpuIsa cpu_isa() {
  static const CpuIsa isa = choose_isa();  // after an exception the next call tries again
  return isa;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (CpuIsa isa : compiled()) names.emplace_back(cpu_isa_name(isa));
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (CpuIsa isa : compiled()) {
    if (missing_feature(isa) == nullptr) names.emplace_back(cpu_isa_name(isa));
  }
  return names;
}

std::vector<std::string> cpu_features() { return detect_features(); }

std::string cpu_name() {
#if defined(__x86_64__)
  if (cpuid(0x80000000u).eax < 0x80000004u) return "x86-64";
  char brand[49] = {};
  for (uint32_t i = 0; i < 3; ++i) {
    const Registers r = cpuid(0x80000002u + i);
    std::memcpy(brand + 16 * i, &r, 16);
  }
  std::string name(brand);
  name.erase(0, name.find_first_not_of(' '));
  return name;
#elif defined(__aarch64__)
  return "arm64";
#else
  return "unknown";
#endif
}

}  // namespace fastlm
