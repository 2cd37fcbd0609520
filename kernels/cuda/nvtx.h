// Ranges that Nsight Systems and its kin show, in a domain "lamina".
#pragma once

#include <cstdint>

namespace lamina::cuda {

// On the calling thread. `index` >= 0 is the range's payload.
void BeginNvtxRange(const char* name, int64_t index);
void EndNvtxRange();

}  // namespace lamina::cuda
