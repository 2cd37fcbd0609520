// Purpose: GELU forward as one elementwise pass; backward as one pass that also leaves the partial
// column sums of dx, for the bias gradient.
//
// erf:  gelu(x) = x Phi(x);  gelu'(x) = Phi(x) + x phi(x)
// tanh: gelu(x) = x/2 (1 + tanh u), u = c (x + a x^3);
//       gelu'(x) = (1 + tanh u)/2 + x/2 (1 - tanh^2 u) c (1 + 3 a x^2)
#include <algorithm>
#include <type_traits>

#include "column_sum.cuh"
#include "common/convert.cuh"
#include "common/dispatch.cuh"
#include "gelu.cuh"

namespace lamina::cuda {
namespace {

constexpr float kSqrt2OverPi = 0.7978845608028654f;
constexpr float kCubic = 0.044715f;
constexpr float kInvSqrt2 = 0.7071067811865476f;
constexpr float kInvSqrt2Pi = 0.3989422804014327f;
constexpr int kThreads = 256;
constexpr int kThreadRows = 8;
constexpr int kBackwardBlocks = 4;  // as many as registers allow on a multiprocessor: one wave

// For fp32: every digit, by the library's functions.
struct Exact {
  // Phi(x); by erfc, so that the left tail keeps its relative accuracy.
  static __device__ __forceinline__ float NormalCdf(float x) {
    return 0.5f * erfcf(-x * kInvSqrt2);
  }
  static __device__ __forceinline__ float NormalCdf(float x, float* density) {
    *density = kInvSqrt2Pi * expf(-0.5f * x * x);
    return NormalCdf(x);
  }
  // 1 / (1 + exp(-x))
  static __device__ __forceinline__ float Sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
};

// For results of 16 bits: relative errors up to 1e-5 in either tail, fifty times less than what
// rounding to fp16 costs, for a third of the instructions: with the library's functions these
// kernels would compute for longer than their bytes take.
struct Fast {
  // erfc(z) exp(z^2) for z >= 0, by a Chebyshev fit of its logarithm (Press et al., Numerical
  // Recipes, 6.2): relative error below 1.2e-7.
  static __device__ __forceinline__ float ScaledErfc(float z) {
    const float t = __fdividef(1.0f, 1.0f + 0.5f * z);
    float p = 0.17087277f;
    p = p * t - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    return t * __expf(p);
  }
  static __device__ __forceinline__ float NormalCdf(float x, float* density) {
    const float z = fabsf(x) * kInvSqrt2;
    const float e = __expf(-z * z);
    *density = kInvSqrt2Pi * e;
    const float tail = 0.5f * e * ScaledErfc(z);
    return x < 0.0f ? tail : 1.0f - tail;
  }
  static __device__ __forceinline__ float NormalCdf(float x) {
    float density;
    return NormalCdf(x, &density);
  }
  static __device__ __forceinline__ float Sigmoid(float x) {
    // Not __fdividef, which gives 0 above 2^126 but NaN for an infinite divisor.
    return __frcp_rn(1.0f + __expf(-x));
  }
};

template <typename T>
using MathFor = std::conditional_t<sizeof(T) == 2, Fast, Exact>;

// (1 + tanh u) / 2 is the logistic function of 2u, which has its digits in the left tail too.
template <typename Math, bool kTanh>
__device__ __forceinline__ float Gelu(float x) {
  if constexpr (kTanh) {
    return x * Math::Sigmoid(2.0f * kSqrt2OverPi * (x + kCubic * x * x * x));
  } else {
    return x * Math::NormalCdf(x);
  }
}

template <typename Math, bool kTanh>
__device__ __forceinline__ float GeluDerivative(float x) {
  if constexpr (kTanh) {
    const float s = Math::Sigmoid(2.0f * kSqrt2OverPi * (x + kCubic * x * x * x));
    const float du = kSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);
    // At large |x| the first factor is exactly 0 and du may have overflowed.
    const float q = s * (1.0f - s);
    return s + (q == 0.0f ? 0.0f : 2.0f * x * q * du);
  } else {
    float density;
    const float cdf = Math::NormalCdf(x, &density);
    return cdf + (density == 0.0f ? 0.0f : x * density);
  }
}

template <typename T, bool kTanh, int kWidth>
__global__ void __launch_bounds__(kThreads) GeluKernel(const T* x, T* y, int64_t groups) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < groups; i += stride) {
    float v[kWidth];
    LoadWide<T, kWidth>(x + i * kWidth, v);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v[j] = Gelu<MathFor<T>, kTanh>(v[j]);
    StoreWide<T, kWidth>(y + i * kWidth, v);
  }
}

// Block (bx, by): columns [bx * 32 * kWidth, ...), rows of slice by. Without dbias no sums.
template <typename T, bool kTanh, int kWidth>
__global__ void __launch_bounds__(32 * kThreadRows, kBackwardBlocks)
    GeluBackwardKernel(GeluBackwardParams p, float* partials, int64_t rows_per_slice) {
  __shared__ float shared[kThreadRows][32 * kWidth + 1];
  const T* x = static_cast<const T*>(p.x);
  const T* dy = static_cast<const T*>(p.dy);
  T* dx = static_cast<T*>(p.dx);
  const int64_t col = (int64_t{blockIdx.x} * 32 + threadIdx.x) * kWidth;
  const int64_t begin = blockIdx.y * rows_per_slice;
  const int64_t end = min(begin + rows_per_slice, p.rows);
  float sum[kWidth] = {};
  if (col < p.cols) {
    // Two rows at a time: both are on their way before either is computed on.
    constexpr int kAtOnce = 2;
    for (int64_t row = begin + threadIdx.y; row < end; row += kAtOnce * kThreadRows) {
      float pre[kAtOnce][kWidth], grad[kAtOnce][kWidth];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (row + r * kThreadRows >= end) break;
        const int64_t offset = (row + r * kThreadRows) * p.cols + col;
        LoadWide<T, kWidth>(x + offset, pre[r]);
        LoadWide<T, kWidth>(dy + offset, grad[r]);
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (row + r * kThreadRows >= end) break;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          grad[r][i] *= GeluDerivative<MathFor<T>, kTanh>(pre[r][i]);
          sum[i] += grad[r][i];
        }
        StoreWide<T, kWidth>(dx + (row + r * kThreadRows) * p.cols + col, grad[r]);
      }
    }
  }
  if (p.dbias == nullptr) return;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) shared[threadIdx.y][threadIdx.x * kWidth + i] = sum[i];
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.y * 32 + threadIdx.x);
  for (int c = thread; c < 32 * kWidth; c += 32 * kThreadRows) {
    const int64_t out = int64_t{blockIdx.x} * 32 * kWidth + c;
    if (out >= p.cols) continue;
    float total = 0.0f;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) total += shared[r][c];
    if (p.unordered) {
      atomicAdd(p.dbias + out, total);
    } else {
      partials[blockIdx.y * p.cols + out] = total;
    }
  }
}

template <typename T, bool kTanh>
cudaError_t LaunchForward(const GeluParams& p, cudaStream_t stream) {
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  const bool wide = p.elements % 8 == 0 && Aligned16(p.x, p.y);
  const int64_t groups = wide ? p.elements / 8 : p.elements;
  const int64_t blocks = std::min<int64_t>((groups + kThreads - 1) / kThreads, int64_t{1} << 30);
  if (wide) {
    GeluKernel<T, kTanh, 8><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(x, y, groups);
  } else {
    GeluKernel<T, kTanh, 1><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(x, y, groups);
  }
  return cudaGetLastError();
}

template <typename T, bool kTanh, int kWidth>
cudaError_t LaunchBackward(const GeluBackwardParams& p, cudaStream_t stream) {
  const int64_t width = 32 * kWidth;
  const size_t unlimited = ~size_t{0};
  const int64_t slices = RowSlices({p.rows, p.cols, width, kThreadRows, 1,
                                    p.dbias != nullptr ? p.workspace_bytes : unlimited,
                                    p.multiprocessors, kBackwardBlocks});
  if (slices == 0) return cudaErrorInvalidValue;
  float* partials = static_cast<float*>(p.workspace);
  const dim3 grid(static_cast<unsigned>((p.cols + width - 1) / width),
                  static_cast<unsigned>(slices));
  GeluBackwardKernel<T, kTanh, kWidth>
      <<<grid, dim3(32, kThreadRows), 0, stream>>>(p, partials, (p.rows + slices - 1) / slices);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (p.dbias == nullptr || p.unordered) return cudaSuccess;
  FinishColumnSumArgs finish;
  finish.partials = partials;
  finish.slices = slices;
  finish.cols = p.cols;
  finish.dst[0] = p.dbias;
  return LaunchFinishColumnSum(finish, stream);
}

}  // namespace

cudaError_t LaunchGelu(const GeluParams& params, cudaStream_t stream) {
  if (params.elements == 0) return cudaSuccess;
  return DispatchFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return params.tanh ? LaunchForward<T, true>(params, stream)
                       : LaunchForward<T, false>(params, stream);
  });
}

cudaError_t LaunchGeluBackward(const GeluBackwardParams& params, cudaStream_t stream) {
  if (params.rows == 0 || params.cols == 0) return cudaSuccess;
  const bool wide = params.cols % 8 == 0 && Aligned16(params.x, params.dy, params.dx);
  return DispatchFloat(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.tanh) {
      return wide ? LaunchBackward<T, true, 8>(params, stream)
                  : LaunchBackward<T, true, 1>(params, stream);
    }
    return wide ? LaunchBackward<T, false, 8>(params, stream)
                : LaunchBackward<T, false, 1>(params, stream);
  });
}

}  // namespace lamina::cuda
