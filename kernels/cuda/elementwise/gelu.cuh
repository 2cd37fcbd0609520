// GELU and its derivative, by the error function or by tanh (backend.h's GeluKind).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "lamina/kernels/dtype.h"

namespace lamina::cuda {

// y = gelu(x), slope = gelu'(x)
struct GeluParams {
  const void* x = nullptr;  // act [elements]
  void* y = nullptr;        // act [elements]; may be x
  void* slope = nullptr;    // act [elements]; may be x; null: not wanted
  int64_t elements = 0;
  bool tanh = false;
  DType dtype = DType::kF32;
};
[[nodiscard]] cudaError_t LaunchGelu(const GeluParams& params, cudaStream_t stream);

// dx = dy * slope;  dbias += column sums of dx. With x in slope's place: slope = gelu'(x), rounded
// to act;  y_again = gelu(x)
struct GeluBackwardParams {
  const void* slope = nullptr;  // act [rows, cols]; null: x and y_again are there
  const void* x = nullptr;      // act [rows, cols]; null: slope is there
  void* y_again = nullptr;      // act [rows, cols], with x; may be x
  const void* dy = nullptr;     // act [rows, cols]
  void* dx = nullptr;           // act [rows, cols]; may be dy
  float* dbias = nullptr;       // fp32 [cols], accumulated; null: none
  int64_t rows = 0, cols = 0;
  bool tanh = false;
  DType dtype = DType::kF32;
  void* workspace = nullptr;  // used with dbias: at least one row of fp32
  size_t workspace_bytes = 0;
  bool unordered = false;  // dbias in any order: column_sum.cuh
  int multiprocessors = 1;
};
[[nodiscard]] cudaError_t LaunchGeluBackward(const GeluBackwardParams& params, cudaStream_t stream);

}  // namespace lamina::cuda
