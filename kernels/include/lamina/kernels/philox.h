// The dropout mask as a pure function of (seed, counter, layer, site, row, column).
//
// Philox4x32 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11)
// gives 128 bits for each counter value: 16 bytes, one per element. Masks take 7 rounds, the fewest
// that pass all of TestU01's BigCrush in that paper: attention on a GPU spends as much on drawing
// its masks as on the softmax. Weights are drawn with the usual 10.
//
// A mask covers a matrix [rows, cols], whose columns go by blocks of 64. A call covers 8 columns of
// either half of a block, [8q, 8q + 8) and [32 + 8q, 40 + 8q): a thread that has a tile's columns
// as tensor cores give them finds its own 16 there, and 16 bytes of bf16 are half of a call. Rows
// never share a call, and no tile shape can change a bit.
//
// An element's draw has 16 bits, its own byte above one that decides only where its own equals the
// threshold's, which is once in 256 times: the exclusive or of the four bytes at its place in the
// call's four words. So an element's draw is uniform, and any two elements' own bytes and shared
// ones are independent. Four elements share a lower byte; what that correlates is the decision of
// two which both equal the threshold: by at most 2^-18 in the probability of keeping both.
//
// Element (row, col) is kept when its draw is below KeepThreshold(p). The scale is one over the
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

// The bytes of call `call` of `row`: of block `call / 4`, with q = call % 4. `stream` is
// DropoutStream(layer, site). Words 0 and 1 have the first 8 columns, lowest byte first, words 2
// and 3 the other 8.
LAMINA_HOST_DEVICE Philox4 DropoutBytes(const RngState& rng, uint32_t stream, uint64_t row,
                                        uint32_t call) {
  // The row takes 40 bits, the call 24 (S and H stay far below 2^28 columns), the context counter
  // 32 here and its high half in the key.
  const uint32_t counter[4] = {static_cast<uint32_t>(row),
                               static_cast<uint32_t>(row >> 32) | (call << 8), stream,
                               static_cast<uint32_t>(rng.counter)};
  return Philox4x32<kDropoutRounds>(
      counter, static_cast<uint32_t>(rng.seed),
      static_cast<uint32_t>(rng.seed >> 32) ^ static_cast<uint32_t>(rng.counter >> 32));
}

// Which call has columns [8 * eight, 8 * eight + 8), and whether they are its second 8.
LAMINA_HOST_DEVICE uint32_t DropoutCall(uint32_t eight) { return (eight >> 3) * 4 + (eight & 3u); }
LAMINA_HOST_DEVICE uint32_t DropoutHalf(uint32_t eight) { return (eight >> 2) & 1u; }

// What decides where an element's byte equals the threshold's: byte i % 4 for the call's element i.
LAMINA_HOST_DEVICE uint32_t DropoutLowBytes(const Philox4& bytes) {
  return bytes.word[0] ^ bytes.word[1] ^ bytes.word[2] ^ bytes.word[3];
}

// Draws of two neighbouring elements, the first in the lower half: those of bytes `pair` * 2 and
// `pair` * 2 + 1 of a word. `pair` is 0 or 1.
LAMINA_HOST_DEVICE uint32_t DropoutDraws(uint32_t word, uint32_t low_bytes, int pair) {
#ifdef __CUDA_ARCH__
  return __byte_perm(low_bytes, word, pair == 0 ? 0x5140 : 0x7362);
#else
  const uint32_t own = word >> (16 * pair), low = low_bytes >> (16 * pair);
  return (low & 0xFFu) | (own & 0xFFu) << 8 | (low & 0xFF00u) << 8 | (own & 0xFF00u) << 16;
#endif
}

// The eight draws of columns [8 * eight, 8 * eight + 8) of `row`, two to a word. Draw i is
// DropoutLane(result, i).
LAMINA_HOST_DEVICE Philox4 DropoutBits(const RngState& rng, uint32_t stream, uint64_t row,
                                       uint32_t eight) {
  const Philox4 bytes = DropoutBytes(rng, stream, row, DropoutCall(eight));
  const uint32_t low = DropoutLowBytes(bytes);
  const bool second = DropoutHalf(eight) != 0;
  const uint32_t first_word = second ? bytes.word[2] : bytes.word[0];
  const uint32_t next_word = second ? bytes.word[3] : bytes.word[1];
  return Philox4{{DropoutDraws(first_word, low, 0), DropoutDraws(first_word, low, 1),
                  DropoutDraws(next_word, low, 0), DropoutDraws(next_word, low, 1)}};
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
