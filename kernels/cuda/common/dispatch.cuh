// Purpose: from a run-time dtype or choice to a compile-time one, on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <type_traits>

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

// The same, with f(TypeTag<T>{}, std::bool_constant<choice>{}).
template <typename F>
inline cudaError_t DispatchFloat(DType dtype, bool choice, F&& f) {
  return DispatchFloat(dtype, [&](auto tag) {
    return choice ? f(tag, std::true_type{}) : f(tag, std::false_type{});
  });
}

// The same for kernels of 16-bit elements alone: cudaErrorInvalidValue for fp32 too.
template <typename F>
inline cudaError_t DispatchHalf(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBF16:
      return f(TypeTag<__nv_bfloat16>{});
    case DType::kF16:
      return f(TypeTag<__half>{});
    default:
      return cudaErrorInvalidValue;
  }
}

// And with a choice too.
template <typename F>
inline cudaError_t DispatchHalf(DType dtype, bool choice, F&& f) {
  return DispatchHalf(dtype, [&](auto tag) {
    return choice ? f(tag, std::true_type{}) : f(tag, std::false_type{});
  });
}

}  // namespace lamina::cuda
