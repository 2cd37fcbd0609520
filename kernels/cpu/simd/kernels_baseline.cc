// What is included before the pragma is compiled for every x86-64: it may be shared with other
// translation units. What comes after it is this instruction set's own, in its own namespace.
#include "simd/includes.h"

#define LAMINA_CPU_ISA_LEVEL 0
#define LAMINA_CPU_ISA_NAMESPACE isa_baseline
// Instructions that every x86-64 has.
#include "simd/kernel_set.h"

namespace lamina::cpu {

// constinit: this translation unit may run nothing before the processor was asked.
constinit const KernelSet kBaselineKernels = isa_baseline::MakeKernelSet("baseline");

}  // namespace lamina::cpu
