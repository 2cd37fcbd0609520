// As kernels/cpu/simd/kernels_*.cc: what is included first is compiled for every x86-64.
#include "math_points.h"
#include "simd/includes.h"

#define LAMINA_CPU_ISA_LEVEL 1
#define LAMINA_CPU_ISA_NAMESPACE isa_avx2
#pragma GCC target("avx2,fma,f16c")
#include "math_points_of_isa.h"

namespace lamina::cpu {

constinit const MathPoints kAvx2Math = isa_avx2::MakeMathPoints("avx2");

}  // namespace lamina::cpu
