// The backward of row_norm.cuh for 16-bit rows of up to 2048 columns, eight rows at a time through
// shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include "norms/row_norm.cuh"

namespace lamina::cuda {

constexpr int kStagedRows = 8;  // that a block has at once

// Whether it takes this one: dtype, width, alignment.
[[nodiscard]] bool HasStagedRowNormBackward(const RowNormBackwardParams& params);
// Only where it does. Each of `blocks` blocks leaves its sums in the workspace, as those of
// row_norm_ring.cuh do.
[[nodiscard]] cudaError_t LaunchStagedRowNormBackward(const RowNormBackwardParams& params,
                                                      int64_t blocks, cudaStream_t stream);

}  // namespace lamina::cuda
