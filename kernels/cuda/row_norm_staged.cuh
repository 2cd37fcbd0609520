// The backward of row_norm.cuh for 16-bit rows of up to 2048 columns, eight rows at a time through
// shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include "row_norm.cuh"

namespace lamina::cuda {

constexpr int kStagedRows = 8;  // that a block has at once

// Whether it takes this one: dtype, width, alignment.
[[nodiscard]] bool HasStagedRowNormBackward(const RowNormBackwardParams& params);
// Only where it does. Each of `blocks` blocks leaves its sums in the workspace: of block b and
// array a, 0 for dgamma, 1 for dbeta, 2 for dbias, fp32 [cols] from (a * blocks + b) * cols on.
[[nodiscard]] cudaError_t LaunchStagedRowNormBackward(const RowNormBackwardParams& params,
                                                      int64_t blocks, cudaStream_t stream);

}  // namespace lamina::cuda
