#include "cli/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

using Json = nlohmann::json;

constexpr size_t kLengthBytes = 8;
// The reference library pads a header it writes so that elements begin aligned.
constexpr size_t kAlignment = 8;
constexpr size_t kMaxRank = 64;  // NumPy's own bound
constexpr size_t kMaxQuotedBytes = 120;
constexpr const char* kMetadataKey = "__metadata__";

struct ElementType {
  absl::string_view name;
  uint64_t bytes;
};
constexpr ElementType kElementTypes[] = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"F8_E8M0", 1},
    {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},     {"U32", 4},
    {"F32", 4},  {"F64", 8}, {"C64", 8}, {"I64", 8},     {"U64", 8}};

// Takes the header as the parser meets it: nothing is kept that a header may not have, so a hostile
// one costs no more than its own size.
class HeaderHandler : public nlohmann::json_sax<Json> {
 public:
  HeaderHandler(SafetensorsHeader* header, uint64_t data_bytes)
      : header_(header), data_bytes_(data_bytes) {}

  const std::string& error() const { return error_; }

  bool start_object(size_t) override {
    if (depth_ == kFile && !name_) return Wrong("an object without a name");
    if (depth_ == kFields || depth_ == kArray) return Wrong("an object");
    if (depth_ == kFile) {
      tensor_ = {};
      offsets_.clear();
      seen_dtype_ = seen_shape_ = seen_offsets_ = false;
    }
    ++depth_;
    return true;
  }
  bool end_object() override {
    --depth_;
    if (depth_ != kFile) return true;
    const bool good = in_metadata_ || TakeTensor();
    name_.reset();
    in_metadata_ = false;
    return good;
  }
  bool key(std::string& key) override {
    if (depth_ == kFile) return TakeName(key);
    field_ = key;
    if (in_metadata_) {
      return header_->metadata.contains(key) ? Fail("its metadata has ", Quoted(key), " twice")
                                             : true;
    }
    bool* seen = key == "dtype"          ? &seen_dtype_
                 : key == "shape"        ? &seen_shape_
                 : key == "data_offsets" ? &seen_offsets_
                                         : nullptr;
    if (seen == nullptr) {
      return Fail("tensor ", Quoted(*name_), " has a field ", Quoted(key),
                  "; its fields are dtype, shape and data_offsets");
    }
    if (*seen) return Fail("tensor ", Quoted(*name_), " has '", key, "' twice");
    *seen = true;
    return true;
  }
  bool start_array(size_t) override {
    if (depth_ != kFields || in_metadata_ || field_ == "dtype") return Wrong("an array");
    ++depth_;
    return true;
  }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool number_unsigned(uint64_t value) override {
    if (depth_ != kArray) return Wrong("a number");
    if (field_ == "data_offsets") {
      if (offsets_.size() == 2) return Wrong("more than two numbers");
      offsets_.push_back(value);
      return true;
    }
    if (value > uint64_t{std::numeric_limits<int64_t>::max()}) {
      return Fail("the shape of tensor ", Quoted(*name_), " overflows");
    }
    if (tensor_.shape.size() == kMaxRank) {
      return Fail("tensor ", Quoted(*name_), " has more than ", kMaxRank, " axes");
    }
    tensor_.shape.push_back(static_cast<int64_t>(value));
    return true;
  }
  bool string(std::string& value) override {
    if (depth_ == kFields && in_metadata_) {
      header_->metadata.emplace(field_, value);
      return true;
    }
    if (depth_ != kFields || field_ != "dtype") return Wrong("a string");
    for (const ElementType& type : kElementTypes) {
      if (type.name != value) continue;
      tensor_.dtype = type.name;
      element_bytes_ = type.bytes;
      return true;
    }
    std::string known;
    for (const ElementType& type : kElementTypes) absl::StrAppend(&known, " ", type.name);
    return Fail("tensor ", Quoted(*name_), " has elements of type ", Quoted(value), "; known are",
                known);
  }
  bool null() override { return Wrong("null"); }
  bool boolean(bool) override { return Wrong("true or false"); }
  bool number_integer(int64_t) override { return Wrong("a negative number"); }
  bool number_float(double, const std::string&) override {
    return Wrong("a number that is no integer of 64 bits");
  }
  bool binary(Json::binary_t&) override { return Wrong("binary"); }
  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    const std::string what = error.what();
    return Fail("its header is not JSON at byte ", position, ": ", what.substr(0, kMaxQuotedBytes));
  }

 private:
  enum Depth { kOutside = 0, kFile = 1, kFields = 2, kArray = 3 };

  template <class... Parts>
  bool Fail(const Parts&... parts) {
    error_ = absl::StrCat(parts...);
    return false;
  }
  bool Wrong(const char* what) {
    if (depth_ == kOutside) return Fail("its header is ", what, "; expected an object");
    if (in_metadata_) {
      return depth_ == kFile
                 ? Fail("its metadata is ", what, "; expected an object")
                 : Fail("its metadata ", Quoted(field_), " is ", what, "; expected a string");
    }
    if (depth_ == kFile) {
      return Fail("tensor ", Quoted(*name_), " is ", what, "; expected an object");
    }
    return Fail("'", field_, "' of tensor ", Quoted(*name_), " is or holds ", what, "; expected ",
                field_ == "dtype"   ? "a string"
                : field_ == "shape" ? "an array of integers >= 0"
                                    : "two integers >= 0");
  }
  bool TakeName(const std::string& name) {
    in_metadata_ = name == kMetadataKey;
    if (in_metadata_ ? std::exchange(seen_metadata_, true) : header_->tensors.contains(name)) {
      return Fail("it has ", Quoted(name), " twice");
    }
    name_ = name;
    return true;
  }
  bool TakeTensor() {
    const std::string name = Quoted(*name_);
    if (!seen_dtype_ || !seen_shape_ || !seen_offsets_ || offsets_.size() != 2) {
      return Fail("tensor ", name, " lacks ",
                  !seen_dtype_   ? "dtype"
                  : !seen_shape_ ? "shape"
                                 : "two data_offsets");
    }
    tensor_.begin = offsets_[0];
    tensor_.end = offsets_[1];
    if (tensor_.begin > tensor_.end || tensor_.end > data_bytes_) {
      return Fail("tensor ", name, " is at bytes [", tensor_.begin, ", ", tensor_.end,
                  ") of elements; the file has ", data_bytes_);
    }
    uint64_t expected = element_bytes_;
    for (const int64_t extent : tensor_.shape) {
      if (__builtin_mul_overflow(expected, static_cast<uint64_t>(extent), &expected)) {
        return Fail("the shape of tensor ", name, " overflows");
      }
    }
    if (tensor_.bytes() != expected) {
      return Fail("tensor ", name, " has ", tensor_.bytes(), " bytes; ", tensor_.dtype, " ",
                  client::ToString(tensor_.shape), " needs ", expected);
    }
    header_->tensors.emplace(*name_, std::move(tensor_));
    return true;
  }

  SafetensorsHeader* header_;
  const uint64_t data_bytes_;
  int depth_ = kOutside;
  std::optional<std::string> name_;  // of the tensor, or kMetadataKey
  bool in_metadata_ = false, seen_metadata_ = false;
  std::string field_;
  SafetensorsTensor tensor_;
  std::vector<uint64_t> offsets_;
  uint64_t element_bytes_ = 0;
  bool seen_dtype_ = false, seen_shape_ = false, seen_offsets_ = false;
  std::string error_;
};

// The elements must be covered once: no byte that two tensors share, none that nobody reads.
absl::Status CheckCovered(const SafetensorsHeader& header, uint64_t data_bytes) {
  using Named = std::pair<const std::string, SafetensorsTensor>;
  std::vector<const Named*> order;
  order.reserve(header.tensors.size());
  for (const Named& named : header.tensors) order.push_back(&named);
  std::sort(order.begin(), order.end(), [](const Named* a, const Named* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  uint64_t covered = 0;
  for (const Named* named : order) {
    const auto& [name, tensor] = *named;
    if (tensor.begin != covered) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", Quoted(name), " begins at byte ", tensor.begin,
                       tensor.begin < covered ? ", within the one before it, which ends at "
                                              : ", which leaves a gap after byte ",
                       covered));
    }
    covered = tensor.end;
  }
  if (covered != data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("its tensors end at byte ", covered, " of ",
                                                   data_bytes, " bytes of elements"));
  }
  return absl::OkStatus();
}

}  // namespace

std::string Quoted(absl::string_view name) {
  const bool cut = name.size() > kMaxQuotedBytes;
  return absl::StrCat("'", absl::Utf8SafeCHexEscape(name.substr(0, kMaxQuotedBytes)),
                      cut ? "...'" : "'");
}

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::string_view json,
                                                         uint64_t data_bytes) {
  if (json.empty() || json.front() != '{') {
    return absl::InvalidArgumentError("its header does not begin with '{'");
  }
  SafetensorsHeader header;
  HeaderHandler handler(&header, data_bytes);
  if (!Json::sax_parse(json.begin(), json.end(), &handler)) {
    return absl::InvalidArgumentError(handler.error());
  }
  if (absl::Status status = CheckCovered(header, data_bytes); !status.ok()) return status;
  return header;
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  const auto bad = [&path](const auto&... what) {
    return absl::InvalidArgumentError(absl::StrCat("'", path, "': ", what...));
  };
  SafetensorsFile file;
  file.path_ = path;
  // Not blocking: opening a FIFO would wait for somebody to write to it.
  file.fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file.fd_ < 0) return bad(std::strerror(errno));
  struct stat status {};
  if (fstat(file.fd_, &status) != 0) return bad(std::strerror(errno));
  if (!S_ISREG(status.st_mode)) return bad("is not a regular file");
  file.size_ = static_cast<uint64_t>(status.st_size);
  if (file.size_ < kLengthBytes) {
    return bad("has ", file.size_, " bytes; a .safetensors file has at least 8");
  }

  std::array<std::byte, kLengthBytes> length{};
  if (absl::Status read = file.ReadAt(0, length); !read.ok()) return read;
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) {
    header_bytes |= static_cast<uint64_t>(length[i]) << (8 * i);
  }
  if (header_bytes > kMaxSafetensorsHeader) {
    return bad("its header would have ", header_bytes, " bytes; at most ", kMaxSafetensorsHeader,
               " are allowed");
  }
  if (header_bytes > file.size_ - kLengthBytes) {
    return bad("ends within its header: that has ", header_bytes, " bytes, the file ", file.size_);
  }
  file.data_offset_ = kLengthBytes + header_bytes;
  std::string json(header_bytes, '\0');
  if (absl::Status read = file.ReadAt(kLengthBytes, std::as_writable_bytes(std::span(json)));
      !read.ok()) {
    return read;
  }
  absl::StatusOr<SafetensorsHeader> header =
      ParseSafetensorsHeader(json, file.size_ - file.data_offset_);
  if (!header.ok()) return bad(header.status().message());
  file.header_ = *std::move(header);
  return file;
}

SafetensorsFile::SafetensorsFile(SafetensorsFile&& other) noexcept { *this = std::move(other); }

SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(header_, other.header_);
  std::swap(fd_, other.fd_);
  std::swap(size_, other.size_);
  std::swap(data_offset_, other.data_offset_);
  return *this;
}

SafetensorsFile::~SafetensorsFile() {
  if (fd_ >= 0) close(fd_);
}

absl::Status SafetensorsFile::ReadAt(uint64_t offset, std::span<std::byte> to) const {
  while (!to.empty()) {
    const ssize_t n = pread(fd_, to.data(), to.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      return absl::InternalError(absl::StrCat("reading '", path_, "': ", std::strerror(errno)));
    }
    if (n == 0) return CutShort(offset);
    offset += static_cast<uint64_t>(n);
    to = to.subspan(static_cast<size_t>(n));
  }
  return absl::OkStatus();
}

// There is no byte at `offset` any more.
absl::Status SafetensorsFile::CutShort(uint64_t offset) const {
  struct stat status {};
  // Unless somebody has made it longer again.
  const uint64_t end =
      fstat(fd_, &status) == 0 ? std::min(offset, static_cast<uint64_t>(status.st_size)) : offset;
  std::string lost = absl::StrCat("it had ", size_, " bytes");
  for (const auto& [name, tensor] : header_.tensors) {
    const uint64_t begins = data_offset_ + tensor.begin, ends = data_offset_ + tensor.end;
    if (offset < begins || offset >= ends) continue;
    lost = absl::StrCat("tensor ", Quoted(name), " is at bytes [", begins, ", ", ends, ")");
  }
  return absl::AbortedError(absl::StrCat("'", path_, "': was cut short while it was read: ", lost,
                                         ", and the file ends at byte ", end, " now"));
}

const char* SafetensorsName(client::DType dtype) {
  switch (dtype) {
    case client::DType::kFloat32:
      return "F32";
    case client::DType::kBFloat16:
      return "BF16";
    case client::DType::kFloat16:
      return "F16";
    case client::DType::kInt32:
      return "I32";
  }
  return "invalid";
}

std::string SafetensorsStart(const std::vector<NewSafetensorsTensor>& tensors,
                             const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[kMetadataKey] = metadata;
  uint64_t offset = 0;
  for (const NewSafetensorsTensor& tensor : tensors) {
    uint64_t bytes = client::SizeOf(tensor.dtype);
    for (const int64_t extent : tensor.shape) bytes *= static_cast<uint64_t>(extent);
    // push_back: looking a key up in an ordered object walks through all of it.
    header.push_back({tensor.name,
                      {{"dtype", SafetensorsName(tensor.dtype)},
                       {"shape", tensor.shape},
                       {"data_offsets", {offset, offset + bytes}}}});
    offset += bytes;
  }
  std::string json = header.dump();
  json.append((kAlignment - json.size() % kAlignment) % kAlignment, ' ');
  std::string start;
  for (size_t i = 0; i < kLengthBytes; ++i) {
    start += static_cast<char>((json.size() >> (8 * i)) & 0xff);
  }
  return start + json;
}

}  // namespace lamina::cli
