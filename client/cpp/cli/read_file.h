// Reads a whole file that was named on the command line.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace lamina::cli {

// INVALID_ARGUMENT with the path and the system's reason.
absl::StatusOr<std::string> ReadFile(const std::string& path);

}  // namespace lamina::cli
