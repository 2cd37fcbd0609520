// Broadcast of a bias to every row of a matrix, ahead of a product that accumulates onto it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lamina/kernels/dtype.h"

namespace lamina::cuda {

struct BroadcastBiasParams {
  const void* bias = nullptr;  // act [cols]
  void* y = nullptr;           // act [rows, cols]
  int64_t rows = 0, cols = 0;
  DType dtype = DType::kF32;
};
[[nodiscard]] cudaError_t LaunchBroadcastBias(const BroadcastBiasParams& params,
                                              cudaStream_t stream);

}  // namespace lamina::cuda
