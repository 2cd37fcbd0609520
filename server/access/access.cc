#include "server/access/access.h"

#include <fnmatch.h>
#include <openssl/crypto.h>
#include <openssl/sha.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "server/logging.h"

namespace lamina {
namespace access_internal {

using Digest = std::array<unsigned char, SHA256_DIGEST_LENGTH>;

struct Token {
  std::string name;
  Digest digest;
  int line;  // of the file
};

struct Rule {
  std::string pattern;  // of "KIND:VALUE", as fnmatch takes it; or "anonymous"
  Roles roles;
};

}  // namespace access_internal

namespace {

using access_internal::Digest;
using access_internal::Rule;
using access_internal::Token;

constexpr size_t kShortestToken = 16;
constexpr size_t kLongestToken = 4096;
constexpr size_t kLongestName = 64;
constexpr size_t kMostTokens = 1000;
constexpr size_t kLongestShown = 120;  // of a word, in messages
constexpr const char* kNameless = "default";
constexpr const char* kTokens = "--tokens";
constexpr const char* kRoles = "--roles";

// Tokens are kept and compared as digests: neither length nor a common beginning shows in the time
// that it takes.
Digest DigestOfToken(absl::string_view token) {
  Digest digest;
  SHA256(reinterpret_cast<const unsigned char*>(token.data()), token.size(), digest.data());
  return digest;
}

bool IsTokenCharacter(char c) {
  return absl::ascii_isalnum(static_cast<unsigned char>(c)) ||
         absl::StrContains("-._~+/=", absl::string_view(&c, 1));
}

bool IsNameCharacter(char c) {
  return absl::ascii_isalnum(static_cast<unsigned char>(c)) ||
         absl::StrContains("-._@", absl::string_view(&c, 1));
}

absl::Status WrongLine(const char* what, const std::string& path, int line, absl::string_view why) {
  return absl::FailedPreconditionError(absl::StrCat(what, " ", path, ":", line, ": ", why));
}

// Calls `take` (absl::Status(line, words)) for each line that has some; '#' begins a comment.
template <typename Take>
absl::Status EachLine(const char* what, const std::string& path, const std::string& content,
                      Take take) {
  int number = 0;
  for (absl::string_view line : absl::StrSplit(content, '\n')) {
    ++number;
    line = line.substr(0, line.find('#'));
    const std::vector<absl::string_view> words =
        absl::StrSplit(line, absl::ByAnyChar(" \t\r"), absl::SkipEmpty());
    if (words.empty()) continue;
    if (const absl::Status status = take(number, words); !status.ok()) {
      return WrongLine(what, path, number, status.message());
    }
  }
  return absl::OkStatus();
}

// A word for a message: one line of a log, and not a long one.
std::string Shown(absl::string_view word) {
  return absl::StrCat("'", absl::CEscape(word.substr(0, kLongestShown)),
                      word.size() > kLongestShown ? "...'" : "'");
}

// No message repeats a word that may be a token, and so none at all: names and tokens are easily
// exchanged.
absl::StatusOr<std::vector<Token>> ParseTokens(const std::string& path,
                                               const std::string& content) {
  std::vector<Token> tokens;
  const absl::Status status = EachLine(
      kTokens, path, content,
      [&](int line, const std::vector<absl::string_view>& words) -> absl::Status {
        if (words.size() > 2) {
          return absl::InvalidArgumentError(
              absl::StrCat("has ", words.size(), " words; must be TOKEN or NAME TOKEN"));
        }
        const absl::string_view name = words.size() == 2 ? words[0] : kNameless;
        if (name.size() > kLongestName || !std::all_of(name.begin(), name.end(), IsNameCharacter)) {
          return absl::InvalidArgumentError(
              absl::StrCat("the name must be 1 to ", kLongestName, " letters, digits and - . _ @"));
        }
        const absl::string_view token = words.back();
        if (token.size() < kShortestToken || token.size() > kLongestToken ||
            !std::all_of(token.begin(), token.end(), IsTokenCharacter)) {
          return absl::InvalidArgumentError(absl::StrCat("the token must be ", kShortestToken,
                                                         " to ", kLongestToken,
                                                         " letters, digits and - . _ ~ + / ="));
        }
        if (tokens.size() == kMostTokens) {
          return absl::InvalidArgumentError(absl::StrCat("more than ", kMostTokens, " tokens"));
        }
        Token made{std::string(name), DigestOfToken(token), line};
        for (const Token& other : tokens) {
          if (other.digest == made.digest && other.name != made.name) {
            return absl::InvalidArgumentError(absl::StrCat("the token is that of line ", other.line,
                                                           " too, which has another name"));
          }
        }
        tokens.push_back(std::move(made));
        return absl::OkStatus();
      });
  if (!status.ok()) return status;
  // Names are told in logs and answers.
  for (const Token& named : tokens) {
    if (named.name.size() < kShortestToken) continue;
    const Digest digest = DigestOfToken(named.name);
    for (const Token& other : tokens) {
      if (other.digest != digest) continue;
      return WrongLine(kTokens, path, named.line,
                       absl::StrCat("the name is a token, that of line ", other.line));
    }
  }
  return tokens;
}

absl::StatusOr<std::vector<Rule>> ParseRules(const std::string& path, const std::string& content) {
  std::vector<Rule> rules;
  const absl::Status status = EachLine(
      kRoles, path, content, [&](int, const std::vector<absl::string_view>& words) -> absl::Status {
        if (words.size() != 2) {
          return absl::InvalidArgumentError(
              absl::StrCat("has ", words.size(), " words; must be IDENTITY ROLE[,ROLE]"));
        }
        const absl::string_view who = words[0];
        const std::pair<absl::string_view, absl::string_view> parts =
            absl::StrSplit(who, absl::MaxSplits(':', 1));
        const auto& [kind, value] = parts;
        uint32_t uid = 0;
        const bool patterned =
            kind == "token" || kind == "uri" || kind == "dns" || kind == "cn" || kind == "email";
        // As it is compared: "uid:007" would be nobody's.
        const bool numbered =
            kind == "uid" && absl::SimpleAtoi(value, &uid) && absl::StrCat(uid) == value;
        if (who != "anonymous" && !(patterned && !value.empty()) && !numbered) {
          return absl::InvalidArgumentError(
              absl::StrCat(Shown(who),
                           " must be token:NAME, uri:PATTERN, dns:PATTERN, cn:PATTERN, "
                           "email:PATTERN, uid:NUMBER without leading zeros, or anonymous"));
        }
        // A pattern ends at a NUL, for fnmatch; nobody's name has the others (see Identify).
        if (!std::all_of(who.begin(), who.end(),
                         [](unsigned char c) { return absl::ascii_isprint(c); })) {
          return absl::InvalidArgumentError(absl::StrCat(
              Shown(who), " has characters that no name has; names are printable ASCII"));
        }
        const std::optional<Roles> roles = ParseRoles(words[1]);
        if (!roles) {
          return absl::InvalidArgumentError(
              absl::StrCat(Shown(words[1]),
                           " must be read-only, operator, trainer or all, or several with "
                           "commas between"));
        }
        rules.push_back({std::string(who), *roles});
        return absl::OkStatus();
      });
  if (!status.ok()) return status;
  return rules;
}

}  // namespace

struct Access::Policy {
  std::vector<Token> tokens;
  std::optional<std::vector<Rule>> rules;  // none: who is known has all roles

  // Of somebody who is known by these, each "KIND:VALUE".
  Roles RolesOf(const std::vector<std::string>& names) const {
    if (!rules) return kAllRoles;
    Roles roles = kNoRole;
    for (const Rule& rule : *rules) {
      for (const std::string& name : names) {
        // A kind has no special character, and so stands for itself.
        if (fnmatch(rule.pattern.c_str(), name.c_str(), 0) == 0) roles |= rule.roles;
      }
    }
    return roles;
  }

  // Looks at all of them, whichever it is.
  const Token* Find(absl::string_view token) const {
    const Digest digest = DigestOfToken(token);
    const Token* found = nullptr;
    for (const Token& known : tokens) {
      if (CRYPTO_memcmp(known.digest.data(), digest.data(), digest.size()) == 0) found = &known;
    }
    return found;
  }
};

Access::Access(const AccessOptions& options)
    : options_(options), watch_({options.tokens, options.roles}) {}
Access::~Access() = default;

absl::StatusOr<std::unique_ptr<Access>> Access::Open(const AccessOptions& options) {
  std::unique_ptr<Access> access(new Access(options));
  auto policy = access->Read();
  if (!policy.ok()) return policy.status();
  access->policy_ = *std::move(policy);
  return access;
}

absl::StatusOr<std::shared_ptr<const Access::Policy>> Access::Read() const {
  auto policy = std::make_shared<Policy>();
  if (!options_.tokens.empty()) {
    const auto content = ReadAccessFile(kTokens, options_.tokens, Secrecy::kSecret);
    if (!content.ok()) return content.status();
    auto tokens = ParseTokens(options_.tokens, *content);
    if (!tokens.ok()) return tokens.status();
    policy->tokens = *std::move(tokens);
    // No mistake: this is how the last token is revoked.
    if (policy->tokens.empty()) spdlog::warn("event=no_tokens file={}", Quoted(options_.tokens));
  }
  if (!options_.roles.empty()) {
    const auto content = ReadAccessFile(kRoles, options_.roles, Secrecy::kPublic);
    if (!content.ok()) return content.status();
    auto rules = ParseRules(options_.roles, *content);
    if (!rules.ok()) return rules.status();
    policy->rules = *std::move(rules);
  }
  return policy;
}

std::shared_ptr<const Access::Policy> Access::policy() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return policy_;
}

bool Access::Refresh() {
  if (!watch_.Changed()) return false;
  auto policy = Read();
  if (!policy.ok()) {
    spdlog::error("event=access_kept reason={}", Quoted(policy.status().message()));
    return false;
  }
  spdlog::info("event=access_reloaded tokens={} rules={}", (*policy)->tokens.size(),
               (*policy)->rules ? (*policy)->rules->size() : 0);
  std::lock_guard<std::mutex> lock(mutex_);
  policy_ = *std::move(policy);
  return true;
}

absl::StatusOr<Caller> Access::Identify(const Presented& presented) const {
  return Identify(*policy(), presented);
}

absl::StatusOr<Caller> Access::Identify(const Policy& policy, const Presented& presented) const {
  Caller caller;
  if (presented.uid) {
    const uid_t uid = *presented.uid;
    const bool own = uid == geteuid();
    if (!own && std::find(options_.allowed_uids.begin(), options_.allowed_uids.end(), uid) ==
                    options_.allowed_uids.end()) {
      return absl::PermissionDeniedError(absl::StrCat(
          uid == kStranger ? "your user" : absl::StrCat("UID ", uid),
          " may not use this socket; laminad --allow-uid names those who may, by number"));
    }
    caller.identity = absl::StrCat("uid:", uid);
    caller.roles = policy.RolesOf({caller.identity});
    // Who runs the daemon may write its files; not to lock out whoever forgets this line.
    if (own && caller.roles == kNoRole) caller.roles = kAllRoles;
    return caller;
  }
  // A token comes first: who sends one means it.
  if (!options_.tokens.empty() && !presented.authorization.empty()) {
    absl::string_view token = presented.authorization.front();
    const bool bearer = token.size() > 7 && absl::EqualsIgnoreCase(token.substr(0, 7), "bearer ");
    if (presented.authorization.size() != 1 || !bearer) {
      return absl::UnauthenticatedError("authorization: must be there once, as \"Bearer TOKEN\"");
    }
    token = absl::StripAsciiWhitespace(token.substr(7));
    const Token* const known = policy.Find(token);
    if (known == nullptr) {
      return absl::UnauthenticatedError(
          "authorization: the token is not, or no longer, one that this daemon knows");
    }
    caller.identity = absl::StrCat("token:", known->name);
    caller.roles = policy.RolesOf({caller.identity});
    return caller;
  }
  if (options_.client_certificates && !presented.names.empty()) {
    std::vector<std::string> names;
    for (const auto& [kind, value] : presented.names) {
      // What has such characters in it is not what a pattern seems to say.
      const bool plain = std::all_of(value.begin(), value.end(),
                                     [](unsigned char c) { return absl::ascii_isprint(c); });
      if (plain && !value.empty()) names.push_back(absl::StrCat(kind, ":", value));
    }
    if (!names.empty()) {
      caller.identity = absl::StrCat("cert:", names.front());
      caller.roles = policy.RolesOf(names);
      return caller;
    }
    return absl::UnauthenticatedError(
        "the client certificate has no name: neither a URI, DNS or e-mail name nor a common name");
  }
  const bool takes_tokens = !options_.tokens.empty();
  if (takes_tokens || options_.client_certificates) {
    return absl::UnauthenticatedError(
        absl::StrCat("this daemon must know who calls: ",
                     takes_tokens ? "send the metadata \"authorization: Bearer TOKEN\"" : "",
                     takes_tokens && options_.client_certificates ? " or " : "",
                     options_.client_certificates ? "show a client certificate" : ""));
  }
  caller.roles = policy.RolesOf({"anonymous"});
  return caller;
}

absl::Status Access::Admit(absl::string_view path, const Presented& presented) const {
  const std::optional<Demand> demand = DemandOf(path);
  if (demand && demand->open) return absl::OkStatus();
  const auto caller = Identify(presented);
  if (!caller.ok()) return caller.status();
  // There is no such RPC, and gRPC will say so.
  if (!demand) return absl::OkStatus();
  if ((caller->roles & demand->any_of) != 0) return absl::OkStatus();
  return absl::PermissionDeniedError(absl::StrCat(
      caller->identity.empty() ? "anonymous" : caller->identity, " may not call ",
      absl::StripPrefix(path, "/"), ": that needs the role ", Describe(demand->any_of, " or "),
      ", and its roles are ", Describe(caller->roles, " and ")));
}

}  // namespace lamina
