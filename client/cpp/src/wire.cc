#include "src/wire.h"

#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "src/storage.h"

namespace lamina::client::internal {
namespace {

absl::Status CheckSession(const char* what, const Tensor& tensor, const void* session) {
  if (tensor.in_region() && Storage::Of(tensor)->session() != session) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, " is in a region of another session; a session's calls take its own"));
  }
  return absl::OkStatus();
}

void PutSlice(const Tensor& tensor, pb::Slice* slice) {
  slice->set_region_id(Storage::Of(tensor)->region_id());
  slice->set_offset_bytes(Storage::OffsetOf(tensor));
  slice->set_size_bytes(tensor.bytes());
}

}  // namespace

pb::StackConfig ToProto(const StackConfig& config) {
  pb::StackConfig message;
  message.set_batch_size(config.batch_size);
  message.set_max_seq_length(config.max_seq_length);
  message.set_hidden_size(config.hidden_size);
  message.set_intermediate_size(config.intermediate_size);
  message.set_heads(config.heads);
  message.set_attn_dropout_ratio(config.attn_dropout_ratio);
  message.set_hidden_dropout_ratio(config.hidden_dropout_ratio);
  message.set_num_hidden_layers(config.num_hidden_layers);
  message.set_initializer_range(config.initializer_range);
  message.set_layer_norm_eps(config.layer_norm_eps);
  message.set_local_rank(config.local_rank);
  message.set_seed(config.seed);
  message.set_fp16(config.fp16);
  message.set_pre_layer_norm(config.pre_layer_norm);
  message.set_normalize_invertible(config.normalize_invertible);
  message.set_gelu_checkpoint(config.gelu_checkpoint);
  message.set_attn_dropout_checkpoint(config.attn_dropout_checkpoint);
  message.set_stochastic_mode(config.stochastic_mode);
  message.set_adjust_init_range(config.adjust_init_range);
  message.set_training(config.training);
  // fp16 alone means dtype fp16: an explicit FLOAT32 beside it would contradict it.
  if (!(config.fp16 && config.dtype == DType::kFloat32)) {
    message.set_dtype(static_cast<pb::DataType>(config.dtype));
  }
  message.set_gelu(static_cast<pb::Gelu>(config.gelu));
  message.set_max_contexts(config.max_contexts);
  message.set_activation_checkpointing(config.activation_checkpointing);
  message.set_causal(config.causal);
  message.set_dynamic_loss_scale(config.dynamic_loss_scale);
  message.set_initial_loss_scale(config.initial_loss_scale);
  message.set_loss_scale_growth_interval(config.loss_scale_growth_interval);
  message.set_loss_scale_growth_factor(config.loss_scale_growth_factor);
  message.set_loss_scale_backoff_factor(config.loss_scale_backoff_factor);
  message.set_loss_scale_hysteresis(config.loss_scale_hysteresis);
  message.set_min_loss_scale(config.min_loss_scale);
  return message;
}

StackConfig FromProto(const pb::StackConfig& message) {
  StackConfig config;
  config.batch_size = message.batch_size();
  config.max_seq_length = message.max_seq_length();
  config.hidden_size = message.hidden_size();
  if (message.has_intermediate_size()) config.intermediate_size = message.intermediate_size();
  config.heads = message.heads();
  config.attn_dropout_ratio = message.attn_dropout_ratio();
  config.hidden_dropout_ratio = message.hidden_dropout_ratio();
  config.num_hidden_layers = message.num_hidden_layers();
  if (message.has_initializer_range()) config.initializer_range = message.initializer_range();
  if (message.has_layer_norm_eps()) config.layer_norm_eps = message.layer_norm_eps();
  if (message.has_local_rank()) config.local_rank = message.local_rank();
  if (message.has_seed()) config.seed = message.seed();
  config.fp16 = message.fp16();
  if (message.has_pre_layer_norm()) config.pre_layer_norm = message.pre_layer_norm();
  config.normalize_invertible = message.normalize_invertible();
  config.gelu_checkpoint = message.gelu_checkpoint();
  config.attn_dropout_checkpoint = message.attn_dropout_checkpoint();
  config.stochastic_mode = message.stochastic_mode();
  if (message.has_adjust_init_range()) config.adjust_init_range = message.adjust_init_range();
  if (message.has_training()) config.training = message.training();
  if (message.dtype() != pb::DATA_TYPE_UNSPECIFIED) {
    config.dtype = static_cast<DType>(message.dtype());
  }
  if (message.gelu() != pb::GELU_UNSPECIFIED) config.gelu = static_cast<Gelu>(message.gelu());
  if (message.has_max_contexts()) config.max_contexts = message.max_contexts();
  config.activation_checkpointing = message.activation_checkpointing();
  config.causal = message.causal();
  config.dynamic_loss_scale = message.dynamic_loss_scale();
  if (message.has_initial_loss_scale()) config.initial_loss_scale = message.initial_loss_scale();
  if (message.has_loss_scale_growth_interval()) {
    config.loss_scale_growth_interval = message.loss_scale_growth_interval();
  }
  if (message.has_loss_scale_growth_factor()) {
    config.loss_scale_growth_factor = message.loss_scale_growth_factor();
  }
  if (message.has_loss_scale_backoff_factor()) {
    config.loss_scale_backoff_factor = message.loss_scale_backoff_factor();
  }
  if (message.has_loss_scale_hysteresis()) {
    config.loss_scale_hysteresis = message.loss_scale_hysteresis();
  }
  if (message.has_min_loss_scale()) config.min_loss_scale = message.min_loss_scale();
  return config;
}

MemoryPlan FromProto(const pb::MemoryPlan& message) {
  MemoryPlan plan;
  plan.total_bytes = message.total_bytes();
  plan.context_bytes = message.context_bytes();
  plan.entries.reserve(static_cast<size_t>(message.entries_size()));
  for (const pb::MemoryPlanEntry& entry : message.entries()) {
    plan.entries.push_back({.kind = static_cast<MemoryKind>(entry.kind()),
                            .name = entry.name(),
                            .bytes = entry.size_bytes(),
                            .instances = entry.instances()});
  }
  return plan;
}

StackInfo FromProto(const pb::Stack& message) {
  StackInfo info;
  info.name = message.name();
  info.config = FromProto(message.config());
  info.plan = FromProto(message.plan());
  info.parameter_count = message.parameter_count();
  info.step = message.step();
  info.skipped_steps = message.skipped_steps();
  info.forward_count = message.forward_count();
  info.outstanding_contexts = message.outstanding_contexts();
  info.loss_scale = message.loss_scale();
  return info;
}

ServerInfo FromProto(const pb::GetServerInfoResponse& message) {
  ServerInfo info;
  info.version = message.version();
  info.build_commit = message.build_commit();
  info.metrics_address = message.metrics_address();
  info.backend = message.backend();
  info.device_name = message.device_name();
  info.device_uuid = message.device_uuid();
  info.device_ordinal = message.device_ordinal();
  info.device_total_bytes = message.device_total_bytes();
  info.device_free_bytes = message.device_free_bytes();
  info.inline_cap_bytes = message.inline_cap_bytes();
  info.replay_window = message.replay_window();
  for (const int transport : message.transports()) {
    info.transports.push_back(static_cast<Transport>(transport));
  }
  info.uptime_seconds = message.uptime_seconds();
  info.checkpoints_enabled = message.checkpoints_enabled();
  return info;
}

StepTiming FromProto(const pb::StepTiming& message) {
  return {.queue_seconds = message.queue_seconds(),
          .input_seconds = message.input_seconds(),
          .compute_seconds = message.compute_seconds(),
          .output_seconds = message.output_seconds()};
}

Shape FromProto(const google::protobuf::RepeatedField<int64_t>& shape) {
  return {shape.begin(), shape.end()};
}

absl::Status PutTensor(const char* what, const Tensor& tensor, const void* session,
                       pb::Tensor* message) {
  if (!tensor) return absl::InvalidArgumentError(absl::StrCat(what, " is absent"));
  if (absl::Status status = CheckSession(what, tensor, session); !status.ok()) return status;
  message->set_dtype(static_cast<pb::DataType>(tensor.dtype()));
  message->mutable_shape()->Add(tensor.shape().begin(), tensor.shape().end());
  if (tensor.in_region()) {
    PutSlice(tensor, message->mutable_slice());
  } else {
    message->set_inline_data(tensor.data(), tensor.bytes());
  }
  return absl::OkStatus();
}

absl::Status PutTarget(const char* what, const Tensor& tensor, const void* session,
                       pb::TensorTarget* message) {
  if (absl::Status status = CheckSession(what, tensor, session); !status.ok()) return status;
  if (tensor.in_region()) {
    PutSlice(tensor, message->mutable_slice());
  } else {
    message->mutable_inline_();
  }
  return absl::OkStatus();
}

absl::StatusOr<Tensor> TakeTensor(const char* what, const pb::Tensor& message,
                                  const Tensor& target) {
  const auto dtype = static_cast<DType>(message.dtype());
  Shape shape = FromProto(message.shape());
  absl::StatusOr<size_t> bytes = BytesOf(dtype, shape);
  if (!bytes.ok()) {
    return absl::InternalError(absl::StrCat("the answer's ", what, ": ", bytes.status().message()));
  }
  if (target) {
    if (dtype != target.dtype() || *bytes != target.bytes()) {
      return absl::InvalidArgumentError(absl::StrCat(
          what, " is ", Name(dtype), " ", ToString(shape), ", the tensor given for it ",
          Name(target.dtype()), " ", ToString(target.shape())));
    }
    if (target.in_region()) return target;  // the daemon wrote it there
  }
  if (message.inline_data().size() != *bytes) {
    return absl::InternalError(absl::StrCat("the answer's ", what, " has ",
                                            message.inline_data().size(), " bytes, its shape ",
                                            *bytes));
  }
  Tensor result = target;
  if (!result) {
    absl::StatusOr<Tensor> made = Tensor::Allocate(dtype, std::move(shape));
    if (!made.ok()) return made.status();
    result = *std::move(made);
  }
  std::memcpy(result.data(), message.inline_data().data(), *bytes);
  return result;
}

}  // namespace lamina::client::internal
