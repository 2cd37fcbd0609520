// The forward of attention on tensor cores: bf16 and fp16, head dims that are multiples of 8 up to
// 128, every pointer aligned to 16 bytes. Probabilities and score gradients are rounded to act
// before their products.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/attention.cuh"

namespace lamina::cuda {

[[nodiscard]] cudaError_t LaunchAttentionMma(const AttentionParams& params, cudaStream_t stream);

}  // namespace lamina::cuda
