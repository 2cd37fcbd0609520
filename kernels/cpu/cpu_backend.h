// The CPU backend.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "lamina/kernels/backend.h"

namespace lamina {

// `threads` worker threads; 0: one for each core that the process may run on. INVALID_ARGUMENT
// below 0.
absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(int threads);
// What that backend's sizes() are, without it.
absl::StatusOr<std::unique_ptr<const OpSizes>> CreateCpuSizes(int threads);

}  // namespace lamina
