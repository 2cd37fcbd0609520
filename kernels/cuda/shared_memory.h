// Device memory that another process may map: CUDA's virtual memory, whose allocations are exported
// as POSIX file descriptors, or plain allocations with a CUDA IPC handle. And the driver's own
// functions, which the runtime has no others for: they are looked up when first needed, so that
// nothing here asks for a driver before a device is opened.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/kernels/backend.h"

namespace lamina::cuda {

// See Backend::AllocateShared. Sets the current device.
absl::StatusOr<std::unique_ptr<SharedMemory>> AllocateShared(int ordinal, size_t bytes,
                                                             SharingKind kind);

// Has `stream` store `value` in `at`, registered host memory, after what was enqueued before, with
// a barrier for the whole system between. UNIMPLEMENTED where the driver can't.
absl::Status WriteValue(cudaStream_t stream, uint64_t* at, uint64_t value);

}  // namespace lamina::cuda
