// GCC 12's own AVX-512 header draws these warnings for its deliberately undefined operands.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

// As kernels/cpu/simd/kernels_*.cc: what is included first is compiled for every x86-64.
#include "math_points.h"
#include "simd/includes.h"

#define LAMINA_CPU_ISA_LEVEL 2
#define LAMINA_CPU_ISA_NAMESPACE isa_avx512
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "math_points_of_isa.h"

namespace lamina::cpu {

constinit const MathPoints kAvx512Math = isa_avx512::MakeMathPoints("avx512");

}  // namespace lamina::cpu
