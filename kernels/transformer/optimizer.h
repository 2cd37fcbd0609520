// One AdamW step over the flat buffers.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/kernels/backend.h"
#include "lamina/transformer/stack.h"

namespace lamina {

// INVALID_ARGUMENT naming the option, its value and its range.
absl::Status CheckOptions(const AdamWOptions& options);

struct OptimizerBuffers {
  TensorView weights;                   // act [n]
  TensorView master;                    // fp32 [n]; weights itself where act is fp32
  TensorView gradients, m, v;           // fp32 [n]
  OptimizerControl* control = nullptr;  // in the backend's memory
  int64_t decayed_elements = 0;         // the first ones: matrices
};

// `options` are checked. `step` is the number of the step that this call makes, from 1: it sets the
// bias corrections. Synchronises. The answer's skip is 1 where a gradient was not finite; then
// nothing has changed and the step does not count.
absl::StatusOr<OptimizerControl> AdamWStep(Backend& backend, const Workspace& workspace,
                                           const OptimizerBuffers& buffers,
                                           const AdamWOptions& options, int64_t step);

}  // namespace lamina
