// Purpose: the application of a dropout to neighbouring elements of a row.
#pragma once

#include <cstdint>

#include "common/dropout_params.h"
#include "lamina/kernels/philox.h"

namespace lamina::cuda {

// v *= mask * scale for columns [col, col + kWidth) of `row`. A width of 8 needs col % 8 == 0.
template <int kWidth>
__device__ __forceinline__ void ApplyDropout(const DropoutParams& dropout, const RngState& rng,
                                             int64_t row, int col, float (&v)[kWidth]) {
  static_assert(kWidth == 8 || kWidth == 1, "8 elements or one");
  const uint32_t c = static_cast<uint32_t>(col);
  const Philox4 bits = DropoutBits(rng, dropout.stream, static_cast<uint64_t>(row), c >> 3);
  if constexpr (kWidth == 8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t lane = (bits.word[i >> 1] >> ((i & 1) * 16)) & 0xFFFFu;
      v[i] = lane < dropout.threshold ? v[i] * dropout.scale : 0.0f;
    }
  } else {
    // Selected without indexing, so that the words stay in registers.
    const uint32_t i = c & 7u;
    const uint32_t low = (i & 2u) != 0 ? bits.word[1] : bits.word[0];
    const uint32_t high = (i & 2u) != 0 ? bits.word[3] : bits.word[2];
    const uint32_t word = (i & 4u) != 0 ? high : low;
    const uint32_t lane = (word >> ((i & 1u) * 16u)) & 0xFFFFu;
    v[0] = lane < dropout.threshold ? v[0] * dropout.scale : 0.0f;
  }
}

}  // namespace lamina::cuda
