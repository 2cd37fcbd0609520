// Purpose: sums over a warp, a group of whole warps and a block, always in the same order.
#pragma once

namespace lamina::cuda {

__device__ __forceinline__ float WarpSum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xFFFFFFFFu, v, offset);
  return v;
}

__device__ __forceinline__ double WarpSum(double v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xFFFFFFFFu, v, offset);
  return v;
}

// Between lanes that differ in the bit kLane: each keeps half of v's sums and adds to them the
// other lane's. The lane with the bit set keeps the upper half.
template <int kLane, int kCount>
__device__ __forceinline__ void ShareSums(const float (&v)[2 * kCount], float (&kept)[kCount]) {
  const bool upper = (threadIdx.x & kLane) != 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float theirs = upper ? v[i] : v[i + kCount];
    const float got = __shfl_xor_sync(0xFFFFFFFFu, theirs, kLane);
    kept[i] = (upper ? v[i + kCount] : v[i]) + got;
  }
}

// The sums of v over the eight lanes of equal lane % 4, which are the rows of a product's
// fragments: lane 4 g + t is left with those of v[kCount g] and on.
template <int kCount>
__device__ __forceinline__ void SumOverRows(const float (&v)[8 * kCount], float (&kept)[kCount]) {
  float half[4 * kCount], quarter[2 * kCount];
  ShareSums<16>(v, half);
  ShareSums<8>(half, quarter);
  ShareSums<4>(quarter, kept);
}

// Sums each v[i] over the `warps` neighbouring warps that this thread's group consists of, and
// gives every thread of the group the total. All threads of the block must call it. `scratch` is
// shared memory for kCount * 32 floats; before it is used again, the block must pass another
// barrier.
template <int kCount>
__device__ __forceinline__ void GroupSum(float (&v)[kCount], int warps, float* scratch) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = WarpSum(v[i]);
  if (warps == 1) return;
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  if ((threadIdx.x & 31u) == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scratch[i * 32 + warp] = v[i];
  }
  __syncthreads();
  const int first = warp / warps * warps;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float total = 0.0f;
    for (int w = 0; w < warps; ++w) total += scratch[i * 32 + first + w];
    v[i] = total;
  }
}

// Sums each v[i] over the block of kWarps warps; thread 0 alone receives the totals. All threads
// must call it, once: a second call of the same kind would need a barrier in between.
template <int kWarps, int kCount>
__device__ __forceinline__ void BlockSum(double (&v)[kCount]) {
  __shared__ double shared[kCount][kWarps];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    v[i] = WarpSum(v[i]);
    if ((threadIdx.x & 31u) == 0) shared[i][threadIdx.x >> 5] = v[i];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    v[i] = 0.0;
    for (int w = 0; w < kWarps; ++w) v[i] += shared[i][w];
  }
}

}  // namespace lamina::cuda
