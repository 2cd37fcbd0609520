// One optimizer step over the flat buffers: AdamW or LAMB.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/kernels/backend.h"
#include "lamina/transformer/stack.h"
#include "parameters.h"

namespace lamina {

// INVALID_ARGUMENT naming the option, its value and its range. loss_scale is the one that the step
// divides by, not 0.
absl::Status CheckOptions(const OptimizerOptions& options);

struct OptimizerBuffers {
  TensorView weights;                   // act [n]
  TensorView master;                    // fp32 [n]; weights itself where act is fp32
  TensorView gradients, m, v;           // fp32 [n]
  OptimizerControl* control = nullptr;  // in the backend's memory
  LambSegment* segments = nullptr;      // in the backend's memory, one a parameter
};

// LAMB's tensors: each stored parameter is one, the fused Q, K, V too. Matrices decay and adapt;
// biases and norm vectors as the options say. Ascending, without the padding.
std::vector<LambSegment> LambSegments(const ParameterLayout& parameters,
                                      bool decay_biases_and_norms, bool adapt_biases_and_norms);

class OptimizerStep {
 public:
  // `parameters` must outlive it.
  OptimizerStep(Backend& backend, const ParameterLayout& parameters)
      : backend_(backend), parameters_(parameters) {}

  // To be called when the buffers are new: the segments have to be written again.
  void ForgetBuffers() { written_segments_.clear(); }

  // `options` are checked. `step` is the number of the step that this call makes, from 1: it sets
  // the bias corrections. Only enqueues; the outcome lies in buffers.control, whose skip is 1 where
  // a gradient was not finite: then nothing has changed and the step does not count.
  absl::Status Enqueue(const Workspace& workspace, const OptimizerBuffers& buffers,
                       const OptimizerOptions& options, int64_t step);

 private:
  absl::Status AdamW(const Workspace& workspace, const OptimizerBuffers& buffers,
                     const OptimizerOptions& options, int64_t step);
  absl::Status Lamb(const Workspace& workspace, const OptimizerBuffers& buffers,
                    const OptimizerOptions& options, int64_t step);

  Backend& backend_;
  const ParameterLayout& parameters_;
  // What buffers.segments holds, and for which options; the copy in flight reads it.
  std::vector<LambSegment> written_segments_;
  std::pair<bool, bool> written_for_;  // decay_biases_and_norms, adapt_biases_and_norms
};

}  // namespace lamina
