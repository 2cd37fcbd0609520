// Purpose: attention by tiles of kTile x kTile scores, accumulators in shared memory;
// attention_any.cuh.
//
// 256 threads as 16 x 16; thread (ty, tx) computes scores (ty + 16 i, tx + 16 j). The forward and
// the dQ kernel fix a tile of queries and loop over keys, the dK/dV kernel fixes keys and loops
// over queries, so no two blocks add to the same element and the result is deterministic.
#include "attention/attention_any.cuh"
#include "attention/attention_head.cuh"
#include "common/convert.cuh"
#include "common/dispatch.cuh"
#include "common/dropout.cuh"

namespace lamina::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kDepth = 32;  // of the head dim at a time
constexpr int kGroups = kThreads / 32;
// Two accumulators of 16 rows and so many columns fit a block's shared memory.
constexpr int kMaxColumns = 1536;

// Columns of a head that a block accumulates: all of them, but for heads too wide for a block's
// shared memory. Those are cut over the grid's second dimension, and each block computes all
// scores.
struct Columns {
  int first, count;
};
__device__ __forceinline__ Columns ColumnsOfBlock(const AttentionParams& p) {
  const int head_dim = static_cast<int>(p.head_dim);
  const int first = static_cast<int>(blockIdx.y) * kMaxColumns;
  return {first, min(kMaxColumns, head_dim - first)};
}

// Whether causality lets `query` see `key`.
__device__ __forceinline__ bool Sees(const AttentionParams& p, int query, int key) {
  return !p.causal || key <= query;
}

// The random factor of a probability: 0, or the dropout's scale.
__device__ __forceinline__ float KeepFactor(const AttentionParams& p, const RngState& rng,
                                            const Head& h, int query, int key) {
  float v[1] = {1.0f};
  ApplyDropout<1>(p.dropout, rng, h.row + query, key, v);
  return v[0];
}

// tile[r][c] = src[(first + r) * stride + d0 + c], zero outside of `rows` and `head_dim`.
template <typename T, int kTile>
__device__ __forceinline__ void LoadDepth(float (*tile)[kDepth + 1], const T* src, int64_t stride,
                                          int rows, int d0, int head_dim) {
  for (int e = static_cast<int>(threadIdx.x); e < kTile * kDepth; e += kThreads) {
    const int r = e / kDepth;
    const int c = e % kDepth;
    tile[r][c] = r < rows && d0 + c < head_dim ? ToFloat(src[r * stride + d0 + c]) : 0.0f;
  }
}

template <int kTile>
__device__ __forceinline__ void MultiplyDepth(const float (*a)[kDepth + 1],
                                              const float (*b)[kDepth + 1],
                                              float (&sum)[kTile / 16][kTile / 16]) {
  const int ty = static_cast<int>(threadIdx.x) / 16;
  const int tx = static_cast<int>(threadIdx.x) % 16;
#pragma unroll 8
  for (int d = 0; d < kDepth; ++d) {
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kTile / 16; ++j) sum[i][j] += a[ty + 16 * i][d] * b[tx + 16 * j][d];
    }
  }
}

// acc[r][d] = acc[r][d] * factor[r] + sum over c < count of weight(r, c) * src[c * stride + d], for
// kTile rows and d < columns. `factor` null: 1. kTransposed: weight(r, c) is weights[c][r], else
// weights[r][c]. A thread owns its elements of acc from call to call.
template <typename T, int kTile, bool kTransposed>
__device__ __forceinline__ void Accumulate(float* acc, const float* factor,
                                           const float (*weights)[kTile + 1], const T* src,
                                           int64_t stride, int count, int columns) {
  constexpr int kRows = kTile / kGroups;
  const int first = static_cast<int>(threadIdx.x) / 32 * kRows;
  for (int d = static_cast<int>(threadIdx.x) % 32; d < columns; d += 32) {
    float sum[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      sum[i] = acc[(first + i) * columns + d];
      if (factor != nullptr) sum[i] *= factor[first + i];
    }
    for (int c = 0; c < count; ++c) {
      const float v = ToFloat(src[c * stride + d]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        sum[i] += (kTransposed ? weights[c][first + i] : weights[first + i][c]) * v;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) acc[(first + i) * columns + d] = sum[i];
  }
}

// dst[r * stride + d] = acc[r][d] * scale, for the rows below `rows`; each thread its own elements.
template <typename T, int kTile>
__device__ __forceinline__ void StoreRows(T* dst, int64_t stride, int rows, const float* acc,
                                          float scale, int columns) {
  constexpr int kRows = kTile / kGroups;
  const int first = static_cast<int>(threadIdx.x) / 32 * kRows;
  for (int d = static_cast<int>(threadIdx.x) % 32; d < columns; d += 32) {
    for (int r = first; r < min(first + kRows, rows); ++r) {
      dst[r * stride + d] = FromFloat<T>(acc[r * columns + d] * scale);
    }
  }
}

template <typename T, int kTile>
__global__ void __launch_bounds__(kThreads) AttentionAnyKernel(AttentionParams p) {
  constexpr int kPer = kTile / 16;
  constexpr int kThreadsPerRow = kThreads / kTile;
  extern __shared__ float acc[];  // [kTile, columns]
  __shared__ float q_tile[kTile][kDepth + 1];
  __shared__ float k_tile[kTile][kDepth + 1];
  __shared__ float scores[kTile][kTile + 1];
  __shared__ float correction[kTile];
  const Head h = HeadOfBlock<kTile, BlockRows::kQueries>(p);
  if (h.first >= h.length) return;
  const int head_dim = static_cast<int>(p.head_dim);
  const Columns columns = ColumnsOfBlock(p);
  const int queries = min(kTile, h.length - h.first);
  const int64_t stride = 3 * p.width;
  const int64_t offset = h.token * stride + h.column;
  const T* qkv = static_cast<const T*>(p.qkv) + offset;
  const T* q = qkv + h.first * stride;
  const int tid = static_cast<int>(threadIdx.x);
  const int ty = tid / 16;
  const int tx = tid % 16;
  RngState rng{};
  if (p.dropout.rng != nullptr) rng = *p.dropout.rng;

  for (int e = tid; e < kTile * columns.count; e += kThreads) acc[e] = 0.0f;
  // The softmax state of row `row`; its kThreadsPerRow threads all hold it.
  const int row = tid / kThreadsPerRow;
  float row_max = -INFINITY;
  float row_sum = 0.0f;
  __syncthreads();

  for (int k0 = 0; k0 < h.keys; k0 += kTile) {
    const int keys = min(kTile, h.keys - k0);
    const T* k = qkv + p.width + k0 * stride;
    float s[kPer][kPer] = {};
    for (int d0 = 0; d0 < head_dim; d0 += kDepth) {
      LoadDepth<T, kTile>(q_tile, q, stride, queries, d0, head_dim);
      LoadDepth<T, kTile>(k_tile, k, stride, keys, d0, head_dim);
      __syncthreads();
      MultiplyDepth<kTile>(q_tile, k_tile, s);
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const float bias = KeyBias(p, h, k0 + tx + 16 * j);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const bool seen = Sees(p, h.first + ty + 16 * i, k0 + tx + 16 * j);
        scores[ty + 16 * i][tx + 16 * j] = seen ? s[i][j] * p.scale + bias : -INFINITY;
      }
    }
    __syncthreads();

    float tile_max = -INFINITY;
    for (int c = tid % kThreadsPerRow; c < kTile; c += kThreadsPerRow) {
      tile_max = fmaxf(tile_max, scores[row][c]);
    }
#pragma unroll
    for (int offset = kThreadsPerRow / 2; offset > 0; offset /= 2) {
      tile_max = fmaxf(tile_max, __shfl_xor_sync(0xFFFFFFFFu, tile_max, offset));
    }
    const float new_max = fmaxf(row_max, tile_max);
    // Nothing seen but -inf: any finite reference gives exp(-inf) = 0 rather than NaN.
    const float reference = new_max == -INFINITY ? 0.0f : new_max;
    const float factor = expf(row_max - reference);
    float tile_sum = 0.0f;
    for (int c = tid % kThreadsPerRow; c < kTile; c += kThreadsPerRow) {
      const float e = expf(scores[row][c] - reference);
      tile_sum += e;
      const float keep =
          p.dropout.rng != nullptr ? KeepFactor(p, rng, h, h.first + row, k0 + c) : 1.0f;
      scores[row][c] = e * keep;
    }
#pragma unroll
    for (int offset = kThreadsPerRow / 2; offset > 0; offset /= 2) {
      tile_sum += __shfl_xor_sync(0xFFFFFFFFu, tile_sum, offset);
    }
    row_sum = row_sum * factor + tile_sum;
    row_max = new_max;
    if (tid % kThreadsPerRow == 0) correction[row] = factor;
    __syncthreads();
    Accumulate<T, kTile, false>(acc, correction, scores,
                                qkv + 2 * p.width + k0 * stride + columns.first, stride, keys,
                                columns.count);
    __syncthreads();
  }

  const float inverse = row_sum > 0.0f ? 1.0f / row_sum : 0.0f;
  if (tid % kThreadsPerRow == 0) {
    correction[row] = inverse;
    if (p.softmax != nullptr && row < queries && columns.first == 0) {
      p.softmax[h.row + h.first + row] = SoftmaxRow{row_sum > 0.0f ? row_max : INFINITY, inverse};
    }
  }
  __syncthreads();
  T* out = static_cast<T*>(p.out) + (h.token + h.first) * p.width + h.column + columns.first;
  for (int e = tid; e < queries * columns.count; e += kThreads) {
    const int r = e / columns.count;
    out[r * p.width + e % columns.count] = FromFloat<T>(acc[e] * correction[r]);
  }
}

// The tile's probabilities and score gradients, from s = q k^T and dp = dout v^T.
// `dropped` receives p * keep, `ds` the gradient of the scaled scores.
struct TileRow {
  float max, inverse_sum, delta;
};
__device__ __forceinline__ TileRow LoadRow(const AttentionParams& p, const Head& h, int query) {
  if (query >= h.length) return TileRow{INFINITY, 0.0f, 0.0f};
  const int64_t index = h.row + query;
  const SoftmaxRow row = p.softmax[index];
  return TileRow{row.max, row.inverse_sum, p.delta[index]};
}

template <typename T, int kTile>
__global__ void __launch_bounds__(kThreads) AttentionAnyQueryGradKernel(AttentionParams p) {
  constexpr int kPer = kTile / 16;
  extern __shared__ float acc[];  // [kTile, columns]: dq
  __shared__ float q_tile[kTile][kDepth + 1];
  __shared__ float k_tile[kTile][kDepth + 1];
  __shared__ float ds[kTile][kTile + 1];
  const Head h = HeadOfBlock<kTile, BlockRows::kQueries>(p);
  if (h.first >= h.length) return;
  const int head_dim = static_cast<int>(p.head_dim);
  const Columns columns = ColumnsOfBlock(p);
  const int queries = min(kTile, h.length - h.first);
  const int64_t stride = 3 * p.width;
  const int64_t offset = h.token * stride + h.column;
  const T* qkv = static_cast<const T*>(p.qkv) + offset;
  const T* q = qkv + h.first * stride;
  const T* dout = static_cast<const T*>(p.dout) + (h.token + h.first) * p.width + h.column;
  const int tid = static_cast<int>(threadIdx.x);
  const int ty = tid / 16;
  const int tx = tid % 16;
  RngState rng{};
  if (p.dropout.rng != nullptr) rng = *p.dropout.rng;

  for (int e = tid; e < kTile * columns.count; e += kThreads) acc[e] = 0.0f;
  TileRow rows[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) rows[i] = LoadRow(p, h, h.first + ty + 16 * i);
  __syncthreads();

  for (int k0 = 0; k0 < h.keys; k0 += kTile) {
    const int keys = min(kTile, h.keys - k0);
    const T* k = qkv + p.width + k0 * stride;
    const T* v = qkv + 2 * p.width + k0 * stride;
    float s[kPer][kPer] = {};
    float dp[kPer][kPer] = {};
    for (int d0 = 0; d0 < head_dim; d0 += kDepth) {
      LoadDepth<T, kTile>(q_tile, q, stride, queries, d0, head_dim);
      LoadDepth<T, kTile>(k_tile, k, stride, keys, d0, head_dim);
      __syncthreads();
      MultiplyDepth<kTile>(q_tile, k_tile, s);
      __syncthreads();
      LoadDepth<T, kTile>(q_tile, dout, p.width, queries, d0, head_dim);
      LoadDepth<T, kTile>(k_tile, v, stride, keys, d0, head_dim);
      __syncthreads();
      MultiplyDepth<kTile>(q_tile, k_tile, dp);
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const int key = k0 + tx + 16 * j;
      const float bias = KeyBias(p, h, key);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const int query = h.first + ty + 16 * i;
        const float prob = Sees(p, query, key)
                               ? expf(s[i][j] * p.scale + bias - rows[i].max) * rows[i].inverse_sum
                               : 0.0f;
        const float keep = p.dropout.rng != nullptr ? KeepFactor(p, rng, h, query, key) : 1.0f;
        ds[ty + 16 * i][tx + 16 * j] = prob * (dp[i][j] * keep - rows[i].delta);
      }
    }
    __syncthreads();
    Accumulate<T, kTile, false>(acc, nullptr, ds, k + columns.first, stride, keys, columns.count);
    __syncthreads();
  }
  T* dq = static_cast<T*>(p.dqkv) + offset + h.first * stride;
  StoreRows<T, kTile>(dq + columns.first, stride, queries, acc, p.scale, columns.count);
}

template <typename T, int kTile>
__global__ void __launch_bounds__(kThreads) AttentionAnyKeyGradKernel(AttentionParams p) {
  constexpr int kPer = kTile / 16;
  extern __shared__ float acc[];  // [2, kTile, columns]: dk, dv
  __shared__ float q_tile[kTile][kDepth + 1];
  __shared__ float k_tile[kTile][kDepth + 1];
  __shared__ float dropped[kTile][kTile + 1];
  __shared__ float ds[kTile][kTile + 1];
  const Head h = HeadOfBlock<kTile, BlockRows::kKeys>(p);
  if (h.first >= h.length) return;
  const int head_dim = static_cast<int>(p.head_dim);
  const Columns columns = ColumnsOfBlock(p);
  const int rows = min(kTile, h.length - h.first);
  const int keys = max(0, min(kTile, h.keys - h.first));
  const int64_t stride = 3 * p.width;
  const int64_t offset = h.token * stride + h.column;
  const T* qkv = static_cast<const T*>(p.qkv) + offset;
  const T* k = qkv + p.width + h.first * stride;
  const T* v = qkv + 2 * p.width + h.first * stride;
  const T* dout_head = static_cast<const T*>(p.dout) + h.token * p.width + h.column;
  const int tid = static_cast<int>(threadIdx.x);
  const int ty = tid / 16;
  const int tx = tid % 16;
  float* dk = acc;
  float* dv = acc + kTile * columns.count;
  RngState rng{};
  if (p.dropout.rng != nullptr) rng = *p.dropout.rng;

  for (int e = tid; e < 2 * kTile * columns.count; e += kThreads) acc[e] = 0.0f;
  float bias[kPer];
#pragma unroll
  for (int j = 0; j < kPer; ++j) bias[j] = KeyBias(p, h, h.first + tx + 16 * j);
  __syncthreads();

  // A tile whose keys are all cut off has zero gradients; `keys` is the whole block's.
  // Queries before the block's first key see none of its keys.
  for (int q0 = p.causal ? h.first : 0; q0 < h.length && keys > 0; q0 += kTile) {
    const int queries = min(kTile, h.length - q0);
    const T* q = qkv + q0 * stride;
    const T* dout = dout_head + q0 * p.width;
    float s[kPer][kPer] = {};
    float dp[kPer][kPer] = {};
    for (int d0 = 0; d0 < head_dim; d0 += kDepth) {
      LoadDepth<T, kTile>(q_tile, q, stride, queries, d0, head_dim);
      LoadDepth<T, kTile>(k_tile, k, stride, keys, d0, head_dim);
      __syncthreads();
      MultiplyDepth<kTile>(q_tile, k_tile, s);
      __syncthreads();
      LoadDepth<T, kTile>(q_tile, dout, p.width, queries, d0, head_dim);
      LoadDepth<T, kTile>(k_tile, v, stride, keys, d0, head_dim);
      __syncthreads();
      MultiplyDepth<kTile>(q_tile, k_tile, dp);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int query = q0 + ty + 16 * i;
      const TileRow row = LoadRow(p, h, query);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const int key = h.first + tx + 16 * j;
        const float prob = Sees(p, query, key)
                               ? expf(s[i][j] * p.scale + bias[j] - row.max) * row.inverse_sum
                               : 0.0f;
        const float keep = p.dropout.rng != nullptr ? KeepFactor(p, rng, h, query, key) : 1.0f;
        dropped[ty + 16 * i][tx + 16 * j] = prob * keep;
        ds[ty + 16 * i][tx + 16 * j] = prob * (dp[i][j] * keep - row.delta);
      }
    }
    __syncthreads();
    Accumulate<T, kTile, true>(dk, nullptr, ds, q + columns.first, stride, queries, columns.count);
    Accumulate<T, kTile, true>(dv, nullptr, dropped, dout + columns.first, p.width, queries,
                               columns.count);
    __syncthreads();
  }
  T* dqkv = static_cast<T*>(p.dqkv) + offset + h.first * stride + columns.first;
  StoreRows<T, kTile>(dqkv + p.width, stride, rows, dk, p.scale, columns.count);
  StoreRows<T, kTile>(dqkv + 2 * p.width, stride, rows, dv, 1.0f, columns.count);
}

// `arrays` accumulators of [kTile, columns] in dynamic shared memory.
template <int kTile, typename Kernel>
cudaError_t LaunchTiles(Kernel kernel, int arrays, const AttentionParams& p, cudaStream_t stream) {
  const int64_t blocks = p.batch * p.heads * ((p.seq + kTile - 1) / kTile);
  const int64_t cuts = (p.head_dim + kMaxColumns - 1) / kMaxColumns;
  if (blocks > 0x7FFFFFFF || cuts > 0xFFFF) return cudaErrorInvalidValue;
  const int64_t columns = p.head_dim < kMaxColumns ? p.head_dim : kMaxColumns;
  const auto shared = static_cast<size_t>(arrays * kTile * columns) * sizeof(float);
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(cuts));
  kernel<<<grid, kThreads, shared, stream>>>(p);
  return cudaGetLastError();
}

// Head dims up to which tiles of 32 rows fit a block's shared memory, two accumulators included.
constexpr int64_t kMaxWideHeadDim = 512;

}  // namespace

cudaError_t LaunchAttentionAny(const AttentionParams& p, cudaStream_t stream) {
  return DispatchFloat(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.head_dim <= kMaxWideHeadDim) {
      return LaunchTiles<32>(AttentionAnyKernel<T, 32>, 1, p, stream);
    }
    return LaunchTiles<16>(AttentionAnyKernel<T, 16>, 1, p, stream);
  });
}

cudaError_t LaunchAttentionAnyBackward(const AttentionParams& p, cudaStream_t stream) {
  return DispatchFloat(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.head_dim <= kMaxWideHeadDim) {
      const cudaError_t error = LaunchTiles<32>(AttentionAnyQueryGradKernel<T, 32>, 1, p, stream);
      if (error != cudaSuccess) return error;
      return LaunchTiles<32>(AttentionAnyKeyGradKernel<T, 32>, 2, p, stream);
    }
    const cudaError_t error = LaunchTiles<16>(AttentionAnyQueryGradKernel<T, 16>, 1, p, stream);
    if (error != cudaSuccess) return error;
    return LaunchTiles<16>(AttentionAnyKeyGradKernel<T, 16>, 2, p, stream);
  });
}

}  // namespace lamina::cuda
