#include "lamina/client/stack.h"

#include <utility>

#include "src/calls.h"
#include "src/session_core.h"
#include "src/wire.h"

namespace lamina::client {

using internal::Calls;
using internal::FromProto;
using internal::SessionCore;
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
  absl::StatusOr<pb::ForwardRequest> request = Calls::Forward(*this, input, options);
  if (!request.ok()) return request.status();
  pb::ForwardResponse response;
  pb::LayerService::Stub& layers = session_->connection().layers();
  absl::Status status =
      request->training()
          ? session_->Mutate(layers, &pb::LayerService::Stub::Forward, &*request, &response)
          : session_->Read(layers, &pb::LayerService::Stub::Forward, *request, &response);
  if (!status.ok()) return status;
  return Calls::Take(*this, response, options);
}

absl::StatusOr<BackwardResult> Stack::Backward(Context& context, const Tensor& output_grad,
                                               const BackwardOptions& options) const {
  if (!context) return Calls::NoContext();
  absl::StatusOr<pb::BackwardRequest> request = Calls::Backward(*this, output_grad, options);
  if (!request.ok()) return request.status();
  request->set_context_id(context.id());
  pb::BackwardResponse response;
  absl::Status status = session_->Mutate(session_->connection().layers(),
                                         &pb::LayerService::Stub::Backward, &*request, &response);
  if (!status.ok()) return status;
  Calls::Spend(context);
  return Calls::Take(response, options);
}

absl::StatusOr<ApplyResult> Stack::ApplyGradients(const OptimizerOptions& options) const {
  pb::ApplyGradientsRequest request = Calls::Apply(*this, options);
  pb::ApplyGradientsResponse response;
  absl::Status status =
      session_->Mutate(session_->connection().layers(), &pb::LayerService::Stub::ApplyGradients,
                       &request, &response);
  if (!status.ok()) return status;
  return Calls::Take(response);
}

absl::Status Stack::ZeroGradients() const {
  pb::ZeroGradientsRequest request = Calls::Zero(*this);
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
