// A stack's calls as messages, and their answers as results: for whatever way they go. Internal.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/client/stack.h"
#include "lamina/v1/layer_service.pb.h"

namespace lamina::client::internal {

namespace pb = lamina::v1;

// Requests come without mutation and, for Backward, without context. INVALID_ARGUMENT: a tensor.
struct Calls {
  static absl::StatusOr<pb::ForwardRequest> Forward(const Stack& stack, const Tensor& input,
                                                    const ForwardOptions& options);
  static absl::StatusOr<pb::BackwardRequest> Backward(const Stack& stack, const Tensor& output_grad,
                                                      const BackwardOptions& options);
  static pb::ApplyGradientsRequest Apply(const Stack& stack, const OptimizerOptions& options);
  static pb::ZeroGradientsRequest Zero(const Stack& stack);

  // INTERNAL: the answer is not what was asked for; a context that it gives is released.
  static absl::StatusOr<ForwardResult> Take(const Stack& stack, const pb::ForwardResponse& response,
                                            const ForwardOptions& options);
  static absl::StatusOr<BackwardResult> Take(const pb::BackwardResponse& response,
                                             const BackwardOptions& options);
  static ApplyResult Take(const pb::ApplyGradientsResponse& response);

  static void Spend(Context& context);  // it has had its Backward
  static absl::Status NoContext();      // what a Backward without one answers
  static const SessionCore* SessionOf(const Stack& stack);
};

}  // namespace lamina::client::internal
