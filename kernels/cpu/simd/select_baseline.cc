// For compilers that can't give part of a source other instructions (clang has no `GCC target`
// pragma): what every x86-64 runs.
#include "simd/kernels.h"

namespace lamina::cpu {

const KernelSet& SelectKernels() { return kBaselineKernels; }

}  // namespace lamina::cpu
