// Layer norm, and bias + dropout + residual with or without it; and their gradients.
#pragma once

#include <cstddef>

#include "absl/status/status.h"
#include "context.h"
#include "lamina/kernels/backend.h"

namespace lamina::cpu {

// Of any of the four at these dims.
size_t NormWorkspaceBytes(const LayerDims& dims, int threads);

absl::Status LayerNorm(const Context& context, const Workspace& ws, const LayerNormArgs& args);
absl::Status LayerNormBackward(const Context& context, const Workspace& ws,
                               const LayerNormBackwardArgs& args);
absl::Status DropoutAddNorm(const Context& context, const Workspace& ws,
                            const DropoutAddNormArgs& args);
absl::Status DropoutAddNormBackward(const Context& context, const Workspace& ws,
                                    const DropoutAddNormBackwardArgs& args);

}  // namespace lamina::cpu
