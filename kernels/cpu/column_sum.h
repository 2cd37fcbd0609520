// Column sums of a matrix, as bias gradients need them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "context.h"
#include "lamina/kernels/tensor.h"

namespace lamina::cpu {

size_t ColumnSumWorkspaceBytes(int64_t rows, int64_t columns);

// out fp32 [n] += column sums of x act [rows, n]. `op` is named in the error for a workspace that
// is too small.
absl::Status AddColumnSums(const Context& context, const Workspace& ws, const char* op,
                           const TensorView& x, const TensorView& out);

}  // namespace lamina::cpu
