// Reads and writes .safetensors files (https://github.com/huggingface/safetensors): the header's
// length as 8 bytes little-endian, the header as JSON, then the tensors' elements without gaps.
//
// Files are untrusted: a header is read in memory that is a small multiple of its own size, which
// the format bounds, and every offset is checked before anything is read through it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "lamina/client/types.h"

namespace lamina::cli {

inline constexpr uint64_t kMaxSafetensorsHeader = 100'000'000;  // bytes; the format's own bound

struct SafetensorsTensor {
  absl::string_view dtype;  // "F32", of the format's names; lives for ever
  client::Shape shape;      // empty: a scalar; an extent may be 0
  uint64_t begin = 0;       // bytes from the elements' start in the file
  uint64_t end = 0;         // exclusive
  uint64_t bytes() const { return end - begin; }
};

struct SafetensorsHeader {
  std::map<std::string, SafetensorsTensor, std::less<>> tensors;  // by name
  std::map<std::string, std::string> metadata;                    // "__metadata__"
};

// `data_bytes`: what follows the header in the file. INVALID_ARGUMENT: no JSON object of tensors,
// deeper than one, a key given twice, an element type that the format lacks; a tensor whose
// offsets, shape and element type disagree or overflow; tensors that overlap, leave a gap or end
// elsewhere than the file does. The message does not name the file.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::string_view json,
                                                         uint64_t data_bytes);

// An open file. Nothing of it is mapped: who cuts it short while it is read ends the reading and
// not the process. A file that takes its name meanwhile is not looked at.
class SafetensorsFile {
 public:
  // INVALID_ARGUMENT, naming the file: it cannot be opened, or is not what the format says. Else as
  // ReadAt.
  static absl::StatusOr<SafetensorsFile> Open(const std::string& path);
  SafetensorsFile(SafetensorsFile&& other) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&& other) noexcept;
  ~SafetensorsFile();

  const std::string& path() const { return path_; }
  const SafetensorsHeader& header() const { return header_; }
  uint64_t size() const { return size_; }                // bytes of the whole file, when opened
  uint64_t data_offset() const { return data_offset_; }  // where the elements begin in it

  // Fills `to` with the file's bytes from `offset`, which lie within the size. ABORTED, naming the
  // file and the tensor: it has become shorter than that. INTERNAL: the system's reason.
  absl::Status ReadAt(uint64_t offset, std::span<std::byte> to) const;

 private:
  SafetensorsFile() = default;
  absl::Status CutShort(uint64_t offset) const;
  std::string path_;
  SafetensorsHeader header_;
  int fd_ = -1;
  uint64_t size_ = 0;
  uint64_t data_offset_ = 0;
};

// A tensor of a file that is to be written.
struct NewSafetensorsTensor {
  std::string name;
  client::DType dtype = client::DType::kFloat32;
  client::Shape shape;
};

// What comes before the elements, padded to a multiple of 8; the elements follow in this order.
std::string SafetensorsStart(const std::vector<NewSafetensorsTensor>& tensors,
                             const std::map<std::string, std::string>& metadata);

// The format's name: "F32", "BF16", "F16" or "I32".
const char* SafetensorsName(client::DType dtype);

// A name out of a file for a message: escaped, and cut where it is long.
std::string Quoted(absl::string_view name);

}  // namespace lamina::cli
