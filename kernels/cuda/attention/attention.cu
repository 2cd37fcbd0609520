// Purpose: the choice between the attention kernels, and the row sums that the plain backward
// needs.
#include "attention/attention.cuh"
#include "attention/attention_any.cuh"
#include "attention/attention_head.cuh"
#include "attention/attention_mma.cuh"
#include "attention/attention_wgmma.cuh"
#include "column_sum.cuh"
#include "common/convert.cuh"
#include "common/dispatch.cuh"

namespace lamina::cuda {
namespace {

constexpr int kThreads = 256;

// The softmax row of a token and a head; -1 for a token of no sequence.
__device__ __forceinline__ int64_t RowOf(const AttentionParams& p, int64_t token, int64_t head) {
  int64_t batch = 0;
  if (p.cu_seqlens == nullptr) {
    batch = token / p.seq;
  } else {
    // The last sequence that begins at or before the token.
    int64_t end = p.batch;
    while (batch + 1 < end) {
      const int64_t middle = (batch + end) / 2;
      if (p.cu_seqlens[middle] <= token) {
        batch = middle;
      } else {
        end = middle;
      }
    }
  }
  const Sequence sequence = SequenceOf(p, batch);
  const int64_t s = token - sequence.token;
  if (s < 0 || s >= sequence.length) return -1;
  return sequence.token * p.heads + head * sequence.length + s;
}

// delta of each softmax row: the sum over d of dout * out. `lanes` neighbouring lanes, a power of
// two up to 32, do a row, kWidth elements at a time.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    DeltaKernel(AttentionParams p, int64_t rows, int lanes) {
  // Rows in memory order (token, a): neighbouring lanes read neighbouring heads.
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  float sum = 0.0f;
  if (row < rows) {
    const T* dout = static_cast<const T*>(p.dout) + row * p.head_dim;
    const T* out = static_cast<const T*>(p.out) + row * p.head_dim;
    for (int64_t d = lane * kWidth; d < p.head_dim; d += lanes * kWidth) {
      float x[kWidth], y[kWidth];
      LoadWide<T, kWidth>(dout + d, x);
      LoadWide<T, kWidth>(out + d, y);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum += x[i] * y[i];
    }
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
  }
  if (row >= rows || lane != 0) return;
  const int64_t index = RowOf(p, row / p.heads, row % p.heads);
  if (index >= 0) p.delta[index] = sum;
}

template <typename T, int kWidth>
cudaError_t LaunchDeltaOfWidth(const AttentionParams& p, cudaStream_t stream) {
  const int64_t rows = p.tokens * p.heads;
  int lanes = 1;
  while (lanes < 32 && int64_t{lanes} * kWidth < p.head_dim) lanes *= 2;
  const int64_t rows_per_block = kThreads / lanes;
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidValue;
  DeltaKernel<T, kWidth><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, rows, lanes);
  return cudaGetLastError();
}

cudaError_t LaunchDelta(const AttentionParams& p, cudaStream_t stream) {
  return DispatchFloat(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.head_dim % 8 == 0 && Aligned16(p.dout, p.out)) return LaunchDeltaOfWidth<T, 8>(p, stream);
    return LaunchDeltaOfWidth<T, 1>(p, stream);
  });
}

// HasTensorCoreAttention, which the plan asks too, for pointers as the arena aligns them. Others
// get the plain kernels.
bool UseTensorCores(const AttentionParams& p) {
  return HasTensorCoreAttention(p.dtype, p.head_dim) && Aligned16(p.qkv, p.out, p.dout, p.dqkv);
}

}  // namespace

cudaError_t LaunchAttention(const AttentionParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.heads == 0) return cudaSuccess;
  if (UseTensorCores(params) && params.seq >= kWgmmaMinSeq) {
    return params.head_dim <= kWgmmaHeadDim ? LaunchAttentionWgmma(params, stream)
                                            : LaunchAttentionWgmmaWide(params, stream);
  }
  if (UseTensorCores(params)) return LaunchAttentionMma(params, stream);
  return LaunchAttentionAny(params, stream);
}

bool BackwardSums(const AttentionParams& params) { return UseTensorCores(params); }

cudaError_t LaunchAttentionBackward(const AttentionParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.heads == 0) return cudaSuccess;
  if (!UseTensorCores(params)) {
    const cudaError_t error = LaunchDelta(params, stream);
    return error != cudaSuccess ? error : LaunchAttentionAnyBackward(params, stream);
  }
  cudaError_t error = cudaSuccess;
  if (params.turns != nullptr) {
    error = LaunchDelta(params, stream);
    if (error == cudaSuccess) error = LaunchAttentionWgmmaOnePassBackward(params, stream);
  } else if (params.seq > kWgmmaHeadRows) {
    error = LaunchAttentionWgmmaBackward(params, stream);
  } else if (params.head_dim <= kWgmmaHeadDim) {
    error = LaunchAttentionWgmmaHeadBackward(params, stream);
  } else {
    error = LaunchAttentionWgmmaWideHeadBackward(params, stream);
  }
  if (error != cudaSuccess || params.sums == nullptr || params.leave_sums) return error;
  return LaunchFinishColumnSum({params.sums, params.sum_slices, 3 * params.width, {params.dbias}},
                               stream);
}

}  // namespace lamina::cuda
