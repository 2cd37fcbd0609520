#include "server/service/conversions.h"

#include <cstdint>

#include "absl/strings/str_cat.h"

namespace lamina {

std::optional<DType> FromProto(v1::DataType dtype) {
  switch (dtype) {
    case v1::DATA_TYPE_FLOAT32:
      return DType::kF32;
    case v1::DATA_TYPE_BFLOAT16:
      return DType::kBF16;
    case v1::DATA_TYPE_FLOAT16:
      return DType::kF16;
    case v1::DATA_TYPE_INT32:
      return DType::kI32;
    default:
      return std::nullopt;
  }
}

v1::DataType ToProto(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return v1::DATA_TYPE_FLOAT32;
    case DType::kBF16:
      return v1::DATA_TYPE_BFLOAT16;
    case DType::kF16:
      return v1::DATA_TYPE_FLOAT16;
    case DType::kI32:
      return v1::DATA_TYPE_INT32;
    case DType::kU8:
      break;
  }
  return v1::DATA_TYPE_UNSPECIFIED;
}

v1::Transport ToProto(TensorTransport transport) {
  switch (transport) {
    case TensorTransport::kInline:
      return v1::TRANSPORT_INLINE;
    case TensorTransport::kMemfd:
      return v1::TRANSPORT_MEMFD;
    case TensorTransport::kDevice:
      return v1::TRANSPORT_DEVICE;
    case TensorTransport::kNone:
      break;
  }
  return v1::TRANSPORT_UNSPECIFIED;
}

v1::AttentionPath AttentionPathOf(const ForwardOutcome& outcome) {
  return outcome.fused_attention ? v1::ATTENTION_PATH_FUSED : v1::ATTENTION_PATH_PLAIN;
}

absl::StatusOr<StackConfig> FromProto(const v1::StackConfig& p) {
  StackConfig c;
  c.batch_size = p.batch_size();
  c.max_seq_length = p.max_seq_length();
  c.hidden_size = p.hidden_size();
  if (p.has_intermediate_size()) c.intermediate_size = p.intermediate_size();
  c.heads = p.heads();
  c.attn_dropout_ratio = p.attn_dropout_ratio();
  c.hidden_dropout_ratio = p.hidden_dropout_ratio();
  c.num_hidden_layers = p.num_hidden_layers();
  if (p.has_initializer_range()) c.initializer_range = p.initializer_range();
  if (p.has_layer_norm_eps()) c.layer_norm_eps = p.layer_norm_eps();
  if (p.has_local_rank()) c.local_rank = p.local_rank();
  if (p.has_seed()) c.seed = p.seed();
  c.fp16 = p.fp16();
  if (p.has_pre_layer_norm()) c.pre_layer_norm = p.pre_layer_norm();
  c.normalize_invertible = p.normalize_invertible();
  c.gelu_checkpoint = p.gelu_checkpoint();
  c.attn_dropout_checkpoint = p.attn_dropout_checkpoint();
  c.activation_checkpointing = p.activation_checkpointing();
  c.stochastic_mode = p.stochastic_mode();
  if (p.has_adjust_init_range()) c.adjust_init_range = p.adjust_init_range();
  if (p.has_training()) c.training = p.training();
  c.causal = p.causal();
  c.dynamic_loss_scale = p.dynamic_loss_scale();
  if (p.has_initial_loss_scale()) c.initial_loss_scale = p.initial_loss_scale();
  if (p.has_loss_scale_growth_interval())
    c.loss_scale_growth_interval = p.loss_scale_growth_interval();
  if (p.has_loss_scale_growth_factor()) c.loss_scale_growth_factor = p.loss_scale_growth_factor();
  if (p.has_loss_scale_backoff_factor())
    c.loss_scale_backoff_factor = p.loss_scale_backoff_factor();
  if (p.has_loss_scale_hysteresis()) c.loss_scale_hysteresis = p.loss_scale_hysteresis();
  if (p.has_min_loss_scale()) c.min_loss_scale = p.min_loss_scale();
  if (p.has_max_contexts()) c.max_contexts = p.max_contexts();
  if (p.dtype() != v1::DATA_TYPE_UNSPECIFIED) {
    const auto dtype = FromProto(p.dtype());
    if (!dtype || !IsFloat(*dtype)) {
      return absl::InvalidArgumentError(absl::StrCat("dtype: ", static_cast<int>(p.dtype()),
                                                     " must be FLOAT32, BFLOAT16 or FLOAT16"));
    }
    c.dtype = *dtype;
  }
  switch (p.gelu()) {
    case v1::GELU_UNSPECIFIED:
    case v1::GELU_ERF:
      c.gelu = GeluKind::kErf;
      break;
    case v1::GELU_TANH:
      c.gelu = GeluKind::kTanh;
      break;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("gelu: ", static_cast<int>(p.gelu()), " must be GELU_ERF or GELU_TANH"));
  }
  return c;
}

v1::StackConfig ToProto(const StackConfig& c) {
  v1::StackConfig p;
  p.set_batch_size(c.batch_size);
  p.set_max_seq_length(c.max_seq_length);
  p.set_hidden_size(c.hidden_size);
  p.set_intermediate_size(c.intermediate_size);
  p.set_heads(c.heads);
  p.set_attn_dropout_ratio(c.attn_dropout_ratio);
  p.set_hidden_dropout_ratio(c.hidden_dropout_ratio);
  p.set_num_hidden_layers(c.num_hidden_layers);
  p.set_initializer_range(c.initializer_range);
  p.set_layer_norm_eps(c.layer_norm_eps);
  p.set_local_rank(c.local_rank);
  p.set_seed(c.seed);
  p.set_fp16(c.dtype == DType::kF16);
  p.set_pre_layer_norm(c.pre_layer_norm);
  p.set_normalize_invertible(c.normalize_invertible);
  p.set_gelu_checkpoint(c.gelu_checkpoint);
  p.set_attn_dropout_checkpoint(c.attn_dropout_checkpoint);
  p.set_activation_checkpointing(c.activation_checkpointing);
  p.set_stochastic_mode(c.stochastic_mode);
  p.set_adjust_init_range(c.adjust_init_range);
  p.set_training(c.training);
  p.set_dtype(ToProto(c.dtype));
  p.set_gelu(c.gelu == GeluKind::kTanh ? v1::GELU_TANH : v1::GELU_ERF);
  p.set_max_contexts(c.max_contexts);
  p.set_causal(c.causal);
  p.set_dynamic_loss_scale(c.dynamic_loss_scale);
  p.set_initial_loss_scale(c.initial_loss_scale);
  p.set_loss_scale_growth_interval(c.loss_scale_growth_interval);
  p.set_loss_scale_growth_factor(c.loss_scale_growth_factor);
  p.set_loss_scale_backoff_factor(c.loss_scale_backoff_factor);
  p.set_loss_scale_hysteresis(c.loss_scale_hysteresis);
  p.set_min_loss_scale(c.min_loss_scale);
  return p;
}

absl::StatusOr<OptimizerOptions> FromProto(const v1::ApplyGradientsRequest& p) {
  OptimizerOptions o;
  switch (p.optimizer()) {
    case v1::OPTIMIZER_KIND_UNSPECIFIED:
    case v1::OPTIMIZER_KIND_ADAMW:
      o.kind = OptimizerKind::kAdamW;
      break;
    case v1::OPTIMIZER_KIND_LAMB:
      o.kind = OptimizerKind::kLamb;
      break;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("optimizer: ", static_cast<int>(p.optimizer()),
                       " must be OPTIMIZER_KIND_ADAMW or OPTIMIZER_KIND_LAMB"));
  }
  if (o.kind != OptimizerKind::kLamb) {
    const char* const lamb = p.adapt_biases_and_norms() ? "adapt_biases_and_norms"
                             : p.has_min_trust_ratio()  ? "min_trust_ratio"
                             : p.has_max_trust_ratio()  ? "max_trust_ratio"
                                                        : nullptr;
    if (lamb != nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat(lamb,
                       ": is LAMB's alone; leave it out or set optimizer to "
                       "OPTIMIZER_KIND_LAMB"));
    }
  }
  o.learning_rate = p.learning_rate();
  if (p.has_beta1()) o.beta1 = p.beta1();
  if (p.has_beta2()) o.beta2 = p.beta2();
  if (p.has_epsilon()) o.epsilon = p.epsilon();
  if (p.has_weight_decay()) o.weight_decay = p.weight_decay();
  o.decay_biases_and_norms = p.decay_biases_and_norms();
  if (p.has_max_grad_norm()) o.max_grad_norm = p.max_grad_norm();
  if (p.has_loss_scale()) {
    if (p.loss_scale() == 0) {
      return absl::InvalidArgumentError(
          "loss_scale: 0 must be finite and > 0; leave it out for the stack's own");
    }
    o.loss_scale = p.loss_scale();
  }
  o.adapt_biases_and_norms = p.adapt_biases_and_norms();
  if (p.has_min_trust_ratio()) o.min_trust_ratio = p.min_trust_ratio();
  if (p.has_max_trust_ratio()) {
    if (p.max_trust_ratio() == 0) {
      return absl::InvalidArgumentError(
          "max_trust_ratio: 0 must be > 0 and at least min_trust_ratio; leave it out for no bound");
    }
    o.max_trust_ratio = p.max_trust_ratio();
  }
  return o;
}

StackChanges FromProto(const v1::UpdateStackRequest& p) {
  StackChanges c;
  if (p.has_attn_dropout_ratio()) c.attn_dropout_ratio = p.attn_dropout_ratio();
  if (p.has_hidden_dropout_ratio()) c.hidden_dropout_ratio = p.hidden_dropout_ratio();
  if (p.has_training()) c.training = p.training();
  if (p.has_normalize_invertible()) c.normalize_invertible = p.normalize_invertible();
  if (p.has_gelu_checkpoint()) c.gelu_checkpoint = p.gelu_checkpoint();
  if (p.has_attn_dropout_checkpoint()) c.attn_dropout_checkpoint = p.attn_dropout_checkpoint();
  if (p.has_activation_checkpointing()) c.activation_checkpointing = p.activation_checkpointing();
  if (p.has_stochastic_mode()) c.stochastic_mode = p.stochastic_mode();
  return c;
}

v1::MemoryPlan ToProto(const MemoryPlan& plan) {
  v1::MemoryPlan p;
  for (const PlanEntry& entry : plan.entries) {
    v1::MemoryPlanEntry* e = p.add_entries();
    // The proto's kinds are the plan's, one up.
    e->set_kind(static_cast<v1::MemoryKind>(static_cast<int>(entry.kind) + 1));
    e->set_name(entry.name);
    e->set_size_bytes(entry.bytes);
    e->set_instances(entry.instances);
  }
  p.set_total_bytes(plan.Total());
  p.set_context_bytes(plan.context_bytes);
  return p;
}

void SetShape(const Shape& shape, google::protobuf::RepeatedField<int64_t>* out) {
  out->Clear();
  for (int i = 0; i < shape.rank(); ++i) out->Add(shape[i]);
}

v1::ParameterInfo ToProto(const ParameterInfo& info) {
  v1::ParameterInfo p;
  p.set_name(info.name);
  SetShape(info.shape, p.mutable_shape());
  return p;
}

v1::Stack ToProto(const StackInfo& info) {
  v1::Stack p;
  p.set_name(info.name);
  *p.mutable_config() = ToProto(info.config);
  *p.mutable_plan() = ToProto(info.plan);
  p.set_parameter_count(info.parameter_count);
  p.set_step(info.counters.optimizer_step);
  p.set_skipped_steps(info.counters.skipped_steps);
  p.set_forward_count(info.counters.rng_counter);
  p.set_outstanding_contexts(info.outstanding_contexts);
  p.set_loss_scale(info.loss_scale);
  return p;
}

v1::StepTiming ToProto(const StepTimes& times) {
  v1::StepTiming p;
  p.set_queue_seconds(times.queue_seconds);
  p.set_input_seconds(times.input_seconds);
  p.set_compute_seconds(times.compute_seconds);
  p.set_output_seconds(times.output_seconds);
  return p;
}

}  // namespace lamina
