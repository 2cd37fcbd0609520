#include <cstdlib>
#include <cstring>

#include "simd/kernels.h"

namespace lamina::cpu {

const KernelSet& SelectKernels() {
  const char* wish = std::getenv("LAMINA_CPU_ISA");
  const auto allows = [wish](const char* isa) {
    return wish == nullptr || std::strcmp(wish, isa) == 0;
  };
  if (wish != nullptr && std::strcmp(wish, "baseline") == 0) return kBaselineKernels;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && allows("avx512")) return kAvx512Kernels;
  if (avx2 && (allows("avx2") || allows("avx512"))) return kAvx2Kernels;
  return kBaselineKernels;
}

}  // namespace lamina::cpu
