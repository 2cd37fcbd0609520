// Purpose: from a run-time dtype to a compile-time element type, on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "lamina/kernels/dtype.h"

namespace lamina::cuda {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>{}) with the element type of `dtype`; cudaErrorInvalidValue for another one.
template <typename F>
inline cudaError_t DispatchFloat(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f(TypeTag<float>{});
    case DType::kBF16:
      return f(TypeTag<__nv_bfloat16>{});
    case DType::kF16:
      return f(TypeTag<__half>{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace lamina::cuda
