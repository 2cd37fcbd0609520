// Purpose: the backward of attention for sequences of up to 128 tokens, a block a head;
// attention_head_backward.cuh.
//
// All of a head lies in shared memory: Q, K, V, dout. Each of 8 warps has 16 keys and computes the
// transposed scores, their probabilities and gradients against 32 queries at a time, once, where
// the kernels for longer sequences (attention_mma.cu) do so twice. Its products with them are dV
// and dK. The gradients of the scores go to shared memory, rounded; when all are there, each warp
// multiplies those of 16 queries with K: dQ. Nothing is shared with another block, so the order of
// every sum is fixed.
#include "attention_head.cuh"
#include "attention_head_backward.cuh"
#include "attention_tiles.cuh"
#include "common/dispatch.cuh"

namespace lamina::cuda {
namespace {

constexpr int kRows = kWholeHeadRows;
constexpr int kThreads = kRows / 16 * 32;
constexpr int kQueries = 32;  // of a step
constexpr int kTiles = kQueries / 8;

template <typename T, int kDim>
struct HeadTiles {
  T k[kRows * Stride(kDim)];
  T v[kRows * Stride(kDim)];
  T q[kRows * Stride(kDim)];
  T dout[kRows * Stride(kDim)];
  T ds[kRows * Stride(kRows)];  // [key][query]
  ScoreRow rows[kRows];
};

// Sum over d of dout * out for query `tid / 2`, in both threads of the pair that has a query.
// `out`, the head's first row, is read before the tiles' copies are waited for.
template <typename T, int kDim>
struct DeltaOfPair {
  static constexpr int kChunks = kDim / 16;  // of eight columns, a thread
  Raw8<T> out[kChunks];

  __device__ __forceinline__ void Start(const AttentionParams& p, const Head& h) {
    const int query = static_cast<int>(threadIdx.x) / 2;
    const T* row =
        static_cast<const T*>(p.out) + (h.token + min(query, h.length - 1)) * p.width + h.column;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (Column(c) < p.head_dim) out[c] = LoadRaw8(row + Column(c));
    }
  }

  __device__ __forceinline__ float Finish(const AttentionParams& p, const T* dout) const {
    const int query = static_cast<int>(threadIdx.x) / 2;
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (Column(c) >= p.head_dim) continue;
      float x[8], y[8];
      Unpack8(out[c], x);
      Load8(dout + query * Stride(kDim) + Column(c), y);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += x[i] * y[i];
    }
    return sum + __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
  }

 private:
  static __device__ __forceinline__ int Column(int c) {
    return (2 * c + (static_cast<int>(threadIdx.x) & 1)) * 8;
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) HeadBackwardKernel(AttentionParams p) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& tiles = *reinterpret_cast<HeadTiles<T, kDim>*>(shared_bytes);
  const Head h = HeadOfBlock<kRows, BlockRows::kKeys>(p);
  if (h.length == 0) return;
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = 3 * p.width;
  const int64_t offset = h.token * stride + h.column;
  const T* qkv = static_cast<const T*>(p.qkv) + offset;
  const T* dout = static_cast<const T*>(p.dout) + h.token * p.width + h.column;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int g = lane >> 2;
  const int t = lane & 3;

  StartTile<kDim, kRows, kThreads>(tiles.dout, dout, p.width, h.length, head_dim);
  StartTile<kDim, kRows, kThreads>(tiles.q, qkv, stride, h.length, head_dim);
  StartTile<kDim, kRows, kThreads>(tiles.k, qkv + p.width, stride, h.keys, head_dim);
  StartTile<kDim, kRows, kThreads>(tiles.v, qkv + 2 * p.width, stride, h.keys, head_dim);
  CommitCopies();
  RngState rng{};
  if (p.dropout.rng != nullptr) rng = *p.dropout.rng;
  const float bias[2] = {KeyBias(p, h, warp_row + g), KeyBias(p, h, warp_row + g + 8)};
  DeltaOfPair<T, kDim> pair;
  pair.Start(p, h);
  WaitForCopies<0>();
  __syncthreads();
  const float delta = pair.Finish(p, tiles.dout);
  if ((threadIdx.x & 1u) == 0) {
    const int query = static_cast<int>(threadIdx.x) / 2;
    tiles.rows[query] = ScoreRowOf(p, h, query, delta);
  }
  __syncthreads();

  float dk[kDim / 8][4] = {};
  float dv[kDim / 8][4] = {};
  // A warp whose keys are all cut off has zero gradients, and dQ does not read its part of ds.
  if (warp_row < h.keys) {
    for (int q0 = 0; q0 < h.length; q0 += kQueries) {
      // No query of this step sees a key of this warp.
      if (p.causal && q0 + kQueries - 1 < warp_row) continue;
      float probs[kTiles][4];
      float ds[kTiles][4];
      const T* q_tile = tiles.q + q0 * Stride(kDim);
      const T* dout_tile = tiles.dout + q0 * Stride(kDim);
      ScoreGradsOfKeys<T, kDim, kTiles>(p, h, rng,
                                        {tiles.k, tiles.v, q_tile, dout_tile, tiles.rows + q0},
                                        warp_row, warp_row, q0, bias, probs, ds);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        T* row = tiles.ds + (warp_row + g) * Stride(kRows) + q0 + n * 8 + 2 * t;
        *reinterpret_cast<uint32_t*>(row) = PackPair<T>(ds[n][0], ds[n][1]);
        *reinterpret_cast<uint32_t*>(row + 8 * Stride(kRows)) = PackPair<T>(ds[n][2], ds[n][3]);
      }
      MultiplyRounded<T, kDim, kTiles>(dv, probs, dout_tile);
      MultiplyRounded<T, kDim, kTiles>(dk, ds, q_tile);
    }
  }
  T* dst = static_cast<T*>(p.dqkv) + offset;
  const float k_factor[2] = {p.scale, p.scale};
  const float v_factor[2] = {p.dropout.scale, p.dropout.scale};
  StoreFragments<T, kDim>(dst + p.width, stride, warp_row, h.length, head_dim, dk, k_factor);
  StoreFragments<T, kDim>(dst + 2 * p.width, stride, warp_row, h.length, head_dim, dv, v_factor);
  __syncthreads();

  // dQ of queries [warp_row, + 16): over the keys that any of them sees.
  if (warp_row >= h.length) return;
  const int keys = p.causal ? min(h.keys, warp_row + 16) : h.keys;
  float dq[kDim / 8][4] = {};
  for (int key0 = 0; key0 < keys; key0 += 16) {
    uint32_t a[4];
    LoadAFromColumns<Stride(kRows)>(a, tiles.ds, key0, warp_row);
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      LoadBFromColumns<Stride(kDim)>(b, tiles.k, key0, n * 16);
      MultiplyAdd<T>(dq[2 * n], a, b[0], b[1]);
      MultiplyAdd<T>(dq[2 * n + 1], a, b[2], b[3]);
    }
  }
  StoreFragments<T, kDim>(dst, stride, warp_row, h.length, head_dim, dq, k_factor);
}

template <typename T, int kDim>
cudaError_t Launch(const AttentionParams& p, cudaStream_t stream) {
  const int64_t blocks = p.batch * p.heads;
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidValue;
  constexpr int kShared = sizeof(HeadTiles<T, kDim>);
  const cudaError_t error = cudaFuncSetAttribute(
      HeadBackwardKernel<T, kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  HeadBackwardKernel<T, kDim><<<static_cast<unsigned>(blocks), kThreads, kShared, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchAttentionHeadBackward(const AttentionParams& p, cudaStream_t stream) {
  if (!HasTensorCoreAttention(p.dtype, p.head_dim) || p.seq > kWholeHeadRows) {
    return cudaErrorInvalidValue;
  }
  constexpr int kDim = 128;  // attention_wgmma has head dims up to 64
  return DispatchHalf(
      p.dtype, [&](auto tag) { return Launch<typename decltype(tag)::type, kDim>(p, stream); });
}

}  // namespace lamina::cuda
