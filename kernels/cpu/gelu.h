// GELU on its own, and its gradient.
#pragma once

#include <cstddef>

#include "absl/status/status.h"
#include "context.h"
#include "lamina/kernels/backend.h"

namespace lamina::cpu {

size_t GeluWorkspaceBytes(const LayerDims& dims);

absl::Status Gelu(const Context& context, const GeluArgs& args);
absl::Status GeluBackward(const Context& context, const Workspace& ws,
                          const GeluBackwardArgs& args);

}  // namespace lamina::cpu
