// row_norm.cuh for 16-bit rows of up to 1024 columns: a warp a row, through a ring of rows in
// shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "norms/row_norm.cuh"

namespace lamina::cuda {

// Whether it takes this one: dtype, width, alignment; forward only with a norm.
[[nodiscard]] bool HasRingRowNorm(const RowNormParams& params);
[[nodiscard]] bool HasRingRowNormBackward(const RowNormBackwardParams& params);

// Only where it does.
[[nodiscard]] cudaError_t LaunchRingRowNorm(const RowNormParams& params, cudaStream_t stream);
// Each of `blocks` blocks, a multiprocessor's one at most, leaves its sums in the workspace: of
// block b and array a fp32 [cols] from (a * blocks + b) * cols on. With a norm array 0 is dgamma's
// and 1 dbeta's; the next one is dbias', with dx.
[[nodiscard]] cudaError_t LaunchRingRowNormBackward(const RowNormBackwardParams& params,
                                                    int64_t blocks, cudaStream_t stream);

}  // namespace lamina::cuda
