// Purpose: attention in the manner of FlashAttention-2 (Dao, 2023) with mma.sync;
// attention_mma.cuh.
//
// A block is 4 warps and 64 rows, 16 a warp: queries in the forward and in the dQ kernel, keys in
// the dK/dV kernel. It walks over the other side in tiles through shared memory. No two blocks
// write the same element: no atomics, deterministic. Head dims are padded with zeros to kDim = 32,
// 64 or 128. The dK/dV kernel computes the transposed scores k q^T, so that its fragments are at
// once the left operands of dV = p^T dout and dK = ds^T q.
#include "attention_head.cuh"
#include "attention_mma.cuh"
#include "common/convert.cuh"
#include "common/copy_async.cuh"
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

// Starts to copy rows [0, kTileRows) of `src` into `tile`, with zeros from row `rows` and from
// column `head_dim` on; row 0 must exist. WaitForCopies and a barrier end it.
template <int kDim, int kTileRows, typename T>
__device__ __forceinline__ void StartTile(T* tile, const T* src, int64_t stride, int rows,
                                          int head_dim) {
  constexpr int kChunks = kDim / 8;
#pragma unroll
  for (int i = 0; i < kTileRows * kChunks / kThreads; ++i) {
    const int e = static_cast<int>(threadIdx.x) + i * kThreads;
    const int r = e / kChunks;
    const int c = e % kChunks * 8;
    const bool inside = r < rows && c < head_dim;
    CopyAsync16(tile + r * Stride(kDim) + c, src + (inside ? r * stride + c : 0), inside);
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

// Causality in a tile of scores whose rows are queries: -inf where the key lies beyond. `query` is
// that of row g, `key0` the key of column 0.
template <int kTiles>
__device__ __forceinline__ void CutQueryRows(int query, int key0, float (&c)[kTiles][4]) {
  // Column 8 n + 2 t + e is beyond row g + 8 b where 8 n + e > query + 8 b - key0 - 2 t.
  const int last = query - key0 - 2 * (static_cast<int>(threadIdx.x) & 3);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (8 * n + (i & 1) > last + 8 * (i >> 1)) c[n][i] = -INFINITY;
    }
  }
}

// The same in a tile whose rows are keys: `key` is that of row g, `query0` the query of column 0.
template <int kTiles>
__device__ __forceinline__ void CutKeyRows(int key, int query0, float (&c)[kTiles][4]) {
  // Row g + 8 b is beyond column 8 n + 2 t + e where 8 n + e < key + 8 b - query0 - 2 t.
  const int first = key - query0 - 2 * (static_cast<int>(threadIdx.x) & 3);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (8 * n + (i & 1) < first + 8 * (i >> 1)) c[n][i] = -INFINITY;
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
    StartTile<kDim, kKeys>(k[slot], keys, stride, h.keys - key0, head_dim);
    StartTile<kDim, kKeys>(v[slot], keys + p.width, stride, h.keys - key0, head_dim);
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
  StartTile<kDim, kRows>(tiles.k[1], qkv + h.first * stride, stride, h.length - h.first, head_dim);
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

// Keys of a tile of the dQ kernel; queries of a tile of the dK/dV kernel: what registers allow.
constexpr int kBackwardTile = 32;
// Blocks that a multiprocessor is to hold at once, for the same reason.
constexpr int BackwardBlocks(int dim) { return dim <= 64 ? 3 : 2; }

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, BackwardBlocks(kDim))
    AttentionMmaQueryGradKernel(AttentionParams p) {
  constexpr int kKeys = kBackwardTile;
  constexpr int kTiles = kKeys / 8;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& tiles = *reinterpret_cast<KeyTiles<T, kDim, kKeys>*>(shared_bytes);
  const Head h = HeadOfBlock<kRows, BlockRows::kQueries>(p);
  if (h.first >= h.length) return;
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = 3 * p.width;
  const int64_t offset = h.token * stride + h.column;
  const T* qkv = static_cast<const T*>(p.qkv) + offset;
  const T* dout = static_cast<const T*>(p.dout) + (h.token + h.first) * p.width + h.column;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int t = lane & 3;
  const int query0 = h.first + warp_row;
  const int64_t row0 = h.row + query0 + (lane >> 2);
  RngState rng{};
  if (p.dropout.rng != nullptr) rng = *p.dropout.rng;

  // The queries pass through the tiles of k into registers, dout through those of v.
  static_assert(kRows <= 2 * kKeys, "queries must fit two tiles of keys");
  uint32_t q[kDim / 16][4];
  uint32_t d_out[kDim / 16][4];
  const int queries = h.length - h.first;
  StartTile<kDim, kRows>(&tiles.k[0][0], qkv + h.first * stride, stride, queries, head_dim);
  StartTile<kDim, kRows>(&tiles.v[0][0], dout, p.width, queries, head_dim);
  CommitCopies();
  WaitForCopies<0>();
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    LoadA<Stride(kDim)>(q[k], &tiles.k[0][0], warp_row, k * 16);
    LoadA<Stride(kDim)>(d_out[k], &tiles.v[0][0], warp_row, k * 16);
  }
  __syncthreads();
  if (h.keys > 0) tiles.Start(p, h, qkv, 0, 0);
  CommitCopies();

  float row_max[2], inverse_sum[2], delta[2];  // rows g and g + 8
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool inside = query0 + (lane >> 2) + 8 * half < h.length;
    row_max[half] = inside ? p.softmax[row0 + 8 * half].max : INFINITY;
    inverse_sum[half] = inside ? p.softmax[row0 + 8 * half].inverse_sum : 0.0f;
    delta[half] = inside ? p.delta[row0 + 8 * half] : 0.0f;
  }

  float dq[kDim / 8][4] = {};
  int slot = 0;
  for (int k0 = 0; k0 < h.keys; k0 += kKeys, slot ^= 1) {
    // After the barrier this tile is there for all, and none reads the other slot any more.
    WaitForCopies<0>();
    __syncthreads();
    if (k0 + kKeys < h.keys) tiles.Start(p, h, qkv, k0 + kKeys, slot ^ 1);
    CommitCopies();
    // No query of this warp sees a key of this tile.
    if (p.causal && k0 > query0 + 15) continue;
    const float* key_bias = tiles.bias[slot];
    float s[kTiles][4];
    float dp[kTiles][4];
    MultiplyRows<T, kDim, kTiles>(s, q, tiles.k[slot]);
    MultiplyRows<T, kDim, kTiles>(dp, d_out, tiles.v[slot]);
    if (p.dropout.rng != nullptr) {
      DropQueryRows<kTiles>(p.dropout, rng, row0, k0, p.dropout.scale, dp);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = s[n][i] * p.scale + key_bias[n * 8 + 2 * t + (i & 1)];
      }
    }
    if (p.causal && k0 + kKeys - 1 > query0) CutQueryRows<kTiles>(query0 + (lane >> 2), k0, s);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float prob = Exp2((s[n][i] - row_max[i >> 1]) * kLog2E) * inverse_sum[i >> 1];
        s[n][i] = prob * (dp[n][i] - delta[i >> 1]);
      }
    }
    MultiplyRounded<T, kDim, kTiles>(dq, s, tiles.k[slot]);
  }
  T* dst = static_cast<T*>(p.dqkv) + offset + h.first * stride;
  const float factor[2] = {p.scale, p.scale};
  StoreFragments<T, kDim>(dst, stride, warp_row, h.length - h.first, head_dim, dq, factor);
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

// What a block of keys keeps, and tiles of queries in pairs.
template <typename T, int kDim>
struct KeyGradTiles {
  static constexpr int kQueries = kBackwardTile;
  T k[kRows * Stride(kDim)];
  T v[kRows * Stride(kDim)];
  T q[2][kQueries * Stride(kDim)];
  T dout[2][kQueries * Stride(kDim)];
  float max[2][kQueries];
  float inverse_sum[2][kQueries];
  float delta[2][kQueries];

  // Queries from `query0`, below h.length, into pair `slot`. `all_dout`: that of the sequence's
  // first token.
  __device__ __forceinline__ void Start(const AttentionParams& p, const Head& h, const T* qkv,
                                        const T* all_dout, int query0, int slot) {
    const int64_t stride = 3 * p.width;
    const int head_dim = static_cast<int>(p.head_dim);
    const int rows = h.length - query0;
    StartTile<kDim, kQueries>(q[slot], qkv + query0 * stride, stride, rows, head_dim);
    StartTile<kDim, kQueries>(dout[slot], all_dout + query0 * p.width, p.width, rows, head_dim);
    const int i = static_cast<int>(threadIdx.x);
    if (i >= kQueries) return;
    const int64_t row = h.row + query0 + i;
    max[slot][i] = i < rows ? p.softmax[row].max : INFINITY;
    inverse_sum[slot][i] = i < rows ? p.softmax[row].inverse_sum : 0.0f;
    delta[slot][i] = i < rows ? p.delta[row] : 0.0f;
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, BackwardBlocks(kDim))
    AttentionMmaKeyGradKernel(AttentionParams p) {
  constexpr int kQueries = kBackwardTile;
  constexpr int kTiles = kQueries / 8;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  auto& tiles = *reinterpret_cast<KeyGradTiles<T, kDim>*>(shared_bytes);
  const Head h = HeadOfBlock<kRows, BlockRows::kKeys>(p);
  if (h.first >= h.length) return;
  const int head_dim = static_cast<int>(p.head_dim);
  const int64_t stride = 3 * p.width;
  const int64_t offset = h.token * stride + h.column;
  const T* qkv = static_cast<const T*>(p.qkv) + offset;
  const T* dout = static_cast<const T*>(p.dout) + h.token * p.width + h.column;
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
    StartTile<kDim, kRows>(tiles.k, qkv + p.width + h.first * stride, stride, keys, head_dim);
    StartTile<kDim, kRows>(tiles.v, qkv + 2 * p.width + h.first * stride, stride, keys, head_dim);
    // Queries before the block's first key see none of its keys. That is where a tile begins.
    static_assert(kRows % kQueries == 0, "a block of keys begins where a tile of queries does");
    const int q_first = p.causal ? h.first : 0;
    tiles.Start(p, h, qkv, dout, q_first, 0);
    CommitCopies();
    const float bias[2] = {KeyBias(p, h, key0 + g), KeyBias(p, h, key0 + g + 8)};

    int slot = 0;
    for (int q0 = q_first; q0 < h.length; q0 += kQueries, slot ^= 1) {
      WaitForCopies<0>();
      __syncthreads();
      if (q0 + kQueries < h.length) tiles.Start(p, h, qkv, dout, q0 + kQueries, slot ^ 1);
      CommitCopies();
      // No query of this tile sees a key of this warp.
      if (p.causal && q0 + kQueries - 1 < key0) continue;
      // Rows are keys g and g + 8, columns queries.
      float s[kTiles][4];
      float dp[kTiles][4];
      {
        uint32_t a[kDim / 16][4];
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) LoadA<Stride(kDim)>(a[k], tiles.k, warp_row, k * 16);
        MultiplyRows<T, kDim, kTiles>(s, a, tiles.q[slot]);
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) LoadA<Stride(kDim)>(a[k], tiles.v, warp_row, k * 16);
        MultiplyRows<T, kDim, kTiles>(dp, a, tiles.dout[slot]);
      }
      uint32_t drawn = 0;
      if (p.dropout.rng != nullptr) {
        drawn = DrawKeyRows<kTiles>(p.dropout, rng, h.row + q0, key0);
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = s[n][i] * p.scale + bias[i >> 1];
      }
      // Only where the tile's first query does not see this warp's last key.
      if (p.causal && q0 < key0 + 15) {
        CutKeyRows<kTiles>(key0 + g, q0, s);
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
              const float prob = Exp2((s[n][i] - tiles.max[slot][column]) * kLog2E) *
                                 tiles.inverse_sum[slot][column];
              const float dprob = keep ? dp[n][i] * scale : 0.0f;
              s[n][i] = keep ? prob : 0.0f;
              dp[n][i] = prob * (dprob - tiles.delta[slot][column]);
            }
          }
        }
      }
      MultiplyRounded<T, kDim, kTiles>(dv, s, tiles.dout[slot]);
      MultiplyRounded<T, kDim, kTiles>(dk, dp, tiles.q[slot]);
    }
  }
  T* dst = static_cast<T*>(p.dqkv) + offset + h.first * stride;
  const float k_factor[2] = {p.scale, p.scale};
  const float v_factor[2] = {p.dropout.scale, p.dropout.scale};
  const int rows = h.length - h.first;
  StoreFragments<T, kDim>(dst + p.width, stride, warp_row, rows, head_dim, dk, k_factor);
  StoreFragments<T, kDim>(dst + 2 * p.width, stride, warp_row, rows, head_dim, dv, v_factor);
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

template <typename T, int kDim>
cudaError_t Backward(const AttentionParams& p, cudaStream_t stream) {
  const cudaError_t error = Launch(AttentionMmaQueryGradKernel<T, kDim>,
                                   sizeof(KeyTiles<T, kDim, kBackwardTile>), p, stream);
  if (error != cudaSuccess) return error;
  return Launch(AttentionMmaKeyGradKernel<T, kDim>, sizeof(KeyGradTiles<T, kDim>), p, stream);
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
  if (!HasTensorCoreAttention(p.dtype, p.head_dim)) return cudaErrorInvalidValue;
  return p.dtype == DType::kBF16 ? ForwardOfDim<__nv_bfloat16>(p, stream)
                                 : ForwardOfDim<__half>(p, stream);
}

cudaError_t LaunchAttentionMmaBackward(const AttentionParams& p, cudaStream_t stream) {
  if (!HasTensorCoreAttention(p.dtype, p.head_dim)) return cudaErrorInvalidValue;
  return p.dtype == DType::kBF16 ? BackwardOfDim<__nv_bfloat16>(p, stream)
                                 : BackwardOfDim<__half>(p, stream);
}

}  // namespace lamina::cuda
