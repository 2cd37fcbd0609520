// As kernels/cpu/simd/kernels_*.cc: what is included first is compiled for every x86-64.
#include "math_points.h"
#include "simd/includes.h"

#define LAMINA_CPU_ISA_LEVEL 0
#define LAMINA_CPU_ISA_NAMESPACE isa_baseline
// Instructions that every x86-64 has.
#include "math_points_of_isa.h"

namespace lamina::cpu {

constinit const MathPoints kBaselineMath = isa_baseline::MakeMathPoints("baseline");

}  // namespace lamina::cpu
