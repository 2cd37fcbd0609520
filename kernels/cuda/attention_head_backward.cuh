// The backward of attention on tensor cores for sequences of up to kWholeHeadRows tokens; otherwise
// as attention_mma.cuh, but it computes delta itself.
#pragma once

#include <cuda_runtime_api.h>

#include "attention.cuh"

namespace lamina::cuda {

constexpr int kWholeHeadRows = 128;

[[nodiscard]] cudaError_t LaunchAttentionHeadBackward(const AttentionParams& params,
                                                      cudaStream_t stream);

}  // namespace lamina::cuda
