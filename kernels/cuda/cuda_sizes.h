// What the plan must know of the CUDA backend, computed without CUDA and without a device.
#pragma once

#include <memory>

#include "lamina/kernels/backend.h"

namespace lamina {

// For a card of `multiprocessors` (at least 1). There in builds without CUDA too.
std::unique_ptr<const OpSizes> CudaOpSizes(int multiprocessors);

}  // namespace lamina
