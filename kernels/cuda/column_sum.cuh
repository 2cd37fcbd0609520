// Column sums of a [rows, cols] matrix, added to fp32 vectors: the gradients of biases, gammas and
// betas. Deterministic: fixed slices of the rows give partial sums in the workspace, and a second
// kernel adds them up in order. `unordered` ones have neither: each slice adds its sums to the
// vector when it is done, so that their order, and with it the last bits, is chance.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernel_limits.h"
#include "lamina/kernels/dtype.h"
#include "lamina/kernels/pending_sums.h"

namespace lamina::cuda {

// How many row slices (at least 1) to cut a column reduction into so that the device is filled and
// `arrays` partial matrices [slices, cols] of fp32 fit into `workspace_bytes`; 0 where not even one
// slice fits. `cols_per_block`: columns that one block covers; `rows_per_step`: rows it reads at
// once; `blocks`: how many run on a multiprocessor at once, up to kColumnSumBlocks.
struct SliceArgs {
  int64_t rows = 0, cols = 0;
  int64_t cols_per_block = 256, rows_per_step = 8;
  int arrays = 1;
  size_t workspace_bytes = 0;
  int multiprocessors = 1;
  int blocks = kColumnSumBlocks;
};
int64_t RowSlices(const SliceArgs& args);

// dst[a][c] += sum over s of partials[(a * slices + s) * cols + c], for each array with a dst.
struct FinishColumnSumArgs {
  const float* partials = nullptr;
  int64_t slices = 0, cols = 0;
  float* dst[3] = {nullptr, nullptr, nullptr};  // fp32 [cols] each; null: skipped
};
[[nodiscard]] cudaError_t LaunchFinishColumnSum(const FinishColumnSumArgs& args,
                                                cudaStream_t stream);
// The same, in the same order, for all of a list in one launch.
[[nodiscard]] cudaError_t LaunchFinishColumnSums(const PendingSums& pending, cudaStream_t stream);

// dst += column sums of x.
struct ColumnSumArgs {
  const void* x = nullptr;  // act [rows, cols]
  float* dst = nullptr;     // fp32 [cols], accumulated
  int64_t rows = 0, cols = 0;
  DType dtype = DType::kF32;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  bool unordered = false;
  int multiprocessors = 1;
};
[[nodiscard]] cudaError_t LaunchColumnSum(const ColumnSumArgs& args, cudaStream_t stream);

}  // namespace lamina::cuda
