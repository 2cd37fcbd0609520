// Purpose: the plain tiled product behind product_any.cuh.
#include "common/convert.cuh"
#include "common/dispatch.cuh"
#include "products/product_any.cuh"

namespace lamina::cuda {
namespace {

constexpr int kTile = 64;   // rows and columns of d a block computes
constexpr int kDepth = 16;  // of the reduction at a time
constexpr int kThreads = 256;

// Threads 16 x 16; a thread computes 4 x 4 elements, 16 apart.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads) ProductAnyKernel(ProductAnyParams p) {
  __shared__ float a_tile[kDepth][kTile + 1];
  __shared__ float b_tile[kDepth][kTile + 1];
  const In* a = static_cast<const In*>(p.a);
  const In* b = static_cast<const In*>(p.b);
  const int64_t n_tiles = (p.n + kTile - 1) / kTile;
  const int64_t i0 = blockIdx.x / n_tiles * kTile;
  const int64_t j0 = blockIdx.x % n_tiles * kTile;
  const int tid = static_cast<int>(threadIdx.x);
  const int ty = tid / 16;
  const int tx = tid % 16;
  float sum[4][4] = {};
  for (int64_t p0 = 0; p0 < p.k; p0 += kDepth) {
    for (int e = tid; e < kTile * kDepth; e += kThreads) {
      // Neighbouring threads go along whichever index is contiguous in memory.
      const int ar = p.a_col == 1 ? e / kDepth : e % kTile;
      const int ac = p.a_col == 1 ? e % kDepth : e / kTile;
      a_tile[ac][ar] = i0 + ar < p.m && p0 + ac < p.k
                           ? ToFloat(a[(i0 + ar) * p.a_row + (p0 + ac) * p.a_col])
                           : 0.0f;
      const int br = p.b_col == 1 ? e / kDepth : e % kTile;
      const int bc = p.b_col == 1 ? e % kDepth : e / kTile;
      b_tile[bc][br] = j0 + br < p.n && p0 + bc < p.k
                           ? ToFloat(b[(j0 + br) * p.b_row + (p0 + bc) * p.b_col])
                           : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      float av[4], bv[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        av[i] = a_tile[d][ty + 16 * i];
        bv[i] = b_tile[d][tx + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += av[i] * bv[j];
      }
    }
    __syncthreads();
  }
  Out* out = static_cast<Out*>(p.d);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = i0 + ty + 16 * i;
      const int64_t col = j0 + tx + 16 * j;
      if (row >= p.m || col >= p.n) continue;
      float v = sum[i][j];
      if (p.bias != nullptr) v += ToFloat(static_cast<const In*>(p.bias)[col]);
      if (p.accumulate) v += ToFloat(out[row * p.n + col]);
      out[row * p.n + col] = FromFloat<Out>(v);
    }
  }
}

}  // namespace

cudaError_t LaunchProductAny(const ProductAnyParams& p, cudaStream_t stream) {
  const int64_t blocks = ((p.m + kTile - 1) / kTile) * ((p.n + kTile - 1) / kTile);
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidValue;
  const auto grid = static_cast<unsigned>(blocks);
  return DispatchFloat(p.operand_dtype, [&](auto tag) {
    using In = typename decltype(tag)::type;
    if (p.result_dtype == p.operand_dtype) {
      ProductAnyKernel<In, In><<<grid, kThreads, 0, stream>>>(p);
    } else if (p.result_dtype == DType::kF32) {
      ProductAnyKernel<In, float><<<grid, kThreads, 0, stream>>>(p);
    } else {
      return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
  });
}

}  // namespace lamina::cuda
