// Dropout factors of a row by philox.h's definition, several Philox blocks at a time.
#pragma once

#include "simd/vec.h"

namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE {

// The 64-bit products of the even 32-bit lanes; what is in the odd ones does not matter.
LAMINA_INLINE Q MulLow(Q a, Q b) {
#if LAMINA_CPU_ISA_LEVEL == 2
  return Bits<Q>(_mm512_mul_epu32(Bits<__m512i>(a), Bits<__m512i>(b)));
#elif LAMINA_CPU_ISA_LEVEL == 1
  return Bits<Q>(_mm256_mul_epu32(Bits<__m256i>(a), Bits<__m256i>(b)));
#else
  return Bits<Q>(_mm_mul_epu32(Bits<__m128i>(a), Bits<__m128i>(b)));
#endif
}

inline constexpr int kPhiloxBlocks = kLanes / 2;  // at a time, one in each 64-bit lane
static_assert(kPhiloxBlocks * 8 <= kPad);

// out[0, n) of `row`: 0 or the scale. Writes up to kPad - 1 floats more.
LAMINA_INLINE void FactorRow(const DropoutKey& key, uint64_t row, int64_t n, float* out) {
  const uint32_t key0 = static_cast<uint32_t>(key.rng.seed);
  const uint32_t key1 =
      static_cast<uint32_t>(key.rng.seed >> 32) ^ static_cast<uint32_t>(key.rng.counter >> 32);
  const Q row_low = Q{} + (row & 0xFFFFFFFFu);
  const Q mul0 = Q{} + 0xD2511F53u, mul1 = Q{} + 0xCD9E8D57u;
  const I last_kept = I{} + static_cast<int32_t>(key.threshold - 1);
  const F scale = Splat(key.scale);
  Q block{};
  for (int i = 0; i < kPhiloxBlocks; ++i) block[i] = static_cast<uint64_t>(i);
  for (int64_t j = 0; j < n; j += kPhiloxBlocks * 8) {
    Q c0 = row_low;
    Q c1 = (Q{} + (row >> 32)) | (block << 8);
    Q c2 = Q{} + key.stream;
    Q c3 = Q{} + (key.rng.counter & 0xFFFFFFFFu);
    uint32_t k0 = key0, k1 = key1;
    LAMINA_UNROLL
    for (int round = 0; round < kDropoutRounds; ++round) {
      // Words sit in the low halves; the high ones hold leavings.
      const Q p0 = MulLow(mul0, c0), p1 = MulLow(mul1, c2);
      c0 = (p1 >> 32) ^ c1 ^ (Q{} + k0);
      c2 = (p0 >> 32) ^ c3 ^ (Q{} + k1);
      c1 = p1;
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const Q low = (c0 & 0xFFFFFFFFu) | (c1 << 32), high = (c2 & 0xFFFFFFFFu) | (c3 << 32);
    uint64_t words[2 * kPhiloxBlocks];  // each block's 128 bits: eight 16-bit lanes in column order
    LAMINA_UNROLL
    for (int i = 0; i < kPhiloxBlocks; ++i) {
      words[2 * i] = low[i];
      words[2 * i + 1] = high[i];
    }
    LAMINA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const I lane = __builtin_convertvector(
          LoadBits(reinterpret_cast<const char*>(words) + i * kLanes * 2), I);
      Store(out + j + i * kLanes, Select(lane <= last_kept, scale, F{}));
    }
    block += kPhiloxBlocks;
  }
}

}  // namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE
