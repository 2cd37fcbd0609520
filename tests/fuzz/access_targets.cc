// The files that say who may call: what is let in is what they say, judged by a second reading of
// the form in docs/security.md.
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "server/access/access.h"
#include "server/access/roles.h"
#include "tests/fuzz/memory_file.h"
#include "tests/fuzz/target.h"

namespace lamina::fuzz {
namespace {

constexpr size_t kLargestFile = size_t{1} << 20;
constexpr size_t kShortestToken = 16;
constexpr size_t kLongestMessage = 1000;  // a line of the log
// Of a file's callers and patterns, so that an input takes milliseconds.
constexpr size_t kMostCallers = 100;

using Words = std::vector<std::string>;

struct Line {
  int number;
  Words words;
};

Words WordsOf(absl::string_view text) {
  return absl::StrSplit(text, absl::ByAnyChar(" \t\r"), absl::SkipEmpty());
}

// The lines that say something.
std::vector<Line> LinesOf(absl::string_view file) {
  std::vector<Line> lines;
  int number = 0;
  for (const absl::string_view line : absl::StrSplit(file, '\n')) {
    ++number;
    Words words = WordsOf(line.substr(0, line.find('#')));
    if (!words.empty()) lines.push_back({number, std::move(words)});
  }
  return lines;
}

// All words, of comments too.
std::set<std::string> AllWordsOf(absl::string_view file) {
  std::set<std::string> all;
  for (const absl::string_view line : absl::StrSplit(file, '\n'))
    for (std::string& word : WordsOf(absl::StripPrefix(line, "#"))) all.insert(std::move(word));
  return all;
}

bool MadeOf(absl::string_view word, absl::string_view others) {
  return absl::c_all_of(word, [&](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) ||
           absl::StrContains(others, absl::string_view(&c, 1));
  });
}

bool IsToken(absl::string_view word) {
  return word.size() >= kShortestToken && word.size() <= 4096 && MadeOf(word, "-._~+/=");
}

bool IsName(absl::string_view word) { return word.size() <= 64 && MadeOf(word, "-._@"); }

absl::StatusOr<std::unique_ptr<Access>> OpenAccess(const AccessOptions& options) {
  spdlog::set_level(spdlog::level::off);
  return Access::Open(options);
}

Presented Bearing(absl::string_view header) {
  Presented presented;
  presented.authorization.push_back(header);
  return presented;
}

// A refusal names the file's line that is wrong, on one line of a log. Returns what it says.
std::string CheckRefusal(const absl::Status& status, const std::string& where, int line) {
  if (!absl::IsFailedPrecondition(status)) Broken(status.ToString());
  absl::string_view message = status.message();
  if (!absl::ConsumePrefix(&message, absl::StrCat(where, ":", line, ": ")))
    Broken(absl::StrCat("a refusal names line ", line, ": ", status.ToString()));
  if (message.size() > kLongestMessage || !absl::c_all_of(message, absl::ascii_isprint))
    Broken(absl::StrCat("a refusal is one line of a log: ", status.ToString()));
  return std::string(message);
}

// A tokens file as it is meant: names by token, or the first line that is wrong.
struct Tokens {
  int wrong = 0;  // 0: none
  std::map<std::string, std::string> names;
};

Tokens ReadTokens(absl::string_view file) {
  Tokens read;
  size_t count = 0;
  const std::vector<Line> lines = LinesOf(file);
  for (const auto& [number, words] : lines) {
    read.wrong = number;
    const std::string name = words.size() == 2 ? words[0] : "default";
    if (words.size() > 2 || !IsName(name) || !IsToken(words.back())) return read;
    if (++count > 1000) return read;
    if (read.names.emplace(words.back(), name).first->second != name) return read;
  }
  // Names are told to everybody.
  for (const auto& [number, words] : lines) {
    read.wrong = number;
    if (words.size() == 2 && read.names.contains(words[0])) return read;
  }
  read.wrong = 0;
  return read;
}

void RunTokens(absl::string_view input) {
  if (input.size() > kLargestFile) return;
  const MemoryFile file(input, 0600);
  const Tokens expected = ReadTokens(input);
  const auto access = OpenAccess({.tokens = file.path(), .client_certificates = true});
  const std::set<std::string> words = AllWordsOf(input);
  if (!access.ok()) {
    const std::string message =
        CheckRefusal(access.status(), absl::StrCat("--tokens ", file.path()), expected.wrong);
    for (const std::string& word : words)
      if (word.size() >= kShortestToken && absl::StrContains(message, word))
        Broken("a refusal repeats no word that may be a token");
    return;
  }
  if (expected.wrong != 0)
    Broken(absl::StrCat("a file with a wrong line ", expected.wrong, " is refused"));
  const auto check = [&](absl::string_view word) {
    const std::string token(absl::StripAsciiWhitespace(word));  // as in a header
    const auto known = expected.names.find(token);
    const auto caller = (*access)->Identify(Bearing(absl::StrCat("Bearer ", token)));
    if (known == expected.names.end()) {
      if (!absl::IsUnauthenticated(caller.status())) Broken("what is no token lets nobody in");
      if (token.size() >= kShortestToken && absl::StrContains(caller.status().message(), token))
        Broken("a refusal repeats no word that may be a token");
      return;
    }
    if (!caller.ok() || caller->identity != absl::StrCat("token:", known->second) ||
        caller->roles != kAllRoles)
      Broken("a token of the file lets in whom its line names");
  };
  // Whatever else is in the file is no token, nor what is nearly one.
  size_t tried = 0;
  for (const std::string& word : words) {
    if (++tried > kMostCallers) break;
    check(word);
    check(word.substr(0, word.size() - 1));
    check(word + "x");
    std::string other = word;
    other.back() = static_cast<char>(other.back() ^ 32);
    check(other);
  }
}

// An identity's kind and value.
using Name = std::pair<std::string, std::string>;

bool IsPatterned(absl::string_view kind) {
  static constexpr std::array<absl::string_view, 5> kKinds = {"token", "uri", "dns", "cn", "email"};
  return absl::c_linear_search(kKinds, kind);
}

// A roles file as it is meant: its rules, or the first line that is wrong.
struct Rules {
  int wrong = 0;  // 0: none
  std::vector<std::pair<std::string, Roles>> rules;
};

Rules ReadRules(absl::string_view file) {
  static const std::map<std::string, Roles, std::less<>> kNames = {
      {"read-only", kReadOnly}, {"operator", kOperator}, {"trainer", kTrainer}, {"all", kAllRoles}};
  Rules read;
  for (const auto& [number, words] : LinesOf(file)) {
    read.wrong = number;
    if (words.size() != 2) return read;
    const Name name = absl::StrSplit(words[0], absl::MaxSplits(':', 1));
    uint32_t uid = 0;
    const bool is_uid = name.first == "uid" && absl::SimpleAtoi(name.second, &uid) &&
                        absl::StrCat(uid) == name.second;
    if (!absl::c_all_of(words[0], absl::ascii_isprint)) return read;
    if (words[0] != "anonymous" && !is_uid && !(IsPatterned(name.first) && !name.second.empty()))
      return read;
    Roles roles = kNoRole;
    for (const absl::string_view word : absl::StrSplit(words[1], ',')) {
      const auto known = kNames.find(word);
      if (known == kNames.end()) return read;
      roles |= known->second;
    }
    read.rules.emplace_back(words[0], roles);
  }
  read.wrong = 0;
  return read;
}

// Whether a pattern with no other special characters than '*' and '?' matches.
bool Matches(absl::string_view pattern, absl::string_view text) {
  size_t at = 0, star = pattern.size(), after_star = 0;
  for (size_t i = 0; i < text.size();) {
    if (at < pattern.size() && pattern[at] == '*') {
      star = at++;
      after_star = i;
    } else if (at < pattern.size() && (pattern[at] == '?' || pattern[at] == text[i])) {
      ++at;
      ++i;
    } else if (star < pattern.size()) {  // the last star takes one more
      at = star + 1;
      i = ++after_star;
    } else {
      return false;
    }
  }
  return pattern.substr(at).find_first_not_of('*') == absl::string_view::npos;
}

// The roles that rules give to somebody of these names: at least, and at most where a pattern has
// brackets or backslashes, whose meaning is the C library's.
std::pair<Roles, Roles> RolesOf(const Rules& rules, const std::vector<Name>& names) {
  Roles least = kNoRole, most = kNoRole;
  for (const auto& [pattern, roles] : rules.rules) {
    for (const auto& [kind, value] : names) {
      const std::string name = value.empty() ? kind : absl::StrCat(kind, ":", value);
      const bool unsure = pattern.find_first_of("[\\") != std::string::npos;
      // Whatever they mean, a pattern is of one kind.
      if (unsure && !absl::StartsWith(pattern, absl::StrCat(kind, ":"))) continue;
      if (!unsure && !Matches(pattern, name)) continue;
      most |= roles;
      if (!unsure) least |= roles;
    }
  }
  return {least, most};
}

void CheckRoles(const Rules& rules, const std::vector<Name>& names, Roles given) {
  const auto [least, most] = RolesOf(rules, names);
  if ((given & least) != least || (given & ~most) != 0)
    Broken(absl::StrCat("'", names.front().first, ":", names.front().second, "' has the roles of ",
                        "the lines that name it: at least ", least, ", at most ", most, ", not ",
                        given));
}

// Who might call, out of the file's own words, which comments may have too: as a pattern itself and
// with other letters in the places that it leaves open.
std::set<Name> CallersOf(absl::string_view file) {
  std::set<Name> callers;
  for (const std::string& word : AllWordsOf(file)) {
    if (callers.size() >= kMostCallers) break;
    const Name name = absl::StrSplit(word, absl::MaxSplits(':', 1));
    callers.insert(name);
    for (const absl::string_view letters : {"", "x", "a/.b"}) {
      std::string value;
      for (const char c : name.second) {
        if (c == '*' || c == '?')
          absl::StrAppend(&value, letters);
        else
          value += c;
      }
      callers.emplace(name.first, value);
    }
  }
  return callers;
}

// A certificate's names that count: those without hidden characters.
bool Counts(const Name& name) {
  return !name.second.empty() && absl::c_all_of(name.second, absl::ascii_isprint);
}

void RunRoles(absl::string_view input) {
  if (input.size() > kLargestFile) return;
  const MemoryFile file(input);
  const Rules expected = ReadRules(input);
  const std::set<Name> callers = CallersOf(input);

  std::string tokens;
  std::map<std::string, std::string> token_of;  // by name
  std::vector<uid_t> uids;
  for (const auto& [kind, value] : callers) {
    if (kind == "token" && !value.empty() && IsName(value)) {
      // No name has a slash, so none is a token.
      const std::string& token = token_of[value] =
          absl::StrCat("the/token/of/caller/", token_of.size());
      absl::StrAppend(&tokens, value, " ", token, "\n");
    }
    uint32_t uid = 0;
    if (kind == "uid" && absl::SimpleAtoi(value, &uid)) uids.push_back(uid);
  }
  const MemoryFile tokens_file(tokens, 0600);
  const auto access = OpenAccess({.tokens = tokens_file.path(),
                                  .roles = file.path(),
                                  .client_certificates = true,
                                  .allowed_uids = uids});
  if (!access.ok()) {
    CheckRefusal(access.status(), absl::StrCat("--roles ", file.path()), expected.wrong);
    return;
  }
  if (expected.wrong != 0)
    Broken(absl::StrCat("a file with a wrong line ", expected.wrong, " is refused"));

  Presented all;  // one certificate with many names
  std::vector<Name> all_names;
  for (const Name& name : callers) {
    const auto& [kind, value] = name;
    if (kind == "token") {
      if (!token_of.contains(value)) continue;
      const std::string header = absl::StrCat("Bearer ", token_of[value]);
      const auto caller = (*access)->Identify(Bearing(header));
      if (!caller.ok()) Broken(caller.status().ToString());
      CheckRoles(expected, {name}, caller->roles);
    } else if (IsPatterned(kind)) {
      Presented presented;
      presented.names.emplace_back(kind, value);
      all.names.emplace_back(kind, value);
      const auto caller = (*access)->Identify(presented);
      if (caller.ok() != Counts(name)) Broken("a name with hidden characters is none");
      if (!caller.ok()) continue;
      all_names.push_back(name);
      CheckRoles(expected, {name}, caller->roles);
    }
  }
  if (!all_names.empty()) {
    const auto caller = (*access)->Identify(all);
    if (!caller.ok()) Broken(caller.status().ToString());
    CheckRoles(expected, all_names, caller->roles);
  }
  for (const uid_t uid : uids) {
    Presented presented;
    presented.uid = uid;
    const auto caller = (*access)->Identify(presented);
    if (!caller.ok()) Broken(caller.status().ToString());
    // The daemon's own user is never locked out.
    if (uid == geteuid() && caller->roles == kAllRoles) continue;
    CheckRoles(expected, {{"uid", absl::StrCat(uid)}}, caller->roles);
  }
  // Where nobody is asked who it is.
  const auto open = OpenAccess({.roles = file.path()});
  if (!open.ok()) Broken(open.status().ToString());
  const auto anybody = (*open)->Identify({});
  if (!anybody.ok()) Broken(anybody.status().ToString());
  CheckRoles(expected, {{"anonymous", ""}}, anybody->roles);
}

}  // namespace

std::vector<Target> AccessTargets() {
  return {
      {"tokens", "the daemon's tokens file, and who is let in by it", nullptr, RunTokens},
      {"roles", "the daemon's roles file, and which roles it gives to whom", nullptr, RunRoles},
  };
}

}  // namespace lamina::fuzz
