// Purpose: what the tensor core attention kernels have in common: tiles on their way to shared
// memory, dropout and causality in fragments of scores, products with tiles. attention_mma.cu says
// how they are put together.
#pragma once

#include <cstdint>

#include "attention_head.cuh"
#include "common/convert.cuh"
#include "common/copy_async.cuh"
#include "common/dropout.cuh"
#include "common/mma.cuh"
#include "common/quad.cuh"

namespace lamina::cuda {

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
template <int kDim, int kTileRows, int kThreads, typename T>
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

// What a backward needs to know of a query's softmax row.
struct ScoreRow {
  float max, inverse_sum;
  float delta;  // sum of dout * out
};

// Of query `query`; beyond the sequence's end one whose probabilities are all 0.
__device__ __forceinline__ ScoreRow ScoreRowOf(const AttentionParams& p, const Head& h, int query,
                                               float delta) {
  if (query >= h.length) return {INFINITY, 0.0f, 0.0f};
  const SoftmaxRow row = p.softmax[h.row + query];
  return {row.max, row.inverse_sum, delta};
}

// The tiles of a block of keys and of queries, in shared memory.
template <typename T>
struct KeyAndQueryTiles {
  const T *k, *v;        // the block's keys
  const T *q, *dout;     // queries
  const ScoreRow* rows;  // of these queries
};

// For a warp's 16 keys, rows [warp_row, + 16) of the tiles, and kTiles * 8 queries from `q0`:
// the probabilities after dropout, without its scale, and the gradients of the scores. Rows of the
// fragments are keys g and g + 8, whose biases are `bias`; columns are queries.
template <typename T, int kDim, int kTiles>
__device__ __forceinline__ void ScoreGradsOfKeys(const AttentionParams& p, const Head& h,
                                                 const RngState& rng,
                                                 const KeyAndQueryTiles<T>& tiles, int warp_row,
                                                 int key0, int q0, const float (&bias)[2],
                                                 float (&probs)[kTiles][4],
                                                 float (&ds)[kTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int g = lane >> 2;
  const int t = lane & 3;
  // Until the end `probs` are scores and `ds` the gradients of the probabilities.
  {
    uint32_t a[kDim / 16][4];
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) LoadA<Stride(kDim)>(a[k], tiles.k, warp_row, k * 16);
    MultiplyRows<T, kDim, kTiles>(probs, a, tiles.q);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) LoadA<Stride(kDim)>(a[k], tiles.v, warp_row, k * 16);
    MultiplyRows<T, kDim, kTiles>(ds, a, tiles.dout);
  }
  uint32_t drawn = 0;
  if (p.dropout.rng != nullptr) drawn = DrawKeyRows<kTiles>(p.dropout, rng, h.row + q0, key0);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) probs[n][i] = probs[n][i] * p.scale + bias[i >> 1];
  }
  // Only where the tile's first query does not see this warp's last key.
  if (p.causal && q0 < key0 + 15) CutKeyRows<kTiles>(key0 + g, q0, probs);
    // Tile n = 2 * pair + j. For each j, key half b and query parity e, one shuffle brings the bits
    // of all pairs.
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
          const ScoreRow& row = tiles.rows[n * 8 + 2 * t + e];
          const bool keep = ((kept >> (8 * pair)) & 1u) != 0;
          const float prob = Exp2((probs[n][i] - row.max) * kLog2E) * row.inverse_sum;
          const float dprob = keep ? ds[n][i] * scale : 0.0f;
          probs[n][i] = keep ? prob : 0.0f;
          ds[n][i] = prob * (dprob - row.delta);
        }
      }
    }
  }
}

}  // namespace lamina::cuda
