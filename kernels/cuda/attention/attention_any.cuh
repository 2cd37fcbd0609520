// Attention in fp32 arithmetic for every dtype, S and head dim.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/attention.cuh"

namespace lamina::cuda {

[[nodiscard]] cudaError_t LaunchAttentionAny(const AttentionParams& params, cudaStream_t stream);
// Needs params.delta filled.
[[nodiscard]] cudaError_t LaunchAttentionAnyBackward(const AttentionParams& params,
                                                     cudaStream_t stream);

}  // namespace lamina::cuda
