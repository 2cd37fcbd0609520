#include "cli/byte_size.h"

#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace lamina::cli {
namespace {

struct Unit {
  absl::string_view name;
  uint64_t bytes;
};
constexpr Unit kUnits[] = {{"", 1},
                           {"b", 1},
                           {"kib", uint64_t{1} << 10},
                           {"mib", uint64_t{1} << 20},
                           {"gib", uint64_t{1} << 30},
                           {"tib", uint64_t{1} << 40},
                           {"kb", 1'000},
                           {"mb", 1'000'000},
                           {"gb", 1'000'000'000},
                           {"tb", 1'000'000'000'000}};
constexpr double kLimit = 0x1p63;

}  // namespace

absl::StatusOr<uint64_t> ParseByteSize(const std::string& text) {
  const auto bad = [&text](absl::string_view why) {
    return absl::InvalidArgumentError(absl::StrCat("'", text, "' ", why));
  };
  const absl::string_view trimmed = absl::StripAsciiWhitespace(text);
  const size_t digits = std::min(trimmed.find_first_not_of("0123456789."), trimmed.size());
  const absl::string_view number = trimmed.substr(0, digits);
  const std::string name =
      absl::AsciiStrToLower(absl::StripLeadingAsciiWhitespace(trimmed.substr(digits)));
  const Unit* unit = nullptr;
  for (const Unit& known : kUnits) {
    if (known.name == name) unit = &known;
  }
  double value = 0;
  if (unit == nullptr || number.empty() || !absl::SimpleAtod(number, &value)) {
    return bad("is not a size such as 32GiB, 80GB, 512MiB or a number of bytes");
  }
  uint64_t whole = 0, bytes = 0;
  if (absl::SimpleAtoi(number, &whole)) {  // exactly, where a double would round
    if (__builtin_mul_overflow(whole, unit->bytes, &bytes) || bytes >> 63 != 0) {
      return bad("is 2^63 bytes or more");
    }
  } else {
    value = std::floor(value * static_cast<double>(unit->bytes));
    if (!(value < kLimit)) return bad("is 2^63 bytes or more");
    bytes = static_cast<uint64_t>(value);
  }
  if (bytes == 0) return bad("is less than a byte");
  return bytes;
}

}  // namespace lamina::cli
