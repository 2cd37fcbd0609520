// A dropout as kernels take it. No device code: the backend includes it too.
#pragma once

#include <cstdint>

#include "lamina/kernels/philox.h"

namespace lamina::cuda {

// `threshold` and `scale` are KeepThreshold(p) and KeepScale of that, computed on the host.
struct DropoutParams {
  const RngState* rng = nullptr;  // device memory; null: no dropout
  uint32_t stream = 0;
  uint32_t threshold = 65536;
  float scale = 1.0f;
};

}  // namespace lamina::cuda
