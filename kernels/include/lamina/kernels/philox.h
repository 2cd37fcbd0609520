// The dropout mask as a pure function of (seed, counter, layer, site, row, column).
//
// Philox4x32 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11)
// gives 128 bits for each counter value; they are cut into eight 16-bit lanes, one per element.
// Masks take 7 rounds, the fewest that pass all of TestU01's BigCrush in that paper: attention on a
// GPU spends as much on drawing its masks as on the softmax. Weights are drawn with the usual 10.
// A mask covers a matrix [rows, cols]; eight neighbouring columns of a row share one Philox call,
// so that a kernel which reads 16 bytes of bf16 spends one call on them. Rows never share a call:
// odd widths cost a partly used call at the row's end, and no tile shape can change a bit.
//
// Element (row, col) is kept when its lane is below KeepThreshold(p). The scale is one over the
// keep probability which that threshold really gives, so the mean is unbiased at any p.
//
// C++17 and free of dependencies; every function runs on the host and in kernels.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LAMINA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LAMINA_HOST_DEVICE inline
#endif

namespace lamina {

struct Philox4 {
  uint32_t word[4];
};

// Where in a layer a mask applies; part of the Philox counter.
enum class DropoutSite : uint32_t {
  kAttentionProbs = 0,   // rows B*A*S (b, a, q in row-major order), cols S (key)
  kAttentionOutput = 1,  // rows T, cols H
  kFeedForward = 2,      // rows T, cols H
};

// Lives where the backend's kernels read (device memory on CUDA), so that a captured graph draws a
// fresh mask when only this changes.
struct RngState {
  uint64_t seed;
  uint64_t counter;  // one value per training Forward of a stack
};

LAMINA_HOST_DEVICE uint64_t MultiplyWide(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  // The compiler makes the same instruction of the C++ expression, but in larger kernels adds a
  // zero to its upper half, which costs as much as the rest of a round does.
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

inline constexpr int kDropoutRounds = 7;

template <int kRounds>
LAMINA_HOST_DEVICE Philox4 Philox4x32(const uint32_t counter[4], uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = MultiplyWide(0xD2511F53u, c0);
    const uint64_t p1 = MultiplyWide(0xCD9E8D57u, c2);
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return Philox4{{c0, c1, c2, c3}};
}

// The eight lanes of columns [8*block, 8*block + 8) of `row`. `stream` is DropoutStream(layer,
// site). Lane i is DropoutLane(result, i).
LAMINA_HOST_DEVICE Philox4 DropoutBits(const RngState& rng, uint32_t stream, uint64_t row,
                                       uint32_t block) {
  // The row takes 40 bits, the block 24 (S and H stay far below 2^27 columns), the context counter
  // 32 here and its high half in the key.
  const uint32_t counter[4] = {static_cast<uint32_t>(row),
                               static_cast<uint32_t>(row >> 32) | (block << 8), stream,
                               static_cast<uint32_t>(rng.counter)};
  return Philox4x32<kDropoutRounds>(
      counter, static_cast<uint32_t>(rng.seed),
      static_cast<uint32_t>(rng.seed >> 32) ^ static_cast<uint32_t>(rng.counter >> 32));
}

LAMINA_HOST_DEVICE uint32_t DropoutStream(uint32_t layer, DropoutSite site) {
  return layer * 4u + static_cast<uint32_t>(site);
}

LAMINA_HOST_DEVICE uint32_t DropoutLane(const Philox4& bits, uint32_t i) {
  return (bits.word[i >> 1] >> ((i & 1u) * 16u)) & 0xFFFFu;
}

// p in [0, 1). Returned value in [1, 65536]: 65536 keeps everything (p < 2^-17 rounds to that).
LAMINA_HOST_DEVICE uint32_t KeepThreshold(float p) {
  const float t = (1.0f - p) * 65536.0f + 0.5f;
  const uint32_t threshold = static_cast<uint32_t>(t);
  return threshold < 1u ? 1u : (threshold > 65536u ? 65536u : threshold);
}

LAMINA_HOST_DEVICE float KeepScale(uint32_t threshold) {
  return 65536.0f / static_cast<float>(threshold);
}

}  // namespace lamina
