// Sizes as people write them.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace lamina::cli {

// "32GiB", "1.5 GiB", "80GB", "512MiB", "1024": a number and KiB, MiB, GiB, TiB (powers of 1024),
// KB, MB, GB, TB (powers of 1000) or B, upper or lower case; B where there is none. Rounds down.
// INVALID_ARGUMENT: anything else, less than a byte, or 2^63 and above.
absl::StatusOr<uint64_t> ParseByteSize(const std::string& text);

}  // namespace lamina::cli
