// Purpose: attention in the manner of FlashAttention-2 (Dao, 2023) with mma.sync;
// attention_mma.cuh.
//
// A block is 4 warps and 64 rows, 16 a warp: queries in the forward and in the dQ kernel, keys in
// the dK/dV kernel. It walks over the other side in tiles through shared memory. No two blocks
// write the same element: no atomics, deterministic. Head dims are padded with zeros to kDim = 32,
// 64 or 128. The dK/dV kernel computes the transposed scores k q^T, so that its fragments are at
// once the left operands of dV = p^T dout and dK = ds^T q.
#include "attention_mma.cuh"
#include "common/convert.cuh"
#include "common/mma.cuh"

namespace lamina::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;  // of a block
constexpr float kLog2E = 1.4426950408889634f;

// Shared memory rows are 16 bytes longer than they need be: ldmatrix then meets no bank conflict.
constexpr int Stride(int dim) { return dim + 8; }

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// One (b, a) with a block of rows.
struct Head {
  int64_t index;   // b * A + a
  int64_t batch;   // b
  int64_t column;  // of the head in an [.., H] row
  int64_t width;   // H
  int first;       // row of the block
  int keys;        // keys that are not cut off by a length
};

__device__ __forceinline__ Head HeadOfBlock(const AttentionParams& p) {
  const int64_t blocks = (p.seq + kRows - 1) / kRows;
  Head h;
  h.index = blockIdx.x / blocks;
  h.batch = h.index / p.heads;
  h.column = h.index % p.heads * p.head_dim;
  h.width = p.heads * p.head_dim;
  h.first = static_cast<int>(blockIdx.x % blocks) * kRows;
  h.keys = static_cast<int>(p.seq);
  if (p.lengths != nullptr) h.keys = max(0, min(h.keys, p.lengths[h.batch]));
  return h;
}

// What is added to the scores of `key`; -inf where it is cut off.
__device__ __forceinline__ float KeyBias(const AttentionParams& p, const Head& h, int key) {
  if (key >= h.keys) return -INFINITY;
  return p.mask != nullptr ? p.mask[h.batch * p.seq + key] : 0.0f;
}

// Copies rows [0, kTileRows) of `src` into `tile`; zeros from row `rows` and from column `head_dim`
// on.
template <int kDim, int kTileRows, typename T>
__device__ __forceinline__ void LoadTile(T* tile, const T* src, int64_t stride, int rows,
                                         int head_dim) {
  constexpr int kChunks = kDim / 8;
#pragma unroll
  for (int i = 0; i < kTileRows * kChunks / kThreads; ++i) {
    const int e = static_cast<int>(threadIdx.x) + i * kThreads;
    const int r = e / kChunks;
    const int c = e % kChunks * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (r < rows && c < head_dim) v = *reinterpret_cast<const uint4*>(src + r * stride + c);
    *reinterpret_cast<uint4*>(tile + r * Stride(kDim) + c) = v;
  }
}

// Among the four lanes of a quad: afterwards w[i] is what lane i held in w[lane % 4].
__device__ __forceinline__ void QuadTranspose(uint32_t (&w)[4]) {
  const bool odd = (threadIdx.x & 1u) != 0;
  const bool upper = (threadIdx.x & 2u) != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, odd ? w[i] : w[i + 1], 1);
    if (odd) {
      w[i] = got;
    } else {
      w[i + 1] = got;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, upper ? w[i] : w[i + 2], 2);
    if (upper) {
      w[i] = got;
    } else {
      w[i + 2] = got;
    }
  }
}

// Multiplies the C fragments c[kTiles] of a score tile (rows: queries `query` + {0, 8} of this
// lane, columns: keys from key0, a multiple of 8) by 0 where dropped and by `kept` elsewhere. A
// quad shares its rows; each of its lanes draws the bits of one column tile in four.
template <int kTiles>
__device__ __forceinline__ void DropQueryRows(const DropoutParams& dropout, const RngState& rng,
                                              int64_t row0, int key0, float kept,
                                              float (&c)[kTiles][4]) {
  static_assert(kTiles % 4 == 0, "quads draw four column tiles");
  const uint32_t t = threadIdx.x & 3u;
#pragma unroll
  for (int tile = 0; tile < kTiles; tile += 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Philox4 bits =
          DropoutBits(rng, dropout.stream, static_cast<uint64_t>(row0 + 8 * half),
                      static_cast<uint32_t>(key0 >> 3) + static_cast<uint32_t>(tile) + t);
      uint32_t w[4] = {bits.word[0], bits.word[1], bits.word[2], bits.word[3]};
      QuadTranspose(w);
      // w[i]: lanes 2t and 2t + 1 of column tile `tile` + i, this thread's two columns of it.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& low = c[tile + i][2 * half];
        float& high = c[tile + i][2 * half + 1];
        low = (w[i] & 0xFFFFu) < dropout.threshold ? low * kept : 0.0f;
        high = (w[i] >> 16) < dropout.threshold ? high * kept : 0.0f;
      }
    }
  }
}

// o[kDim/8] += c (rounded) times the kTiles * 8 rows of `tile`.
template <typename T, int kDim, int kTiles>
__device__ __forceinline__ void MultiplyRounded(float (&o)[kDim / 8][4],
                                                const float (&c)[kTiles][4], const T* tile) {
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) {
    uint32_t a[4];
    PackA<T>(a, c[2 * k], c[2 * k + 1]);
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      LoadBFromColumns<Stride(kDim)>(b, tile, k * 16, n * 16);
      MultiplyAdd<T>(o[2 * n], a, b[0], b[1]);
      MultiplyAdd<T>(o[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// c[kTiles] = a (16 rows, kDim deep) times the transposed kTiles * 8 rows of `tile`.
template <typename T, int kDim, int kTiles>
__device__ __forceinline__ void MultiplyRows(float (&c)[kTiles][4],
                                             const uint32_t (&a)[kDim / 16][4], const T* tile) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0.0f;
  }
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      uint32_t b[4];
      LoadBFromRows<Stride(kDim)>(b, tile, n * 16, k * 16);
      MultiplyAdd<T>(c[2 * n], a[k], b[0], b[1]);
      MultiplyAdd<T>(c[2 * n + 1], a[k], b[2], b[3]);
    }
  }
}

// Writes o * factor for this warp's 16 rows from `row`, those below `rows`. factor[half] is that of
// rows g + 8 * half.
template <typename T, int kDim>
__device__ __forceinline__ void StoreFragments(T* dst, int64_t stride, int row, int rows,
                                               int head_dim, const float (&o)[kDim / 8][4],
                                               const float (&factor)[2]) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + (lane >> 2) + 8 * half;
    if (r >= rows) continue;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int col = n * 8 + (lane & 3) * 2;
      if (n * 8 >= head_dim) continue;
      *reinterpret_cast<uint32_t*>(dst + r * stride + col) =
          PackPair<T>(o[n][2 * half] * factor[half], o[n][2 * half + 1] * factor[half]);
    }
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) AttentionMmaKernel(AttentionParams p) {
  constexpr int kKeys = 64;
  constexpr int kTiles = kKeys / 8;
  __shared__ __align__(16) T k_tile[kKeys * Stride(kDim)];
  __shared__ __align__(16) T v_tile[kKeys * Stride(kDim)];
  __shared__ float key_bias[kKeys];
  const Head h = HeadOfBlock(p);
  const int head_dim = static_cast<int>(p.head_dim);
  const int seq = static_cast<int>(p.seq);
  const int64_t stride = 3 * h.width;
  const T* qkv = static_cast<const T*>(p.qkv) + h.batch * p.seq * stride + h.column;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int t = lane & 3;
  const int64_t row0 = h.index * p.seq + h.first + warp_row + (lane >> 2);
  RngState rng{};
  if (p.dropout.rng != nullptr) rng = *p.dropout.rng;

  // The queries pass through the keys' tile into registers.
  uint32_t q[kDim / 16][4];
  LoadTile<kDim, kRows>(k_tile, qkv + h.first * stride, stride, seq - h.first, head_dim);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) LoadA<Stride(kDim)>(q[k], k_tile, warp_row, k * 16);

  float o[kDim / 8][4] = {};
  float row_max[2] = {-INFINITY, -INFINITY};  // rows g and g + 8
  float row_sum[2] = {0.0f, 0.0f};            // this lane's columns only, until the end
  for (int k0 = 0; k0 < h.keys; k0 += kKeys) {
    __syncthreads();
    LoadTile<kDim, kKeys>(k_tile, qkv + h.width + k0 * stride, stride, h.keys - k0, head_dim);
    LoadTile<kDim, kKeys>(v_tile, qkv + 2 * h.width + k0 * stride, stride, h.keys - k0, head_dim);
    if (threadIdx.x < kKeys) {
      key_bias[threadIdx.x] = KeyBias(p, h, k0 + static_cast<int>(threadIdx.x));
    }
    __syncthreads();
    float s[kTiles][4];
    MultiplyRows<T, kDim, kTiles>(s, q, k_tile);
    float tile_max[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = s[n][i] * p.scale + key_bias[n * 8 + 2 * t + (i & 1)];
        tile_max[i >> 1] = fmaxf(tile_max[i >> 1], s[n][i]);
      }
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
    MultiplyRounded<T, kDim, kTiles>(o, s, v_tile);
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
    if (p.softmax != nullptr && t == 0 && h.first + row < seq) {
      p.softmax[h.index * p.seq + h.first + row] =
          SoftmaxRow{sum > 0.0f ? row_max[half] : INFINITY, inverse};
    }
  }
  T* out = static_cast<T*>(p.out) + (h.batch * p.seq + h.first) * h.width + h.column;
  StoreFragments<T, kDim>(out, h.width, warp_row, seq - h.first, head_dim, o, factor);
}

// Keys of a tile of the dQ kernel; queries of a tile of the dK/dV kernel: what registers allow.
constexpr int BackwardTile(int dim) { return dim <= 64 ? 64 : 32; }

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) AttentionMmaQueryGradKernel(AttentionParams p) {
  constexpr int kKeys = BackwardTile(kDim);
  constexpr int kTiles = kKeys / 8;
  // dout needs a tile of kRows rows at first, v one of kKeys.
  __shared__ __align__(16) T k_tile[kRows * Stride(kDim)];
  __shared__ __align__(16) T v_tile[kKeys * Stride(kDim)];
  __shared__ float key_bias[kKeys];
  const Head h = HeadOfBlock(p);
  const int head_dim = static_cast<int>(p.head_dim);
  const int seq = static_cast<int>(p.seq);
  const int64_t stride = 3 * h.width;
  const T* qkv = static_cast<const T*>(p.qkv) + h.batch * p.seq * stride + h.column;
  const T* dout = static_cast<const T*>(p.dout) + (h.batch * p.seq + h.first) * h.width + h.column;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int t = lane & 3;
  const int64_t row0 = h.index * p.seq + h.first + warp_row + (lane >> 2);
  RngState rng{};
  if (p.dropout.rng != nullptr) rng = *p.dropout.rng;

  // The queries and dout pass through the keys' tile into registers.
  uint32_t q[kDim / 16][4];
  uint32_t d_out[kDim / 16][4];
  LoadTile<kDim, kRows>(k_tile, qkv + h.first * stride, stride, seq - h.first, head_dim);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) LoadA<Stride(kDim)>(q[k], k_tile, warp_row, k * 16);
  __syncthreads();
  LoadTile<kDim, kRows>(k_tile, dout, h.width, seq - h.first, head_dim);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) LoadA<Stride(kDim)>(d_out[k], k_tile, warp_row, k * 16);

  float row_max[2], inverse_sum[2], delta[2];  // rows g and g + 8
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool inside = h.first + warp_row + (lane >> 2) + 8 * half < seq;
    row_max[half] = inside ? p.softmax[row0 + 8 * half].max : INFINITY;
    inverse_sum[half] = inside ? p.softmax[row0 + 8 * half].inverse_sum : 0.0f;
    delta[half] = inside ? p.delta[row0 + 8 * half] : 0.0f;
  }

  float dq[kDim / 8][4] = {};
  for (int k0 = 0; k0 < h.keys; k0 += kKeys) {
    __syncthreads();
    LoadTile<kDim, kKeys>(k_tile, qkv + h.width + k0 * stride, stride, h.keys - k0, head_dim);
    LoadTile<kDim, kKeys>(v_tile, qkv + 2 * h.width + k0 * stride, stride, h.keys - k0, head_dim);
    if (threadIdx.x < kKeys) {
      key_bias[threadIdx.x] = KeyBias(p, h, k0 + static_cast<int>(threadIdx.x));
    }
    __syncthreads();
    float s[kTiles][4];
    float dp[kTiles][4];
    MultiplyRows<T, kDim, kTiles>(s, q, k_tile);
    MultiplyRows<T, kDim, kTiles>(dp, d_out, v_tile);
    if (p.dropout.rng != nullptr) {
      DropQueryRows<kTiles>(p.dropout, rng, row0, k0, p.dropout.scale, dp);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float score = s[n][i] * p.scale + key_bias[n * 8 + 2 * t + (i & 1)];
        const float prob = Exp2((score - row_max[i >> 1]) * kLog2E) * inverse_sum[i >> 1];
        s[n][i] = prob * (dp[n][i] - delta[i >> 1]);
      }
    }
    MultiplyRounded<T, kDim, kTiles>(dq, s, k_tile);
  }
  T* dst = static_cast<T*>(p.dqkv) + (h.batch * p.seq + h.first) * stride + h.column;
  const float factor[2] = {p.scale, p.scale};
  StoreFragments<T, kDim>(dst, stride, warp_row, seq - h.first, head_dim, dq, factor);
}

// Bit 8 p + g of lane 16 j + 8 b + r of the result: whether the probability of query
// query0 + 16 p + 8 j + r and key key0 + 8 b + g is kept, for p < kTiles / 2.
template <int kTiles>
__device__ __forceinline__ uint32_t DrawKeyRows(const DropoutParams& dropout, const RngState& rng,
                                                int64_t query_row0, int key0) {
  static_assert(kTiles <= 8, "8 bits for each pair of tiles");
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const uint32_t block = static_cast<uint32_t>(key0 >> 3) + ((lane >> 3) & 1);
  uint32_t kept = 0;
#pragma unroll
  for (int pair = 0; pair < kTiles / 2; ++pair) {
    const int64_t row = query_row0 + 16 * pair + 8 * (lane >> 4) + (lane & 7);
    const Philox4 bits = DropoutBits(rng, dropout.stream, static_cast<uint64_t>(row), block);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t draw = (bits.word[i >> 1] >> ((i & 1) * 16)) & 0xFFFFu;
      kept |= (draw < dropout.threshold ? 1u : 0u) << (8 * pair + i);
    }
  }
  return kept;
}

template <typename T, int kDim>
struct KeyGradShared {
  T k[kRows * Stride(kDim)];
  T v[kRows * Stride(kDim)];
  T q[BackwardTile(kDim) * Stride(kDim)];
  T dout[BackwardTile(kDim) * Stride(kDim)];
  float max[BackwardTile(kDim)];
  float inverse_sum[BackwardTile(kDim)];
  float delta[BackwardTile(kDim)];
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) AttentionMmaKeyGradKernel(AttentionParams p) {
  constexpr int kQueries = BackwardTile(kDim);
  constexpr int kTiles = kQueries / 8;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<KeyGradShared<T, kDim>*>(shared_bytes);
  const Head h = HeadOfBlock(p);
  const int head_dim = static_cast<int>(p.head_dim);
  const int seq = static_cast<int>(p.seq);
  const int64_t stride = 3 * h.width;
  const T* qkv = static_cast<const T*>(p.qkv) + h.batch * p.seq * stride + h.column;
  const T* dout = static_cast<const T*>(p.dout) + h.batch * p.seq * h.width + h.column;
  const int tid = static_cast<int>(threadIdx.x);
  const int lane = tid & 31;
  const int warp_row = tid / 32 * 16;
  const int g = lane >> 2;
  const int t = lane & 3;
  const int key0 = h.first + warp_row;
  RngState rng{};
  if (p.dropout.rng != nullptr) rng = *p.dropout.rng;

  float dk[kDim / 8][4] = {};
  float dv[kDim / 8][4] = {};
  // A block whose keys are all cut off has zero gradients.
  if (h.first < h.keys) {
    const int keys = h.keys - h.first;
    LoadTile<kDim, kRows>(shared.k, qkv + h.width + h.first * stride, stride, keys, head_dim);
    LoadTile<kDim, kRows>(shared.v, qkv + 2 * h.width + h.first * stride, stride, keys, head_dim);
    const float bias[2] = {KeyBias(p, h, key0 + g), KeyBias(p, h, key0 + g + 8)};

    for (int q0 = 0; q0 < seq; q0 += kQueries) {
      __syncthreads();
      LoadTile<kDim, kQueries>(shared.q, qkv + q0 * stride, stride, seq - q0, head_dim);
      LoadTile<kDim, kQueries>(shared.dout, dout + q0 * h.width, h.width, seq - q0, head_dim);
      if (tid < kQueries) {
        const bool inside = q0 + tid < seq;
        const int64_t row = h.index * p.seq + q0 + tid;
        shared.max[tid] = inside ? p.softmax[row].max : INFINITY;
        shared.inverse_sum[tid] = inside ? p.softmax[row].inverse_sum : 0.0f;
        shared.delta[tid] = inside ? p.delta[row] : 0.0f;
      }
      __syncthreads();
      // Rows are keys g and g + 8, columns queries.
      float s[kTiles][4];
      float dp[kTiles][4];
      {
        uint32_t a[kDim / 16][4];
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) LoadA<Stride(kDim)>(a[k], shared.k, warp_row, k * 16);
        MultiplyRows<T, kDim, kTiles>(s, a, shared.q);
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) LoadA<Stride(kDim)>(a[k], shared.v, warp_row, k * 16);
        MultiplyRows<T, kDim, kTiles>(dp, a, shared.dout);
      }
      uint32_t drawn = 0;
      if (p.dropout.rng != nullptr) {
        drawn = DrawKeyRows<kTiles>(p.dropout, rng, h.index * p.seq + q0, key0);
      }
      // Tile n = 2 * pair + j. For each j, key half b and query parity e, one shuffle brings the
      // bits of all pairs.
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            uint32_t kept = 0xFFFFFFFFu;
            float scale = 1.0f;
            if (p.dropout.rng != nullptr) {
              kept = __shfl_sync(0xFFFFFFFFu, drawn, 16 * j + 8 * b + 2 * t + e);
              scale = p.dropout.scale;
            }
            kept >>= g;
#pragma unroll
            for (int pair = 0; pair < kTiles / 2; ++pair) {
              const int n = 2 * pair + j;
              const int i = 2 * b + e;
              const int column = n * 8 + 2 * t + e;
              const bool keep = ((kept >> (8 * pair)) & 1u) != 0;
              const float score = s[n][i] * p.scale + bias[b];
              const float prob =
                  Exp2((score - shared.max[column]) * kLog2E) * shared.inverse_sum[column];
              const float dprob = keep ? dp[n][i] * scale : 0.0f;
              s[n][i] = keep ? prob : 0.0f;
              dp[n][i] = prob * (dprob - shared.delta[column]);
            }
          }
        }
      }
      MultiplyRounded<T, kDim, kTiles>(dv, s, shared.dout);
      MultiplyRounded<T, kDim, kTiles>(dk, dp, shared.q);
    }
  }
  T* dst = static_cast<T*>(p.dqkv) + (h.batch * p.seq + h.first) * stride + h.column;
  const float k_factor[2] = {p.scale, p.scale};
  const float v_factor[2] = {p.dropout.scale, p.dropout.scale};
  StoreFragments<T, kDim>(dst + h.width, stride, warp_row, seq - h.first, head_dim, dk, k_factor);
  StoreFragments<T, kDim>(dst + 2 * h.width, stride, warp_row, seq - h.first, head_dim, dv,
                          v_factor);
}

bool Blocks(const AttentionParams& p, unsigned* blocks) {
  const int64_t n = p.batch * p.heads * ((p.seq + kRows - 1) / kRows);
  *blocks = static_cast<unsigned>(n);
  return n <= 0x7FFFFFFF;
}

template <typename T, int kDim>
cudaError_t Forward(const AttentionParams& p, cudaStream_t stream) {
  unsigned blocks = 0;
  if (!Blocks(p, &blocks)) return cudaErrorInvalidValue;
  AttentionMmaKernel<T, kDim><<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, int kDim>
cudaError_t Backward(const AttentionParams& p, cudaStream_t stream) {
  unsigned blocks = 0;
  if (!Blocks(p, &blocks)) return cudaErrorInvalidValue;
  AttentionMmaQueryGradKernel<T, kDim><<<blocks, kThreads, 0, stream>>>(p);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  const size_t shared = sizeof(KeyGradShared<T, kDim>);
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(AttentionMmaKeyGradKernel<T, kDim>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  AttentionMmaKeyGradKernel<T, kDim><<<blocks, kThreads, shared, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t ForwardOfDim(const AttentionParams& p, cudaStream_t stream) {
  if (p.head_dim <= 32) return Forward<T, 32>(p, stream);
  if (p.head_dim <= 64) return Forward<T, 64>(p, stream);
  return Forward<T, 128>(p, stream);
}

template <typename T>
cudaError_t BackwardOfDim(const AttentionParams& p, cudaStream_t stream) {
  if (p.head_dim <= 32) return Backward<T, 32>(p, stream);
  if (p.head_dim <= 64) return Backward<T, 64>(p, stream);
  return Backward<T, 128>(p, stream);
}

}  // namespace

cudaError_t LaunchAttentionMma(const AttentionParams& p, cudaStream_t stream) {
  if (p.head_dim > 128 || p.head_dim % 8 != 0) return cudaErrorInvalidValue;
  if (p.dtype == DType::kBF16) return ForwardOfDim<__nv_bfloat16>(p, stream);
  if (p.dtype == DType::kF16) return ForwardOfDim<__half>(p, stream);
  return cudaErrorInvalidValue;
}

cudaError_t LaunchAttentionMmaBackward(const AttentionParams& p, cudaStream_t stream) {
  if (p.head_dim > 128 || p.head_dim % 8 != 0) return cudaErrorInvalidValue;
  if (p.dtype == DType::kBF16) return BackwardOfDim<__nv_bfloat16>(p, stream);
  if (p.dtype == DType::kF16) return BackwardOfDim<__half>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace lamina::cuda
