// Purpose: GELU and its derivative, of one element.
//
// erf:  gelu(x) = x Phi(x);  gelu'(x) = Phi(x) + x phi(x)
// tanh: gelu(x) = x/2 (1 + tanh u), u = c (x + a x^3);
//       gelu'(x) = (1 + tanh u)/2 + x/2 (1 - tanh^2 u) c (1 + 3 a x^2)
//
// What one kernel keeps another computes again, and both must have the same bits: every rounding is
// written out, so that no compiler joins a product and a sum here and not there.
#pragma once

#include <cstdint>
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
  // 1 / (1 + exp(-x)), of kScale x
  static constexpr float kScale = 1.0f;
  static __device__ __forceinline__ float Sigmoid(float scaled) {
    return __fdiv_rn(1.0f, __fadd_rn(1.0f, expf(-scaled)));
  }

 private:
  // By erfc, so that the left tail keeps its relative accuracy.
  static __device__ __forceinline__ float NormalCdf(float x) {
    return __fmul_rn(0.5f, erfcf(__fmul_rn(-x, kInvSqrt2)));
  }
};

// For results of 16 bits, in a quarter of the instructions: with the library's functions these
// kernels would compute for longer than their bytes take.
//
// With a = |x|, Phi(-a) = Phi'(a) Q(t), where t = 1 / (a + 2.2) and the polynomial Q is a fit of
// Phi(-a) / Phi'(a) on a <= 9 that leaves Phi off by 8e-8 (least squares, reweighted by the error
// times Phi' until its peaks are even). With the roundings and the units' errors Phi and gelu' are
// off by 4.7e-7 at 0 and 1.6e-7 where gelu' is 0; rounding to fp16 costs 2.4e-4 beside 1/2. As Phi
// is made from 1/2, its left tail has its digits down to 3e-8, half of fp16's smallest number.
struct Fast {
  static __device__ __forceinline__ float ErfGelu(float x) { return __fmul_rn(x, Normal(x).cdf); }
  static __device__ __forceinline__ GeluPoint ErfGeluPoint(float x) {
    const Distribution normal = Normal(x);
    return {__fmul_rn(x, normal.cdf), __fmaf_rn(x, normal.density, normal.cdf)};
  }
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kScale = kLog2E;
  static __device__ __forceinline__ float Sigmoid(float scaled) {
    return Reciprocal(__fadd_rn(1.0f, Exp2(-scaled)));
  }

 private:
  static constexpr float kLog2InvSqrt2Pi = -1.32574806f;

  struct Distribution {
    float cdf, density;  // Phi(x), Phi'(x)
  };
  static __device__ __forceinline__ Distribution Normal(float x) {
    const float t = Reciprocal(__fadd_rn(fabsf(x), 2.2f));
    float q = 7.2434344f;
    q = __fmaf_rn(q, t, -18.355177f);
    q = __fmaf_rn(q, t, 15.0083065f);
    q = __fmaf_rn(q, t, -0.48449144f);
    q = __fmaf_rn(q, t, 1.3269316f);
    q = __fmaf_rn(q, t, -0.01622868f);
    const float density = Exp2(__fmaf_rn(__fmul_rn(x, x), -0.5f * kLog2E, kLog2InvSqrt2Pi));
    // What Phi(-a) is short of 1/2, which is not negative, or so little that it might as well be 0:
    // so much is Phi(x) above or below.
    const float h = __fmaf_rn(-density, q, 0.5f);
    const uint32_t above = __float_as_uint(h) | (__float_as_uint(x) & 0x80000000u);
    return {__fadd_rn(0.5f, __uint_as_float(above)), density};
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
template <typename Math>
struct TanhGelu {
  static constexpr float kLinear = 2.0f * kSqrt2OverPi;  // 2u = x (kLinear + kCube x^2)
  static constexpr float kCube = kLinear * kCubic;
  // Beyond |x| = 100 everything is 0 or 1, and this keeps it finite.
  static __device__ __forceinline__ float Square(float x) { return fminf(__fmul_rn(x, x), 1e4f); }
  static __device__ __forceinline__ float Gate(float x, float square) {
    return Math::Sigmoid(
        __fmul_rn(x, __fmaf_rn(kCube * Math::kScale, square, kLinear * Math::kScale)));
  }
  static __device__ __forceinline__ GeluPoint Point(float x) {
    const float square = Square(x);
    const float gate = Gate(x, square);
    const float value = __fmul_rn(x, gate);
    // The gate and x times its derivative, gate (1 - gate) d(2u)/dx.
    const float du = __fmaf_rn(3.0f * kCube, square, kLinear);
    return {value, __fmaf_rn(__fmaf_rn(-value, gate, value), du, gate)};
  }
};

// gelu(x), with GeluAt's bits.
template <typename Math, bool kTanh>
__device__ __forceinline__ float Gelu(float x) {
  if constexpr (kTanh) {
    return __fmul_rn(x, TanhGelu<Math>::Gate(x, TanhGelu<Math>::Square(x)));
  } else {
    return Math::ErfGelu(x);
  }
}

// gelu(x) and gelu'(x), which share their exponential.
template <typename Math, bool kTanh>
__device__ __forceinline__ GeluPoint GeluAt(float x) {
  if constexpr (kTanh) {
    return TanhGelu<Math>::Point(x);
  } else {
    return Math::ErfGeluPoint(x);
  }
}

}  // namespace lamina::cuda
