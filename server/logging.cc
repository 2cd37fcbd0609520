#include "server/logging.h"

#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <cstdint>
#include <memory>
#include <utility>

#include <nlohmann/json.hpp>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"

namespace lamina {
namespace {

// The text and its key=value pairs; a value with blanks in it is quoted and C-escaped.
nlohmann::ordered_json Fields(absl::string_view text) {
  nlohmann::ordered_json fields = {{"message", std::string(text)}};
  while (!text.empty()) {
    const size_t equals = text.find('=');
    if (equals == absl::string_view::npos) break;
    const size_t blank = text.rfind(' ', equals);
    const size_t begin = blank == absl::string_view::npos ? 0 : blank + 1;
    const std::string key(text.substr(begin, equals - begin));
    text.remove_prefix(equals + 1);
    std::string value;
    if (!text.empty() && text[0] == '"') {
      size_t end = 1;
      while (end < text.size() && text[end] != '"') end += text[end] == '\\' ? 2 : 1;
      if (end >= text.size()) break;
      if (!absl::CUnescape(text.substr(1, end - 1), &value)) break;
      text.remove_prefix(end + 1);
    } else {
      value = std::string(text.substr(0, text.find(' ')));
      text.remove_prefix(value.size());
    }
    int64_t number = 0;
    if (fields.contains(key)) continue;
    if (absl::SimpleAtoi(value, &number)) {
      fields[key] = number;
    } else {
      fields[key] = value;
    }
  }
  return fields;
}

// "message":..., and the rest, without the braces around them.
class JsonFields final : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg& message, const std::tm&,
              spdlog::memory_buf_t& out) override {
    const std::string object =
        Fields(absl::string_view(message.payload.data(), message.payload.size()))
            .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    out.append(object.data() + 1, object.data() + object.size() - 1);
  }
  std::unique_ptr<custom_flag_formatter> clone() const override {
    return std::make_unique<JsonFields>();
  }
};

}  // namespace

void SetUpLog(const std::string& level, const std::string& format) {
  auto logger = spdlog::stderr_logger_mt("laminad");
  logger->set_level(spdlog::level::from_str(level));
  if (format == "json") {
    auto formatter = std::make_unique<spdlog::pattern_formatter>();
    formatter->add_flag<JsonFields>('*').set_pattern(
        R"({"time":"%Y-%m-%dT%H:%M:%S.%e%z","level":"%l",%*})");
    logger->set_formatter(std::move(formatter));
  } else {
    logger->set_pattern("%Y-%m-%dT%H:%M:%S.%e%z level=%l %v");
  }
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
}

std::string Quoted(absl::string_view text) {
  // An apostrophe needs no escape between double quotes.
  return absl::StrCat("\"", absl::StrReplaceAll(absl::CEscape(text), {{"\\'", "'"}}), "\"");
}

}  // namespace lamina
