// Dropout factors of a row by philox.h's definition, several Philox calls at a time.
#pragma once

#include "simd/vec.h"

namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE {

LAMINA_INLINE I LoadBytes(const char* p) {
  typedef uint8_t B __attribute__((vector_size(kLanes)));
  B v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, I);
}

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

// Calls at a time, one in each 64-bit lane: two blocks of 64 columns, one, or half of one's calls.
inline constexpr int kPhiloxCalls = kLanes / 2;
static_assert(kPad == 64);

// out[0, n) of `row`: 0 or the scale. Writes up to kPad - 1 floats more.
LAMINA_INLINE void FactorRow(const DropoutKey& key, uint64_t row, int64_t n, float* out) {
  const uint32_t key0 = static_cast<uint32_t>(key.rng.seed);
  const uint32_t key1 =
      static_cast<uint32_t>(key.rng.seed >> 32) ^ static_cast<uint32_t>(key.rng.counter >> 32);
  const Q row_low = Q{} + (row & 0xFFFFFFFFu);
  const Q mul0 = Q{} + 0xD2511F53u, mul1 = Q{} + 0xCD9E8D57u;
  const I last_kept = I{} + static_cast<int32_t>(key.threshold - 1);
  const F scale = Splat(key.scale);
  Q call{};
  for (int i = 0; i < kPhiloxCalls; ++i) call[i] = static_cast<uint64_t>(i);
  int64_t number = 0;  // of the first of these calls
  for (; number * 16 < Padded(n); number += kPhiloxCalls) {
    Q c0 = row_low;
    Q c1 = (Q{} + (row >> 32)) | (call << 8);
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
    const Q low_bytes = (c0 ^ c1 ^ c2 ^ c3) & 0xFFFFFFFFu;
    // Of each half of a block: the calls' elements in column order, own bytes and lower ones.
    uint64_t own[2][kPhiloxCalls], low[kPhiloxCalls];
    const Q own0 = (c0 & 0xFFFFFFFFu) | (c1 << 32), own1 = (c2 & 0xFFFFFFFFu) | (c3 << 32);
    const Q lows = low_bytes | (low_bytes << 32);
    __builtin_memcpy(own[0], &own0, sizeof(own0));
    __builtin_memcpy(own[1], &own1, sizeof(own1));
    __builtin_memcpy(low, &lows, sizeof(lows));
    LAMINA_UNROLL
    for (int half = 0; half < 2; ++half) {
      LAMINA_UNROLL
      for (int i = 0; i < kPhiloxCalls * 8; i += kLanes) {
        const int64_t to = number + i / 8;  // the call that these lanes begin with
        const int64_t column = to / 4 * 64 + half * 32 + to % 4 * 8 + i % 8;
        if (column >= Padded(n)) break;
        const I draw = LoadBytes(reinterpret_cast<const char*>(own[half]) + i) << 8 |
                       LoadBytes(reinterpret_cast<const char*>(low) + i);
        Store(out + column, Select(draw <= last_kept, scale, F{}));
      }
    }
    call += kPhiloxCalls;
  }
}

}  // namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE
