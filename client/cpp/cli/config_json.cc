#include "cli/config_json.h"

#include <functional>
#include <map>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "cli/read_file.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

using client::StackConfig;
using Json = nlohmann::json;

absl::Status WrongType(const std::string& key, const char* expected, const Json& value) {
  return absl::InvalidArgumentError(
      absl::StrCat("'", key, "' is ", value.dump(), "; expected ", expected));
}

absl::Status Take(const std::string& key, const Json& value, bool* field) {
  if (!value.is_boolean()) return WrongType(key, "true or false", value);
  *field = value.get<bool>();
  return absl::OkStatus();
}

absl::Status Take(const std::string& key, const Json& value, int64_t* field) {
  if (!value.is_number_integer() ||
      (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX})) {
    return WrongType(key, "an integer of 64 bits", value);
  }
  *field = value.get<int64_t>();
  return absl::OkStatus();
}

absl::Status Take(const std::string& key, const Json& value, int* field) {
  int64_t wide = 0;
  if (absl::Status status = Take(key, value, &wide); !status.ok()) return status;
  if (wide < INT32_MIN || wide > INT32_MAX) return WrongType(key, "an integer of 32 bits", value);
  *field = static_cast<int>(wide);
  return absl::OkStatus();
}

absl::Status Take(const std::string& key, const Json& value, double* field) {
  if (!value.is_number()) return WrongType(key, "a number", value);
  *field = value.get<double>();
  return absl::OkStatus();
}

absl::Status Take(const std::string& key, const Json& value, client::DType* field) {
  const auto dtype =
      value.is_string() ? client::ParseDType(value.get<std::string>()) : std::nullopt;
  if (!dtype || *dtype == client::DType::kInt32) {
    return WrongType(key, "\"fp32\", \"bf16\" or \"fp16\"", value);
  }
  *field = *dtype;
  return absl::OkStatus();
}

absl::Status Take(const std::string& key, const Json& value, client::Gelu* field) {
  const auto gelu = value.is_string() ? client::ParseGelu(value.get<std::string>()) : std::nullopt;
  if (!gelu) return WrongType(key, "\"erf\" or \"tanh\"", value);
  *field = *gelu;
  return absl::OkStatus();
}

using Taker = std::function<absl::Status(const std::string&, const Json&, StackConfig*)>;

template <class Field>
Taker Into(Field StackConfig::*field) {
  return [field](const std::string& key, const Json& value, StackConfig* config) {
    return Take(key, value, &(config->*field));
  };
}

const std::map<std::string, Taker>& Takers() {
  static const auto* takers = new std::map<std::string, Taker>{
      {"batch_size", Into(&StackConfig::batch_size)},
      {"max_seq_length", Into(&StackConfig::max_seq_length)},
      {"hidden_size", Into(&StackConfig::hidden_size)},
      {"intermediate_size", Into(&StackConfig::intermediate_size)},
      {"heads", Into(&StackConfig::heads)},
      {"num_hidden_layers", Into(&StackConfig::num_hidden_layers)},
      {"attn_dropout_ratio", Into(&StackConfig::attn_dropout_ratio)},
      {"hidden_dropout_ratio", Into(&StackConfig::hidden_dropout_ratio)},
      {"initializer_range", Into(&StackConfig::initializer_range)},
      {"layer_norm_eps", Into(&StackConfig::layer_norm_eps)},
      {"local_rank", Into(&StackConfig::local_rank)},
      {"seed", Into(&StackConfig::seed)},
      {"fp16", Into(&StackConfig::fp16)},
      {"dtype", Into(&StackConfig::dtype)},
      {"pre_layer_norm", Into(&StackConfig::pre_layer_norm)},
      {"normalize_invertible", Into(&StackConfig::normalize_invertible)},
      {"gelu_checkpoint", Into(&StackConfig::gelu_checkpoint)},
      {"attn_dropout_checkpoint", Into(&StackConfig::attn_dropout_checkpoint)},
      {"stochastic_mode", Into(&StackConfig::stochastic_mode)},
      {"adjust_init_range", Into(&StackConfig::adjust_init_range)},
      {"training", Into(&StackConfig::training)},
      {"gelu", Into(&StackConfig::gelu)},
      {"max_contexts", Into(&StackConfig::max_contexts)},
      {"activation_checkpointing", Into(&StackConfig::activation_checkpointing)},
      {"causal", Into(&StackConfig::causal)},
      {"dynamic_loss_scale", Into(&StackConfig::dynamic_loss_scale)},
      {"initial_loss_scale", Into(&StackConfig::initial_loss_scale)},
      {"loss_scale_growth_interval", Into(&StackConfig::loss_scale_growth_interval)},
      {"loss_scale_growth_factor", Into(&StackConfig::loss_scale_growth_factor)},
      {"loss_scale_backoff_factor", Into(&StackConfig::loss_scale_backoff_factor)},
      {"loss_scale_hysteresis", Into(&StackConfig::loss_scale_hysteresis)},
      {"min_loss_scale", Into(&StackConfig::min_loss_scale)},
  };
  return *takers;
}

}  // namespace

Json ToJson(const StackConfig& config) {
  return {{"batch_size", config.batch_size},
          {"max_seq_length", config.max_seq_length},
          {"hidden_size", config.hidden_size},
          {"intermediate_size", config.intermediate_size},
          {"heads", config.heads},
          {"num_hidden_layers", config.num_hidden_layers},
          {"attn_dropout_ratio", config.attn_dropout_ratio},
          {"hidden_dropout_ratio", config.hidden_dropout_ratio},
          {"initializer_range", config.initializer_range},
          {"layer_norm_eps", config.layer_norm_eps},
          {"local_rank", config.local_rank},
          {"seed", config.seed},
          {"fp16", config.fp16},
          {"dtype", client::Name(config.dtype)},
          {"pre_layer_norm", config.pre_layer_norm},
          {"normalize_invertible", config.normalize_invertible},
          {"gelu_checkpoint", config.gelu_checkpoint},
          {"attn_dropout_checkpoint", config.attn_dropout_checkpoint},
          {"stochastic_mode", config.stochastic_mode},
          {"adjust_init_range", config.adjust_init_range},
          {"training", config.training},
          {"gelu", client::Name(config.gelu)},
          {"max_contexts", config.max_contexts},
          {"activation_checkpointing", config.activation_checkpointing},
          {"causal", config.causal},
          {"dynamic_loss_scale", config.dynamic_loss_scale},
          {"initial_loss_scale", config.initial_loss_scale},
          {"loss_scale_growth_interval", config.loss_scale_growth_interval},
          {"loss_scale_growth_factor", config.loss_scale_growth_factor},
          {"loss_scale_backoff_factor", config.loss_scale_backoff_factor},
          {"loss_scale_hysteresis", config.loss_scale_hysteresis},
          {"min_loss_scale", config.min_loss_scale}};
}

absl::StatusOr<StackConfig> ConfigFromJson(const Json& json) {
  if (!json.is_object()) return absl::InvalidArgumentError("the config is not a JSON object");
  StackConfig config;
  for (const auto& [key, value] : json.items()) {
    const auto found = Takers().find(key);
    if (found == Takers().end()) {
      std::string known;
      for (const auto& [name, taker] : Takers()) absl::StrAppend(&known, " ", name);
      return absl::InvalidArgumentError(
          absl::StrCat("the config has no field '", key, "'; its fields are", known));
    }
    if (value.is_null()) continue;
    if (absl::Status status = found->second(key, value, &config); !status.ok()) return status;
  }
  return config;
}

absl::StatusOr<Json> ReadConfigFile(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(path);
  if (!text.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("config file ", text.status().message()));
  }
  try {
    Json json = Json::parse(*text);
    if (json.is_object()) return json;
    return absl::InvalidArgumentError(absl::StrCat("config file '", path, "': not a JSON object"));
  } catch (const Json::parse_error& error) {
    return absl::InvalidArgumentError(absl::StrCat("config file '", path, "': ", error.what()));
  }
}

}  // namespace lamina::cli
