// A StackConfig as JSON: the config's field names as they are, dtype "fp32", "bf16" or "fp16", gelu
// "erf" or "tanh".
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "lamina/client/types.h"
#include "nlohmann/json_fwd.hpp"

namespace lamina::cli {

nlohmann::json ToJson(const client::StackConfig& config);

// Missing keys take their defaults, null is the same as missing. INVALID_ARGUMENT: not an object,
// an unknown key (lists the known ones), a value of the wrong type.
absl::StatusOr<client::StackConfig> ConfigFromJson(const nlohmann::json& json);

// Reads a file's object. INVALID_ARGUMENT: cannot be read, or is no JSON object (says where).
absl::StatusOr<nlohmann::json> ReadConfigFile(const std::string& path);

}  // namespace lamina::cli
