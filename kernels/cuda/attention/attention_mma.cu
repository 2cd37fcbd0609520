// Purpose: the forward of attention in the manner of FlashAttention-2 (Dao, 2023) with mma.sync;
// attention_mma.cuh.
//
// A block is 4 warps and 64 queries, 16 a warp. It walks over the keys in tiles through shared
// memory. Head dims are padded with zeros to kDim = 32, 64 or 128.
#include "attention/attention_head.cuh"
#include "attention/attention_mma.cuh"
#include "attention/attention_tiles.cuh"
#include "common/dispatch.cuh"

namespace lamina::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;  // of a block
// Tiles come in pairs: one is computed on while the next one arrives.
template <typename T, int kDim, int kKeys>
struct KeyTiles {
  T k[2][kKeys * Stride(kDim)];
  T v[2][kKeys * Stride(kDim)];
  float bias[2][kKeys];

  // Keys from `key0`, below h.keys, into pair `slot`.
  __device__ __forceinline__ void Start(const AttentionParams& p, const Head& h, const T* qkv,
                                        int key0, int slot) {
    const int64_t stride = 3 * p.width;
    const int head_dim = static_cast<int>(p.head_dim);
    const T* keys = qkv + p.width + key0 * stride;
    StartTile<kDim, kKeys, kThreads>(k[slot], keys, stride, h.keys - key0, head_dim);
    StartTile<kDim, kKeys, kThreads>(v[slot], keys + p.width, stride, h.keys - key0, head_dim);
    if (threadIdx.x < kKeys) {
      bias[slot][threadIdx.x] = KeyBias(p, h, key0 + static_cast<int>(threadIdx.x));
    }
  }
};

constexpr int kForwardKeys = 64;

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) AttentionMmaKernel(AttentionParams p) {
  constexpr int kKeys = kForwardKeys;
  constexpr int kTiles = kKeys / 8;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& tiles = *reinterpret_cast<KeyTiles<T, kDim, kKeys>*>(shared_bytes);
  const Head h = HeadOfBlock<kRows, BlockRows::kQueries>(p);
  if (h.first >= h.length) return;
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = 3 * p.width;
  const int64_t offset = h.token * stride + h.column;
  const T* qkv = static_cast<const T*>(p.qkv) + offset;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int t = lane & 3;
  const int query0 = h.first + warp_row;
  const int64_t row0 = h.row + query0 + (lane >> 2);
  RngState rng{};
  if (p.dropout.rng != nullptr) rng = *p.dropout.rng;

  // The queries pass through the second tile of keys into registers.
  static_assert(kRows <= kKeys, "queries must fit a tile of keys");
  uint32_t q[kDim / 16][4];
  StartTile<kDim, kRows, kThreads>(tiles.k[1], qkv + h.first * stride, stride, h.length - h.first,
                                   head_dim);
  CommitCopies();
  if (h.keys > 0) tiles.Start(p, h, qkv, 0, 0);
  CommitCopies();
  WaitForCopies<1>();
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) LoadA<Stride(kDim)>(q[k], tiles.k[1], warp_row, k * 16);

  float o[kDim / 8][4] = {};
  float row_max[2] = {-INFINITY, -INFINITY};  // rows g and g + 8
  float row_sum[2] = {0.0f, 0.0f};            // this lane's columns only, until the end
  int slot = 0;
  for (int k0 = 0; k0 < h.keys; k0 += kKeys, slot ^= 1) {
    // After the barrier this tile is there for all, and none reads the other slot any more.
    WaitForCopies<0>();
    __syncthreads();
    if (k0 + kKeys < h.keys) tiles.Start(p, h, qkv, k0 + kKeys, slot ^ 1);
    CommitCopies();
    const float* key_bias = tiles.bias[slot];
    float s[kTiles][4];
    MultiplyRows<T, kDim, kTiles>(s, q, tiles.k[slot]);
    float tile_max[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = s[n][i] * p.scale + key_bias[n * 8 + 2 * t + (i & 1)];
      }
    }
    // Only where this warp's first query does not see the tile's last key.
    if (p.causal && k0 + kKeys - 1 > query0) CutQueryRows<kTiles>(query0 + (lane >> 2), k0, s);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) tile_max[i >> 1] = fmaxf(tile_max[i >> 1], s[n][i]);
    }
    float reference[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float m = tile_max[half];
      m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 1));
      m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 2));
      m = fmaxf(m, row_max[half]);
      // Nothing seen but -inf: any finite reference gives exp(-inf) = 0 rather than NaN.
      reference[half] = m == -INFINITY ? 0.0f : m;
      const float factor = Exp2((row_max[half] - reference[half]) * kLog2E);
      row_max[half] = m;
      row_sum[half] *= factor;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        o[n][2 * half] *= factor;
        o[n][2 * half + 1] *= factor;
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = Exp2((s[n][i] - reference[i >> 1]) * kLog2E);
        row_sum[i >> 1] += s[n][i];
      }
    }
    // The scale of the kept ones goes into the last factor.
    if (p.dropout.rng != nullptr) DropQueryRows<kTiles>(p.dropout, rng, row0, k0, 1.0f, s);
    MultiplyRounded<T, kDim, kTiles>(o, s, tiles.v[slot]);
  }

  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = row_sum[half];
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    factor[half] = inverse * p.dropout.scale;
    const int row = warp_row + (lane >> 2) + 8 * half;
    if (p.softmax != nullptr && t == 0 && h.first + row < h.length) {
      p.softmax[h.row + h.first + row] = SoftmaxRow{sum > 0.0f ? row_max[half] : INFINITY, inverse};
    }
  }
  T* out = static_cast<T*>(p.out) + (h.token + h.first) * p.width + h.column;
  StoreFragments<T, kDim>(out, p.width, warp_row, h.length - h.first, head_dim, o, factor);
}

bool Blocks(const AttentionParams& p, unsigned* blocks) {
  const int64_t n = p.batch * p.heads * ((p.seq + kRows - 1) / kRows);
  *blocks = static_cast<unsigned>(n);
  return n <= 0x7FFFFFFF;
}

template <typename Kernel>
cudaError_t Launch(Kernel kernel, size_t shared, const AttentionParams& p, cudaStream_t stream) {
  unsigned blocks = 0;
  if (!Blocks(p, &blocks)) return cudaErrorInvalidValue;
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<blocks, kThreads, shared, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, int kDim>
cudaError_t Forward(const AttentionParams& p, cudaStream_t stream) {
  return Launch(AttentionMmaKernel<T, kDim>, sizeof(KeyTiles<T, kDim, kForwardKeys>), p, stream);
}

template <typename T>
cudaError_t ForwardOfDim(const AttentionParams& p, cudaStream_t stream) {
  if (p.head_dim <= 32) return Forward<T, 32>(p, stream);
  if (p.head_dim <= 64) return Forward<T, 64>(p, stream);
  return Forward<T, 128>(p, stream);
}

}  // namespace

cudaError_t LaunchAttentionMma(const AttentionParams& p, cudaStream_t stream) {
  if (!HasTensorCoreAttention(p.dtype, p.head_dim)) return cudaErrorInvalidValue;
  return DispatchHalf(
      p.dtype, [&](auto tag) { return ForwardOfDim<typename decltype(tag)::type>(p, stream); });
}

}  // namespace lamina::cuda
