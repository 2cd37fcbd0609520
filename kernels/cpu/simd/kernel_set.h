// This translation unit's table of kernels.
#pragma once

#include "simd/attention_head.h"
#include "simd/elementwise.h"
#include "simd/norm_rows.h"

namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE {

template <typename E>
constexpr ActKernels MakeActKernels() {
  return ActKernels{
      .bias_gelu = BiasGelu<E, E>,
      .bias_gelu_f32 = BiasGelu<float, E>,
      .gelu_backward = GeluBackward<E>,
      .dropout_add_norm = DropoutAddNorm<E>,
      .dropout_add_norm_backward = DropoutAddNormBackward<E>,
      .column_sum = ColumnSum<E>,
      .attention = AttentionForward<E>,
      .attention_backward = AttentionBackward<E>,
      .to_f32 = ToF32<E>,
      .from_f32 = FromF32<E>,
      .adamw = AdamW<E>,
      .lamb_step = LambStep<E>,
  };
}

constexpr KernelSet MakeKernelSet(const char* isa) {
  return KernelSet{
      .isa = isa,
      .f32 = MakeActKernels<float>(),
      .bf16 = MakeActKernels<BF16>(),
      .f16 = MakeActKernels<F16>(),
      .sum_squares = SumSquares,
      .lamb_moments = LambMoments,
      .add = Add,
  };
}

}  // namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE
