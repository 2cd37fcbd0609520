// The feed-forward branch's products with GELU in them, for tensor cores: what the separate passes
// over [T, I] would read and write again stays in registers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "lamina/kernels/dtype.h"

namespace lamina::cuda {

// pre = x w^T + bias;  y = gelu(pre as stored)
struct GeluProductParams {
  const void* x = nullptr;     // act [m, k]
  const void* w = nullptr;     // act [n, k]
  const void* bias = nullptr;  // act [n]
  void* pre = nullptr;         // act [m, n]; null: not kept
  void* y = nullptr;           // act [m, n]
  int64_t m = 0, n = 0, k = 0;
  bool tanh = false;
  DType dtype = DType::kBF16;
};

// dx = (dy w) * gelu'(pre);  dbias += column sums of dx, in a fixed order
struct GeluProductBackwardParams {
  const void* dy = nullptr;   // act [m, k]
  const void* w = nullptr;    // act [k, n]
  const void* pre = nullptr;  // act [m, n]
  void* dx = nullptr;         // act [m, n]
  float* dbias = nullptr;     // fp32 [n]; null: none
  int64_t m = 0, n = 0, k = 0;
  bool tanh = false;
  DType dtype = DType::kBF16;
  float* workspace = nullptr;  // with dbias: GeluProductWorkspaceBytes(m, n)
};

// Whether there is a kernel for it: 16-bit operands that the copy engine can read. Otherwise a
// product and a pass over its result do it.
[[nodiscard]] bool HasGeluProduct(const GeluProductParams& params);
[[nodiscard]] bool HasGeluProduct(const GeluProductBackwardParams& params);

// Only where there is one.
[[nodiscard]] cudaError_t LaunchGeluProduct(const GeluProductParams& params, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchGeluProductBackward(const GeluProductBackwardParams& params,
                                                    cudaStream_t stream);

}  // namespace lamina::cuda
