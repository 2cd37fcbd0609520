#include "lamina/client/session.h"

#include <utility>

#include "src/session_core.h"
#include "src/wire.h"

namespace lamina::client {

namespace pb = lamina::v1;

absl::StatusOr<Tensor> Region::View(DType dtype, Shape shape, size_t offset_bytes) const {
  if (!bytes_) return absl::InvalidArgumentError("View: there is no region");
  return bytes_.View(dtype, std::move(shape), offset_bytes);
}

Session::Session(std::shared_ptr<internal::SessionCore> core) : core_(std::move(core)) {}
Session::Session(Session&&) noexcept = default;

Session& Session::operator=(Session&& other) noexcept {
  if (this != &other) {
    Close().IgnoreError();
    core_ = std::move(other.core_);
  }
  return *this;
}

// Stacks and tensors may still refer to the core: the session ends with its owner all the same.
Session::~Session() { Close().IgnoreError(); }

absl::Status Session::Close() { return core_ == nullptr ? absl::OkStatus() : core_->Close(); }

absl::Status Session::status() const {
  return core_ == nullptr ? absl::FailedPreconditionError("the session was moved away")
                          : core_->status();
}

absl::StatusOr<Region> Session::CreateRegion(size_t bytes) const {
  absl::StatusOr<internal::SessionCore::MadeRegion> made = core_->CreateRegion(bytes);
  if (!made.ok()) return made.status();
  Region region;
  region.bytes_ = std::move(made->bytes);
  region.size_ = made->length;
  region.registered_ = made->registered;
  return region;
}

absl::StatusOr<Tensor> Session::NewTensor(DType dtype, Shape shape) const {
  return core_->NewTensor(dtype, std::move(shape));
}

Transport Session::transport() const { return core_->transport(); }
std::string Session::transport_reason() const { return core_->transport_reason(); }
std::chrono::duration<double> Session::lease() const { return core_->lease(); }
std::chrono::duration<double> Session::resume_grace() const { return core_->resume_grace(); }

absl::StatusOr<Stack> Session::CreateStack(const std::string& name,
                                           const StackConfig& config) const {
  pb::CreateStackRequest request;
  request.set_name(name);
  *request.mutable_config() = internal::ToProto(config);
  pb::CreateStackResponse response;
  internal::Connection& connection = core_->connection();
  absl::Status status = connection.Call(connection.config(), &pb::ConfigService::Stub::CreateStack,
                                        request, &response);
  if (!status.ok()) return status;
  return OpenStack(name);
}

absl::StatusOr<Stack> Session::OpenStack(const std::string& name) const {
  pb::GetStackRequest request;
  request.set_name(name);
  pb::GetStackResponse response;
  internal::Connection& connection = core_->connection();
  absl::Status status =
      core_->Read(connection.config(), &pb::ConfigService::Stub::GetStack, request, &response);
  if (!status.ok()) return status;
  StackInfo info = internal::FromProto(response.stack());
  for (const pb::ParameterInfo& parameter : response.parameters()) {
    info.parameters.push_back(
        {.name = parameter.name(), .shape = internal::FromProto(parameter.shape())});
  }
  return Stack(core_, std::move(info));
}

}  // namespace lamina::client
