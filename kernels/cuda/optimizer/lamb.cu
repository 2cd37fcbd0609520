// Purpose: the LAMB step in three kernels; lamb.cuh.
//
// A block has one chunk of one segment. The first kernel updates the moments and leaves the chunk's
// sums of squares of w and of the update u; the second adds those of each segment up, in order, and
// leaves the ratio; the third computes u again, from what the first one wrote, rather than read it.
//
// Chunks are numbered without a table. Segment i has slots from floor(begin / chunk) + i on, one
// for each of its ceil(length / chunk) chunks. Those end before the next segment's begin, since
// that begins at begin + length or later, and
//   floor((begin + length) / chunk) + i + 1 >= floor(begin / chunk) + i + ceil(length / chunk).
// Before and between segments a slot may stay empty: its block does nothing.
#include <algorithm>

#include "common/convert.cuh"
#include "common/dispatch.cuh"
#include "common/reduce.cuh"
#include "kernel_limits.h"
#include "optimizer/lamb.cuh"

namespace lamina::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 8;          // elements of a thread at a time
constexpr int kMinChunkBits = 13;  // four times what a block reads at once

// Sums of squares of a chunk.
struct LambPartial {
  double w, u;
};

// The launch's division of the buffers. It depends on their length and on the number of segments
// alone, so that results don't depend on how large the workspace happens to be.
struct LambGrid {
  int chunk_bits;  // a chunk is 2^chunk_bits elements
  int64_t slots;
};

size_t BytesOf(const LambGrid& grid, int64_t segments) {
  return static_cast<size_t>(grid.slots) * sizeof(LambPartial) +
         static_cast<size_t>(segments) * sizeof(float);
}

LambGrid GridOf(int64_t elements, int64_t segments) {
  // The last segment's slots end at floor(elements / chunk) + segments, as above.
  LambGrid grid{kMinChunkBits, (elements >> kMinChunkBits) + segments};
  while (elements >> grid.chunk_bits > 0 && BytesOf(grid, segments) > kLambWorkspaceBytes) {
    ++grid.chunk_bits;
    grid.slots = (elements >> grid.chunk_bits) + segments;
  }
  return grid;
}

__device__ __forceinline__ int64_t FirstSlot(const LambRange& segment, int64_t i, int chunk_bits) {
  return (segment.begin >> chunk_bits) + i;
}

// A chunk of a segment; begin == end for the block of an empty slot.
struct LambChunk {
  int64_t segment = 0, begin = 0, end = 0;
  bool decay = false, adapt = false;
};
__device__ __forceinline__ LambChunk ChunkOfBlock(const LambParams& p, int chunk_bits) {
  // The last segment whose first slot is this one or before it.
  LambChunk c;
  int64_t beyond = p.segment_count;
  while (c.segment + 1 < beyond) {
    const int64_t middle = (c.segment + beyond) / 2;
    if (FirstSlot(p.segments[middle], middle, chunk_bits) <= blockIdx.x) {
      c.segment = middle;
    } else {
      beyond = middle;
    }
  }
  const LambRange segment = p.segments[c.segment];
  const int64_t index = int64_t{blockIdx.x} - FirstSlot(segment, c.segment, chunk_bits);
  // Slots before the first segment's have no chunk either.
  if (index < 0) return c;
  const int64_t chunk = int64_t{1} << chunk_bits;
  c.begin = min(segment.begin + index * chunk, segment.end);
  c.end = min(c.begin + chunk, segment.end);
  c.decay = segment.decay != 0;
  c.adapt = segment.adapt != 0;
  return c;
}

__device__ __forceinline__ float UpdateOf(const LambParams& p, float decay, float w, float m,
                                          float v) {
  return (m / p.correction1) / (sqrtf(v / p.correction2) + p.eps) + decay * w;
}

// Calls f(offset, width tag) for this thread's parts of the chunk: kWidth elements at once where
// `wide` and the chunk's begin allow it.
template <int kElements>
struct WidthTag {
  static constexpr int value = kElements;
};
template <typename F>
__device__ __forceinline__ void ForChunk(const LambChunk& c, bool wide, F&& f) {
  const int64_t groups = wide && c.begin % kWidth == 0 ? (c.end - c.begin) / kWidth : 0;
  for (int64_t i = threadIdx.x; i < groups; i += kThreads) {
    f(c.begin + i * kWidth, WidthTag<kWidth>{});
  }
  for (int64_t i = c.begin + groups * kWidth + threadIdx.x; i < c.end; i += kThreads) {
    f(i, WidthTag<1>{});
  }
}

__global__ void __launch_bounds__(kThreads)
    LambMomentsKernel(LambParams p, int chunk_bits, bool wide, LambPartial* partials) {
  if (p.control->skip != 0) return;
  const LambChunk c = ChunkOfBlock(p, chunk_bits);
  if (c.begin == c.end) return;
  const float scale = p.control->grad_scale;
  const float decay = c.decay ? p.weight_decay : 0.0f;
  double sums[2] = {0.0, 0.0};
  ForChunk(c, wide, [&](int64_t offset, auto tag) {
    constexpr int kElements = decltype(tag)::value;
    float grad[kElements], m[kElements], v[kElements];
    LoadWide<float, kElements>(p.grad + offset, grad);
    LoadWide<float, kElements>(p.m + offset, m);
    LoadWide<float, kElements>(p.v + offset, v);
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const float g = grad[j] * scale;
      m[j] = p.beta1 * m[j] + (1.0f - p.beta1) * g;
      v[j] = p.beta2 * v[j] + (1.0f - p.beta2) * g * g;
    }
    StoreWide<float, kElements>(p.m + offset, m);
    StoreWide<float, kElements>(p.v + offset, v);
    if (!c.adapt) return;
    float w[kElements];
    LoadWide<float, kElements>(p.master + offset, w);
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      const float u = UpdateOf(p, decay, w[j], m[j], v[j]);
      sums[0] += static_cast<double>(w[j]) * w[j];
      sums[1] += static_cast<double>(u) * u;
    }
  });
  if (!c.adapt) return;
  BlockSum<kThreads / 32>(sums);
  if (threadIdx.x == 0) partials[blockIdx.x] = LambPartial{sums[0], sums[1]};
}

// A block for each segment.
__global__ void __launch_bounds__(kThreads)
    LambRatioKernel(LambParams p, int chunk_bits, const LambPartial* partials, float* ratios) {
  if (p.control->skip != 0) return;
  const int64_t i = blockIdx.x;
  const LambRange segment = p.segments[i];
  double sums[2] = {0.0, 0.0};
  if (segment.adapt != 0) {
    const LambPartial* mine = partials + FirstSlot(segment, i, chunk_bits);
    const int64_t length = segment.end - segment.begin;
    const int64_t count = (length + (int64_t{1} << chunk_bits) - 1) >> chunk_bits;
    for (int64_t s = threadIdx.x; s < count; s += kThreads) {
      sums[0] += mine[s].w;
      sums[1] += mine[s].u;
    }
  }
  BlockSum<kThreads / 32>(sums);
  if (threadIdx.x != 0) return;
  double ratio = 1.0;
  if (sums[0] > 0.0 && sums[1] > 0.0) {
    ratio = fmax(sqrt(sums[0]) / sqrt(sums[1]), static_cast<double>(p.min_ratio));
    if (p.max_ratio > 0.0f) ratio = fmin(ratio, static_cast<double>(p.max_ratio));
  }
  ratios[i] = static_cast<float>(ratio);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    LambUpdateKernel(LambParams p, int chunk_bits, bool wide, const float* ratios) {
  if (p.control->skip != 0) return;
  const LambChunk c = ChunkOfBlock(p, chunk_bits);
  if (c.begin == c.end) return;
  const float decay = c.decay ? p.weight_decay : 0.0f;
  const float step = p.lr * ratios[c.segment];
  ForChunk(c, wide, [&](int64_t offset, auto tag) {
    constexpr int kElements = decltype(tag)::value;
    float w[kElements], m[kElements], v[kElements];
    LoadWide<float, kElements>(p.master + offset, w);
    LoadWide<float, kElements>(p.m + offset, m);
    LoadWide<float, kElements>(p.v + offset, v);
#pragma unroll
    for (int j = 0; j < kElements; ++j) w[j] -= step * UpdateOf(p, decay, w[j], m[j], v[j]);
    StoreWide<float, kElements>(p.master + offset, w);
    if (p.weights != nullptr) StoreWide<T, kElements>(static_cast<T*>(p.weights) + offset, w);
  });
}

template <typename T>
cudaError_t Launch(const LambParams& p, cudaStream_t stream) {
  const LambGrid grid = GridOf(p.elements, p.segment_count);
  if (grid.slots > 0x7FFFFFFF) return cudaErrorInvalidValue;
  auto* partials = static_cast<LambPartial*>(p.workspace);
  auto* ratios = reinterpret_cast<float*>(partials + grid.slots);
  const bool wide = Aligned16(p.master, p.weights, p.grad, p.m, p.v);
  const auto slots = static_cast<unsigned>(grid.slots);
  LambMomentsKernel<<<slots, kThreads, 0, stream>>>(p, grid.chunk_bits, wide, partials);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  LambRatioKernel<<<static_cast<unsigned>(p.segment_count), kThreads, 0, stream>>>(
      p, grid.chunk_bits, partials, ratios);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  LambUpdateKernel<T><<<slots, kThreads, 0, stream>>>(p, grid.chunk_bits, wide, ratios);
  return cudaGetLastError();
}

}  // namespace

size_t LambWorkspaceBytes(int64_t elements, int64_t segment_count) {
  return BytesOf(GridOf(elements, segment_count), segment_count);
}

cudaError_t LaunchLamb(const LambParams& params, cudaStream_t stream) {
  if (params.elements == 0 || params.segment_count == 0) return cudaSuccess;
  if (params.weights == nullptr) return Launch<float>(params, stream);
  return DispatchFloat(
      params.dtype, [&](auto tag) { return Launch<typename decltype(tag)::type>(params, stream); });
}

}  // namespace lamina::cuda
