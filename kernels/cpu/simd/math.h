// Exponential and GELU over vectors. Constants: least-squares fits reweighted to equal relative
// error, in double precision, rounded to fp32.
//
// Error bounds, in u = 2^-23, which tests/cpu/math_test.cc checks on every instruction set:
//   Exp: 2u of the value; 2^-126 where it is cut to zero.
//   GeluErf, GeluTanh: 4u of the value for x >= 0. Below, where the exponential multiplies its
//     argument's rounding, (4 + x^2/4)u and (4 + 1.5 |t|)u, t being GeluTanhExp's argument; 2e-37
//     where it is cut to zero.
//   Their derivatives: 3u of the value, and u.
#pragma once

#include "simd/vec.h"

namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE {

// e^x; below 2^-126 the result is zero, above the largest float infinity, of NaN NaN.
LAMINA_INLINE F Exp(F x) {
  constexpr float kLow = -87.33654f, kHigh = 89.0f;
  F c = x < kLow ? Splat(kLow) : x;  // keeps NaN
  c = c > kHigh ? Splat(kHigh) : c;
  // n = c / ln 2, rounded: adding 1.5 * 2^23 leaves the integer in the low bits.
  constexpr float kMagic = 12582912.0f;
  const F shifted = c * 1.44269504f + kMagic;
  const F n = shifted - kMagic;
  F r = c - n * 0.693359375f;  // ln 2 in two parts, the first exact in n's products
  r = r + n * 2.12194440e-4f;
  F p = Splat(0.00138368318f);
  p = p * r + 0.00837482419f;
  p = p * r + 0.0416682251f;
  p = p * r + 0.166664198f;
  p = p * r + 0.499999911f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if LAMINA_CPU_ISA_LEVEL == 2
  const F result = _mm512_scalef_ps(p, n);
#else
  // 2^n in two factors: n reaches 128.
  const I whole = Bits<I>(shifted) - Bits<I>(Splat(kMagic));
  const I half = whole >> 1;
  const F result = p * Bits<F>((half + 127) << 23) * Bits<F>((whole - half + 127) << 23);
#endif
  return Select(x < kLow, F{}, result);
}

// For GELU: with Phi and phi the normal distribution function and density,
//   e^(-x^2/2) =: e,  Phi(-|x|) = e * R(|x|),  phi(x) = e / sqrt(2 pi)
// where R(z) = erfcx(z / sqrt 2) / 2 is smooth and slow, and a polynomial in (z-3)/(z+3). No
// cancellation in the negative tail, and the derivative needs no second exponential.
struct Normal {
  F distribution;  // Phi(x)
  F density;       // phi(x)
};
LAMINA_INLINE Normal NormalAt(F x) {
  const F magnitude = Abs(x);
  const F z = magnitude > 14.5f ? Splat(14.5f) : magnitude;  // e is zero from 13.3 on
  const F q = (z - 3.0f) / (z + 3.0f);
  F r = Splat(5.31615769e-05f);
  r = r * q + 0.000115013863f;
  r = r * q + -0.000339012477f;
  r = r * q + -0.000983288512f;
  r = r * q + 0.00290438719f;
  r = r * q + 0.00613194238f;
  r = r * q + -0.0462132618f;
  r = r * q + 0.123225041f;
  r = r * q + -0.206402615f;
  r = r * q + 0.121513948f;
  const F e = Exp(x * x * -0.5f);
  const F tail = e * r;
  return Normal{Select(x < 0.0f, tail, 1.0f - tail), e * 0.398942280f};
}

// gelu and its derivative, which share their exponential.
struct GeluPoint {
  F value, slope;
};
LAMINA_INLINE F GeluErf(F x) { return x * NormalAt(x).distribution; }
LAMINA_INLINE GeluPoint GeluErfPoint(F x) {
  const Normal normal = NormalAt(x);
  return GeluPoint{x * normal.distribution, normal.distribution + x * normal.density};
}

// With 2u = 2 sqrt(2/pi) (x + 0.044715 x^3): 0.5 (1 + tanh u) = 1 / (1 + e^(-2u)), which does not
// cancel.
LAMINA_INLINE F GeluTanhExp(F x) {  // e^(-2u); infinity from about x = -10.05 down
  return Exp(-x * (1.59576912f + 0.0713548163f * x * x));
}
LAMINA_INLINE F GeluTanh(F x) { return x * (1.0f / (1.0f + GeluTanhExp(x))); }
LAMINA_INLINE GeluPoint GeluTanhPoint(F x) {
  const F e = GeluTanhExp(x);
  const F gate = 1.0f / (1.0f + e);
  const F slope = 1.59576912f + 0.214064449f * x * x;  // d(2u)/dx
  // x times the gate's derivative, gate (1 - gate) d(2u)/dx, where 1 - gate = gate e. Beyond 10 it
  // is below 1e-35, and there e or x^2 may be infinite.
  const F second = x * slope * (gate * (gate * e));
  return GeluPoint{x * gate, gate + Select(Abs(x) > 10.0f, F{}, second)};
}

}  // namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE
