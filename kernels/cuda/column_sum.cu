// Purpose: deterministic column sums in two levels; column_sum.cuh.
#include <algorithm>

#include "column_sum.cuh"
#include "common/convert.cuh"
#include "common/dispatch.cuh"
#include "common/reduce.cuh"

namespace lamina::cuda {
namespace {

constexpr int kThreadRows = 8;  // a block is 32 x 8 threads
constexpr int kBlocks = 5;      // as many as registers allow on a multiprocessor: one wave of them
// Few blocks finish, each with much to fetch that nothing else waits for: many threads a column.
constexpr int kFinishRows = 32;

// Block (bx, by): columns [bx * 32 * kWidth, ...), rows of slice by. One sum a column, to
// partials[by * cols + column]; where `unordered`, added to partials[column].
template <typename T, int kWidth>
__global__ void __launch_bounds__(32 * kThreadRows, kBlocks)
    ColumnSumKernel(const T* x, float* partials, int64_t rows, int64_t cols, int64_t rows_per_slice,
                    bool unordered) {
  __shared__ float shared[kThreadRows][32 * kWidth + 1];
  const int64_t col = (int64_t{blockIdx.x} * 32 + threadIdx.x) * kWidth;
  const int64_t begin = blockIdx.y * rows_per_slice;
  const int64_t end = min(begin + rows_per_slice, rows);
  float sum[kWidth] = {};
  if (col < cols) {
#pragma unroll 4
    for (int64_t row = begin + threadIdx.y; row < end; row += kThreadRows) {
      float v[kWidth];
      LoadWide<T, kWidth>(x + row * cols + col, v);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] += v[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) shared[threadIdx.y][threadIdx.x * kWidth + i] = sum[i];
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.y * 32 + threadIdx.x);
  for (int c = thread; c < 32 * kWidth; c += 32 * kThreadRows) {
    const int64_t out = int64_t{blockIdx.x} * 32 * kWidth + c;
    if (out >= cols) continue;
    float total = 0.0f;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) total += shared[r][c];
    if (unordered) {
      atomicAdd(partials + out, total);
    } else {
      partials[blockIdx.y * cols + out] = total;
    }
  }
}

// Of each vector, in blocks of 32 columns: those of vector i end before block end[i].
struct FinishParams {
  PendingSums::Vector vectors[PendingSums::kMostVectors];
  uint32_t end[PendingSums::kMostVectors];
};

__global__ void __launch_bounds__(32 * kFinishRows)
    FinishColumnSumsKernel(const __grid_constant__ FinishParams params) {
  __shared__ float shared[kFinishRows][33];
  int i = 0;
  while (blockIdx.x >= params.end[i]) ++i;
  const PendingSums::Vector& vector = params.vectors[i];
  const int64_t first = int64_t{blockIdx.x - (i == 0 ? 0 : params.end[i - 1])} * 32;
  const int64_t cols = vector.cols, slices = vector.slices;
  const int64_t col = first + threadIdx.x;
  float sum = 0.0f;
  if (col < cols) {
    const float* partials = vector.partials + col;
    for (int64_t s = threadIdx.y; s < slices; s += kFinishRows) sum += partials[s * cols];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  // A warp a column: its lane r has the sum of thread row r.
  const int64_t out = first + threadIdx.y;
  const float total = WarpSum(shared[threadIdx.x][threadIdx.y]);
  if (threadIdx.x == 0 && out < cols) vector.dst[out] += total;
}

template <typename T, int kWidth>
cudaError_t Launch(const ColumnSumArgs& a, cudaStream_t stream) {
  const int64_t width = 32 * kWidth;
  const int64_t slices = RowSlices(
      {a.rows, a.cols, width, kThreadRows, 1, a.workspace_bytes, a.multiprocessors, kBlocks});
  if (slices == 0) return cudaErrorInvalidValue;
  float* partials = a.unordered ? a.dst : static_cast<float*>(a.workspace);
  const dim3 grid(static_cast<unsigned>((a.cols + width - 1) / width),
                  static_cast<unsigned>(slices));
  ColumnSumKernel<T, kWidth><<<grid, dim3(32, kThreadRows), 0, stream>>>(
      static_cast<const T*>(a.x), partials, a.rows, a.cols, (a.rows + slices - 1) / slices,
      a.unordered);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (a.unordered) return cudaSuccess;
  FinishColumnSumArgs finish;
  finish.partials = partials;
  finish.slices = slices;
  finish.cols = a.cols;
  finish.dst[0] = a.dst;
  return LaunchFinishColumnSum(finish, stream);
}

}  // namespace

int64_t RowSlices(const SliceArgs& a) {
  const int64_t column_blocks = (a.cols + a.cols_per_block - 1) / a.cols_per_block;
  const int64_t wanted =
      (int64_t{a.multiprocessors} * a.blocks + column_blocks - 1) / column_blocks;
  // Two steps of rows a slice at least: a slice's partial sum must be less than what it read.
  const int64_t useful = (a.rows + 2 * a.rows_per_step - 1) / (2 * a.rows_per_step);
  const int64_t fitting = static_cast<int64_t>(
      a.workspace_bytes / (static_cast<size_t>(a.arrays) * static_cast<size_t>(a.cols) * 4));
  return std::min(
      {std::max<int64_t>(wanted, 1), std::max<int64_t>(useful, 1), fitting, int64_t{65535}});
}

namespace {

// Of `count` vectors; f(i) gives the i-th.
template <typename F>
cudaError_t Finish(int count, cudaStream_t stream, F&& f) {
  if (count == 0) return cudaSuccess;
  FinishParams params{};
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    params.vectors[i] = f(i);
    blocks += (params.vectors[i].cols + 31) / 32;
    params.end[i] = static_cast<uint32_t>(blocks);
  }
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidValue;
  FinishColumnSumsKernel<<<static_cast<unsigned>(blocks), dim3(32, kFinishRows), 0, stream>>>(
      params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchFinishColumnSum(const FinishColumnSumArgs& args, cudaStream_t stream) {
  PendingSums::Vector vectors[3];
  int count = 0;
  for (int a = 0; a < 3; ++a) {
    if (args.dst[a] == nullptr) continue;
    vectors[count++] = {args.partials + a * args.slices * args.cols, args.dst[a], args.slices,
                        args.cols};
  }
  return Finish(count, stream, [&](int i) { return vectors[i]; });
}

cudaError_t LaunchFinishColumnSums(const PendingSums& pending, cudaStream_t stream) {
  return Finish(pending.count(), stream, [&](int i) { return pending[i]; });
}

cudaError_t LaunchColumnSum(const ColumnSumArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.cols == 0) return cudaSuccess;
  return DispatchFloat(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (args.cols % 8 == 0 && Aligned16(args.x)) return Launch<T, 8>(args, stream);
    return Launch<T, 1>(args, stream);
  });
}

}  // namespace lamina::cuda
