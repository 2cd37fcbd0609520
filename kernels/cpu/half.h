// bf16 and fp16 as storage types, and their exact conversions in plain integer arithmetic. The
// vector kernels use the processor's own conversions where it has them; these are for the rest, and
// give the same bits.
#pragma once

#include <cstdint>

namespace lamina::cpu {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float FloatOf(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t BitsOf(float value) { return __builtin_bit_cast(uint32_t, value); }

inline float ToFloat(BF16 v) { return FloatOf(uint32_t{v.bits} << 16); }

inline float ToFloat(F16 v) {
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16;
  const uint32_t magnitude = v.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // infinity; a NaN keeps its payload and becomes quiet
    const uint32_t quiet = magnitude > 0x7C00u ? 0x400000u : 0u;
    return FloatOf(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13) | quiet);
  }
  // With the exponent field in place the value is 2^112 times too small, subnormals included; the
  // product is exact.
  const float scaled = FloatOf(magnitude << 13) * 0x1p112f;
  return FloatOf(BitsOf(scaled) | sign);
}

// Both round to nearest even; NaN stays NaN and becomes quiet.
inline BF16 ToBF16(float f) {
  const uint32_t u = BitsOf(f);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return BF16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  return BF16{static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}

inline F16 ToF16(float f) {
  const uint32_t u = BitsOf(f);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
  } else if (magnitude >= 0x477FF000u) {  // 65520 and more round to infinity
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a subnormal, a multiple of 2^-24
    // Adding 0.5 leaves the multiple in the low bits, rounded to nearest even by the addition.
    const float sum = FloatOf(magnitude) + 0.5f;
    half = BitsOf(sum) - 0x3F000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return F16{static_cast<uint16_t>(sign | half)};
}

}  // namespace lamina::cpu
