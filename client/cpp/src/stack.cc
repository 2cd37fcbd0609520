#include "lamina/client/stack.h"

#include <utility>

#include "src/session_core.h"
#include "src/wire.h"

namespace lamina::client {

using internal::FromProto;
using internal::PutTarget;
using internal::PutTensor;
using internal::SessionCore;
using internal::TakeTensor;
namespace pb = lamina::v1;

// --- contexts ---

Context::Context(Context&& other) noexcept
    : id_(std::exchange(other.id_, {})),
      stack_(std::move(other.stack_)),
      session_(std::move(other.session_)) {}

Context& Context::operator=(Context&& other) noexcept {
  if (this != &other) {
    Release().IgnoreError();
    id_ = std::exchange(other.id_, {});
    stack_ = std::move(other.stack_);
    session_ = std::move(other.session_);
  }
  return *this;
}

Context::~Context() { Release().IgnoreError(); }

absl::Status Context::Release() {
  const std::string id = std::exchange(id_, {});
  const std::shared_ptr<SessionCore> session = session_.lock();
  if (id.empty() || session == nullptr) return absl::OkStatus();
  return session->ReleaseContext(stack_, id);
}

// --- stacks ---

Stack::Stack(std::shared_ptr<SessionCore> session, StackInfo info)
    : session_(std::move(session)),
      name_(info.name),
      info_(std::make_shared<const StackInfo>(std::move(info))) {}

absl::StatusOr<StackInfo> Stack::Describe() const {
  pb::GetStackRequest request;
  request.set_name(name_);
  pb::GetStackResponse response;
  absl::Status status = session_->Read(session_->connection().config(),
                                       &pb::ConfigService::Stub::GetStack, request, &response);
  if (!status.ok()) return status;
  StackInfo info = FromProto(response.stack());
  info.parameters = info_->parameters;
  return info;
}

absl::StatusOr<ForwardResult> Stack::Forward(const Tensor& input,
                                             const ForwardOptions& options) const {
  const void* session = session_.get();
  pb::ForwardRequest request;
  request.set_stack(name_);
  request.set_session_id(session_->id());
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
  const bool training = options.training.value_or(config().training);
  request.set_training(training);

  pb::ForwardResponse response;
  pb::LayerService::Stub& layers = session_->connection().layers();
  absl::Status status =
      training ? session_->Mutate(layers, &pb::LayerService::Stub::Forward, &request, &response)
               : session_->Read(layers, &pb::LayerService::Stub::Forward, request, &response);
  if (!status.ok()) return status;

  ForwardResult result;
  // First, so that the context is released when the output is not what it should be.
  result.context.id_ = response.context_id();
  result.context.stack_ = name_;
  result.context.session_ = session_;
  absl::StatusOr<Tensor> output = TakeTensor("output", response.output(), options.output);
  if (!output.ok()) return output.status();
  result.output = *std::move(output);
  result.timing = FromProto(response.timing());
  result.input_transport = static_cast<Transport>(response.input_transport());
  result.output_transport = static_cast<Transport>(response.output_transport());
  result.attention_path = static_cast<AttentionPath>(response.attention_path());
  return result;
}

absl::StatusOr<BackwardResult> Stack::Backward(Context& context, const Tensor& output_grad,
                                               const BackwardOptions& options) const {
  if (!context) {
    return absl::FailedPreconditionError(
        "the context is spent, released, or of an evaluation; run a training Forward first");
  }
  const void* session = session_.get();
  pb::BackwardRequest request;
  request.set_stack(name_);
  request.set_context_id(context.id());
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
  pb::BackwardResponse response;
  absl::Status status = session_->Mutate(session_->connection().layers(),
                                         &pb::LayerService::Stub::Backward, &request, &response);
  if (!status.ok()) return status;
  context.id_.clear();  // spent

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

absl::StatusOr<ApplyResult> Stack::ApplyGradients(const OptimizerOptions& options) const {
  pb::ApplyGradientsRequest request;
  request.set_stack(name_);
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
  pb::ApplyGradientsResponse response;
  absl::Status status =
      session_->Mutate(session_->connection().layers(), &pb::LayerService::Stub::ApplyGradients,
                       &request, &response);
  if (!status.ok()) return status;
  return ApplyResult{.applied = response.applied(),
                     .grad_norm = response.grad_norm(),
                     .step = response.step(),
                     .timing = FromProto(response.timing()),
                     .loss_scale = response.loss_scale(),
                     .next_loss_scale = response.next_loss_scale()};
}

absl::Status Stack::ZeroGradients() const {
  pb::ZeroGradientsRequest request;
  request.set_stack(name_);
  pb::ZeroGradientsResponse response;
  return session_->Mutate(session_->connection().layers(), &pb::LayerService::Stub::ZeroGradients,
                          &request, &response);
}

absl::StatusOr<SavedCheckpoint> Stack::SaveCheckpoint(const std::string& name) const {
  pb::SaveCheckpointRequest request;
  request.set_stack(name_);
  request.set_name(name);
  pb::SaveCheckpointResponse response;
  absl::Status status =
      session_->Read(session_->connection().config(), &pb::ConfigService::Stub::SaveCheckpoint,
                     request, &response);
  if (!status.ok()) return status;
  return SavedCheckpoint{
      .path = response.path(), .bytes = response.size_bytes(), .step = response.step()};
}

absl::Status Stack::LoadCheckpoint(const std::string& name) const {
  pb::LoadCheckpointRequest request;
  request.set_stack(name_);
  request.set_name(name);
  pb::LoadCheckpointResponse response;
  return session_->Read(session_->connection().config(), &pb::ConfigService::Stub::LoadCheckpoint,
                        request, &response);
}

}  // namespace lamina::client
