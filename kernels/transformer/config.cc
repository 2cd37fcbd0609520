#include "lamina/transformer/config.h"

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "status_macros.h"

namespace lamina {
namespace {

using Json = nlohmann::ordered_json;

// Every field under its JSON name: ToJson and StackConfigFromJson both walk this list, so that
// neither can forget one.
struct Field {
  const char* name;
  std::variant<int64_t StackConfig::*, int StackConfig::*, double StackConfig::*,
               bool StackConfig::*, DType StackConfig::*, GeluKind StackConfig::*>
      member;
};

const Field kFields[] = {
    {"batch_size", &StackConfig::batch_size},
    {"max_seq_length", &StackConfig::max_seq_length},
    {"hidden_size", &StackConfig::hidden_size},
    {"intermediate_size", &StackConfig::intermediate_size},
    {"heads", &StackConfig::heads},
    {"num_hidden_layers", &StackConfig::num_hidden_layers},
    {"attn_dropout_ratio", &StackConfig::attn_dropout_ratio},
    {"hidden_dropout_ratio", &StackConfig::hidden_dropout_ratio},
    {"initializer_range", &StackConfig::initializer_range},
    {"layer_norm_eps", &StackConfig::layer_norm_eps},
    {"local_rank", &StackConfig::local_rank},
    {"seed", &StackConfig::seed},
    {"fp16", &StackConfig::fp16},
    {"dtype", &StackConfig::dtype},
    {"pre_layer_norm", &StackConfig::pre_layer_norm},
    {"normalize_invertible", &StackConfig::normalize_invertible},
    {"gelu_checkpoint", &StackConfig::gelu_checkpoint},
    {"attn_dropout_checkpoint", &StackConfig::attn_dropout_checkpoint},
    {"activation_checkpointing", &StackConfig::activation_checkpointing},
    {"stochastic_mode", &StackConfig::stochastic_mode},
    {"adjust_init_range", &StackConfig::adjust_init_range},
    {"training", &StackConfig::training},
    {"causal", &StackConfig::causal},
    {"gelu", &StackConfig::gelu},
    {"dynamic_loss_scale", &StackConfig::dynamic_loss_scale},
    {"initial_loss_scale", &StackConfig::initial_loss_scale},
    {"loss_scale_growth_interval", &StackConfig::loss_scale_growth_interval},
    {"loss_scale_growth_factor", &StackConfig::loss_scale_growth_factor},
    {"loss_scale_backoff_factor", &StackConfig::loss_scale_backoff_factor},
    {"loss_scale_hysteresis", &StackConfig::loss_scale_hysteresis},
    {"min_loss_scale", &StackConfig::min_loss_scale},
    {"max_contexts", &StackConfig::max_contexts},
};

const char* GeluName(GeluKind kind) { return kind == GeluKind::kErf ? "erf" : "tanh"; }

absl::Status WrongType(const char* name, const Json& value, const char* wanted) {
  return absl::InvalidArgumentError(absl::StrCat(
      "config: ", name, " is ", value.dump(-1, ' ', false, Json::error_handler_t::replace),
      "; it must be ", wanted));
}

absl::StatusOr<int64_t> ToInt64(const char* name, const Json& value) {
  if (value.is_number_unsigned()) {
    const uint64_t u = value.get<uint64_t>();
    if (u <= uint64_t{std::numeric_limits<int64_t>::max()}) return static_cast<int64_t>(u);
  } else if (value.is_number_integer()) {
    return value.get<int64_t>();
  }
  return WrongType(name, value, "an integer of 64 bits");
}

absl::Status Read(const Field& field, const Json& value, StackConfig& config) {
  const char* name = field.name;
  if (auto p = std::get_if<int64_t StackConfig::*>(&field.member)) {
    LAMINA_ASSIGN_OR_RETURN(config.*(*p), ToInt64(name, value));
  } else if (auto p32 = std::get_if<int StackConfig::*>(&field.member)) {
    LAMINA_ASSIGN_OR_RETURN(const int64_t wide, ToInt64(name, value));
    if (wide != static_cast<int>(wide)) return WrongType(name, value, "an integer of 32 bits");
    config.*(*p32) = static_cast<int>(wide);
  } else if (auto pd = std::get_if<double StackConfig::*>(&field.member)) {
    if (!value.is_number()) return WrongType(name, value, "a number");
    config.*(*pd) = value.get<double>();
  } else if (auto pb = std::get_if<bool StackConfig::*>(&field.member)) {
    if (!value.is_boolean()) return WrongType(name, value, "true or false");
    config.*(*pb) = value.get<bool>();
  } else if (auto pt = std::get_if<DType StackConfig::*>(&field.member)) {
    for (DType t : {DType::kF32, DType::kBF16, DType::kF16}) {
      if (value == Name(t)) {
        config.*(*pt) = t;
        return absl::OkStatus();
      }
    }
    return WrongType(name, value, "\"fp32\", \"bf16\" or \"fp16\"");
  } else if (auto pg = std::get_if<GeluKind StackConfig::*>(&field.member)) {
    for (GeluKind g : {GeluKind::kErf, GeluKind::kTanh}) {
      if (value == GeluName(g)) {
        config.*(*pg) = g;
        return absl::OkStatus();
      }
    }
    return WrongType(name, value, "\"erf\" or \"tanh\"");
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status Invalid(const char* name, T value, absl::string_view range) {
  return absl::InvalidArgumentError(
      absl::StrCat("config: ", name, " is ", value, "; it must be ", range));
}

absl::Status InRange(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return Invalid(name, value, absl::StrCat("in [", low, ", ", high, "]"));
}

absl::Status CheckLossScaling(const StackConfig& config) {
  using C = StackConfig;
  // The kernels divide by the scale in fp32. Each comparison is false for NaN.
  constexpr double kFloatMin = std::numeric_limits<float>::min();
  constexpr auto kMaxScale = static_cast<int64_t>(C::kMaxLossScale);  // as errors print it
  if (!(config.min_loss_scale >= kFloatMin && config.min_loss_scale <= C::kMaxLossScale))
    return Invalid("min_loss_scale", config.min_loss_scale,
                   absl::StrCat("in [", kFloatMin, ", ", kMaxScale, "]"));
  // A power of two divides out without rounding.
  int exponent = 0;
  if (!(config.initial_loss_scale >= config.min_loss_scale &&
        config.initial_loss_scale <= C::kMaxLossScale &&
        std::frexp(config.initial_loss_scale, &exponent) == 0.5))
    return Invalid("initial_loss_scale", config.initial_loss_scale,
                   absl::StrCat("a power of two in [", config.min_loss_scale, " (min_loss_scale), ",
                                kMaxScale, "]"));
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  LAMINA_RETURN_IF_ERROR(
      InRange("loss_scale_growth_interval", config.loss_scale_growth_interval, 1, kMost));
  if (!(config.loss_scale_growth_factor > 1.0 &&
        config.loss_scale_growth_factor <= C::kMaxLossScale))
    return Invalid("loss_scale_growth_factor", config.loss_scale_growth_factor,
                   absl::StrCat("in (1, ", kMaxScale, "]"));
  if (!(config.loss_scale_backoff_factor > 0.0 && config.loss_scale_backoff_factor < 1.0))
    return Invalid("loss_scale_backoff_factor", config.loss_scale_backoff_factor, "in (0, 1)");
  return InRange("loss_scale_hysteresis", config.loss_scale_hysteresis, 1, kMost);
}

}  // namespace

absl::Status CheckDropoutRatio(const char* name, double ratio) {
  // The kernels take a float; 0.99999999999 would be 1 there. NaN fails both comparisons.
  if (ratio >= 0.0 && static_cast<float>(ratio) < 1.0f) return absl::OkStatus();
  return Invalid(name, ratio, "in [0, 1)");
}

LayerDims StackConfig::Dims(int64_t batch, int64_t seq, int64_t packed_tokens) const {
  return LayerDims{.batch = batch,
                   .seq = seq,
                   .hidden = hidden_size,
                   .heads = heads,
                   .intermediate = intermediate_size,
                   .dtype = dtype,
                   .packed_tokens = packed_tokens};
}

absl::StatusOr<StackConfig> Resolve(StackConfig config, int device_ordinal) {
  using C = StackConfig;
  LAMINA_RETURN_IF_ERROR(InRange("batch_size", config.batch_size, 1, C::kMaxBatchSize));
  LAMINA_RETURN_IF_ERROR(InRange("max_seq_length", config.max_seq_length, 1, C::kMaxSeqLength));
  LAMINA_RETURN_IF_ERROR(InRange("hidden_size", config.hidden_size, 1, C::kMaxHiddenSize));
  if (config.intermediate_size == -1) config.intermediate_size = 4 * config.hidden_size;
  if (config.intermediate_size < 1 || config.intermediate_size > C::kMaxIntermediateSize)
    return Invalid(
        "intermediate_size", config.intermediate_size,
        absl::StrCat("in [1, ", C::kMaxIntermediateSize, "], or -1 for 4 * hidden_size"));
  LAMINA_RETURN_IF_ERROR(InRange("heads", config.heads, 1, config.hidden_size));
  if (config.hidden_size % config.heads != 0)
    return Invalid("hidden_size", config.hidden_size,
                   absl::StrCat("divisible by heads, which is ", config.heads));
  LAMINA_RETURN_IF_ERROR(InRange("num_hidden_layers", config.num_hidden_layers, 1, C::kMaxLayers));
  LAMINA_RETURN_IF_ERROR(CheckDropoutRatio("attn_dropout_ratio", config.attn_dropout_ratio));
  LAMINA_RETURN_IF_ERROR(CheckDropoutRatio("hidden_dropout_ratio", config.hidden_dropout_ratio));
  constexpr double kFloatMax = std::numeric_limits<float>::max();
  constexpr double kFloatMin = std::numeric_limits<float>::min();
  // An eighth of the range: no draw is further out than 7 deviations, so no weight is infinite.
  if (!(config.initializer_range >= 0.0 && config.initializer_range <= kFloatMax / 8))
    return Invalid("initializer_range", config.initializer_range, "finite and >= 0");
  if (!(config.layer_norm_eps >= kFloatMin && config.layer_norm_eps <= kFloatMax))
    return Invalid("layer_norm_eps", config.layer_norm_eps,
                   absl::StrCat("finite and >= ", kFloatMin, ", the least that fp32 resolves"));
  if (config.local_rank != -1 && config.local_rank != device_ordinal)
    return Invalid("local_rank", config.local_rank,
                   absl::StrCat("-1 or ", device_ordinal, ", the device that this daemon owns"));
  if (config.seed < -1) return Invalid("seed", config.seed, ">= 0, or -1 to have one drawn");
  if (!IsFloat(config.dtype)) return Invalid("dtype", Name(config.dtype), "fp32, bf16 or fp16");
  if (config.fp16 && config.dtype == DType::kBF16)
    return absl::InvalidArgumentError(
        "config: fp16 is true and dtype is bf16; give one of the two (fp16 means dtype = fp16)");
  if (config.fp16) config.dtype = DType::kF16;
  config.fp16 = config.dtype == DType::kF16;
  if (config.gelu != GeluKind::kErf && config.gelu != GeluKind::kTanh)
    return Invalid("gelu", static_cast<int>(config.gelu), "erf (1) or tanh (2)");
  LAMINA_RETURN_IF_ERROR(InRange("max_contexts", config.max_contexts, 1, 1024));
  LAMINA_RETURN_IF_ERROR(CheckLossScaling(config));

  if (config.seed == -1) {
    std::random_device entropy;
    const uint64_t bits = (uint64_t{entropy()} << 32) | entropy();
    config.seed = static_cast<int64_t>(bits >> 1);
  }
  return config;
}

std::string ToJson(const StackConfig& config) {
  Json json = Json::object();
  for (const Field& field : kFields) {
    std::visit(
        [&](auto member) {
          const auto& value = config.*member;
          using T = std::decay_t<decltype(value)>;
          if constexpr (std::is_same_v<T, DType>) {
            json[field.name] = Name(value);
          } else if constexpr (std::is_same_v<T, GeluKind>) {
            json[field.name] = GeluName(value);
          } else {
            json[field.name] = value;
          }
        },
        field.member);
  }
  return json.dump();
}

absl::StatusOr<StackConfig> StackConfigFromJson(const std::string& json) {
  const Json parsed = Json::parse(json, nullptr, /*allow_exceptions=*/false);
  if (parsed.is_discarded()) return absl::InvalidArgumentError("config: not valid JSON");
  if (!parsed.is_object()) return absl::InvalidArgumentError("config: must be a JSON object");
  StackConfig config;
  for (const auto& [key, value] : parsed.items()) {
    const Field* known = nullptr;
    for (const Field& field : kFields)
      if (key == field.name) known = &field;
    if (known == nullptr)
      return absl::InvalidArgumentError(absl::StrCat("config: unknown field \"", key, "\""));
    LAMINA_RETURN_IF_ERROR(Read(*known, value, config));
  }
  return config;
}

}  // namespace lamina
