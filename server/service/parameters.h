// Parameters and gradients across the boundary: into a slice, into the answer, as a stream, and
// back.
#pragma once

#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "lamina/v1/config_service.pb.h"
#include "server/service/shared_state.h"

namespace lamina {

// What GetParameters and GetGradients have in common.
struct ParameterQuery {
  const std::string& stack;
  std::vector<std::string> names;  // empty: all stored ones
  v1::DataType dtype = v1::DATA_TYPE_UNSPECIFIED;
  bool gradients = false;
};

// Into the request's target; the answer's tensors are appended to `tensors` in the order of the
// names.
absl::Status ReadParametersTo(SharedState& state, const ParameterQuery& query,
                              const v1::GetParametersRequest& request, const CallControl& control,
                              google::protobuf::RepeatedPtrField<v1::NamedTensor>* tensors);
absl::Status ReadParametersTo(SharedState& state, const ParameterQuery& query,
                              const v1::GetGradientsRequest& request, const CallControl& control,
                              google::protobuf::RepeatedPtrField<v1::NamedTensor>* tensors);

// One tensor after another, each in chunks. CANCELLED: `write` said that nobody takes them.
absl::Status StreamParametersTo(SharedState& state, const ParameterQuery& query,
                                const CallControl& control,
                                absl::FunctionRef<bool(const v1::StreamParametersResponse&)> write);

absl::Status WriteParametersFrom(SharedState& state, const v1::SetParametersRequest& request,
                                 Session& session, const CallControl& control);

}  // namespace lamina
