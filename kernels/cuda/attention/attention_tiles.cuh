// Purpose: what the tensor core attention kernels have in common: tiles on their way to shared
// memory, dropout and causality in fragments of scores, products with tiles. attention_mma.cu says
// how they are put together.
#pragma once

#include <cstdint>

#include "attention/attention_head.cuh"
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

}  // namespace lamina::cuda
