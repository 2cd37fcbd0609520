// Messages to the engine's structs and back. Pure functions.
#pragma once

#include <optional>

#include "absl/status/statusor.h"
#include "lamina/v1/config_service.pb.h"
#include "lamina/v1/layer_service.pb.h"
#include "server/engine/engine.h"

namespace lamina {

// nullopt for DATA_TYPE_UNSPECIFIED and numbers that are no type.
std::optional<DType> FromProto(v1::DataType dtype);
v1::DataType ToProto(DType dtype);
v1::Transport ToProto(TensorTransport transport);
v1::AttentionPath AttentionPathOf(const ForwardOutcome& outcome);

// Absent fields take their defaults. INVALID_ARGUMENT for a dtype or gelu that is none; what the
// values mean is checked by Resolve.
absl::StatusOr<StackConfig> FromProto(const v1::StackConfig& config);
v1::StackConfig ToProto(const StackConfig& config);

// Absent fields take their defaults. INVALID_ARGUMENT for an optimizer that is none, for LAMB's
// settings with another one, and for a 0 that would read as "absent"; the other ranges are checked
// by Stack::ApplyGradients.
absl::StatusOr<OptimizerOptions> FromProto(const v1::ApplyGradientsRequest& request);
StackChanges FromProto(const v1::UpdateStackRequest& request);

v1::MemoryPlan ToProto(const MemoryPlan& plan);
v1::Stack ToProto(const StackInfo& info);
v1::ParameterInfo ToProto(const ParameterInfo& info);
v1::StepTiming ToProto(const StepTimes& times);
void SetShape(const Shape& shape, google::protobuf::RepeatedField<int64_t>* out);

}  // namespace lamina
