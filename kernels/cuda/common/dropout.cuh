// Purpose: the application of a dropout to neighbouring elements of a row. The product has a
// rounding of its own, whatever is added to it: every kernel has the same bits.
//
// Draws are compared by arithmetic of fp16 pairs. A byte b below a biased exponent is 1024 + b, a
// difference of two such numbers is a whole number, and saturated it is 1 where it is above 0, else
// 0. That takes half an instruction an element where integers take four, and of the units that
// multiply: attention keeps those of integers busy already.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/dropout_params.h"
#include "lamina/kernels/philox.h"

namespace lamina::cuda {

// Pairs of fp16 in a word, the first in the lower half.
constexpr uint32_t kBytePair = 0x64006400u;  // 1024 in both; + b is 1024 + b
constexpr uint32_t kHalfTwos = 0x40004000u;
constexpr uint32_t kHalfFours = 0x44004400u;

// 1 where a > b, else 0, of whole numbers
__device__ __forceinline__ uint32_t IsAbove(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("sub.rn.sat.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
__device__ __forceinline__ uint32_t AddPairs(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
__device__ __forceinline__ uint32_t MultiplyAddPairs(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}
__device__ __forceinline__ float2 PairToFloats(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// What a call's bytes must be below, to be kept.
class KeepLimits {
 public:
  KeepLimits() = default;
  __device__ __forceinline__ KeepLimits(const Philox4& bytes, uint32_t threshold) {
    const uint32_t whole = kBytePair + (threshold >> 8) * 0x10001u;
    const uint32_t part = kBytePair + (threshold & 0xFFu) * 0x10001u;
    const uint32_t low = DropoutLowBytes(bytes);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      limit_[pair] = AddPairs(whole, IsAbove(part, BytePair(low, pair)));
    }
  }
  // 1 where kept, else 0, as fp16: of bytes 2 * pair and 2 * pair + 1 of a word.
  __device__ __forceinline__ uint32_t Kept(uint32_t word, int pair) const {
    return IsAbove(limit_[pair], BytePair(word, pair));
  }

 private:
  static __device__ __forceinline__ uint32_t BytePair(uint32_t word, int pair) {
    return __byte_perm(word, kBytePair, pair == 0 ? 0x5150 : 0x5352);
  }
  uint32_t limit_[2];
};

// The draws of one call, for a thread that has all 16 columns of it: [col, col + 8) and
// [col + 32, col + 40) of a row, where `call` is the number of col's in the row. Half of the calls
// of ApplyDropout. Without a dropout it keeps everything.
class CallDropout {
 public:
  CallDropout() = default;
  __device__ __forceinline__ CallDropout(const DropoutParams& dropout, const RngState& rng,
                                         int64_t row, uint32_t call)
      : CallDropout(dropout.rng == nullptr
                        ? Philox4{}
                        : DropoutBytes(rng, dropout.stream, static_cast<uint64_t>(row), call),
                    dropout) {}

  // v *= mask * scale for the first 8 columns, or for the second.
  __device__ __forceinline__ void Apply(bool second, float (&v)[8]) const {
    const uint32_t words[2] = {second ? bytes_.word[2] : bytes_.word[0],
                               second ? bytes_.word[3] : bytes_.word[1]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 kept = PairToFloats(limits_.Kept(words[i / 2], i % 2));
      v[2 * i] = __fmul_rn(v[2 * i], kept.x * scale_);
      v[2 * i + 1] = __fmul_rn(v[2 * i + 1], kept.y * scale_);
    }
  }

 private:
  __device__ __forceinline__ CallDropout(const Philox4& bytes, const DropoutParams& dropout)
      : bytes_(bytes), limits_(bytes, dropout.threshold), scale_(dropout.scale) {}

  Philox4 bytes_;
  KeepLimits limits_;
  float scale_;
};

// v *= mask * scale for columns [col, col + kWidth) of `row`. A width of 8 needs col % 8 == 0.
template <int kWidth>
__device__ __forceinline__ void ApplyDropout(const DropoutParams& dropout, const RngState& rng,
                                             int64_t row, int col, float (&v)[kWidth]) {
  static_assert(kWidth == 8 || kWidth == 1, "8 elements or one");
  const uint32_t eight = static_cast<uint32_t>(col) >> 3;
  if constexpr (kWidth == 8) {
    const Philox4 bytes =
        DropoutBytes(rng, dropout.stream, static_cast<uint64_t>(row), DropoutCall(eight));
    const KeepLimits limits(bytes, dropout.threshold);
    const bool second = DropoutHalf(eight) != 0;
    const uint32_t words[2] = {second ? bytes.word[2] : bytes.word[0],
                               second ? bytes.word[3] : bytes.word[1]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 kept = PairToFloats(limits.Kept(words[i / 2], i % 2));
      v[2 * i] = __fmul_rn(v[2 * i], kept.x * dropout.scale);
      v[2 * i + 1] = __fmul_rn(v[2 * i + 1], kept.y * dropout.scale);
    }
  } else {
    const Philox4 bits = DropoutBits(rng, dropout.stream, static_cast<uint64_t>(row), eight);
    // Selected without indexing, so that the words stay in registers.
    const uint32_t i = static_cast<uint32_t>(col) & 7u;
    const uint32_t low = (i & 2u) != 0 ? bits.word[1] : bits.word[0];
    const uint32_t high = (i & 2u) != 0 ? bits.word[3] : bits.word[2];
    const uint32_t word = (i & 4u) != 0 ? high : low;
    const uint32_t lane = (word >> ((i & 1u) * 16u)) & 0xFFFFu;
    v[0] = lane < dropout.threshold ? __fmul_rn(v[0], dropout.scale) : 0.0f;
  }
}

}  // namespace lamina::cuda
