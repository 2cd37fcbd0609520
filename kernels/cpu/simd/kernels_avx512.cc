// GCC 12's own AVX-512 header draws these warnings for its deliberately undefined operands.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

// What is included before the pragma is compiled for every x86-64: it may be shared with other
// translation units. What comes after it is this instruction set's own, in its own namespace.
#include "simd/includes.h"

#define LAMINA_CPU_ISA_LEVEL 2
#define LAMINA_CPU_ISA_NAMESPACE isa_avx512
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "simd/kernel_set.h"

namespace lamina::cpu {

// constinit: this translation unit may run nothing before the processor was asked.
constinit const KernelSet kAvx512Kernels = isa_avx512::MakeKernelSet("avx512");

}  // namespace lamina::cpu
