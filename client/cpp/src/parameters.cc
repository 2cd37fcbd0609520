// Stack's reads and writes of parameters and gradients.
#include <cstring>
#include <utility>

#include "lamina/client/stack.h"
#include "src/session_core.h"
#include "src/storage.h"
#include "src/wire.h"

namespace lamina::client {

using internal::FromProto;
namespace pb = lamina::v1;

namespace {

// Puts one chunk of the stream where it belongs.
absl::Status TakeChunk(const pb::StreamParametersResponse& chunk, std::vector<NamedTensor>* into) {
  if (into->empty() || into->back().name != chunk.name() || chunk.offset_bytes() == 0) {
    absl::StatusOr<Tensor> tensor =
        Tensor::Allocate(static_cast<DType>(chunk.dtype()), FromProto(chunk.shape()));
    if (!tensor.ok()) return tensor.status();
    into->push_back({.name = chunk.name(), .tensor = *std::move(tensor)});
  }
  const Tensor& tensor = into->back().tensor;
  if (chunk.data().size() > tensor.bytes() ||
      chunk.offset_bytes() > tensor.bytes() - chunk.data().size()) {
    return absl::InternalError(absl::StrCat("a chunk of '", chunk.name(), "' of ",
                                            chunk.data().size(), " bytes at ", chunk.offset_bytes(),
                                            " lies outside its ", tensor.bytes(), " bytes"));
  }
  std::memcpy(static_cast<char*>(tensor.data()) + chunk.offset_bytes(), chunk.data().data(),
              chunk.data().size());
  return absl::OkStatus();
}

absl::Status CheckTarget(const ParameterOptions& options, DType dtype) {
  if (!options.target.in_region()) {
    return absl::InvalidArgumentError(
        "target is not in a region; leave it out to have the values "
        "in memory of this process");
  }
  if (options.target.dtype() != dtype) {
    return absl::InvalidArgumentError(
        absl::StrCat("target is ", Name(options.target.dtype()), ", the values ", Name(dtype)));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<NamedTensor>> Stack::GetParameters(
    const std::vector<std::string>& names, const ParameterOptions& options) const {
  return options.target ? ReadIntoTarget(names, options, /*gradients=*/false)
                        : Read(names, options, /*gradients=*/false);
}

absl::StatusOr<std::vector<NamedTensor>> Stack::GetGradients(
    const std::vector<std::string>& names, const ParameterOptions& options) const {
  return options.target ? ReadIntoTarget(names, options, /*gradients=*/true)
                        : Read(names, options, /*gradients=*/true);
}

absl::StatusOr<std::vector<NamedTensor>> Stack::Read(const std::vector<std::string>& names,
                                                     const ParameterOptions& options,
                                                     bool gradients) const {
  pb::StreamParametersRequest request;
  request.set_stack(name_);
  request.mutable_names()->Assign(names.begin(), names.end());
  request.set_dtype(gradients ? pb::DATA_TYPE_FLOAT32 : static_cast<pb::DataType>(options.dtype));
  request.set_gradients(gradients);
  std::vector<NamedTensor> tensors;
  const absl::Status status = session_->ReadStream([&](internal::Connection& connection) {
    tensors.clear();
    grpc::ClientContext context;
    connection.Prepare(&context);
    auto stream = connection.config().StreamParameters(&context, request);
    pb::StreamParametersResponse chunk;
    absl::Status taken;
    while (taken.ok() && stream->Read(&chunk)) taken = TakeChunk(chunk, &tensors);
    if (!taken.ok()) context.TryCancel();
    const grpc::Status end = stream->Finish();
    return taken.ok() ? internal::ToAbsl(end, context, connection.target()) : taken;
  });
  if (!status.ok()) return status;
  return tensors;
}

absl::StatusOr<std::vector<NamedTensor>> Stack::ReadIntoTarget(
    const std::vector<std::string>& names, const ParameterOptions& options, bool gradients) const {
  const DType dtype = gradients ? DType::kFloat32 : options.dtype;
  if (absl::Status status = CheckTarget(options, dtype); !status.ok()) return status;
  pb::TensorTarget target;
  absl::Status status = internal::PutTarget("target", options.target, session_.get(), &target);
  if (!status.ok()) return status;

  google::protobuf::RepeatedPtrField<pb::NamedTensor> described;
  pb::ConfigService::Stub& config = session_->connection().config();
  if (gradients) {
    pb::GetGradientsRequest request;
    request.set_stack(name_);
    request.mutable_names()->Assign(names.begin(), names.end());
    request.set_session_id(session_->id());
    *request.mutable_target() = std::move(target);
    pb::GetGradientsResponse response;
    status = session_->Read(config, &pb::ConfigService::Stub::GetGradients, request, &response);
    described.Swap(response.mutable_tensors());
  } else {
    pb::GetParametersRequest request;
    request.set_stack(name_);
    request.mutable_names()->Assign(names.begin(), names.end());
    request.set_dtype(static_cast<pb::DataType>(dtype));
    request.set_session_id(session_->id());
    *request.mutable_target() = std::move(target);
    pb::GetParametersResponse response;
    status = session_->Read(config, &pb::ConfigService::Stub::GetParameters, request, &response);
    described.Swap(response.mutable_tensors());
  }
  if (!status.ok()) return status;

  std::vector<NamedTensor> tensors;
  size_t offset = 0;
  for (const pb::NamedTensor& named : described) {
    absl::StatusOr<Tensor> view =
        options.target.View(dtype, FromProto(named.tensor().shape()), offset);
    if (!view.ok()) return view.status();
    offset += view->bytes();
    tensors.push_back({.name = named.name(), .tensor = *std::move(view)});
  }
  return tensors;
}

absl::Status Stack::SetParameters(const std::vector<NamedTensor>& values) const {
  const uint64_t cap = session_->connection().inline_cap_bytes();
  size_t inline_bytes = 0;
  for (const NamedTensor& value : values) {
    if (!value.tensor.in_region()) inline_bytes += value.tensor.bytes();
  }
  // One temporary region for all of them: the call stays all or none.
  Tensor moved;
  if (inline_bytes > cap && session_->transport() == Transport::kMemfd) {
    absl::StatusOr<Tensor> made = session_->NewTensor(
        DType::kInt32, {static_cast<int64_t>((inline_bytes + 4 * values.size()) / 4)});
    if (!made.ok()) return made.status();
    if (made->in_region()) moved = *std::move(made);
  }
  pb::SetParametersRequest request;
  request.set_stack(name_);
  size_t offset = 0;
  for (const NamedTensor& value : values) {
    Tensor tensor = value.tensor;
    if (moved && tensor && !tensor.in_region()) {
      absl::StatusOr<Tensor> view = moved.View(tensor.dtype(), tensor.shape(), offset);
      if (!view.ok()) return view.status();
      std::memcpy(view->data(), tensor.data(), tensor.bytes());
      offset += (tensor.bytes() + 3) / 4 * 4;
      tensor = *std::move(view);
    }
    pb::NamedTensor* named = request.add_tensors();
    named->set_name(value.name);
    if (absl::Status status = internal::PutTensor(value.name.c_str(), tensor, session_.get(),
                                                  named->mutable_tensor());
        !status.ok()) {
      return status;
    }
  }
  pb::SetParametersResponse response;
  return session_->Mutate(session_->connection().config(), &pb::ConfigService::Stub::SetParameters,
                          &request, &response);
}

}  // namespace lamina::client
