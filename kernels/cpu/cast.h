// Conversion between dtypes.
#pragma once

#include "absl/status/status.h"
#include "context.h"
#include "lamina/kernels/backend.h"

namespace lamina::cpu {

absl::Status Cast(const Context& context, const CastArgs& args);

}  // namespace lamina::cpu
