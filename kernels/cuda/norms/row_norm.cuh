// Layer norm, and dropout + residual + layer norm, forward and backward, one pass over memory each.
//
// Both ops of backend.h are one computation here: LayerNorm is DropoutAddNorm without bias,
// residual, dropout and sum, and its backward's residual_grad is the other's dsum. Statistics are
// fp32, the variance a mean of squared differences from the mean. The norm's input is the sum as it
// is rounded to act, stored or not.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "common/dropout_params.h"
#include "lamina/kernels/dtype.h"
#include "lamina/kernels/pending_sums.h"

namespace lamina::cuda {

// sum = residual + dropout(x + bias);  y = (sum - mean) * rstd * gamma + beta
struct RowNormParams {
  const void* x = nullptr;         // act [rows, cols]
  const void* bias = nullptr;      // act [cols]; with residual only
  const void* residual = nullptr;  // act [rows, cols]; null: sum is x
  DropoutParams dropout;           // with residual only
  void* sum = nullptr;             // act [rows, cols]; null: not wanted. May be x
  const void* gamma = nullptr;     // act [cols]; null: no norm, and then no beta, y, mean, rstd
  const void* beta = nullptr;      // act [cols]
  float eps = 0.0f;
  void* y = nullptr;      // act [rows, cols]
  float* mean = nullptr;  // [rows]; null: not wanted
  float* rstd = nullptr;  // [rows]; null: not wanted
  int64_t rows = 0, cols = 0;
  DType dtype = DType::kF32;
  int multiprocessors = 1;
};
// cudaErrorInvalidValue for cols above MaxRowNormCols() or more than 2^31 - 1 rows.
[[nodiscard]] cudaError_t LaunchRowNorm(const RowNormParams& params, cudaStream_t stream);

// The widest row that the forward takes: what fits in a block's shared memory as fp32.
constexpr int64_t MaxRowNormCols() { return 56 * 1024; }

// With ds = d(norm)/d(sum) . dy + dsum:  dsum_out = ds;  dx = mask * scale * ds;
// dbias += column sums of dx;  dgamma += column sums of dy * normalised;  dbeta += those of dy.
// normalised is (sum - mean) * rstd, or (y - beta) / gamma.
struct RowNormBackwardParams {
  const void* dy = nullptr;    // act [rows, cols]; null: there was no norm
  const void* dsum = nullptr;  // act [rows, cols]; null: zero
  const void* sum =
      nullptr;              // act [rows, cols]: the norm's input; with dy, or y and beta are there
  const void* y = nullptr;  // act [rows, cols]: the norm's output; null: sum and mean are there
  const void* beta = nullptr;  // act [cols]; with y or y_again
  // act [rows, cols]: receives the norm's output as the forward made it; with sum. Null: not
  // wanted. May be dy
  void* y_again = nullptr;
  const void* gamma = nullptr;  // act [cols]; with dy
  const float* mean = nullptr;  // [rows]; with sum
  const float* rstd = nullptr;  // [rows]; with dy
  DropoutParams dropout;
  void* dsum_out = nullptr;  // act [rows, cols]; null: not wanted. May be dsum
  void* dx = nullptr;      // act [rows, cols]; null: not wanted. May be dsum where dsum_out is null
  float* dbias = nullptr;  // [cols], accumulated; with dx
  float* dgamma = nullptr;  // [cols], accumulated; with dy
  float* dbeta = nullptr;   // [cols], accumulated; with dy
  int64_t rows = 0, cols = 0;
  DType dtype = DType::kF32;
  void* workspace = nullptr;  // 3 * cols * 4 bytes at least
  size_t workspace_bytes = 0;
  PendingSums* pending = nullptr;  // where there is room: the sums' ends are left to it
  int multiprocessors = 1;
};
// cudaErrorInvalidValue for more than 2^31 - 1 rows.
[[nodiscard]] cudaError_t LaunchRowNormBackward(const RowNormBackwardParams& params,
                                                cudaStream_t stream);

}  // namespace lamina::cuda
