// Conversion between fp32, bf16 and fp16, rounding to nearest even.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lamina/kernels/dtype.h"

namespace lamina::cuda {

struct CastParams {
  const void* src = nullptr;  // [elements]
  void* dst = nullptr;        // [elements]
  DType src_dtype = DType::kF32, dst_dtype = DType::kF32;
  int64_t elements = 0;
};
[[nodiscard]] cudaError_t LaunchCast(const CastParams& params, cudaStream_t stream);

}  // namespace lamina::cuda
