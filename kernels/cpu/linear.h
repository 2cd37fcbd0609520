// y = x w^T + bias (and GELU of it), and its two gradients.
#pragma once

#include <cstddef>

#include "absl/status/status.h"
#include "context.h"
#include "lamina/kernels/backend.h"

namespace lamina::cpu {

// Of any of the three at these dims.
size_t LinearWorkspaceBytes(const LayerDims& dims);

absl::Status Linear(const Context& context, const Workspace& ws, const LinearArgs& args);
absl::Status LinearInputGrad(const Context& context, const Workspace& ws,
                             const LinearInputGradArgs& args);
absl::Status LinearWeightGrad(const Context& context, const Workspace& ws,
                              const LinearWeightGradArgs& args);

}  // namespace lamina::cpu
