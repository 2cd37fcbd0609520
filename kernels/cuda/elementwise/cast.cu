// Purpose: elementwise dtype conversion; cast.cuh.
#include <algorithm>

#include "common/convert.cuh"
#include "common/dispatch.cuh"
#include "elementwise/cast.cuh"

namespace lamina::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Src, typename Dst, int kWidth>
__global__ void __launch_bounds__(kThreads) CastKernel(const Src* src, Dst* dst, int64_t groups) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < groups; i += stride) {
    float v[kWidth];
    LoadWide<Src, kWidth>(src + i * kWidth, v);
    StoreWide<Dst, kWidth>(dst + i * kWidth, v);
  }
}

template <typename Src, typename Dst>
cudaError_t Launch(const CastParams& p, cudaStream_t stream) {
  const Src* src = static_cast<const Src*>(p.src);
  Dst* dst = static_cast<Dst*>(p.dst);
  // Whole groups of eight first, where both sides are aligned; then what is left.
  const int64_t groups = Aligned16(p.src, p.dst) ? p.elements / 8 : 0;
  const int64_t rest = p.elements - groups * 8;
  if (groups > 0) {
    const int64_t blocks = std::min<int64_t>((groups + kThreads - 1) / kThreads, int64_t{1} << 30);
    CastKernel<Src, Dst, 8>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(src, dst, groups);
  }
  if (rest > 0) {
    const int64_t blocks = std::min<int64_t>((rest + kThreads - 1) / kThreads, int64_t{1} << 30);
    CastKernel<Src, Dst, 1><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        src + groups * 8, dst + groups * 8, rest);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchCast(const CastParams& params, cudaStream_t stream) {
  if (params.elements == 0) return cudaSuccess;
  if (params.src_dtype == params.dst_dtype) {
    return cudaMemcpyAsync(params.dst, params.src,
                           static_cast<size_t>(params.elements) * SizeOf(params.src_dtype),
                           cudaMemcpyDeviceToDevice, stream);
  }
  return DispatchFloat(params.src_dtype, [&](auto src_tag) {
    using Src = typename decltype(src_tag)::type;
    return DispatchFloat(params.dst_dtype, [&](auto dst_tag) {
      return Launch<Src, typename decltype(dst_tag)::type>(params, stream);
    });
  });
}

}  // namespace lamina::cuda
