// Gradient norm, clipping and overflow detection; AdamW; LAMB.
#pragma once

#include <cstddef>

#include "absl/status/status.h"
#include "context.h"
#include "lamina/kernels/backend.h"

namespace lamina::cpu {

size_t GradientStatsWorkspaceBytes();
size_t LambWorkspaceBytes();

absl::Status GradientStats(const Context& context, const Workspace& ws,
                           const GradientStatsArgs& args);
absl::Status AdamW(const Context& context, const AdamWArgs& args);
absl::Status Lamb(const Context& context, const Workspace& ws, const LambArgs& args);

}  // namespace lamina::cpu
