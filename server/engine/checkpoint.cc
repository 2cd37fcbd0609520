#include "server/engine/checkpoint.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "nlohmann/json.hpp"
#include "server/engine/status_macros.h"

namespace lamina {
namespace {

using Json = nlohmann::json;

constexpr char kFormat[] = "1";
constexpr char kDigestKey[] = "lamina.sha256";
constexpr size_t kDigestDigits = 64;
constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the safetensors library's own bound
constexpr size_t kReadChunk = size_t{1} << 20;

constexpr char kMasterPrefix[] = "master.";
constexpr char kMoment1Prefix[] = "exp_avg.";
constexpr char kMoment2Prefix[] = "exp_avg_sq.";
constexpr char kGradientPrefix[] = "gradient.";

const char* SafetensorsName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kBF16:
      return "BF16";
    case DType::kF16:
      return "F16";
    case DType::kI32:
      return "I32";
    case DType::kU8:
      return "U8";
  }
  return "invalid";
}

// The part that a tensor without prefix holds: what the others follow from.
ParameterPart WeightsPart(DType dtype) {
  return dtype == DType::kF32 ? ParameterPart::kMaster : ParameterPart::kWeights;
}

absl::Status FileError(const std::string& what, int error) {
  const std::string text = absl::StrCat("checkpoint: ", what, ": ", std::strerror(error));
  if (error == ENOSPC || error == EDQUOT || error == EFBIG)
    return absl::ResourceExhaustedError(text);
  return absl::InternalError(text);
}

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new()) {
    good_ = context_ != nullptr && EVP_DigestInit_ex(context_, EVP_sha256(), nullptr) == 1;
  }
  ~Sha256() { EVP_MD_CTX_free(context_); }
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void Add(const void* data, size_t bytes) {
    good_ = good_ && EVP_DigestUpdate(context_, data, bytes) == 1;
  }
  // 64 hexadecimal digits.
  absl::StatusOr<std::string> Finish() {
    std::array<unsigned char, 32> digest{};
    unsigned int length = 0;
    if (!good_ || EVP_DigestFinal_ex(context_, digest.data(), &length) != 1 ||
        length != digest.size())
      return absl::InternalError("checkpoint: SHA-256 failed");
    return absl::BytesToHexString(
        absl::string_view(reinterpret_cast<const char*>(digest.data()), digest.size()));
  }

 private:
  EVP_MD_CTX* context_;
  bool good_ = false;
};

std::array<unsigned char, kLengthBytes> LittleEndian(uint64_t value) {
  std::array<unsigned char, kLengthBytes> bytes{};
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<unsigned char>(value >> (8 * i));
  return bytes;
}

absl::Status WriteAt(int fd, uint64_t offset, const void* data, size_t bytes) {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = pwrite(fd, from, bytes, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return FileError("write", n == 0 ? ENOSPC : errno);
    from += n;
    offset += static_cast<uint64_t>(n);
    bytes -= static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

// One tensor of a checkpoint to be written.
struct Part {
  const ParameterInfo* parameter;
  ParameterPart part;
  std::string name;
  DType dtype;
  uint64_t bytes;
};

absl::StatusOr<bool> GradientsAreZero(Stack& stack, std::vector<char>& buffer) {
  for (const ParameterInfo& p : stack.parameters()) {
    const size_t bytes = static_cast<size_t>(p.shape.elements()) * sizeof(float);
    buffer.resize(std::max(buffer.size(), bytes));
    ENGINE_RETURN_IF_ERROR(
        stack.ReadParameter(p.name, ParameterPart::kGradient, buffer.data(), bytes));
    if (std::any_of(buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(bytes),
                    [](char c) { return c != 0; }))
      return false;
  }
  return true;
}

// fp32 first: the wider elements stay aligned.
absl::StatusOr<std::vector<Part>> PartsOf(Stack& stack, std::vector<char>& buffer) {
  const StackConfig& config = stack.config();
  std::vector<Part> parts;
  const auto add = [&](ParameterPart part, const char* prefix, DType dtype) {
    for (const ParameterInfo& p : stack.parameters())
      parts.push_back({&p, part, absl::StrCat(prefix, p.name), dtype,
                       static_cast<uint64_t>(p.shape.elements()) * SizeOf(dtype)});
  };
  if (config.dtype != DType::kF32) add(ParameterPart::kMaster, kMasterPrefix, DType::kF32);
  if (config.training) {
    add(ParameterPart::kMoment1, kMoment1Prefix, DType::kF32);
    add(ParameterPart::kMoment2, kMoment2Prefix, DType::kF32);
    ENGINE_ASSIGN_OR_RETURN(const bool zero, GradientsAreZero(stack, buffer));
    if (!zero) add(ParameterPart::kGradient, kGradientPrefix, DType::kF32);
  }
  add(WeightsPart(config.dtype), "", config.dtype);
  return parts;
}

std::string HeaderOf(const Stack& stack, const std::vector<Part>& parts) {
  const StackCounters counters = stack.counters();
  Json header = Json::object();
  header["__metadata__"] = {
      {"lamina.format", kFormat},
      {"lamina.version", LAMINA_VERSION},
      {"lamina.created", absl::FormatTime(absl::RFC3339_sec, absl::Now(), absl::UTCTimeZone())},
      {"lamina.config", ToJson(stack.config())},
      {"lamina.optimizer_step", absl::StrCat(counters.optimizer_step)},
      {"lamina.rng_counter", absl::StrCat(counters.rng_counter)},
      {"lamina.skipped_steps", absl::StrCat(counters.skipped_steps)},
      {"lamina.loss_scale", Json(counters.loss_scale).dump()},  // every bit of it
      {"lamina.clean_steps", absl::StrCat(counters.clean_steps)},
      {"lamina.overflows_tolerated", absl::StrCat(counters.overflows_tolerated)},
      {kDigestKey, std::string(kDigestDigits, '0')},
  };
  uint64_t offset = 0;
  for (const Part& part : parts) {
    Json shape = Json::array();
    for (int i = 0; i < part.parameter->shape.rank(); ++i)
      shape.push_back(part.parameter->shape[i]);
    header[part.name] = {{"dtype", SafetensorsName(part.dtype)},
                         {"shape", std::move(shape)},
                         {"data_offsets", {offset, offset + part.bytes}}};
    offset += part.bytes;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  return text;
}

// Where the digest's digits begin in a header; npos unless its key is there exactly once. A quote
// inside a JSON string is escaped, so this finds keys alone.
size_t DigestPosition(const std::string& header) {
  const std::string before = absl::StrCat("\"", kDigestKey, "\":\"");
  const size_t found = header.find(before);
  if (found == std::string::npos || header.find(before, found + 1) != std::string::npos)
    return std::string::npos;
  const size_t begin = found + before.size();
  return begin + kDigestDigits <= header.size() ? begin : std::string::npos;
}

absl::Status Damaged(const std::string& name, absl::string_view what) {
  return absl::DataLossError(absl::StrCat("checkpoint \"", name, "\" is damaged: ", what));
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) absl::StrAppend(&text, i > 0 ? ", " : "", shape[i]);
  return text + "]";
}

bool ParseDType(const std::string& text, DType& dtype) {
  for (const DType d : {DType::kF32, DType::kBF16, DType::kF16, DType::kI32, DType::kU8}) {
    if (text != SafetensorsName(d)) continue;
    dtype = d;
    return true;
  }
  return false;
}

}  // namespace

std::string CheckpointPath(const std::string& folder, const std::string& name) {
  return absl::StrCat(folder, "/", name, ".safetensors");
}

// --- writing ---

CheckpointWriter::~CheckpointWriter() {
  if (!temporary_.empty()) unlink(temporary_.c_str());
  if (fd_ >= 0) close(fd_);  // last: its lock says that the temporary is ours
}

// The temporary's name is fixed, so that a daemon that was killed leaves one file at most, which
// the next save takes over; a lock keeps two daemons from sharing it.
absl::Status CheckpointWriter::OpenTemporary() {
  const std::string temporary = absl::StrCat(path_, ".tmp");
  for (;;) {
    const int fd = open(temporary.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK,
                        S_IRUSR | S_IWUSR | S_IRGRP | S_IROTH);
    if (fd < 0) return FileError(absl::StrCat("open ", temporary), errno);
    struct stat opened {};
    struct stat named {};
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
      const int error = errno;
      close(fd);
      if (error == EWOULDBLOCK)
        return absl::FailedPreconditionError(
            absl::StrCat("checkpoint: another process is writing ", path_));
      return FileError(absl::StrCat("lock ", temporary), error);
    }
    // Between open and lock another daemon may have finished with it: then it is a checkpoint now.
    if (fstat(fd, &opened) == 0 && lstat(temporary.c_str(), &named) == 0 &&
        opened.st_ino == named.st_ino && opened.st_dev == named.st_dev) {
      fd_ = fd;
      temporary_ = temporary;
      if (!S_ISREG(opened.st_mode)) {
        temporary_.clear();
        return absl::InternalError(
            absl::StrCat("checkpoint: ", temporary, " exists and is no regular file"));
      }
      if (ftruncate(fd, 0) != 0) return FileError("truncate", errno);
      return absl::OkStatus();
    }
    close(fd);
  }
}

absl::Status CheckpointWriter::WriteAll(Stack& stack) {
  std::vector<char> buffer;
  ENGINE_ASSIGN_OR_RETURN(const std::vector<Part> parts, PartsOf(stack, buffer));
  std::string header = HeaderOf(stack, parts);
  const size_t digest_position = DigestPosition(header);
  if (digest_position == std::string::npos || header.size() > kMaxHeaderBytes)
    return absl::InternalError("checkpoint: the header can't be written");
  bytes_ = kLengthBytes + header.size();
  for (const Part& part : parts) bytes_ += part.bytes;
  // Says early that there is no space; a file system that can't do it says so as we write.
  if (fallocate(fd_, 0, 0, static_cast<off_t>(bytes_)) != 0 && errno != EOPNOTSUPP &&
      errno != ENOSYS)
    return FileError(absl::StrCat("reserve ", bytes_, " bytes for ", path_), errno);

  Sha256 sha;
  const auto length = LittleEndian(header.size());
  sha.Add(length.data(), length.size());
  sha.Add(header.data(), header.size());
  uint64_t offset = kLengthBytes + header.size();
  for (const Part& part : parts) {
    buffer.resize(std::max<size_t>(buffer.size(), part.bytes));
    ENGINE_RETURN_IF_ERROR(
        stack.ReadParameter(part.parameter->name, part.part, buffer.data(), part.bytes));
    sha.Add(buffer.data(), part.bytes);
    ENGINE_RETURN_IF_ERROR(WriteAt(fd_, offset, buffer.data(), part.bytes));
    offset += part.bytes;
  }
  ENGINE_ASSIGN_OR_RETURN(const std::string digest, sha.Finish());
  header.replace(digest_position, kDigestDigits, digest);
  ENGINE_RETURN_IF_ERROR(WriteAt(fd_, 0, length.data(), length.size()));
  return WriteAt(fd_, kLengthBytes, header.data(), header.size());
}

absl::StatusOr<std::unique_ptr<CheckpointWriter>> CheckpointWriter::Write(Stack& stack,
                                                                          const std::string& folder,
                                                                          const std::string& name) {
  std::unique_ptr<CheckpointWriter> writer(new CheckpointWriter);
  writer->folder_ = folder;
  writer->path_ = CheckpointPath(folder, name);
  writer->step_ = stack.counters().optimizer_step;
  ENGINE_RETURN_IF_ERROR(writer->OpenTemporary());
  ENGINE_RETURN_IF_ERROR(writer->WriteAll(stack));
  return writer;
}

absl::StatusOr<CheckpointInfo> CheckpointWriter::Commit() {
  if (fsync(fd_) != 0) return FileError(absl::StrCat("sync ", path_), errno);
  if (rename(temporary_.c_str(), path_.c_str()) != 0)
    return FileError(absl::StrCat("rename to ", path_), errno);
  temporary_.clear();
  // Without this the old name could come back after a power failure.
  const int folder = open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0) return FileError(absl::StrCat("open ", folder_), errno);
  const int synced = fsync(folder);
  const int error = errno;
  close(folder);
  if (synced != 0) return FileError(absl::StrCat("sync ", folder_), error);
  return CheckpointInfo{.path = path_, .bytes = bytes_, .step = step_};
}

// --- reading ---

CheckpointReader::~CheckpointReader() {
  if (fd_ >= 0) close(fd_);
}

absl::Status CheckpointReader::ReadAt(uint64_t offset, void* dst, size_t bytes) const {
  char* to = static_cast<char*>(dst);
  while (bytes > 0) {
    const ssize_t n = pread(fd_, to, bytes, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(absl::StrCat("read \"", name_, "\""), errno);
    if (n == 0) return Damaged(name_, "it became shorter while it was read");
    to += n;
    offset += static_cast<uint64_t>(n);
    bytes -= static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

absl::Status CheckpointReader::ReadHeader() {
  std::array<unsigned char, kLengthBytes> length_bytes{};
  if (file_bytes_ < kLengthBytes)
    return Damaged(name_,
                   absl::StrCat("the file has ", file_bytes_, " bytes, no room for a header"));
  ENGINE_RETURN_IF_ERROR(ReadAt(0, length_bytes.data(), length_bytes.size()));
  uint64_t length = 0;
  for (size_t i = 0; i < length_bytes.size(); ++i) length |= uint64_t{length_bytes[i]} << (8 * i);
  if (length > kMaxHeaderBytes || length > file_bytes_ - kLengthBytes)
    return Damaged(name_,
                   absl::StrCat("the header's length is ", length, "; the file has ", file_bytes_,
                                " bytes and a header at most ", kMaxHeaderBytes));
  header_.resize(length);
  ENGINE_RETURN_IF_ERROR(ReadAt(kLengthBytes, header_.data(), header_.size()));

  // JSON keeps the last of two equal keys; counting them shows that there were two.
  size_t keys = 0;
  const Json header = Json::parse(
      header_,
      [&keys](int depth, Json::parse_event_t event, const Json&) {
        if (depth == 1 && event == Json::parse_event_t::key) ++keys;
        return true;
      },
      /*allow_exceptions=*/false);
  if (header.is_discarded() || !header.is_object())
    return Damaged(name_, "the header is no JSON object");
  if (header.size() != keys) return Damaged(name_, "the header has a key twice");

  const uint64_t data_begin = kLengthBytes + length;
  const uint64_t data_bytes = file_bytes_ - data_begin;
  for (const auto& [key, value] : header.items()) {
    if (key == "__metadata__") continue;
    Tensor tensor{.name = key};
    if (!value.is_object() || !value.contains("dtype") || !value["dtype"].is_string() ||
        !value.contains("shape") || !value["shape"].is_array() || !value.contains("data_offsets") ||
        !value["data_offsets"].is_array() || value["data_offsets"].size() != 2 ||
        !value["data_offsets"][0].is_number_unsigned() ||
        !value["data_offsets"][1].is_number_unsigned())
      return Damaged(name_, absl::StrCat("the entry of tensor ", key, " is malformed"));
    if (!ParseDType(value["dtype"].get<std::string>(), tensor.dtype))
      return Damaged(name_, absl::StrCat("tensor ", key, " has a dtype that is not known"));
    uint64_t bytes = SizeOf(tensor.dtype);
    for (const Json& extent : value["shape"]) {
      if (!extent.is_number_unsigned() ||
          __builtin_mul_overflow(bytes, extent.get<uint64_t>(), &bytes) || bytes > data_bytes)
        return Damaged(
            name_, absl::StrCat("the shape of tensor ", key, " is malformed or beyond the file"));
      tensor.shape.push_back(static_cast<int64_t>(extent.get<uint64_t>()));
    }
    const uint64_t begin = value["data_offsets"][0].get<uint64_t>();
    const uint64_t end = value["data_offsets"][1].get<uint64_t>();
    if (begin > end || end > data_bytes)
      return Damaged(name_, absl::StrCat("tensor ", key, " lies at [", begin, ", ", end, ") of ",
                                         data_bytes, " bytes: the file is truncated or altered"));
    if (end - begin != bytes)
      return Damaged(name_, absl::StrCat("tensor ", key, " has ", end - begin,
                                         " bytes; its shape needs ", bytes));
    tensor.offset = data_begin + begin;
    tensor.bytes = bytes;
    tensors_.push_back(std::move(tensor));
  }

  std::vector<const Tensor*> by_offset;
  for (const Tensor& tensor : tensors_) by_offset.push_back(&tensor);
  std::sort(by_offset.begin(), by_offset.end(), [](const Tensor* a, const Tensor* b) {
    return std::pair(a->offset, a->bytes) < std::pair(b->offset, b->bytes);
  });
  uint64_t end = data_begin;
  for (const Tensor* tensor : by_offset) {
    if (tensor->offset != end)
      return Damaged(name_, absl::StrCat("tensor ", tensor->name,
                                         tensor->offset < end ? " overlaps" : " leaves a gap after",
                                         " the one before it"));
    end += tensor->bytes;
  }
  if (end != file_bytes_)
    return Damaged(name_, absl::StrCat(file_bytes_ - end, " bytes follow the last tensor"));
  std::sort(tensors_.begin(), tensors_.end(),
            [](const Tensor& a, const Tensor& b) { return a.name < b.name; });

  const auto not_ours = [this](absl::string_view what) {
    return absl::InvalidArgumentError(
        absl::StrCat("checkpoint \"", name_, "\" is not one of Lamina's: ", what));
  };
  if (!header.contains("__metadata__") || !header["__metadata__"].is_object())
    return not_ours("it has no __metadata__");
  const Json& metadata = header["__metadata__"];
  const auto text = [&metadata](const char* key) {
    const auto it = metadata.find(key);
    return it != metadata.end() && it->is_string() ? it->get<std::string>() : std::string();
  };
  // The digest first, where there is one: then what is wrong with the rest is no damage.
  digest_position_ = DigestPosition(header_);
  digest_ = text(kDigestKey);
  const bool has_digest = digest_position_ != std::string::npos &&
                          digest_.size() == kDigestDigits &&
                          header_.compare(digest_position_, kDigestDigits, digest_) == 0;
  if (has_digest) ENGINE_RETURN_IF_ERROR(CheckDigest());
  if (text("lamina.format") != kFormat)
    return not_ours(absl::StrCat("lamina.format is \"", absl::CHexEscape(text("lamina.format")),
                                 "\"; this version reads \"", kFormat, "\""));
  if (!has_digest) return Damaged(name_, "it has no digest");

  ENGINE_ASSIGN_OR_RETURN(config_, StackConfigFromJson(text("lamina.config")));
  config_.local_rank = -1;
  if (!absl::SimpleAtoi(text("lamina.optimizer_step"), &counters_.optimizer_step) ||
      !absl::SimpleAtoi(text("lamina.rng_counter"), &counters_.rng_counter) ||
      !absl::SimpleAtoi(text("lamina.skipped_steps"), &counters_.skipped_steps) ||
      counters_.optimizer_step < 0 || counters_.skipped_steps < 0)
    return not_ours("its counters are missing or malformed");
  // Files from before dynamic loss scaling have none of these three.
  has_loss_scale_ = metadata.contains("lamina.loss_scale");
  if (has_loss_scale_ &&
      (!absl::SimpleAtod(text("lamina.loss_scale"), &counters_.loss_scale) ||
       !absl::SimpleAtoi(text("lamina.clean_steps"), &counters_.clean_steps) ||
       !absl::SimpleAtoi(text("lamina.overflows_tolerated"), &counters_.overflows_tolerated) ||
       !std::isfinite(counters_.loss_scale) || counters_.loss_scale <= 0 ||
       counters_.clean_steps < 0 || counters_.overflows_tolerated < 0))
    return not_ours("its loss scale is malformed");
  return absl::OkStatus();
}

absl::Status CheckpointReader::CheckDigest() const {
  Sha256 sha;
  const auto length = LittleEndian(header_.size());
  sha.Add(length.data(), length.size());
  std::string header = header_;
  header.replace(digest_position_, kDigestDigits, kDigestDigits, '0');
  sha.Add(header.data(), header.size());
  const uint64_t data = kLengthBytes + header_.size();
  std::vector<char> chunk(static_cast<size_t>(std::min<uint64_t>(kReadChunk, file_bytes_ - data)));
  for (uint64_t at = data; at < file_bytes_;) {
    const size_t bytes = static_cast<size_t>(std::min<uint64_t>(chunk.size(), file_bytes_ - at));
    ENGINE_RETURN_IF_ERROR(ReadAt(at, chunk.data(), bytes));
    sha.Add(chunk.data(), bytes);
    at += bytes;
  }
  ENGINE_ASSIGN_OR_RETURN(const std::string digest, sha.Finish());
  if (digest != digest_) return Damaged(name_, "its SHA-256 is not the one it was saved with");
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<CheckpointReader>> CheckpointReader::Open(const std::string& folder,
                                                                         const std::string& name) {
  std::unique_ptr<CheckpointReader> reader(new CheckpointReader);
  reader->name_ = name;
  const std::string path = CheckpointPath(folder, name);
  reader->fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (reader->fd_ < 0) {
    if (errno == ENOENT)
      return absl::NotFoundError(absl::StrCat("name: no checkpoint \"", name, "\""));
    return FileError(absl::StrCat("open ", path), errno);
  }
  struct stat stat {};
  if (fstat(reader->fd_, &stat) != 0) return FileError(absl::StrCat("stat ", path), errno);
  if (!S_ISREG(stat.st_mode))
    return absl::InvalidArgumentError(absl::StrCat("checkpoint \"", name, "\" is no regular file"));
  reader->file_bytes_ = static_cast<uint64_t>(stat.st_size);
  ENGINE_RETURN_IF_ERROR(reader->ReadHeader());
  return reader;
}

const CheckpointReader::Tensor* CheckpointReader::Find(const std::string& name) const {
  const auto it =
      std::lower_bound(tensors_.begin(), tensors_.end(), name,
                       [](const Tensor& t, const std::string& n) { return t.name < n; });
  return it != tensors_.end() && it->name == name ? &*it : nullptr;
}

absl::Status CheckpointReader::CheckTensor(const std::string& name, DType dtype,
                                           const Shape& shape) const {
  const Tensor* const tensor = Find(name);
  if (tensor == nullptr)
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": the stack has it, checkpoint \"", name_, "\" has not"));
  std::vector<int64_t> extents;
  for (int i = 0; i < shape.rank(); ++i) extents.push_back(shape[i]);
  if (tensor->dtype != dtype || tensor->shape != extents)
    return absl::InvalidArgumentError(absl::StrCat(
        name, ": is ", Name(tensor->dtype), " ", ShapeText(tensor->shape), " in checkpoint \"",
        name_, "\" and ", Name(dtype), " ", shape.ToString(), " in the stack"));
  return absl::OkStatus();
}

absl::Status CheckpointReader::CheckFits(const StackConfig& config,
                                         const std::vector<ParameterInfo>& parameters) const {
  size_t expected = 0;
  const bool gradients =
      !parameters.empty() && Find(absl::StrCat(kGradientPrefix, parameters[0].name)) != nullptr;
  for (const ParameterInfo& p : parameters) {
    ENGINE_RETURN_IF_ERROR(CheckTensor(p.name, config.dtype, p.shape));
    ++expected;
    std::vector<const char*> prefixes;
    if (config.dtype != DType::kF32) prefixes.push_back(kMasterPrefix);
    if (config_.training) prefixes.insert(prefixes.end(), {kMoment1Prefix, kMoment2Prefix});
    if (gradients) prefixes.push_back(kGradientPrefix);
    for (const char* prefix : prefixes) {
      ENGINE_RETURN_IF_ERROR(CheckTensor(absl::StrCat(prefix, p.name), DType::kF32, p.shape));
      ++expected;
    }
  }
  if (expected != tensors_.size()) {
    const auto known = [&](const std::string& name) {
      for (const char* prefix :
           {"", kMasterPrefix, kMoment1Prefix, kMoment2Prefix, kGradientPrefix})
        for (const ParameterInfo& p : parameters)
          if (name == absl::StrCat(prefix, p.name)) return true;
      return false;
    };
    for (const Tensor& tensor : tensors_)
      if (!known(tensor.name))
        return absl::InvalidArgumentError(absl::StrCat(absl::CHexEscape(tensor.name),
                                                       ": checkpoint \"", name_,
                                                       "\" has it, the stack has not"));
    return absl::InvalidArgumentError(
        absl::StrCat("checkpoint \"", name_, "\" has ", tensors_.size(),
                     " tensors; a stack of its settings has ", expected));
  }

  const auto differs = [this](const char* field, const auto& file, const auto& stack) {
    return absl::InvalidArgumentError(absl::StrCat("config.", field, ": is ", file,
                                                   " in checkpoint \"", name_, "\" and ", stack,
                                                   " in the stack"));
  };
  const auto yes_no = [](bool value) { return value ? "true" : "false"; };
  if (config_.heads != config.heads) return differs("heads", config_.heads, config.heads);
  if (config_.pre_layer_norm != config.pre_layer_norm)
    return differs("pre_layer_norm", yes_no(config_.pre_layer_norm), yes_no(config.pre_layer_norm));
  if (config_.causal != config.causal)
    return differs("causal", yes_no(config_.causal), yes_no(config.causal));
  if (config_.gelu != config.gelu)
    return differs("gelu", static_cast<int>(config_.gelu), static_cast<int>(config.gelu));
  if (config_.layer_norm_eps != config.layer_norm_eps)
    return differs("layer_norm_eps", config_.layer_norm_eps, config.layer_norm_eps);
  return absl::OkStatus();
}

void CheckpointReader::RestoreLossScale(const Stack& stack, StackCounters& counters) const {
  const StackConfig& config = stack.config();
  if (!config.dynamic_loss_scale) {
    const StackCounters own = stack.counters();
    counters.loss_scale = own.loss_scale;
    counters.clean_steps = own.clean_steps;
    counters.overflows_tolerated = own.overflows_tolerated;
  } else if (!has_loss_scale_ || !config_.dynamic_loss_scale) {
    counters.loss_scale = config.initial_loss_scale;
    counters.clean_steps = 0;
    counters.overflows_tolerated = config.loss_scale_hysteresis;
  } else {
    counters.loss_scale =
        std::clamp(counters.loss_scale, config.min_loss_scale, StackConfig::kMaxLossScale);
    counters.overflows_tolerated =
        std::min(counters.overflows_tolerated, config.loss_scale_hysteresis);
  }
}

absl::Status CheckpointReader::Restore(Stack& stack) const {
  const DType dtype = stack.config().dtype;
  const bool training = stack.config().training;
  std::vector<char> buffer;
  size_t largest = 0;
  for (const ParameterInfo& p : stack.parameters())
    largest = std::max(largest, static_cast<size_t>(p.shape.elements()) * sizeof(float));
  buffer.reserve(largest);  // memory that runs out must do so before the first write
  // Writes the file's tensor, or zeros where it has none.
  const auto restore = [&](const ParameterInfo& p, ParameterPart part,
                           const char* prefix) -> absl::Status {
    const Tensor* const tensor = Find(absl::StrCat(prefix, p.name));
    const size_t bytes = static_cast<size_t>(p.shape.elements()) * sizeof(float);
    buffer.assign(bytes, 0);
    if (tensor != nullptr) ENGINE_RETURN_IF_ERROR(ReadAt(tensor->offset, buffer.data(), bytes));
    return stack.WriteParameter(p.name, part, buffer.data(), bytes);
  };
  absl::Status status;
  for (const ParameterInfo& p : stack.parameters()) {
    if (status.ok())
      status = restore(p, ParameterPart::kMaster, dtype == DType::kF32 ? "" : kMasterPrefix);
    if (!training) continue;
    if (status.ok()) status = restore(p, ParameterPart::kMoment1, kMoment1Prefix);
    if (status.ok()) status = restore(p, ParameterPart::kMoment2, kMoment2Prefix);
    if (status.ok()) status = restore(p, ParameterPart::kGradient, kGradientPrefix);
  }
  if (!status.ok())
    return absl::DataLossError(absl::StrCat(
        "checkpoint \"", name_,
        "\" failed while it was loaded; the stack holds parts of both, load again or delete it: ",
        status.message()));
  StackCounters counters = counters_;
  if (!training) counters.optimizer_step = 0;  // as turning training off does: the moments are gone
  RestoreLossScale(stack, counters);
  stack.set_counters(counters);
  return absl::OkStatus();
}

}  // namespace lamina
