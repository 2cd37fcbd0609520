#include "cli/config_flags.h"

#include <cstdint>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "cli/config_json.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {

// Flags are collected as JSON: a flag and a file's key go through the same checks.
struct ConfigFlags::Given {
  std::string file;
  nlohmann::json fields = nlohmann::json::object();
};

ConfigFlags::ConfigFlags() : given_(std::make_unique<Given>()) {}
ConfigFlags::~ConfigFlags() = default;

void ConfigFlags::AddTo(CLI::App* command) {
  constexpr const char* kGroup = "Stack config (each overrides --config)";
  nlohmann::json* fields = &given_->fields;
  const auto field_of = [](std::string flag) {
    for (char& c : flag) c = c == '-' ? '_' : c;
    return flag;
  };
  const auto value = [&]<class T>(T, const std::string& name, const std::string& type,
                                  const std::string& help) {
    const std::string field = field_of(name);
    command
        ->add_option_function<T>(
            "--" + name, [fields, field](const T& given) { (*fields)[field] = given; }, help)
        ->group(kGroup)
        ->type_name(type);
  };
  const auto integer = [&](const std::string& name, const std::string& help) {
    value(int64_t{}, name, "N", help);
  };
  const auto number = [&](const std::string& name, const std::string& help) {
    value(double{}, name, "X", help);
  };
  const auto flag = [&](const std::string& name, const std::string& opposite,
                        const std::string& help) {
    const std::string field = field_of(name);
    const std::string names = opposite.empty() ? "--" + name : "--" + name + ",!--" + opposite;
    command
        ->add_flag_function(
            names, [fields, field](int64_t count) { (*fields)[field] = count > 0; }, help)
        ->group(kGroup);
  };

  command->add_option("--config", given_->file, "JSON file with the fields below, '_' for '-'")
      ->type_name("FILE");
  integer("batch-size", "Largest B of a call");
  integer("max-seq-length", "Largest S of a call");
  integer("hidden-size", "H, divisible by heads");
  integer("intermediate-size", "I [4 * hidden-size]");
  integer("heads", "A, attention heads");
  integer("num-hidden-layers", "L, layers");
  number("attn-dropout-ratio", "Dropout on the attention probabilities, [0, 1) [0]");
  number("hidden-dropout-ratio", "Dropout on the two sub-layer outputs, [0, 1) [0]");
  number("initializer-range", "Standard deviation of the initial weights [0.02]");
  number("layer-norm-eps", "Added to the variance [1e-12]");
  integer("local-rank", "Device ordinal that the stack must be on [the daemon's]");
  integer("seed", "Of weights and dropout [the daemon draws one]");
  value(std::string(), "dtype", "fp32|bf16|fp16", "Type of weights and activations [fp32]");
  flag("fp16", "", "The same as --dtype fp16");
  value(std::string(), "gelu", "erf|tanh", "The GELU's form [erf]");
  flag("pre-layer-norm", "post-layer-norm",
       "Norm before each sub-layer (the default) or after the residual sum");
  flag("adjust-init-range", "no-adjust-init-range",
       "Divide the output matrices' deviation by sqrt(2L) [on]");
  flag("training", "no-training", "Keep gradients, optimizer state and contexts [on]");
  integer("max-contexts", "Contexts at full batch-size x max-seq-length that fit [2]");
  flag("normalize-invertible", "", "Drop the norms' inputs, recover them in Backward");
  flag("gelu-checkpoint", "", "Drop the GELU output, recompute it in Backward");
  flag("attn-dropout-checkpoint", "",
       "Drop the attention dropout's output, which nothing stores anyway");
  flag("activation-checkpointing", "", "Keep each layer's input alone, recompute it in Backward");
  flag("stochastic-mode", "", "Allow unordered reductions");
  flag("causal", "", "Let token s attend to tokens 0..s alone");
  flag("dynamic-loss-scale", "", "Let the daemon find the loss scale");
  number("initial-loss-scale", "Where it begins, a power of two [65536]");
  integer("loss-scale-growth-interval", "Clean steps before it grows [1000]");
  number("loss-scale-growth-factor", "What it grows by, > 1 [2]");
  number("loss-scale-backoff-factor", "What overflows multiply it by, in (0, 1) [0.5]");
  integer("loss-scale-hysteresis", "Overflows until it backs off [2]");
  number("min-loss-scale", "Where backing off ends, > 0 [1]");
}

absl::StatusOr<client::StackConfig> ConfigFlags::Resolve() const {
  if (given_->file.empty() && given_->fields.empty()) {
    return absl::InvalidArgumentError(
        "no config is given: --config FILE or flags as --hidden-size");
  }
  return ResolveOver(nlohmann::json::object());
}

absl::StatusOr<client::StackConfig> ConfigFlags::ResolveOver(nlohmann::json fields) const {
  if (!given_->file.empty()) {
    const absl::StatusOr<nlohmann::json> file = ReadConfigFile(given_->file);
    if (!file.ok()) return file.status();
    fields.update(*file);
  }
  fields.update(given_->fields);
  return ConfigFromJson(fields);
}

}  // namespace lamina::cli
