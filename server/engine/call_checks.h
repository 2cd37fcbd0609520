// The checks of what a call brings, before anything is changed. Messages begin with the field's
// name in the proto and say what it is and what it must be.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/engine/engine.h"

namespace lamina {

// 1..64 of letters, digits, '.', '_', '-', not beginning with '.': so a name is a file's name too.
absl::Status CheckName(absl::string_view field, absl::string_view name);

// Present, of this dtype and shape, aligned to its elements.
absl::Status CheckTensor(absl::string_view field, const CallTensor& tensor, DType dtype,
                         const Shape& shape);

// A tensor that the config's stack takes: [B, S, H], or `packed` [T, H].
absl::Status CheckActivation(absl::string_view field, const CallTensor& tensor,
                             const StackConfig& config, bool packed);

// fp32 [B, 1, 1, S] or [B, S].
absl::Status CheckMask(const CallTensor& mask, int64_t batch, int64_t seq);

// Copies `bytes` of a call's tensor to `to`.
using CopyTensor = absl::FunctionRef<absl::Status(void* to, const CallTensor& from, size_t bytes)>;

// int32 [B]. Has the lengths copied into `copy` first and checks the copy: the client can change
// what is in a region at any time.
absl::Status CopyLengths(const CallTensor& lengths, int64_t batch, int64_t seq, CopyTensor copy_in,
                         std::vector<int32_t>& copy);

// What the cumulative lengths of a packed batch say.
struct PackedSize {
  int64_t sequences = 0;  // n
  int64_t longest = 0;    // the longest one's length
  double sum_of_squared_lengths = 0;
};

// int32 [n + 1]: 0 first, then each 1..max_seq_length above the one before it, `tokens` last.
// Has them copied into `copy` first and checks the copy, as CopyLengths.
absl::StatusOr<PackedSize> CopyCumulativeLengths(const CallTensor& cumulative_lengths,
                                                 int64_t tokens, int64_t max_seq_length,
                                                 CopyTensor copy_in, std::vector<int32_t>& copy);

// Where a result of `bytes` goes: into `target`, which must hold exactly these, or, where it has
// no data, into the response, within the cap.
absl::Status CheckTarget(absl::string_view field, const CallTensor& target, size_t bytes,
                         size_t element_size, size_t inline_cap_bytes);

// Whether the two share a byte; absent ones share none. By the daemon's own addresses: a region is
// mapped once.
bool Overlap(const CallTensor& a, const CallTensor& b);

absl::Status CheckLayers(const LayerRange& layers, const StackConfig& config);

}  // namespace lamina
