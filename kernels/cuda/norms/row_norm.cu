// Purpose: layer norm with what surrounds it fused in; row_norm.cuh.
//
// Fast path (cols a multiple of 8, pointers aligned to 16 bytes, rows that fit in registers): a
// group of whole warps holds a row in registers, kChunks chunks of eight columns a thread; a block
// holds several groups. Backward: a thread keeps its columns over all rows of its block, so the
// column sums stay in registers until the block's end. Otherwise: forward holds the row in shared
// memory; backward reads its row twice, and column sums are a kernel of their own. 16-bit rows of
// usual widths are row_norm_ring.cu's and row_norm_staged.cu's.
#include <algorithm>

#include "column_sum.cuh"
#include "common/convert.cuh"
#include "common/dispatch.cuh"
#include "common/dropout.cuh"
#include "common/norm_math.cuh"
#include "common/reduce.cuh"
#include "kernel_limits.h"
#include "norms/row_norm.cuh"
#include "norms/row_norm_ring.cuh"
#include "norms/row_norm_staged.cuh"

namespace lamina::cuda {
namespace {

// Threads of a group: whole warps that cover `chunks` chunks with `per_thread` chunks a thread.
constexpr int GroupThreads(int64_t chunks, int per_thread) {
  const int64_t threads = (chunks + per_thread - 1) / per_thread;
  return static_cast<int>((threads + 31) / 32 * 32);
}

// residual + dropout(x + bias) for kWidth columns from `col`; x alone without residual.
template <typename T, int kWidth>
__device__ __forceinline__ void LoadSum(const RowNormParams& p, const RngState& rng, int64_t row,
                                        int col, float (&v)[kWidth]) {
  const int64_t offset = row * p.cols + col;
  LoadWide<T, kWidth>(static_cast<const T*>(p.x) + offset, v);
  if (p.residual == nullptr) return;
  float other[kWidth];
  if (p.bias != nullptr) {
    LoadWide<T, kWidth>(static_cast<const T*>(p.bias) + col, other);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] = __fadd_rn(v[i], other[i]);
  }
  if (p.dropout.rng != nullptr) ApplyDropout<kWidth>(p.dropout, rng, row, col, v);
  LoadWide<T, kWidth>(static_cast<const T*>(p.residual) + offset, other);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) v[i] = __fadd_rn(v[i], other[i]);
}

template <typename T, int kChunks>
__global__ void __launch_bounds__(512) RowNormKernel(RowNormParams p, int group_threads) {
  __shared__ float scratch[2][32];
  const int group = static_cast<int>(threadIdx.x) / group_threads;
  const int thread = static_cast<int>(threadIdx.x) - group * group_threads;
  const int groups = static_cast<int>(blockDim.x) / group_threads;
  const int64_t row = int64_t{blockIdx.x} * groups + group;
  const int chunks = static_cast<int>(p.cols / 8);
  const bool active = row < p.rows;
  RngState rng{};
  if (p.dropout.rng != nullptr) rng = *p.dropout.rng;

  float v[kChunks][8];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = thread + c * group_threads;
    if (active && chunk < chunks) {
      LoadSum<T, 8>(p, rng, row, chunk * 8, v[c]);
      const Raw8<T> sum = Pack8<T>(v[c]);
      if (p.sum != nullptr) StoreRaw8(static_cast<T*>(p.sum) + row * p.cols + chunk * 8, sum);
      Unpack8(sum, v[c]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[c][i] = 0.0f;
    }
  }
  if (p.gamma == nullptr) return;

  const float inv_cols = 1.0f / static_cast<float>(p.cols);
  float total[1] = {0.0f};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < 8; ++i) total[0] += v[c][i];
  }
  GroupSum<1>(total, group_threads / 32, scratch[0]);
  const float mean = total[0] * inv_cols;
  total[0] = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (thread + c * group_threads < chunks) {
#pragma unroll
      for (int i = 0; i < 8; ++i) total[0] += (v[c][i] - mean) * (v[c][i] - mean);
    }
  }
  GroupSum<1>(total, group_threads / 32, scratch[1]);
  const float rstd = rsqrtf(total[0] * inv_cols + p.eps);
  if (!active) return;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = thread + c * group_threads;
    if (chunk >= chunks) continue;
    float gamma[8], beta[8];
    Load8(static_cast<const T*>(p.gamma) + chunk * 8, gamma);
    Load8(static_cast<const T*>(p.beta) + chunk * 8, beta);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[c][i] = NormOutput(Normalised(v[c][i], mean, rstd), gamma[i], beta[i]);
    }
    Store8(static_cast<T*>(p.y) + row * p.cols + chunk * 8, v[c]);
  }
  if (thread == 0) {
    if (p.mean != nullptr) p.mean[row] = mean;
    if (p.rstd != nullptr) p.rstd[row] = rstd;
  }
}

// One row a block, the row as fp32 in dynamic shared memory; any width, any alignment.
template <typename T>
__global__ void __launch_bounds__(256) RowNormAnyKernel(RowNormParams p) {
  extern __shared__ float values[];
  __shared__ float scratch[2][32];
  const int64_t row = blockIdx.x;
  const int cols = static_cast<int>(p.cols);
  const int warps = static_cast<int>(blockDim.x) / 32;
  RngState rng{};
  if (p.dropout.rng != nullptr) rng = *p.dropout.rng;

  // Each thread reads back only what it wrote, so `values` needs no barrier.
  float total[1] = {0.0f};
  for (int col = static_cast<int>(threadIdx.x); col < cols; col += static_cast<int>(blockDim.x)) {
    float v[1];
    LoadSum<T, 1>(p, rng, row, col, v);
    const T sum = FromFloat<T>(v[0]);
    if (p.sum != nullptr) static_cast<T*>(p.sum)[row * p.cols + col] = sum;
    values[col] = ToFloat(sum);
    total[0] += values[col];
  }
  if (p.gamma == nullptr) return;
  GroupSum<1>(total, warps, scratch[0]);
  const float inv_cols = 1.0f / static_cast<float>(cols);
  const float mean = total[0] * inv_cols;
  total[0] = 0.0f;
  for (int col = static_cast<int>(threadIdx.x); col < cols; col += static_cast<int>(blockDim.x)) {
    total[0] += (values[col] - mean) * (values[col] - mean);
  }
  GroupSum<1>(total, warps, scratch[1]);
  const float rstd = rsqrtf(total[0] * inv_cols + p.eps);
  for (int col = static_cast<int>(threadIdx.x); col < cols; col += static_cast<int>(blockDim.x)) {
    const float gamma = ToFloat(static_cast<const T*>(p.gamma)[col]);
    const float beta = ToFloat(static_cast<const T*>(p.beta)[col]);
    static_cast<T*>(p.y)[row * p.cols + col] =
        FromFloat<T>(NormOutput(Normalised(values[col], mean, rstd), gamma, beta));
  }
  if (threadIdx.x == 0) {
    if (p.mean != nullptr) p.mean[row] = mean;
    if (p.rstd != nullptr) p.rstd[row] = rstd;
  }
}

// The normalised values of kWidth columns from `col`, whose gammas the caller has.
template <typename T, int kWidth, bool kFromOutput>
__device__ __forceinline__ void LoadNormalised(const RowNormBackwardParams& p, int64_t row,
                                               int64_t col, float mean, float rstd,
                                               const float (&gamma)[kWidth],
                                               float (&normalised)[kWidth]) {
  const int64_t offset = row * p.cols + col;
  if constexpr (kFromOutput) {
    float beta[kWidth];
    LoadWide<T, kWidth>(static_cast<const T*>(p.y) + offset, normalised);
    LoadWide<T, kWidth>(static_cast<const T*>(p.beta) + col, beta);
#pragma unroll
    // Two ulp beside what y lost when it was rounded; an exact division costs a third of the
    // registers, and with them half of the blocks.
    for (int i = 0; i < kWidth; ++i) {
      normalised[i] = __fdividef(normalised[i] - beta[i], gamma[i]);
    }
  } else {
    LoadWide<T, kWidth>(static_cast<const T*>(p.sum) + offset, normalised);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) normalised[i] = Normalised(normalised[i], mean, rstd);
  }
}

// The norm's output, of the normalised values of kWidth columns from `col`.
template <typename T, int kWidth>
__device__ __forceinline__ void StoreOutput(const RowNormBackwardParams& p, int64_t row,
                                            int64_t col, const float (&gamma)[kWidth],
                                            const float (&normalised)[kWidth]) {
  float beta[kWidth], y[kWidth];
  LoadWide<T, kWidth>(static_cast<const T*>(p.beta) + col, beta);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) y[i] = NormOutput(normalised[i], gamma[i], beta[i]);
  StoreWide<T, kWidth>(static_cast<T*>(p.y_again) + row * p.cols + col, y);
}

constexpr int BackwardThreads(int chunks_per_thread) { return chunks_per_thread <= 2 ? 512 : 256; }
// Of such blocks a multiprocessor has at once.
constexpr int BackwardBlocksAtOnce(int chunks_per_thread) { return chunks_per_thread == 1 ? 2 : 1; }

// Partial sums go to partials[(array * gridDim.x + block) * cols + col]: dgamma and dbeta where
// there is a norm, and then dbias. kFromOutput: y and beta are there, not sum.
template <typename T, int kChunks, bool kFromOutput>
__global__ void __launch_bounds__(BackwardThreads(kChunks), BackwardBlocksAtOnce(kChunks))
    RowNormBackwardKernel(RowNormBackwardParams p, float* partials, int group_threads) {
  extern __shared__ float columns[];  // [cols]: sums over the groups
  __shared__ float scratch[2][2 * 32];
  const int group = static_cast<int>(threadIdx.x) / group_threads;
  const int thread = static_cast<int>(threadIdx.x) - group * group_threads;
  const int groups = static_cast<int>(blockDim.x) / group_threads;
  const int chunks = static_cast<int>(p.cols / 8);
  const float inv_cols = 1.0f / static_cast<float>(p.cols);
  RngState rng{};
  if (p.dropout.rng != nullptr) rng = *p.dropout.rng;

  // Index 0: dgamma, 1: dbeta, 2: dbias.
  float sums[3][kChunks][8] = {};
  int parity = 0;
  // The bound is the block's, not the group's: every thread meets every barrier.
  for (int64_t base = int64_t{blockIdx.x} * groups; base < p.rows;
       base += int64_t{gridDim.x} * groups, parity ^= 1) {
    const int64_t row = base + group;
    const bool active = row < p.rows;
    float ds[kChunks][8];
    if (p.dy != nullptr) {
      const float mean = active && !kFromOutput ? p.mean[row] : 0.0f;
      const float rstd = active ? p.rstd[row] : 0.0f;
      float normalised[kChunks][8];
      float total[2] = {0.0f, 0.0f};  // sums of g and of g * normalised, g = dy * gamma
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int chunk = thread + c * group_threads;
        if (active && chunk < chunks) {
          const int64_t offset = row * p.cols + chunk * 8;
          float gamma[8];
          Load8(static_cast<const T*>(p.dy) + offset, ds[c]);
          Load8(static_cast<const T*>(p.gamma) + chunk * 8, gamma);
          LoadNormalised<T, 8, kFromOutput>(p, row, chunk * 8, mean, rstd, gamma, normalised[c]);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            sums[0][c][i] += ds[c][i] * normalised[c][i];
            sums[1][c][i] += ds[c][i];
            ds[c][i] *= gamma[i];
            total[0] += ds[c][i];
            total[1] += ds[c][i] * normalised[c][i];
          }
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i) normalised[c][i] = ds[c][i] = 0.0f;
        }
      }
      // Two scratch areas in turn: the barrier in the next call orders this call's reads.
      GroupSum<2>(total, group_threads / 32, scratch[parity]);
      const float mean_g = total[0] * inv_cols;
      const float mean_gn = total[1] * inv_cols;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          ds[c][i] = rstd * (ds[c][i] - mean_g - normalised[c][i] * mean_gn);
        }
        // The barrier of the sums lies between, so that the registers of both ends do not add up.
        const int chunk = thread + c * group_threads;
        if (!kFromOutput && p.y_again != nullptr && active && chunk < chunks) {
          float gamma[8];
          Load8(static_cast<const T*>(p.gamma) + chunk * 8, gamma);
          StoreOutput<T, 8>(p, row, chunk * 8, gamma, normalised[c]);
        }
      }
    } else {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < 8; ++i) ds[c][i] = 0.0f;
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = thread + c * group_threads;
      if (!active || chunk >= chunks) continue;
      const int64_t offset = row * p.cols + chunk * 8;
      if (p.dsum != nullptr) {
        float other[8];
        Load8(static_cast<const T*>(p.dsum) + offset, other);
#pragma unroll
        for (int i = 0; i < 8; ++i) ds[c][i] += other[i];
      }
      if (p.dsum_out != nullptr) StoreAndKeep8(static_cast<T*>(p.dsum_out) + offset, ds[c]);
      if (p.dx == nullptr) continue;
      if (p.dropout.rng != nullptr) ApplyDropout<8>(p.dropout, rng, row, chunk * 8, ds[c]);
      Store8(static_cast<T*>(p.dx) + offset, ds[c]);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[2][c][i] += ds[c][i];
    }
  }

  // The groups add their sums up one after another; the last one writes the block's sums out.
#pragma unroll
  for (int array = 0; array < 3; ++array) {
    float* gradient = array == 0 ? p.dgamma : array == 1 ? p.dbeta : p.dbias;
    if (gradient == nullptr) continue;
    const int place = p.dy != nullptr ? array : 0;
    float* out = partials + (place * int64_t{gridDim.x} + blockIdx.x) * p.cols;
    for (int turn = 0; turn < groups; ++turn) {
      if (group == turn) {
        const bool last = turn + 1 == groups;
        float* dst = last ? out : columns;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const int chunk = thread + c * group_threads;
          if (chunk >= chunks) continue;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int col = chunk * 8 + i;
            const float total = (turn == 0 ? 0.0f : columns[col]) + sums[array][c][i];
            dst[col] = total;
          }
        }
      }
      __syncthreads();
    }
  }
}

// One row a block, the row read twice; any width, any alignment. Leaves the column sums to others.
template <typename T, bool kFromOutput>
__global__ void __launch_bounds__(256) RowNormBackwardAnyKernel(RowNormBackwardParams p) {
  __shared__ float scratch[2 * 32];
  const int64_t row = blockIdx.x;
  const int cols = static_cast<int>(p.cols);
  const int step = static_cast<int>(blockDim.x);
  const T* dy = static_cast<const T*>(p.dy);
  const T* dsum = static_cast<const T*>(p.dsum);
  RngState rng{};
  if (p.dropout.rng != nullptr) rng = *p.dropout.rng;

  float mean = 0.0f, rstd = 0.0f, mean_g = 0.0f, mean_gn = 0.0f;
  if (dy != nullptr) {
    if (!kFromOutput) mean = p.mean[row];
    rstd = p.rstd[row];
    float total[2] = {0.0f, 0.0f};
    for (int col = static_cast<int>(threadIdx.x); col < cols; col += step) {
      const float gamma[1] = {ToFloat(static_cast<const T*>(p.gamma)[col])};
      float normalised[1];
      LoadNormalised<T, 1, kFromOutput>(p, row, col, mean, rstd, gamma, normalised);
      const float g = ToFloat(dy[row * p.cols + col]) * gamma[0];
      total[0] += g;
      total[1] += g * normalised[0];
    }
    GroupSum<2>(total, step / 32, scratch);
    mean_g = total[0] / static_cast<float>(cols);
    mean_gn = total[1] / static_cast<float>(cols);
  }
  for (int col = static_cast<int>(threadIdx.x); col < cols; col += step) {
    const int64_t offset = row * p.cols + col;
    float ds[1] = {0.0f};
    if (dy != nullptr) {
      const float gamma[1] = {ToFloat(static_cast<const T*>(p.gamma)[col])};
      float normalised[1];
      LoadNormalised<T, 1, kFromOutput>(p, row, col, mean, rstd, gamma, normalised);
      ds[0] = rstd * (ToFloat(dy[offset]) * gamma[0] - mean_g - normalised[0] * mean_gn);
      if constexpr (!kFromOutput) {
        if (p.y_again != nullptr) StoreOutput<T, 1>(p, row, col, gamma, normalised);
      }
    }
    if (dsum != nullptr) ds[0] += ToFloat(dsum[offset]);
    if (p.dsum_out != nullptr) {
      const T stored = FromFloat<T>(ds[0]);
      static_cast<T*>(p.dsum_out)[offset] = stored;
      ds[0] = ToFloat(stored);
    }
    if (p.dx == nullptr) continue;
    if (p.dropout.rng != nullptr) ApplyDropout<1>(p.dropout, rng, row, col, ds);
    static_cast<T*>(p.dx)[offset] = FromFloat<T>(ds[0]);
  }
}

// Partial sums of dgamma and dbeta. Block (bx, by): 32 columns, the rows of slice by.
template <typename T, bool kFromOutput>
__global__ void __launch_bounds__(256)
    NormColumnsKernel(RowNormBackwardParams p, float* partials, int64_t rows_per_slice) {
  __shared__ float shared[2][8][33];
  const int64_t col = int64_t{blockIdx.x} * 32 + threadIdx.x;
  const int64_t begin = blockIdx.y * rows_per_slice;
  const int64_t end = min(begin + rows_per_slice, p.rows);
  float dgamma = 0.0f, dbeta = 0.0f;
  if (col < p.cols) {
    const float gamma[1] = {ToFloat(static_cast<const T*>(p.gamma)[col])};
    for (int64_t row = begin + threadIdx.y; row < end; row += 8) {
      const float dy = ToFloat(static_cast<const T*>(p.dy)[row * p.cols + col]);
      float normalised[1];
      LoadNormalised<T, 1, kFromOutput>(p, row, col, kFromOutput ? 0.0f : p.mean[row], p.rstd[row],
                                        gamma, normalised);
      dgamma += dy * normalised[0];
      dbeta += dy;
    }
  }
  shared[0][threadIdx.y][threadIdx.x] = dgamma;
  shared[1][threadIdx.y][threadIdx.x] = dbeta;
  __syncthreads();
  if (threadIdx.y >= 2 || col >= p.cols) return;
  float total = 0.0f;
  for (int r = 0; r < 8; ++r) total += shared[threadIdx.y][r][threadIdx.x];
  partials[(threadIdx.y * int64_t{gridDim.y} + blockIdx.y) * p.cols + col] = total;
}

template <typename T, int kChunks>
cudaError_t LaunchFast(const RowNormParams& p, cudaStream_t stream) {
  const int group_threads = GroupThreads(p.cols / 8, kChunks);
  const int groups = std::max(1, 256 / group_threads);
  const int64_t blocks = (p.rows + groups - 1) / groups;
  RowNormKernel<T, kChunks>
      <<<static_cast<unsigned>(blocks), static_cast<unsigned>(groups * group_threads), 0, stream>>>(
          p, group_threads);
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchAny(const RowNormParams& p, cudaStream_t stream) {
  if (p.cols > MaxRowNormCols()) return cudaErrorInvalidValue;
  const size_t shared = static_cast<size_t>(p.cols) * sizeof(float);
  if (shared > 40 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        RowNormAnyKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  RowNormAnyKernel<T><<<static_cast<unsigned>(p.rows), 256, shared, stream>>>(p);
  return cudaGetLastError();
}

// Blocks of `rows` rows at once, as many as the device and the workspace have room for; 0: it has
// none.
int64_t BackwardBlocks(const RowNormBackwardParams& p, int64_t rows) {
  const int64_t fitting = static_cast<int64_t>(
      p.workspace_bytes / (static_cast<size_t>(p.cols) * kRowNormBackwardArrays * sizeof(float)));
  return std::min(
      {(p.rows + rows - 1) / rows, int64_t{p.multiprocessors} * kRowNormBackwardBlocks, fitting});
}

// launch(q) starts a kernel whose `blocks` blocks leave their sums in q.workspace: where they may
// be finished later, in the memory for that; else they are finished here. Sums are dgamma and dbeta
// where there is a norm, and behind them dbias where there is a dx.
template <typename F>
cudaError_t LaunchAndSum(const RowNormBackwardParams& p, int64_t blocks, cudaStream_t stream,
                         F&& launch) {
  if (blocks == 0) return cudaErrorInvalidValue;
  FinishColumnSumArgs finish;
  finish.slices = blocks;
  finish.cols = p.cols;
  int count = 0;
  if (p.dy != nullptr) {
    finish.dst[count++] = p.dgamma;
    finish.dst[count++] = p.dbeta;
  }
  if (p.dx != nullptr) finish.dst[count++] = p.dbias;
  float* const later =
      p.pending == nullptr ? nullptr : p.pending->Leave(finish.dst, count, blocks, p.cols);
  RowNormBackwardParams q = p;
  if (later != nullptr) q.workspace = later;
  const cudaError_t error = launch(q);
  if (error != cudaSuccess || later != nullptr) return error;
  finish.partials = static_cast<const float*>(p.workspace);
  return LaunchFinishColumnSum(finish, stream);
}

cudaError_t LaunchBackwardStaged(const RowNormBackwardParams& p, cudaStream_t stream) {
  const int64_t blocks = BackwardBlocks(p, kStagedRows);
  return LaunchAndSum(p, blocks, stream, [&](const RowNormBackwardParams& q) {
    return LaunchStagedRowNormBackward(q, blocks, stream);
  });
}

cudaError_t LaunchBackwardRing(const RowNormBackwardParams& p, cudaStream_t stream) {
  const int64_t blocks = std::min(BackwardBlocks(p, 1), int64_t{p.multiprocessors});
  return LaunchAndSum(p, blocks, stream, [&](const RowNormBackwardParams& q) {
    return LaunchRingRowNormBackward(q, blocks, stream);
  });
}

template <typename T, int kChunks, bool kFromOutput>
cudaError_t LaunchBackwardFast(const RowNormBackwardParams& p, cudaStream_t stream) {
  const int group_threads = GroupThreads(p.cols / 8, kChunks);
  const int groups = std::max(1, BackwardThreads(kChunks) / group_threads);
  const int64_t blocks = BackwardBlocks(p, groups);
  return LaunchAndSum(p, blocks, stream, [&](const RowNormBackwardParams& q) {
    RowNormBackwardKernel<T, kChunks, kFromOutput>
        <<<static_cast<unsigned>(blocks), static_cast<unsigned>(groups * group_threads),
           static_cast<size_t>(q.cols) * sizeof(float), stream>>>(
            q, static_cast<float*>(q.workspace), group_threads);
    return cudaGetLastError();
  });
}

template <typename T, bool kFromOutput>
cudaError_t LaunchBackwardAny(const RowNormBackwardParams& p, cudaStream_t stream) {
  float* partials = static_cast<float*>(p.workspace);
  if (p.dy != nullptr && (p.dgamma != nullptr || p.dbeta != nullptr)) {
    // Before the rows' kernel, which may overwrite dy.
    const int64_t slices =
        RowSlices({p.rows, p.cols, 32, 8, 2, p.workspace_bytes, p.multiprocessors});
    if (slices == 0) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>((p.cols + 31) / 32), static_cast<unsigned>(slices));
    NormColumnsKernel<T, kFromOutput>
        <<<grid, dim3(32, 8), 0, stream>>>(p, partials, (p.rows + slices - 1) / slices);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    FinishColumnSumArgs finish;
    finish.partials = partials;
    finish.slices = slices;
    finish.cols = p.cols;
    finish.dst[0] = p.dgamma;
    finish.dst[1] = p.dbeta;
    if (const cudaError_t error = LaunchFinishColumnSum(finish, stream); error != cudaSuccess) {
      return error;
    }
  }
  RowNormBackwardAnyKernel<T, kFromOutput><<<static_cast<unsigned>(p.rows), 256, 0, stream>>>(p);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (p.dx == nullptr || p.dbias == nullptr) return cudaSuccess;
  ColumnSumArgs sums;
  sums.x = p.dx;
  sums.dst = p.dbias;
  sums.rows = p.rows;
  sums.cols = p.cols;
  sums.dtype = p.dtype;
  sums.workspace = p.workspace;
  sums.workspace_bytes = p.workspace_bytes;
  sums.multiprocessors = p.multiprocessors;
  return LaunchColumnSum(sums, stream);
}

template <typename T, bool kFromOutput>
cudaError_t LaunchBackward(const RowNormBackwardParams& p, cudaStream_t stream) {
  const bool wide = p.cols % 8 == 0 && Aligned16(p.dy, p.dsum, p.sum, p.y, p.beta, p.y_again,
                                                 p.gamma, p.dsum_out, p.dx);
  // Narrower rows of 16 bits are staged.
  if constexpr (sizeof(T) == 4) {
    if (wide && p.cols <= 256 * 8) return LaunchBackwardFast<T, 1, kFromOutput>(p, stream);
  }
  if (wide && p.cols <= 512 * 8) return LaunchBackwardFast<T, 2, kFromOutput>(p, stream);
  if (wide && p.cols <= 1024 * 8) return LaunchBackwardFast<T, 4, kFromOutput>(p, stream);
  return LaunchBackwardAny<T, kFromOutput>(p, stream);
}

}  // namespace

cudaError_t LaunchRowNorm(const RowNormParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.cols == 0) return cudaSuccess;
  if (p.rows > 0x7FFFFFFF) return cudaErrorInvalidValue;
  if (HasRingRowNorm(p)) return LaunchRingRowNorm(p, stream);
  const bool wide =
      p.cols % 8 == 0 && Aligned16(p.x, p.bias, p.residual, p.sum, p.gamma, p.beta, p.y);
  return DispatchFloat(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    // Up to 1024 columns a warp holds a row, and a norm meets no barrier.
    if (wide && p.gamma != nullptr && p.cols <= 32 * 4 * 8) return LaunchFast<T, 4>(p, stream);
    if (wide && p.cols <= 256 * 8) return LaunchFast<T, 1>(p, stream);
    if (wide && p.cols <= 512 * 8) return LaunchFast<T, 2>(p, stream);
    if (wide && p.cols <= 2048 * 8) return LaunchFast<T, 4>(p, stream);
    return LaunchAny<T>(p, stream);
  });
}

cudaError_t LaunchRowNormBackward(const RowNormBackwardParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.cols == 0) return cudaSuccess;
  if (p.rows > 0x7FFFFFFF) return cudaErrorInvalidValue;
  if (HasRingRowNormBackward(p)) return LaunchBackwardRing(p, stream);
  if (HasStagedRowNormBackward(p)) return LaunchBackwardStaged(p, stream);
  return DispatchFloat(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return p.y != nullptr ? LaunchBackward<T, true>(p, stream)
                          : LaunchBackward<T, false>(p, stream);
  });
}

}  // namespace lamina::cuda
