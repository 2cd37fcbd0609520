// Purpose: gradient statistics in two deterministic levels, and the AdamW update; optimizer.cuh.
#include <algorithm>

#include "common/convert.cuh"
#include "common/dispatch.cuh"
#include "common/reduce.cuh"
#include "kernel_limits.h"
#include "optimizer/optimizer.cuh"

namespace lamina::cuda {
namespace {

constexpr int kThreads = 256;

// One sum of squares a block. In fp64 no square of an fp32 overflows, so the total is finite
// exactly when every gradient is.
__global__ void __launch_bounds__(kThreads)
    SumOfSquaresKernel(const float* grad, int64_t elements, bool aligned, double* partials) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t quads = aligned ? elements / 4 : 0;
  double sum = 0.0;
  for (int64_t i = first; i < quads; i += stride) {
    const float4 g = reinterpret_cast<const float4*>(grad)[i];
    sum += static_cast<double>(g.x) * g.x + static_cast<double>(g.y) * g.y;
    sum += static_cast<double>(g.z) * g.z + static_cast<double>(g.w) * g.w;
  }
  for (int64_t i = quads * 4 + first; i < elements; i += stride) {
    sum += static_cast<double>(grad[i]) * grad[i];
  }
  double total[1] = {sum};
  BlockSum<kThreads / 32>(total);
  if (threadIdx.x == 0) partials[blockIdx.x] = total[0];
}

__global__ void __launch_bounds__(kThreads)
    FinishStatsKernel(const double* partials, int count, float loss_scale, float max_norm,
                      Control* control) {
  double sum = 0.0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) sum += partials[i];
  double sums[1] = {sum};
  BlockSum<kThreads / 32>(sums);
  if (threadIdx.x != 0) return;
  const double total = sums[0];
  const double norm = sqrt(total) / static_cast<double>(loss_scale);
  const bool finite = isfinite(total);
  double clip = 1.0;
  if (finite && max_norm > 0.0f && norm > static_cast<double>(max_norm)) {
    clip = static_cast<double>(max_norm) / norm;
  }
  control->grad_scale = static_cast<float>(clip / static_cast<double>(loss_scale));
  control->grad_norm = static_cast<float>(norm);
  control->skip = finite ? 0 : 1;
  control->reserved = 0;
}

__device__ __forceinline__ void Update(const AdamWParams& p, float scale, float grad, float& w,
                                       float& m, float& v) {
  const float g = grad * scale;
  m = p.beta1 * m + (1.0f - p.beta1) * g;
  v = p.beta2 * v + (1.0f - p.beta2) * g * g;
  w -= p.lr * (p.weight_decay * w + (m / p.correction1) / (sqrtf(v / p.correction2) + p.eps));
}

// `groups` groups of kWidth elements from element `begin`.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    AdamWKernel(AdamWParams p, int64_t begin, int64_t groups) {
  if (p.control->skip != 0) return;
  const float scale = p.control->grad_scale;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < groups; i += stride) {
    const int64_t offset = begin + i * kWidth;
    float w[kWidth], grad[kWidth], m[kWidth], v[kWidth];
    LoadWide<float, kWidth>(p.master + offset, w);
    LoadWide<float, kWidth>(p.grad + offset, grad);
    LoadWide<float, kWidth>(p.m + offset, m);
    LoadWide<float, kWidth>(p.v + offset, v);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) Update(p, scale, grad[j], w[j], m[j], v[j]);
    StoreWide<float, kWidth>(p.master + offset, w);
    StoreWide<float, kWidth>(p.m + offset, m);
    StoreWide<float, kWidth>(p.v + offset, v);
    if (p.weights != nullptr) StoreWide<T, kWidth>(static_cast<T*>(p.weights) + offset, w);
  }
}

template <typename T>
cudaError_t Launch(const AdamWParams& p, cudaStream_t stream) {
  const bool wide = Aligned16(p.master, p.weights, p.grad, p.m, p.v);
  const int64_t groups = wide ? p.elements / 8 : 0;
  const int64_t rest = p.elements - groups * 8;
  if (groups > 0) {
    const int64_t blocks = std::min<int64_t>((groups + kThreads - 1) / kThreads, int64_t{1} << 30);
    AdamWKernel<T, 8><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, 0, groups);
  }
  if (rest > 0) {
    const int64_t blocks = std::min<int64_t>((rest + kThreads - 1) / kThreads, int64_t{1} << 30);
    AdamWKernel<T, 1><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, groups * 8, rest);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchGradientStats(const GradientStatsParams& p, cudaStream_t stream) {
  const int64_t useful = (p.elements + kThreads * 8 - 1) / (kThreads * 8);
  const int count = static_cast<int>(std::clamp<int64_t>(useful, 1, kMaxGradientStatsPartials));
  double* partials = static_cast<double*>(p.workspace);
  SumOfSquaresKernel<<<static_cast<unsigned>(count), kThreads, 0, stream>>>(
      p.grad, p.elements, Aligned16(p.grad), partials);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  FinishStatsKernel<<<1, kThreads, 0, stream>>>(partials, count, p.loss_scale, p.max_norm,
                                                p.control);
  return cudaGetLastError();
}

cudaError_t LaunchAdamW(const AdamWParams& params, cudaStream_t stream) {
  if (params.elements == 0) return cudaSuccess;
  if (params.weights == nullptr) return Launch<float>(params, stream);
  return DispatchFloat(
      params.dtype, [&](auto tag) { return Launch<typename decltype(tag)::type>(params, stream); });
}

}  // namespace lamina::cuda
