// LAMB over flat buffers cut into segments, each with a trust ratio of its own (backend.h's
// LambArgs).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "lamina/kernels/dtype.h"
#include "optimizer/optimizer.cuh"

namespace lamina::cuda {

// LambSegment of backend.h, which this cannot include; the backend asserts that they agree.
struct LambRange {
  int64_t begin, end;  // elements
  int32_t decay;
  int32_t adapt;
};

struct LambParams {
  float* master = nullptr;      // [elements]
  void* weights = nullptr;      // act [elements]; null: master is the weights
  const float* grad = nullptr;  // [elements]
  float* m = nullptr;           // [elements]
  float* v = nullptr;           // [elements]
  int64_t elements = 0;
  const LambRange* segments = nullptr;  // device memory, ascending, not overlapping
  int64_t segment_count = 0;
  float lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
  float correction1 = 1, correction2 = 1;
  float min_ratio = 0, max_ratio = 0;  // max 0: no clamp above
  const Control* control = nullptr;
  DType dtype = DType::kF32;  // of weights
  void* workspace = nullptr;  // LambWorkspaceBytes, aligned to 8 bytes
};

// What these many elements and segments need: at most kLambWorkspaceBytes, but where there are
// very many segments, whose own partial sums don't fit into that.
size_t LambWorkspaceBytes(int64_t elements, int64_t segment_count);

[[nodiscard]] cudaError_t LaunchLamb(const LambParams& params, cudaStream_t stream);

}  // namespace lamina::cuda
