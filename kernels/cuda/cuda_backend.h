// The backend for one CUDA device.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "lamina/kernels/backend.h"

namespace lamina {

// NOT_FOUND where there is no driver or no such device; FAILED_PRECONDITION where the device's
// compute capability is not the one that the kernels were built for; UNIMPLEMENTED in a build
// without CUDA.
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(int ordinal);

}  // namespace lamina
