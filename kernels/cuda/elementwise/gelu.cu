// Purpose: GELU forward, and its derivative, as one elementwise pass; backward as one pass that
// also leaves the partial column sums of dx, for the bias gradient.
#include <algorithm>

#include "column_sum.cuh"
#include "common/convert.cuh"
#include "common/dispatch.cuh"
#include "common/gelu_math.cuh"
#include "elementwise/gelu.cuh"

namespace lamina::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kThreadRows = 8;
constexpr int kBackwardBlocks = 4;  // as many as registers allow on a multiprocessor: one wave

template <typename T, bool kTanh, bool kSlope, int kWidth>
__global__ void __launch_bounds__(kThreads) GeluKernel(const T* x, T* y, T* slope, int64_t groups) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < groups; i += stride) {
    float v[kWidth];
    LoadWide<T, kWidth>(x + i * kWidth, v);
    if constexpr (kSlope) {
      float slopes[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const GeluPoint point = GeluAt<MathFor<T>, kTanh>(v[j]);
        v[j] = point.value;
        slopes[j] = point.slope;
      }
      StoreWide<T, kWidth>(slope + i * kWidth, slopes);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) v[j] = Gelu<MathFor<T>, kTanh>(v[j]);
    }
    StoreWide<T, kWidth>(y + i * kWidth, v);
  }
}

// Block (bx, by): columns [bx * 32 * kWidth, ...), rows of slice by. Without dbias no sums. kAgain:
// by x, and y_again.
template <typename T, bool kAgain, bool kTanh, int kWidth>
__global__ void __launch_bounds__(32 * kThreadRows, kBackwardBlocks)
    GeluBackwardKernel(GeluBackwardParams p, float* partials, int64_t rows_per_slice) {
  __shared__ float shared[kThreadRows][32 * kWidth + 1];
  const T* kept = static_cast<const T*>(kAgain ? p.x : p.slope);
  T* y_again = static_cast<T*>(p.y_again);
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
      float slope[kAtOnce][kWidth], grad[kAtOnce][kWidth];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (row + r * kThreadRows >= end) break;
        const int64_t offset = (row + r * kThreadRows) * p.cols + col;
        LoadWide<T, kWidth>(kept + offset, slope[r]);
        LoadWide<T, kWidth>(dy + offset, grad[r]);
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (row + r * kThreadRows >= end) break;
        const int64_t offset = (row + r * kThreadRows) * p.cols + col;
        if constexpr (kAgain) {
          float y[kWidth];
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            const GeluPoint point = GeluAt<MathFor<T>, kTanh>(slope[r][i]);
            y[i] = point.value;
            slope[r][i] = ToFloat(FromFloat<T>(point.slope));  // as GeluKernel would have kept it
          }
          StoreWide<T, kWidth>(y_again + offset, y);
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          grad[r][i] *= slope[r][i];
          sum[i] += grad[r][i];
        }
        StoreWide<T, kWidth>(dx + offset, grad[r]);
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

template <typename T, bool kTanh, bool kSlope>
cudaError_t LaunchForward(const GeluParams& p, cudaStream_t stream) {
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  T* slope = static_cast<T*>(p.slope);
  const bool wide = p.elements % 8 == 0 && Aligned16(p.x, p.y, p.slope);
  const int64_t groups = wide ? p.elements / 8 : p.elements;
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>((groups + kThreads - 1) / kThreads, int64_t{1} << 30));
  if (wide) {
    GeluKernel<T, kTanh, kSlope, 8><<<blocks, kThreads, 0, stream>>>(x, y, slope, groups);
  } else {
    GeluKernel<T, kTanh, kSlope, 1><<<blocks, kThreads, 0, stream>>>(x, y, slope, groups);
  }
  return cudaGetLastError();
}

template <typename T, bool kAgain, bool kTanh, int kWidth>
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
  GeluBackwardKernel<T, kAgain, kTanh, kWidth>
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
  return DispatchFloat(params.dtype, params.tanh, [&](auto tag, auto tanh) {
    using T = typename decltype(tag)::type;
    return params.slope != nullptr ? LaunchForward<T, tanh.value, true>(params, stream)
                                   : LaunchForward<T, tanh.value, false>(params, stream);
  });
}

cudaError_t LaunchGeluBackward(const GeluBackwardParams& params, cudaStream_t stream) {
  if (params.rows == 0 || params.cols == 0) return cudaSuccess;
  const bool by_slope = params.slope != nullptr;
  const bool wide = params.cols % 8 == 0 &&
                    Aligned16(params.slope, params.x, params.y_again, params.dy, params.dx);
  // GELU's form is in the slopes.
  return DispatchFloat(params.dtype, !by_slope && params.tanh, [&](auto tag, auto tanh) {
    using T = typename decltype(tag)::type;
    if constexpr (!tanh.value) {
      if (by_slope) {
        return wide ? LaunchBackward<T, false, false, 8>(params, stream)
                    : LaunchBackward<T, false, false, 1>(params, stream);
      }
    }
    return wide ? LaunchBackward<T, true, tanh.value, 8>(params, stream)
                : LaunchBackward<T, true, tanh.value, 1>(params, stream);
  });
}

}  // namespace lamina::cuda
