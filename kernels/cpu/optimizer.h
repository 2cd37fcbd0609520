// Gradient norm, clipping and overflow detection; and AdamW.
#pragma once

#include <cstddef>

#include "absl/status/status.h"
#include "context.h"
#include "lamina/kernels/backend.h"

namespace lamina::cpu {

size_t GradientStatsWorkspaceBytes();

absl::Status GradientStats(const Context& context, const Workspace& ws,
                           const GradientStatsArgs& args);
absl::Status AdamW(const Context& context, const AdamWArgs& args);

}  // namespace lamina::cpu
