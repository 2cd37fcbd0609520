// The vector functions of kernels/cpu/simd/math.h over arrays, one version per instruction set, for
// math_test.cc. A processor may run only the versions that it has.
#pragma once

#include <cstdint>

namespace lamina::cpu {

struct MathPoints {
  const char* isa;
  // out[0, n) = f(x[0, n)); n a multiple of 16.
  void (*exp)(const float* x, float* out, int64_t n);
  void (*gelu_erf)(const float* x, float* out, int64_t n);
  void (*gelu_erf_point)(const float* x, float* value, float* slope, int64_t n);
  void (*gelu_tanh)(const float* x, float* out, int64_t n);
  void (*gelu_tanh_point)(const float* x, float* value, float* slope, int64_t n);
};

extern const MathPoints kBaselineMath;
extern const MathPoints kAvx2Math;
extern const MathPoints kAvx512Math;

}  // namespace lamina::cpu
