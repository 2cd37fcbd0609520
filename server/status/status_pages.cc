#include "server/status/status_pages.h"

#include <sys/random.h>

#include <utility>

#include <nlohmann/json.hpp>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"

namespace lamina {
namespace {

constexpr const char* kJson = "application/json";

// Names are the users' text and need not be UTF-8.
std::string Text(const nlohmann::ordered_json& json, int indent) {
  return json.dump(indent, ' ', false, nlohmann::json::error_handler_t::replace);
}

// What a script must name to be run: no other one can know it.
std::string Nonce() {
  char bytes[16] = {};
  size_t filled = 0;
  while (filled < sizeof(bytes)) {
    const ssize_t got = getrandom(bytes + filled, sizeof(bytes) - filled, 0);
    if (got > 0) filled += static_cast<size_t>(got);
  }
  return absl::BytesToHexString(absl::string_view(bytes, sizeof(bytes)));
}

bool AsksForJson(const std::string& query) {
  for (const absl::string_view part : absl::StrSplit(query, '&'))
    if (part == "format=json") return true;
  return false;
}

}  // namespace

std::string EmbeddedJson(std::string json) {
  return absl::StrReplaceAll(
      json, {{"<", "\\u003c"}, {">", "\\u003e"}, {"&", "\\u0026"}});  // only strings have these
}

std::map<std::string, HttpPage> StatusPages(const StatusSources& sources, std::string config_json) {
  const HttpPage report = [&sources](const std::string&) {
    return HttpAnswer{.type = kJson, .body = Text(StatusReport(sources), 1) + "\n"};
  };
  const HttpPage page = [&sources, report](const std::string& query) {
    if (AsksForJson(query)) return report(query);
    const std::string nonce = Nonce();
    return HttpAnswer{
        .type = "text/html; charset=utf-8",
        // In one pass: what is filled in is not looked at again.
        .body = absl::StrReplaceAll(
            kStatuszHtml,
            {{"@@NONCE@@", nonce}, {"@@DATA@@", EmbeddedJson(Text(StatusReport(sources), -1))}}),
        .content_policy = absl::StrCat("default-src 'none'; script-src 'nonce-", nonce,
                                       "'; style-src 'nonce-", nonce,
                                       "'; connect-src 'self'; img-src data:; base-uri 'none'; "
                                       "form-action 'none'; frame-ancestors 'none'")};
  };
  return {{"/statusz", page},
          {"/statusz.json", report},
          {"/healthz",
           [&sources](const std::string&) {
             const Readiness readiness = ReadinessOf(sources);
             return readiness.alive() ? HttpAnswer{.body = "ok\n"}
                                      : HttpAnswer{.code = 503, .body = readiness.reason + "\n"};
           }},
          {"/readyz",
           [&sources](const std::string&) {
             const Readiness readiness = ReadinessOf(sources);
             if (readiness.ready()) return HttpAnswer{.body = "ok\n"};
             return HttpAnswer{
                 .code = 503,
                 .body = absl::StrCat(readiness.state, readiness.reason.empty() ? "" : ": ",
                                      readiness.reason, "\n")};
           }},
          {"/configz", [config = std::move(config_json)](const std::string&) {
             return HttpAnswer{.type = kJson, .body = config};
           }}};
}

}  // namespace lamina
