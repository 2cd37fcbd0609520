// Purpose: the choice between the attention kernels, and the row sums that both backwards need.
#include "attention.cuh"
#include "attention_any.cuh"
#include "attention_mma.cuh"
#include "common/convert.cuh"
#include "common/dispatch.cuh"
#include "common/reduce.cuh"

namespace lamina::cuda {
namespace {

constexpr int kWarps = 8;

// delta[(b*A + a)*S + s] = sum over d of dout * out for token (b, s) and head a; one warp each.
template <typename T>
__global__ void __launch_bounds__(kWarps * 32) DeltaKernel(AttentionParams p, int64_t rows) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  // Rows in memory order (b, s, a): neighbouring warps read neighbouring heads.
  const int64_t token = row / p.heads;
  const int64_t head = row % p.heads;
  const int64_t offset = row * p.head_dim;
  const T* dout = static_cast<const T*>(p.dout) + offset;
  const T* out = static_cast<const T*>(p.out) + offset;
  float sum = 0.0f;
  for (int64_t d = threadIdx.x & 31u; d < p.head_dim; d += 32) {
    sum += ToFloat(dout[d]) * ToFloat(out[d]);
  }
  sum = WarpSum(sum);
  if ((threadIdx.x & 31u) != 0) return;
  const int64_t b = token / p.seq;
  const int64_t s = token % p.seq;
  p.delta[(b * p.heads + head) * p.seq + s] = sum;
}

cudaError_t LaunchDelta(const AttentionParams& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.seq * p.heads;
  const int64_t blocks = (rows + kWarps - 1) / kWarps;
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidValue;
  return DispatchFloat(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    DeltaKernel<T><<<static_cast<unsigned>(blocks), kWarps * 32, 0, stream>>>(p, rows);
    return cudaGetLastError();
  });
}

bool UseTensorCores(const AttentionParams& p) {
  return p.dtype != DType::kF32 && p.head_dim % 8 == 0 && p.head_dim <= 128 &&
         Aligned16(p.qkv, p.out, p.dout, p.dqkv);
}

}  // namespace

cudaError_t LaunchAttention(const AttentionParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.seq == 0 || params.heads == 0) return cudaSuccess;
  if (UseTensorCores(params)) return LaunchAttentionMma(params, stream);
  return LaunchAttentionAny(params, stream);
}

cudaError_t LaunchAttentionBackward(const AttentionParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.seq == 0 || params.heads == 0) return cudaSuccess;
  if (const cudaError_t error = LaunchDelta(params, stream); error != cudaSuccess) return error;
  if (UseTensorCores(params)) return LaunchAttentionMmaBackward(params, stream);
  return LaunchAttentionAnyBackward(params, stream);
}

}  // namespace lamina::cuda
