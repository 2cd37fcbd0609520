// This translation unit's MathPoints; included after its instruction set is chosen.
#pragma once

#include "simd/math.h"

namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE {

template <F (*kFunction)(F)>
void Map(const float* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) Store(out + i, kFunction(Load(x + i)));
}

template <GeluPoint (*kFunction)(F)>
void MapPoint(const float* x, float* value, float* slope, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const GeluPoint point = kFunction(Load(x + i));
    Store(value + i, point.value);
    Store(slope + i, point.slope);
  }
}

constexpr MathPoints MakeMathPoints(const char* isa) {
  return MathPoints{.isa = isa,
                    .exp = Map<Exp>,
                    .gelu_erf = Map<GeluErf>,
                    .gelu_erf_point = MapPoint<GeluErfPoint>,
                    .gelu_tanh = Map<GeluTanh>,
                    .gelu_tanh_point = MapPoint<GeluTanhPoint>};
}

}  // namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE
