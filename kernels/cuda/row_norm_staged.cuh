// The backward of row_norm.cuh for 16-bit rows of up to 2048 columns, eight rows at a time through
// shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include "row_norm.cuh"

namespace lamina::cuda {

// Whether it takes this one: dtype, width, alignment, and the workspace for at least one block.
[[nodiscard]] bool HasStagedRowNormBackward(const RowNormBackwardParams& params);
// Only where it does.
[[nodiscard]] cudaError_t LaunchStagedRowNormBackward(const RowNormBackwardParams& params,
                                                      cudaStream_t stream);

}  // namespace lamina::cuda
