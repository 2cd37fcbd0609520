// What is included before the pragma is compiled for every x86-64: it may be shared with other
// translation units. What comes after it is this instruction set's own, in its own namespace.
#include "simd/includes.h"

#define LAMINA_CPU_ISA_LEVEL 1
#define LAMINA_CPU_ISA_NAMESPACE isa_avx2
#pragma GCC target("avx2,fma,f16c")
#include "simd/kernel_set.h"

namespace lamina::cpu {

// constinit: this translation unit may run nothing before the processor was asked.
constinit const KernelSet kAvx2Kernels = isa_avx2::MakeKernelSet("avx2");

}  // namespace lamina::cpu
