#include "server/engine/call_checks.h"

#include <algorithm>
#include <functional>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "server/engine/status_macros.h"

namespace lamina {
namespace {

constexpr size_t kMaxNameLength = 64;

absl::Status Invalid(absl::string_view field, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(field, what));
}

absl::Status CheckAligned(absl::string_view field, const void* data, size_t element_size) {
  if (reinterpret_cast<uintptr_t>(data) % element_size == 0) return absl::OkStatus();
  return Invalid(field, absl::StrCat(": begins at an address that is no multiple of ", element_size,
                                     ", the size of an element"));
}

}  // namespace

absl::Status CheckName(absl::string_view field, absl::string_view name) {
  bool good = !name.empty() && name.size() <= kMaxNameLength && name[0] != '.';
  for (const char c : name)
    good = good &&
           (absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-');
  if (good) return absl::OkStatus();
  // The name itself is not repeated beyond its length: it may hold anything.
  return Invalid(field, absl::StrCat(": has ", name.size(),
                                     " bytes; a name is 1 to 64 of letters, digits, '.', '_' and "
                                     "'-', and does not begin with '.'"));
}

absl::Status CheckTensor(absl::string_view field, const CallTensor& tensor, DType dtype,
                         const Shape& shape) {
  if (!tensor) return Invalid(field, ": is missing");
  if (tensor.dtype != dtype)
    return Invalid(field,
                   absl::StrCat(".dtype: is ", Name(tensor.dtype), "; it must be ", Name(dtype)));
  if (tensor.shape != shape)
    return Invalid(field, absl::StrCat(".shape: is ", tensor.shape.ToString(), "; it must be ",
                                       shape.ToString()));
  return CheckAligned(field, tensor.data, SizeOf(dtype));
}

absl::Status CheckActivation(absl::string_view field, const CallTensor& tensor,
                             const StackConfig& config, bool packed) {
  if (!tensor) return Invalid(field, ": is missing");
  if (tensor.dtype != config.dtype)
    return Invalid(field, absl::StrCat(".dtype: is ", Name(tensor.dtype), "; the stack's is ",
                                       Name(config.dtype)));
  const Shape& s = tensor.shape;
  if (packed) {
    const int64_t most = config.batch_size * config.max_seq_length;
    if (s.rank() != 2 || s[0] < 1 || s[0] > most || s[1] != config.hidden_size)
      return Invalid(field, absl::StrCat(".shape: is ", s.ToString(), "; with cumulative_lengths ",
                                         "it must be [T, ", config.hidden_size, "] with T in 1..",
                                         most, ", batch_size * max_seq_length"));
    return CheckAligned(field, tensor.data, SizeOf(config.dtype));
  }
  if (s.rank() != 3 || s[0] < 1 || s[0] > config.batch_size || s[1] < 1 ||
      s[1] > config.max_seq_length || s[2] != config.hidden_size)
    return Invalid(field, absl::StrCat(".shape: is ", s.ToString(), "; it must be [B, S, ",
                                       config.hidden_size, "] with B in 1..", config.batch_size,
                                       " and S in 1..", config.max_seq_length));
  return CheckAligned(field, tensor.data, SizeOf(config.dtype));
}

absl::Status CheckMask(const CallTensor& mask, int64_t batch, int64_t seq) {
  if (mask.dtype != DType::kF32)
    return Invalid("mask", absl::StrCat(".dtype: is ", Name(mask.dtype), "; it must be fp32"));
  const Shape two{batch, seq};
  const Shape four{batch, 1, 1, seq};
  if (mask.shape != two && mask.shape != four)
    return Invalid("mask", absl::StrCat(".shape: is ", mask.shape.ToString(), "; it must be ",
                                        four.ToString(), " or ", two.ToString()));
  return CheckAligned("mask", mask.data, sizeof(float));
}

absl::Status CopyLengths(const CallTensor& lengths, int64_t batch, int64_t seq, CopyTensor copy_in,
                         std::vector<int32_t>& copy) {
  ENGINE_RETURN_IF_ERROR(CheckTensor("lengths", lengths, DType::kI32, Shape{batch}));
  copy.resize(static_cast<size_t>(batch));
  ENGINE_RETURN_IF_ERROR(copy_in(copy.data(), lengths, copy.size() * sizeof(int32_t)));
  for (size_t b = 0; b < copy.size(); ++b)
    if (copy[b] < 1 || copy[b] > seq)
      return Invalid("lengths",
                     absl::StrCat("[", b, "]: is ", copy[b], "; it must be in 1..", seq));
  return absl::OkStatus();
}

absl::StatusOr<PackedSize> CopyCumulativeLengths(const CallTensor& cumulative_lengths,
                                                 int64_t tokens, int64_t max_seq_length,
                                                 CopyTensor copy_in, std::vector<int32_t>& copy) {
  constexpr absl::string_view kField = "cumulative_lengths";
  const CallTensor& given = cumulative_lengths;
  if (given.dtype != DType::kI32)
    return Invalid(kField, absl::StrCat(".dtype: is ", Name(given.dtype), "; it must be int32"));
  // No sequence is empty, so there are at most as many as tokens.
  if (given.shape.rank() != 1 || given.shape[0] < 2 || given.shape[0] > tokens + 1)
    return Invalid(kField, absl::StrCat(".shape: is ", given.shape.ToString(),
                                        "; it must be [n + 1] with n, the number of sequences, in "
                                        "1..",
                                        tokens, ", the input's tokens"));
  ENGINE_RETURN_IF_ERROR(CheckAligned(kField, given.data, sizeof(int32_t)));
  copy.resize(static_cast<size_t>(given.shape[0]));
  ENGINE_RETURN_IF_ERROR(copy_in(copy.data(), given, copy.size() * sizeof(int32_t)));

  if (copy[0] != 0) return Invalid(kField, absl::StrCat("[0]: is ", copy[0], "; it must be 0"));
  PackedSize size{.sequences = given.shape[0] - 1};
  for (size_t i = 1; i < copy.size(); ++i) {
    const int64_t before = copy[i - 1];
    const int64_t length = copy[i] - before;
    if (length < 1 || length > max_seq_length)
      return Invalid(kField,
                     absl::StrCat("[", i, "]: is ", copy[i], "; it must be in ", before + 1, "..",
                                  before + max_seq_length, ", a sequence's length of 1..",
                                  max_seq_length, " above the one before it"));
    size.longest = std::max(size.longest, length);
    size.sum_of_squared_lengths += static_cast<double>(length) * static_cast<double>(length);
  }
  if (copy.back() != tokens)
    return Invalid(kField, absl::StrCat("[", copy.size() - 1, "]: is ", copy.back(),
                                        "; the last must be ", tokens, ", the input's tokens"));
  return size;
}

absl::Status CheckTarget(absl::string_view field, const CallTensor& target, size_t bytes,
                         size_t element_size, size_t inline_cap_bytes) {
  if (!target) {
    if (bytes <= inline_cap_bytes) return absl::OkStatus();
    return Invalid(
        field, absl::StrCat(".inline: the result has ", bytes, " bytes, above the inline cap of ",
                            inline_cap_bytes, "; give a slice of a region"));
  }
  if (target.bytes() != bytes)
    return Invalid(field, absl::StrCat(".slice.size_bytes: is ", target.bytes(),
                                       "; the result has ", bytes, " bytes"));
  return CheckAligned(field, target.data, element_size);
}

bool Overlap(const CallTensor& a, const CallTensor& b) {
  if (!a || !b) return false;
  const auto* a0 = static_cast<const char*>(a.data);
  const auto* b0 = static_cast<const char*>(b.data);
  return std::less<>()(a0, b0 + b.bytes()) && std::less<>()(b0, a0 + a.bytes());
}

absl::Status CheckLayers(const LayerRange& layers, const StackConfig& config) {
  if (layers.begin >= 0 && layers.begin < layers.end && layers.end <= config.num_hidden_layers)
    return absl::OkStatus();
  return Invalid("layers", absl::StrCat(": is [", layers.begin, ", ", layers.end,
                                        "); it must be a range of one layer or more within [0, ",
                                        config.num_hidden_layers, ")"));
}

}  // namespace lamina
