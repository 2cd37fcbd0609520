#include "src/calls.h"

#include <utility>

#include "src/session_core.h"
#include "src/wire.h"

namespace lamina::client::internal {

absl::StatusOr<pb::ForwardRequest> Calls::Forward(const Stack& stack, const Tensor& input,
                                                  const ForwardOptions& options) {
  const void* session = stack.session_.get();
  pb::ForwardRequest request;
  request.set_stack(stack.name_);
  request.set_session_id(stack.session_->id());
  if (absl::Status status = PutTensor("input", input, session, request.mutable_input());
      !status.ok()) {
    return status;
  }
  if (options.mask && options.lengths) {
    return absl::InvalidArgumentError("mask and lengths are both given; one of them is allowed");
  }
  if (options.cumulative_lengths && (options.mask || options.lengths)) {
    return absl::InvalidArgumentError(
        "cumulative_lengths and mask or lengths are both given; one of them is allowed");
  }
  if (options.mask) {
    if (absl::Status status = PutTensor("mask", options.mask, session, request.mutable_mask());
        !status.ok()) {
      return status;
    }
  }
  if (options.lengths) {
    if (absl::Status status =
            PutTensor("lengths", options.lengths, session, request.mutable_lengths());
        !status.ok()) {
      return status;
    }
  }
  if (options.cumulative_lengths) {
    if (absl::Status status = PutTensor("cumulative_lengths", options.cumulative_lengths, session,
                                        request.mutable_cumulative_lengths());
        !status.ok()) {
      return status;
    }
  }
  if (options.layers) {
    request.mutable_layers()->set_begin(options.layers->begin);
    request.mutable_layers()->set_end(options.layers->end);
  }
  if (absl::Status status = PutTarget("output", options.output, session, request.mutable_output());
      !status.ok()) {
    return status;
  }
  // Said outright: what the call is must not depend on what others did to the stack meanwhile.
  const bool training = options.training.value_or(stack.config().training);
  request.set_training(training);
  return request;
}

absl::StatusOr<ForwardResult> Calls::Take(const Stack& stack, const pb::ForwardResponse& response,
                                          const ForwardOptions& options) {
  ForwardResult result;
  // First, so that the context is released when the output is not what it should be.
  result.context.id_ = response.context_id();
  result.context.stack_ = stack.name_;
  result.context.session_ = stack.session_;
  absl::StatusOr<Tensor> output = TakeTensor("output", response.output(), options.output);
  if (!output.ok()) return output.status();
  result.output = *std::move(output);
  result.timing = FromProto(response.timing());
  result.input_transport = static_cast<Transport>(response.input_transport());
  result.output_transport = static_cast<Transport>(response.output_transport());
  result.attention_path = static_cast<AttentionPath>(response.attention_path());
  return result;
}

absl::StatusOr<pb::BackwardRequest> Calls::Backward(const Stack& stack, const Tensor& output_grad,
                                                    const BackwardOptions& options) {
  const void* session = stack.session_.get();
  pb::BackwardRequest request;
  request.set_stack(stack.name_);
  if (absl::Status status =
          PutTensor("output_grad", output_grad, session, request.mutable_output_grad());
      !status.ok()) {
    return status;
  }
  const bool wanted = options.want_input_grad || static_cast<bool>(options.input_grad);
  if (wanted) {
    if (absl::Status status =
            PutTarget("input_grad", options.input_grad, session, request.mutable_input_grad());
        !status.ok()) {
      return status;
    }
  }
  return request;
}

absl::StatusOr<BackwardResult> Calls::Take(const pb::BackwardResponse& response,
                                           const BackwardOptions& options) {
  const bool wanted = options.want_input_grad || static_cast<bool>(options.input_grad);
  BackwardResult result;
  if (wanted) {
    absl::StatusOr<Tensor> input_grad =
        TakeTensor("input_grad", response.input_grad(), options.input_grad);
    if (!input_grad.ok()) return input_grad.status();
    result.input_grad = *std::move(input_grad);
  }
  result.timing = FromProto(response.timing());
  result.input_transport = static_cast<Transport>(response.input_transport());
  result.output_transport = static_cast<Transport>(response.output_transport());
  return result;
}

pb::ApplyGradientsRequest Calls::Apply(const Stack& stack, const OptimizerOptions& options) {
  pb::ApplyGradientsRequest request;
  request.set_stack(stack.name_);
  request.set_learning_rate(options.learning_rate);
  request.set_beta1(options.beta1);
  request.set_beta2(options.beta2);
  request.set_epsilon(options.epsilon);
  request.set_weight_decay(options.weight_decay);
  request.set_decay_biases_and_norms(options.decay_biases_and_norms);
  request.set_max_grad_norm(options.max_grad_norm);
  if (options.loss_scale != 0) request.set_loss_scale(options.loss_scale);
  request.set_zero_gradients(options.zero_gradients);
  request.set_optimizer(static_cast<pb::OptimizerKind>(options.kind));
  request.set_adapt_biases_and_norms(options.adapt_biases_and_norms);
  if (options.min_trust_ratio != 0) request.set_min_trust_ratio(options.min_trust_ratio);
  if (options.max_trust_ratio != 0) request.set_max_trust_ratio(options.max_trust_ratio);
  return request;
}

ApplyResult Calls::Take(const pb::ApplyGradientsResponse& response) {
  return ApplyResult{.applied = response.applied(),
                     .grad_norm = response.grad_norm(),
                     .step = response.step(),
                     .timing = FromProto(response.timing()),
                     .loss_scale = response.loss_scale(),
                     .next_loss_scale = response.next_loss_scale()};
}

pb::ZeroGradientsRequest Calls::Zero(const Stack& stack) {
  pb::ZeroGradientsRequest request;
  request.set_stack(stack.name_);
  return request;
}

void Calls::Spend(Context& context) { context.id_.clear(); }

absl::Status Calls::NoContext() {
  return absl::FailedPreconditionError(
      "the context is spent, released, or of an evaluation; run a training Forward first");
}

const SessionCore* Calls::SessionOf(const Stack& stack) { return stack.session_.get(); }

}  // namespace lamina::client::internal
