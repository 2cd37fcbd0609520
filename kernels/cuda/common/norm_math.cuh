// A layer norm's values, element by element, each operation with a rounding of its own: so that
// Backward, which makes them again, has the forward's bits whatever the compiler would contract.
#pragma once

namespace lamina::cuda {

__device__ __forceinline__ float Normalised(float x, float mean, float rstd) {
  return __fmul_rn(__fsub_rn(x, mean), rstd);
}

__device__ __forceinline__ float NormOutput(float normalised, float gamma, float beta) {
  return __fmaf_rn(normalised, gamma, beta);
}

}  // namespace lamina::cuda
