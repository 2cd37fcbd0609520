// The gradient's norm with the decision to clip or skip, and AdamW, each over one flat range.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "lamina/kernels/dtype.h"

namespace lamina::cuda {

// OptimizerControl of backend.h, which this cannot include; the backend asserts that they agree.
struct Control {
  float grad_scale;
  float grad_norm;
  int32_t skip;
  int32_t reserved;
};

struct GradientStatsParams {
  const float* grad = nullptr;  // [elements]
  int64_t elements = 0;
  float loss_scale = 1.0f;
  float max_norm = 0.0f;  // 0: no clipping
  Control* control = nullptr;
  void* workspace = nullptr;  // kGradientStatsWorkspaceBytes
};
[[nodiscard]] cudaError_t LaunchGradientStats(const GradientStatsParams& params,
                                              cudaStream_t stream);

struct AdamWParams {
  float* master = nullptr;      // [elements]
  void* weights = nullptr;      // act [elements]; null: master is the weights
  const float* grad = nullptr;  // [elements]
  float* m = nullptr;           // [elements]
  float* v = nullptr;           // [elements]
  int64_t elements = 0;
  float lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
  float correction1 = 1, correction2 = 1;
  const Control* control = nullptr;
  DType dtype = DType::kF32;  // of weights
};
[[nodiscard]] cudaError_t LaunchAdamW(const AdamWParams& params, cudaStream_t stream);

}  // namespace lamina::cuda
