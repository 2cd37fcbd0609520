// A matrix product for any shape and alignment: what the backend falls back on where cuBLASLt
// offers no algorithm (some odd widths and unaligned pointers in 16-bit types). fp32 accumulation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lamina/kernels/dtype.h"

namespace lamina::cuda {

// d[i, j] = sum over p of a[i, p] b[j, p] + bias[j] (+ d[i, j] where accumulate).
// Element [i, p] of a lies at a[i * a_row + p * a_col], and so on; d is row-major and dense.
struct ProductAnyParams {
  const void* a = nullptr;  // operand dtype
  int64_t a_row = 0, a_col = 0;
  const void* b = nullptr;  // operand dtype
  int64_t b_row = 0, b_col = 0;
  const void* bias = nullptr;  // operand dtype [n]; null: none. Only where d has that dtype too
  void* d = nullptr;           // [m, n]
  int64_t m = 0, n = 0, k = 0;
  DType operand_dtype = DType::kF32;
  DType result_dtype = DType::kF32;  // the operands' or fp32
  bool accumulate = false;
};
[[nodiscard]] cudaError_t LaunchProductAny(const ProductAnyParams& params, cudaStream_t stream);

}  // namespace lamina::cuda
