// Purpose: exchange within a quad, the four neighbouring lanes that share a row of a tensor core
// fragment.
#pragma once

#include <cstdint>

namespace lamina::cuda {

// Among the four lanes of a quad: afterwards w[i] is what lane i held in w[lane % 4].
__device__ __forceinline__ void QuadTranspose(uint32_t (&w)[4]) {
  const bool odd = (threadIdx.x & 1u) != 0;
  const bool upper = (threadIdx.x & 2u) != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, odd ? w[i] : w[i + 1], 1);
    if (odd) {
      w[i] = got;
    } else {
      w[i + 1] = got;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, upper ? w[i] : w[i + 2], 2);
    if (upper) {
      w[i] = got;
    } else {
      w[i + 2] = got;
    }
  }
}

}  // namespace lamina::cuda
