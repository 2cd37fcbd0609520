// Purpose: GELU and its derivative, of one element.
//
// erf:  gelu(x) = x Phi(x);  gelu'(x) = Phi(x) + x phi(x)
// tanh: gelu(x) = x/2 (1 + tanh u), u = c (x + a x^3);
//       gelu'(x) = (1 + tanh u)/2 + x/2 (1 - tanh^2 u) c (1 + 3 a x^2)
//
// What one kernel keeps another computes again, and both must have the same bits: every rounding is
// written out, so that no compiler joins a product and a sum here and not there.
#pragma once

#include <type_traits>

namespace lamina::cuda {

constexpr float kSqrt2OverPi = 0.7978845608028654f;
constexpr float kCubic = 0.044715f;
constexpr float kInvSqrt2 = 0.7071067811865476f;
constexpr float kInvSqrt2Pi = 0.3989422804014327f;

struct GeluPoint {
  float value, slope;  // gelu(x), gelu'(x)
};

// For fp32: every digit, by the library's functions.
struct Exact {
  // x Phi(x)
  static __device__ __forceinline__ float ErfGelu(float x) { return __fmul_rn(x, NormalCdf(x)); }
  // and Phi(x) + x Phi'(x)
  static __device__ __forceinline__ GeluPoint ErfGeluPoint(float x) {
    const float cdf = NormalCdf(x);
    const float density = __fmul_rn(kInvSqrt2Pi, expf(__fmul_rn(-0.5f, __fmul_rn(x, x))));
    return {__fmul_rn(x, cdf), density == 0.0f ? cdf : __fmaf_rn(x, density, cdf)};
  }
  // 1 / (1 + exp(-x))
  static __device__ __forceinline__ float Sigmoid(float x) {
    return __fdiv_rn(1.0f, __fadd_rn(1.0f, expf(-x)));
  }

 private:
  // By erfc, so that the left tail keeps its relative accuracy.
  static __device__ __forceinline__ float NormalCdf(float x) {
    return __fmul_rn(0.5f, erfcf(__fmul_rn(-x, kInvSqrt2)));
  }
};

// For results of 16 bits, in a third of the instructions: with the library's functions these
// kernels would compute for longer than their bytes take.
//
// With a = |x|, both go by the tail Phi(-a) = exp(-a^2 / 2) t Q(t), where t = 1 / (1 + 0.27 a) and
// the polynomial Q(t) is a fit of erfc(a / sqrt 2) exp(a^2 / 2) / (2 t) on a <= 20 with a relative
// error of 1.5e-6 (least squares, reweighted until the error's peaks are even): gelu' near its zero
// asks for that. With the exponential's it stays below 1.2e-5 in either tail, 40 times less than
// what rounding to fp16 costs.
struct Fast {
  static __device__ __forceinline__ float ErfGelu(float x) {
    float e, scaled;
    const float a = Tail(x, &e, &scaled);
    return __fmaf_rn(-a, __fmul_rn(scaled, e), PositivePart(x));
  }
  static __device__ __forceinline__ GeluPoint ErfGeluPoint(float x) {
    float e, scaled;
    const float a = Tail(x, &e, &scaled);
    // Phi(-a) - a Phi'(a); of x > 0 it is what is missing to 1.
    const float g = __fmul_rn(e, __fmaf_rn(-a, kInvSqrt2Pi, scaled));
    return {__fmaf_rn(-a, __fmul_rn(scaled, e), PositivePart(x)),
            x < 0.0f ? g : __fsub_rn(1.0f, g)};
  }
  static __device__ __forceinline__ float Sigmoid(float x) {
    return Reciprocal(__fadd_rn(1.0f, Exp2(__fmul_rn(-kLog2E, x))));
  }

 private:
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLargest = 20.0f;  // from here on exp(-a^2 / 2) is 0

  // Returns a: |x| or kLargest, NaN if x is. Phi(-a) = e * scaled.
  static __device__ __forceinline__ float Tail(float x, float* e, float* scaled) {
    float a;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(fabsf(x)), "f"(kLargest));
    const float t = Reciprocal(__fmaf_rn(0.27f, a, 1.0f));
    float q = -0.0610571913f;
    q = __fmaf_rn(q, t, 0.15936318f);
    q = __fmaf_rn(q, t, -0.0255846865f);
    q = __fmaf_rn(q, t, 0.118715383f);
    q = __fmaf_rn(q, t, 0.0923250392f);
    q = __fmaf_rn(q, t, 0.108561024f);
    q = __fmaf_rn(q, t, 0.10767664f);
    *scaled = __fmul_rn(q, t);
    *e = Exp2(__fmul_rn(__fmul_rn(a, a), -0.5f * kLog2E));
    return a;
  }
  static __device__ __forceinline__ float PositivePart(float x) {
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
  }
  // The units' own, to about 2 ulps; what is subnormal counts as 0.
  static __device__ __forceinline__ float Exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ __forceinline__ float Reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
};

template <typename T>
using MathFor = std::conditional_t<sizeof(T) == 2, Fast, Exact>;

// (1 + tanh u) / 2 is the logistic function of 2u, which has its digits in the left tail too.
constexpr float kTanhLinear = 2.0f * kSqrt2OverPi;  // 2u = x (kTanhLinear + kTanhCubic x^2)
constexpr float kTanhCubic = kTanhLinear * kCubic;

// gelu(x), with GeluAt's bits.
template <typename Math, bool kTanh>
__device__ __forceinline__ float Gelu(float x) {
  if constexpr (kTanh) {
    const float square = __fmul_rn(x, x);
    return __fmul_rn(x, Math::Sigmoid(__fmul_rn(x, __fmaf_rn(kTanhCubic, square, kTanhLinear))));
  } else {
    return Math::ErfGelu(x);
  }
}

// gelu(x) and gelu'(x), which share their exponential.
template <typename Math, bool kTanh>
__device__ __forceinline__ GeluPoint GeluAt(float x) {
  if constexpr (kTanh) {
    const float square = __fmul_rn(x, x);
    const float s = Math::Sigmoid(__fmul_rn(x, __fmaf_rn(kTanhCubic, square, kTanhLinear)));
    const float value = __fmul_rn(x, s);
    const float du = __fmaf_rn(3.0f * kTanhCubic, square, kTanhLinear);  // d(2u)/dx
    // x times the derivative of s, s (1 - s) d(2u)/dx. At large |x| that product is exactly 0 and
    // du may have overflowed.
    const float q = __fmul_rn(s, __fsub_rn(1.0f, s));
    return {value, q == 0.0f ? s : __fmaf_rn(__fmul_rn(x, q), du, s)};
  } else {
    return Math::ErfGeluPoint(x);
  }
}

}  // namespace lamina::cuda
