// Reads a whole file that was named on the command line.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace lamina::cli {

// INVALID_ARGUMENT with the path and the system's reason, or where it has more than `most` bytes.
absl::StatusOr<std::string> ReadFile(const std::string& path, uint64_t most = UINT64_MAX);

}  // namespace lamina::cli
