#include "server/service/parameters.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/service/conversions.h"
#include "server/service/tensors.h"

namespace lamina {
namespace {

constexpr size_t kChunk = size_t{1} << 20;

size_t BytesOf(const ParameterRead& read) {
  return static_cast<size_t>(read.info.shape.elements()) * SizeOf(read.dtype);
}

absl::StatusOr<std::vector<ParameterRead>> Describe(SharedState& state,
                                                    const ParameterQuery& query) {
  DType dtype = DType::kF32;
  if (query.dtype != v1::DATA_TYPE_UNSPECIFIED) {
    const auto given = FromProto(query.dtype);
    if (!given || !IsFloat(*given)) {
      return absl::InvalidArgumentError(absl::StrCat("dtype: ", static_cast<int>(query.dtype),
                                                     " must be FLOAT32 or the stack's own type"));
    }
    dtype = *given;
  }
  return state.engine.DescribeParameters(query.stack, query.names, dtype, query.gradients);
}

v1::Tensor TensorOf(const ParameterRead& read) {
  v1::Tensor tensor;
  tensor.set_dtype(ToProto(read.dtype));
  SetShape(read.info.shape, tensor.mutable_shape());
  return tensor;
}

template <typename Request>
absl::Status Read(SharedState& state, const ParameterQuery& query, const Request& request,
                  const CallControl& given,
                  google::protobuf::RepeatedPtrField<v1::NamedTensor>* tensors) {
  auto reads = Describe(state, query);
  if (!reads.ok()) return reads.status();
  const v1::TensorTarget& target = request.target();
  const bool to_slice = target.destination_case() == v1::TensorTarget::kSlice;
  std::shared_ptr<Session> session;
  CallControl control = given;
  if (to_slice || request.has_ready()) {
    auto found = state.sessions.Find(request.session_id(), given.caller);
    if (!found.ok()) return found.status();
    session = *std::move(found);
    auto waiting = WithReady(request, given, *session);
    if (!waiting.ok()) return waiting.status();
    control = *std::move(waiting);
  }
  size_t total = 0;
  for (const ParameterRead& read : *reads) total += BytesOf(read);

  if (to_slice) {
    const DType dtype = reads->empty() ? DType::kF32 : reads->front().dtype;
    auto where = ResolveSlice("target", target.slice(), total, SizeOf(dtype), *session);
    if (!where.ok()) return where.status();
    const ParameterTarget to{.data = where->data, .bytes = total, .memory = where->memory};
    absl::Status status =
        state.engine.ReadParameters(query.stack, query.names, dtype, query.gradients, to, control);
    if (!status.ok()) return status;
    uint64_t offset = target.slice().offset_bytes();
    for (const ParameterRead& read : *reads) {
      v1::NamedTensor* named = tensors->Add();
      named->set_name(read.info.name);
      *named->mutable_tensor() = TensorOf(read);
      v1::Slice* slice = named->mutable_tensor()->mutable_slice();
      slice->set_region_id(target.slice().region_id());
      slice->set_offset_bytes(offset);
      slice->set_size_bytes(BytesOf(read));
      offset += BytesOf(read);
    }
    return absl::OkStatus();
  }

  const size_t cap = state.engine.options().inline_cap_bytes;
  if (total > cap) {
    return absl::InvalidArgumentError(absl::StrCat("target: an inline result of ", total,
                                                   " bytes passes the cap of ", cap,
                                                   "; use StreamParameters or a slice"));
  }
  // At once, so that no step of another client comes between two of them.
  const DType dtype = reads->empty() ? DType::kF32 : reads->front().dtype;
  const auto values = std::make_unique<char[]>(total);
  absl::Status status = state.engine.ReadParameters(query.stack, query.names, dtype,
                                                    query.gradients, values.get(), total, control);
  if (!status.ok()) return status;
  const char* from = values.get();
  for (const ParameterRead& read : *reads) {
    v1::NamedTensor* named = tensors->Add();
    named->set_name(read.info.name);
    *named->mutable_tensor() = TensorOf(read);
    named->mutable_tensor()->set_inline_data(from, BytesOf(read));
    from += BytesOf(read);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ReadParametersTo(SharedState& state, const ParameterQuery& query,
                              const v1::GetParametersRequest& request, const CallControl& control,
                              google::protobuf::RepeatedPtrField<v1::NamedTensor>* tensors) {
  return Read(state, query, request, control, tensors);
}

absl::Status ReadParametersTo(SharedState& state, const ParameterQuery& query,
                              const v1::GetGradientsRequest& request, const CallControl& control,
                              google::protobuf::RepeatedPtrField<v1::NamedTensor>* tensors) {
  return Read(state, query, request, control, tensors);
}

absl::Status StreamParametersTo(
    SharedState& state, const ParameterQuery& query, const CallControl& control,
    absl::FunctionRef<bool(const v1::StreamParametersResponse&)> write) {
  auto reads = Describe(state, query);
  if (!reads.ok()) return reads.status();
  for (const ParameterRead& read : *reads) {
    const size_t bytes = BytesOf(read);
    const auto values = std::make_unique<char[]>(bytes);
    absl::Status status = state.engine.ReadParameters(
        query.stack, {read.info.name}, read.dtype, query.gradients, values.get(), bytes, control);
    if (!status.ok()) return status;
    for (size_t offset = 0; offset < bytes; offset += kChunk) {
      v1::StreamParametersResponse chunk;
      chunk.set_name(read.info.name);
      chunk.set_dtype(ToProto(read.dtype));
      SetShape(read.info.shape, chunk.mutable_shape());
      chunk.set_offset_bytes(offset);
      chunk.set_data(values.get() + offset, std::min(kChunk, bytes - offset));
      if (!write(chunk)) return absl::CancelledError("the client has gone");
    }
  }
  return absl::OkStatus();
}

absl::Status WriteParametersFrom(SharedState& state, const v1::SetParametersRequest& request,
                                 Session& session, const CallControl& given) {
  const auto control = WithReady(request, given, session);
  if (!control.ok()) return control.status();
  std::vector<ParameterValue> values;
  values.reserve(static_cast<size_t>(request.tensors_size()));
  for (int i = 0; i < request.tensors_size(); ++i) {
    const v1::NamedTensor& named = request.tensors(i);
    auto tensor = ResolveInput(absl::StrCat("tensors[", i, "].tensor"), named.tensor(),
                               state.engine.options().inline_cap_bytes, session);
    if (!tensor.ok()) return tensor.status();
    values.push_back({named.name(), *std::move(tensor)});
  }
  return state.engine.WriteParameters(request.stack(), values, *control);
}

}  // namespace lamina
