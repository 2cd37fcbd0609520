#include "cli/output.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <utility>

#include "lamina/client.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

std::string Format(const char* format, double value) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), format, value);
  return text.data();
}

// Display width: UTF-8 continuation bytes take none.
size_t Width(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

std::string Padded(const std::string& text, size_t width, bool left) {
  const std::string spaces(width - std::min(width, Width(text)), ' ');
  return left ? text + spaces : spaces + text;
}

void PrintError(const GlobalOptions& options, const std::string& code, const std::string& message,
                int exit_code, const std::string& request_id = "") {
  if (options.json) {
    nlohmann::json error = {
        {"error", {{"code", code}, {"message", message}, {"exit_code", exit_code}}}};
    if (!request_id.empty()) error["error"]["request_id"] = request_id;
    std::fprintf(stderr, "%s\n",
                 error.dump(2, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  } else {
    std::fprintf(stderr, "lamina: %s: %s%s\n", code.c_str(), message.c_str(),
                 request_id.empty() ? "" : (" (request " + request_id + ")").c_str());
  }
}

}  // namespace

std::string Table::Text() const {
  std::vector<size_t> widths;
  const auto measure = [&widths](const std::vector<std::string>& row) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], Width(row[i]));
  };
  measure(header_);
  for (const auto& row : rows_) measure(row);
  std::string text;
  const auto print = [&](const std::vector<std::string>& row) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      if (i > 0) line += "  ";
      const bool left = i == 0 || (text_last_ && i + 1 == header_.size());
      line += Padded(row[i], widths[i], left);
    }
    text += line.substr(0, line.find_last_not_of(' ') + 1);
    text += '\n';
  };
  print(header_);
  for (const auto& row : rows_) print(row);
  if (!text.empty()) text.pop_back();
  return text;
}

std::string Lines(const std::vector<std::pair<std::string, std::string>>& lines) {
  size_t width = 0;
  for (const auto& [label, value] : lines) width = std::max(width, Width(label));
  std::string text;
  for (const auto& [label, value] : lines) {
    if (!text.empty()) text += '\n';
    text += Padded(label, width, /*left=*/true) + "  " + value;
  }
  return text;
}

std::string HumanBytes(uint64_t bytes) {
  constexpr std::array<const char*, 6> kUnits = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  if (bytes < 1024) return std::to_string(bytes) + " B";
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  // 1023.996 would round to 1024.00: the next unit says it better.
  while (value >= 1023.995 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  return Format("%.2f ", value) + kUnits[unit];
}

std::string HumanSeconds(double seconds) {
  if (seconds < 1e-3) return Format("%.1f µs", seconds * 1e6);
  if (seconds < 1) return Format("%.2f ms", seconds * 1e3);
  if (seconds < 60) return Format("%.1f s", seconds);
  const auto minutes = static_cast<int64_t>(seconds / 60);
  if (minutes < 60) {
    return std::to_string(minutes) + " min " + Format("%.0f s", std::floor(std::fmod(seconds, 60)));
  }
  if (minutes < 24 * 60) {
    return std::to_string(minutes / 60) + " h " + std::to_string(minutes % 60) + " min";
  }
  return std::to_string(minutes / 1440) + " d " + std::to_string(minutes / 60 % 24) + " h";
}

std::string HumanCount(int64_t count) {
  std::string digits = std::to_string(count);
  const size_t first = digits.front() == '-' ? 1 : 0;
  for (size_t i = digits.size(); i > first + 3; i -= 3) digits.insert(i - 3, 1, ',');
  return digits;
}

std::string Milliseconds(double seconds) { return Format("%.3f", seconds * 1e3); }

void PrintText(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fputc('\n', stdout);
}

void PrintJson(const nlohmann::json& json) {
  PrintText(json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace));
}

int Fail(const GlobalOptions& options, const absl::Status& status) {
  PrintError(options, absl::StatusCodeToString(status.code()), std::string(status.message()),
             kRefused, client::RequestIdOf(status));
  return kRefused;
}

int FailUsage(const GlobalOptions& options, const std::string& message) {
  PrintError(options, "usage", message, kUsage);
  return kUsage;
}

int FailBy(const GlobalOptions& options, const absl::Status& status) {
  return absl::IsInvalidArgument(status) ? FailUsage(options, std::string(status.message()))
                                         : Fail(options, status);
}

}  // namespace lamina::cli
