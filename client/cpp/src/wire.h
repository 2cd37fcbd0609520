// The library's values to and from the contract's messages. Internal.
#pragma once

#include "absl/status/statusor.h"
#include "lamina/client/tensor.h"
#include "lamina/client/types.h"
#include "lamina/v1/config_service.pb.h"
#include "lamina/v1/layer_service.pb.h"
#include "lamina/v1/tensor.pb.h"

namespace lamina::client::internal {

namespace pb = lamina::v1;

pb::StackConfig ToProto(const StackConfig& config);
StackConfig FromProto(const pb::StackConfig& config);
MemoryPlan FromProto(const pb::MemoryPlan& plan);
StackInfo FromProto(const pb::Stack& stack);
ServerInfo FromProto(const pb::GetServerInfoResponse& info);
StepTiming FromProto(const pb::StepTiming& timing);
Shape FromProto(const google::protobuf::RepeatedField<int64_t>& shape);

// How tensors cross: by slice where the tensor is in a region of `session`, else inline. `what`
// names the argument in errors. INVALID_ARGUMENT: absent, or in another session's region.
absl::Status PutTensor(const char* what, const Tensor& tensor, const void* session,
                       pb::Tensor* message);
// Where a result shall go; absent and out of regions: inline.
absl::Status PutTarget(const char* what, const Tensor& tensor, const void* session,
                       pb::TensorTarget* message);
// The result of a call with that target: `target` itself, filled from the message where it crossed
// inline, or a new tensor where target is absent. INTERNAL: it is not what was asked for.
absl::StatusOr<Tensor> TakeTensor(const char* what, const pb::Tensor& message,
                                  const Tensor& target);

}  // namespace lamina::client::internal
