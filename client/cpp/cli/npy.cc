#include "cli/npy.h"

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <optional>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "cli/read_file.h"
#include "src/float16.h"

namespace lamina::cli {
namespace {

using Type = NpyArray::Type;
constexpr std::string_view kMagic("\x93NUMPY", 6);
// NumPy aligns the data for vector loads.
constexpr size_t kHeaderAlignment = 64;

struct TypeName {
  Type type;
  const char* descr;
  size_t bytes;
};
constexpr TypeName kTypes[] = {{Type::kFloat16, "<f2", 2},
                               {Type::kFloat32, "<f4", 4},
                               {Type::kFloat64, "<f8", 8},
                               {Type::kInt32, "<i4", 4},
                               {Type::kInt64, "<i8", 8}};

const TypeName& Describe(Type type) {
  for (const TypeName& name : kTypes) {
    if (name.type == type) return name;
  }
  return kTypes[0];
}

// Reads the header: a Python dict literal of three known keys.
class HeaderParser {
 public:
  explicit HeaderParser(std::string_view text) : text_(text) {}

  struct Header {
    std::optional<std::string> descr;
    std::optional<bool> fortran;
    std::optional<std::vector<int64_t>> shape;
  };

  // nullopt: not such a dict.
  std::optional<Header> Parse() {
    Header header;
    if (!Eat('{')) return std::nullopt;
    while (!Eat('}')) {
      const std::optional<std::string> key = String();
      if (!key || !Eat(':')) return std::nullopt;
      if (*key == "descr") {
        header.descr = String();
        if (!header.descr) return std::nullopt;
      } else if (*key == "fortran_order") {
        header.fortran = Bool();
        if (!header.fortran) return std::nullopt;
      } else if (*key == "shape") {
        header.shape = Tuple();
        if (!header.shape) return std::nullopt;
      } else {
        return std::nullopt;
      }
      if (!Eat(',') && Peek() != '}') return std::nullopt;
    }
    Peek();
    if (at_ != text_.size() || !header.descr || !header.fortran || !header.shape) {
      return std::nullopt;
    }
    return header;
  }

 private:
  char Peek() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool Eat(char c) {
    if (Peek() != c || at_ >= text_.size()) return false;
    ++at_;
    return true;
  }
  bool EatWord(std::string_view word) {
    Peek();
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }
  std::optional<bool> Bool() {
    if (EatWord("True")) return true;
    if (EatWord("False")) return false;
    return std::nullopt;
  }
  std::optional<std::string> String() {
    const char quote = Peek();
    if (quote != '\'' && quote != '"') return std::nullopt;
    const size_t end = text_.find(quote, at_ + 1);
    if (end == std::string_view::npos) return std::nullopt;
    std::string value(text_.substr(at_ + 1, end - at_ - 1));
    at_ = end + 1;
    return value;
  }
  std::optional<int64_t> Integer() {
    int64_t value = 0;
    size_t digits = 0;
    for (Peek(); at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_, ++digits) {
      if (__builtin_mul_overflow(value, int64_t{10}, &value) ||
          __builtin_add_overflow(value, int64_t{text_[at_] - '0'}, &value)) {
        return std::nullopt;
      }
    }
    if (digits == 0) return std::nullopt;
    return value;
  }
  std::optional<std::vector<int64_t>> Tuple() {
    std::vector<int64_t> values;
    if (!Eat('(')) return std::nullopt;
    while (!Eat(')')) {
      const std::optional<int64_t> value = Integer();
      if (!value) return std::nullopt;
      values.push_back(*value);
      if (!Eat(',') && Peek() != ')') return std::nullopt;
    }
    return values;
  }

  std::string_view text_;
  size_t at_ = 0;
};

template <class T>
std::vector<T> Elements(const std::string& data) {
  std::vector<T> values(data.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), data.data(), values.size() * sizeof(T));
  return values;
}

}  // namespace

int64_t NpyArray::elements() const {
  return static_cast<int64_t>(data.size() / Describe(type).bytes);
}

std::string NpyArray::descr() const { return Describe(type).descr; }

absl::StatusOr<std::vector<float>> NpyArray::ToFloats() const {
  if (type == Type::kFloat32) return Elements<float>(data);
  std::vector<float> values;
  values.reserve(static_cast<size_t>(elements()));
  if (type == Type::kFloat16) {
    for (const uint16_t half : Elements<uint16_t>(data)) {
      values.push_back(client::internal::FloatFromFloat16(half));
    }
    return values;
  }
  if (type == Type::kFloat64) {
    for (const double value : Elements<double>(data)) values.push_back(static_cast<float>(value));
    return values;
  }
  return absl::InvalidArgumentError(absl::StrCat("is ", descr(), "; expected <f4, <f2 or <f8"));
}

absl::StatusOr<std::vector<int32_t>> NpyArray::ToInts() const {
  if (type == Type::kInt32) return Elements<int32_t>(data);
  if (type != Type::kInt64) {
    return absl::InvalidArgumentError(absl::StrCat("is ", descr(), "; expected <i4 or <i8"));
  }
  std::vector<int32_t> values;
  for (const int64_t value : Elements<int64_t>(data)) {
    if (value < std::numeric_limits<int32_t>::min() ||
        value > std::numeric_limits<int32_t>::max()) {
      return absl::InvalidArgumentError(absl::StrCat("holds ", value, ", which int32 does not"));
    }
    values.push_back(static_cast<int32_t>(value));
  }
  return values;
}

absl::StatusOr<NpyArray> ReadNpy(const std::string& path) {
  const auto bad = [&path](const auto&... what) {
    return absl::InvalidArgumentError(absl::StrCat("'", path, "': ", what...));
  };
  const absl::StatusOr<std::string> content = ReadFile(path);
  if (!content.ok()) return content.status();
  const std::string_view bytes(*content);
  if (bytes.substr(0, kMagic.size()) != kMagic || bytes.size() < 12) {
    return bad("is not a .npy file");
  }
  const auto byte = [&bytes](size_t i) {
    return static_cast<size_t>(static_cast<uint8_t>(bytes[i]));
  };
  const size_t version = byte(6);
  if (version < 1 || version > 3) return bad("is .npy version ", version, "; 1 to 3 are known");
  const size_t start = version == 1 ? 10 : 12;
  size_t header_bytes = byte(8) | byte(9) << 8;
  if (version > 1) header_bytes |= byte(10) << 16 | byte(11) << 24;
  if (header_bytes > bytes.size() - start) return bad("ends within its header");
  const auto header = HeaderParser(bytes.substr(start, header_bytes)).Parse();
  if (!header) return bad("its header is not {'descr', 'fortran_order', 'shape'}");

  NpyArray array;
  const TypeName* type = nullptr;
  for (const TypeName& known : kTypes) {
    if (*header->descr == known.descr) type = &known;
  }
  if (type == nullptr) {
    return bad("its elements are '", *header->descr, "'; <f4, <f2, <f8, <i4 and <i8 are known");
  }
  array.type = type->type;
  array.shape = *header->shape;
  if (*header->fortran && array.shape.size() > 1) {
    return bad("is in Fortran order; save numpy.ascontiguousarray(x)");
  }
  size_t expected = type->bytes;
  for (const int64_t extent : array.shape) {
    if (__builtin_mul_overflow(expected, static_cast<size_t>(extent), &expected)) {
      return bad("its shape overflows");
    }
  }
  const std::string_view data = bytes.substr(start + header_bytes);
  if (data.size() != expected) {
    return bad("has ", data.size(), " bytes of elements; its shape needs ", expected);
  }
  array.data = std::string(data);
  return array;
}

absl::Status WriteNpy(const std::string& path, const NpyArray& array) {
  std::string header =
      absl::StrCat("{'descr': '", array.descr(), "', 'fortran_order': False, 'shape': (");
  for (const int64_t extent : array.shape) absl::StrAppend(&header, extent, ", ");
  absl::StrAppend(&header, "), }");
  const size_t before = kMagic.size() + 4;
  const size_t padding = kHeaderAlignment - (before + header.size() + 1) % kHeaderAlignment;
  header += std::string(padding % kHeaderAlignment, ' ') + '\n';
  std::string start(kMagic);
  start += '\x01';
  start += '\x00';
  start += static_cast<char>(header.size() & 0xff);
  start += static_cast<char>(header.size() >> 8);
  errno = 0;
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << start << header << array.data;
  file.close();
  if (!file) {
    return absl::InternalError(
        absl::StrCat("writing '", path, "': ", std::strerror(errno != 0 ? errno : EIO)));
  }
  return absl::OkStatus();
}

}  // namespace lamina::cli
