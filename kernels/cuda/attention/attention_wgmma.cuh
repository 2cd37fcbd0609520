// Attention on tensor cores, a warpgroup at a time: as attention_mma.cuh, with the same SoftmaxRow,
// the forward for sequences of kWgmmaMinSeq tokens and more. Of what is there twice, the wide one
// is for head dims above kWgmmaHeadDim. Blocks go by params.multiprocessors.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/attention.cuh"

namespace lamina::cuda {

constexpr int kWgmmaMinSeq = 65;  // for fewer tokens, half of a block would have nothing to do

[[nodiscard]] cudaError_t LaunchAttentionWgmma(const AttentionParams& params, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchAttentionWgmmaWide(const AttentionParams& params,
                                                   cudaStream_t stream);
// Fills params.delta itself. This and the following fill params.sums where it is there.
[[nodiscard]] cudaError_t LaunchAttentionWgmmaBackward(const AttentionParams& params,
                                                       cudaStream_t stream);
// The same in one pass, where HasOnePassBackward, from params.delta.
[[nodiscard]] cudaError_t LaunchAttentionWgmmaOnePassBackward(const AttentionParams& params,
                                                              cudaStream_t stream);
// The same for sequences of up to kWgmmaHeadRows tokens, however short, without params.delta.
[[nodiscard]] cudaError_t LaunchAttentionWgmmaHeadBackward(const AttentionParams& params,
                                                           cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchAttentionWgmmaWideHeadBackward(const AttentionParams& params,
                                                               cudaStream_t stream);

}  // namespace lamina::cuda
