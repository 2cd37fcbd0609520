// The feed-forward branch's products with GELU in them, for tensor cores: what the separate passes
// over [T, I] would read and write again stays in registers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "lamina/kernels/dtype.h"

namespace lamina::cuda {

// pre = x w^T + bias;  y = gelu(pre), slope = gelu'(pre), both of pre rounded to act
struct GeluProductParams {
  const void* x = nullptr;     // act [m, k]
  const void* w = nullptr;     // act [n, k]
  const void* bias = nullptr;  // act [n]
  void* pre = nullptr;         // act [m, n]; null: not kept
  void* slope = nullptr;       // act [m, n]; null: not kept. Not both
  void* y = nullptr;           // act [m, n]
  int64_t m = 0, n = 0, k = 0;
  bool tanh = false;
  DType dtype = DType::kBF16;
};

// dx = (dy w) * slope;  dbias += column sums of dx, in a fixed order. With pre in slope's place:
// slope = gelu'(pre), rounded to act;  y_again = gelu(pre)
struct GeluProductBackwardParams {
  const void* dy = nullptr;     // act [m, k]
  const void* w = nullptr;      // act [k, n]
  const void* slope = nullptr;  // act [m, n]; null: pre and y_again are there
  const void* pre = nullptr;    // act [m, n]; null: slope is there
  void* y_again = nullptr;      // act [m, n], with pre; may be pre
  void* dx = nullptr;           // act [m, n]
  float* dbias = nullptr;       // fp32 [n]; null: none
  int64_t m = 0, n = 0, k = 0;
  bool tanh = false;
  DType dtype = DType::kBF16;
  float* sums = nullptr;    // with dbias: for GeluProductSlices(m) partial sums of n columns
  bool leave_sums = false;  // and they stay there; otherwise they are added to dbias
};

// Whether to do it so; otherwise a product and a pass over its result do it. There is a kernel for
// 16-bit operands that the copy engine can read. cuBLAS's product gains on it as k grows, up to
// where that is more than the pass: at (8192, 8192, 2048) it takes 466 us forward with slopes,
// where cuBLAS and a pass take 487, and 416 backward by slopes (H100, bf16; docs/performance.md).
[[nodiscard]] bool UseGeluProduct(const GeluProductParams& params);
[[nodiscard]] bool UseGeluProduct(const GeluProductBackwardParams& params);

// Only where that is so, but for k.
[[nodiscard]] cudaError_t LaunchGeluProduct(const GeluProductParams& params, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchGeluProductBackward(const GeluProductBackwardParams& params,
                                                    cudaStream_t stream);

}  // namespace lamina::cuda
