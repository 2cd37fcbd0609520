#include "server/access/access.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "server/access/roles.h"

namespace lamina {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr absl::string_view kToken = "correct-horse-battery";
constexpr absl::string_view kOther = "staple.0123456789abcdef";
constexpr char kForward[] = "/lamina.v1.LayerService/Forward";
constexpr char kCreate[] = "/lamina.v1.ConfigService/CreateStack";

class AccessTest : public ::testing::Test {
 protected:
  AccessTest() : folder_(absl::StrCat(::testing::TempDir(), "/access-", getpid())) {
    mkdir(folder_.c_str(), 0700);
  }
  ~AccessTest() override {
    unlink(tokens().c_str());
    unlink(roles().c_str());
    rmdir(folder_.c_str());
  }

  std::string tokens() const { return folder_ + "/tokens"; }
  std::string roles() const { return folder_ + "/roles"; }

  absl::StatusOr<std::unique_ptr<Access>> Open(absl::string_view tokens_content,
                                               absl::string_view roles_content = "token:* all") {
    Write(tokens(), tokens_content);
    Write(roles(), roles_content);
    return Access::Open({.tokens = tokens(), .roles = roles(), .client_certificates = true});
  }

  static Presented Bearing(absl::string_view header) {
    Presented presented;
    presented.authorization.push_back(header);
    return presented;
  }
  static bool Knows(const Access& access, absl::string_view token) {
    return access.Identify(Bearing(absl::StrCat("Bearer ", token))).ok();
  }

 private:
  static void Write(const std::string& path, absl::string_view content) {
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file << content;
    file.close();
    ASSERT_TRUE(file);
    ASSERT_EQ(chmod(path.c_str(), 0600), 0);
  }
  const std::string folder_;
};

// A bad file is refused whole, with its line and without its words; what is read is what is there.
TEST_F(AccessTest, HostileTokenFiles) {
  const std::string good = absl::StrCat("alice ", kToken, "\n");
  const std::string zero(1, '\0');
  const std::vector<std::pair<std::string, std::string>> refused = {
      {absl::StrCat(good, kOther, zero), ":2: the token must be"},
      {absl::StrCat(good, zero), ":2: the token must be"},
      {absl::StrCat("al\xff", "ice ", kToken), ":1: the name must be"},
      {absl::StrCat("al", zero, "ice ", kToken), ":1: the name must be"},
      {absl::StrCat(std::string(65, 'a'), " ", kToken), ":1: the name must be"},
      {absl::StrCat("alice ", kToken, "\xe2\x80\x8b"), ":1: the token must be"},  // no-width space
      {absl::StrCat("alice ", kToken, "\v", kOther), ":1: the token must be"},
      {absl::StrCat("alice ", kToken, " ", kOther), ":1: has 3 words"},
      {absl::StrCat("alice\r", kToken, "\r", kOther), ":1: has 3 words"},  // old ends of lines
      {absl::StrCat("alice ", std::string(4097, 'x')), ":1: the token must be"},
      {absl::StrCat("alice ", std::string(15, 'x')), ":1: the token must be"},
      {absl::StrCat("\xef\xbb\xbf", good), ":1: the name must be"},  // a byte order mark
      {absl::StrCat(good, "bob ", kToken), ":2: the token is that of line 1 too"},
      // Names are told, and must be no secrets, whichever line comes first.
      {absl::StrCat(good, kToken, " ", kOther), ":2: the name is a token, that of line 1"},
      {absl::StrCat(kToken, " ", kOther, "\n", good), ":1: the name is a token, that of line 2"},
      {absl::StrCat(kToken, " ", kToken), ":1: the name is a token, that of line 1"},
      {absl::StrCat(kToken, " ", kOther, "\nbob ", kOther, "\n", kToken), ":2: the token is that"},
      {std::string(4000, '\0'), ":1: the token must be"},
      {std::string((size_t{1} << 20) + 1, '#'), "larger"},
  };
  for (const auto& [content, words] : refused) {
    const auto access = Open(content);
    ASSERT_FALSE(access.ok()) << words;
    EXPECT_EQ(access.status().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(access.status().message()), HasSubstr(words));
    EXPECT_THAT(std::string(access.status().message()), Not(HasSubstr(std::string(kToken))));
  }
  std::string many;
  for (int i = 0; i < 1001; ++i) absl::StrAppend(&many, "n", i, " ", kToken, i, "\n");
  EXPECT_THAT(std::string(Open(many).status().message()), HasSubstr(":1001: more than 1000"));

  const auto access =
      Open(absl::StrCat("\t # a comment\r\n\n  alice\t", kToken, " # hers\r\n#", kOther));
  ASSERT_TRUE(access.ok()) << access.status();
  EXPECT_TRUE(Knows(**access, kToken));
  EXPECT_FALSE(Knows(**access, kOther));
}

TEST_F(AccessTest, HostileRoleFiles) {
  const std::string zero(1, '\0');
  const std::vector<std::pair<std::string, std::string>> refused = {
      {absl::StrCat("token:alice all", zero), "'all\\000' must be read-only"},
      // The pattern would end at the NUL: another name than the line's.
      {absl::StrCat("token:alice", zero, "x all"), "'token:alice\\000x' has characters"},
      {"cn:J\xc3\xbcrgen all", "'cn:J\\303\\274rgen' has characters that no name has"},
      {"uid:007 all", "'uid:007' must be token:NAME"},  // nobody is called so
      {"uid:+7 all", "'uid:+7' must be token:NAME"},
      {"token:alice all,", "must be read-only"},
      {"token:alice ,all", "must be read-only"},
      {"token:alice ALL", "must be read-only"},
      {"token:alice all all", ":1: has 3 words"},
      {"TOKEN:alice all", "must be token:NAME"},
      {"token: all", "must be token:NAME"},
      {": all", "must be token:NAME"},
      {"* all", "must be token:NAME"},
      {"anonymous: all", "must be token:NAME"},
      {"uid:-1 all", "'uid:-1'"},
      {"uid:4294967296 all", "'uid:4294967296'"},
      {"uid:1* all", "'uid:1*'"},
      {"\xff\xfe:x all", "'\\377\\376:x'"},
      {absl::StrCat("token:a all\n", std::string(5000, '\xff')), ":2: has 1 words"},
  };
  for (const auto& [content, words] : refused) {
    const auto access = Open(absl::StrCat("alice ", kToken), content);
    ASSERT_FALSE(access.ok()) << words;
    EXPECT_EQ(access.status().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(access.status().message()), HasSubstr(words));
    // What is repeated of the file can neither end a line of the log nor a string of C.
    EXPECT_TRUE(absl::c_all_of(access.status().message(), absl::ascii_isprint)) << words;
  }
  for (const std::string& line :
       {std::string(100'000, 'x') + " all", "cn:x " + std::string(100'000, '\x1b')}) {
    EXPECT_LT(Open("", line).status().message().size(), 1000u);
  }
  // Patterns that fnmatch reads in its own way match what they say, or nothing.
  for (const char* pattern :
       {"token:[", "token:[!a", "token:\\", "token:[z-a]", "token:[[:none:]]"}) {
    const auto access = Open(absl::StrCat("alice ", kToken), absl::StrCat(pattern, " all"));
    ASSERT_TRUE(access.ok()) << access.status();
    EXPECT_FALSE((*access)->Admit(kForward, Bearing(absl::StrCat("Bearer ", kToken))).ok())
        << pattern;
  }
}

// Only the very token opens, whatever is sent.
TEST_F(AccessTest, HostileHeaders) {
  const auto access = Open(absl::StrCat("alice ", kToken), "token:alice trainer");
  ASSERT_TRUE(access.ok()) << access.status();
  const std::string right = absl::StrCat("Bearer ", kToken);
  EXPECT_TRUE((*access)->Admit(kForward, Bearing(right)).ok());
  EXPECT_TRUE((*access)->Admit(kForward, Bearing(absl::StrCat("bEARER  ", kToken, " "))).ok());
  EXPECT_EQ((*access)->Admit(kCreate, Bearing(right)).code(), absl::StatusCode::kPermissionDenied);
  std::vector<std::string> wrong = {"",
                                    "Bearer",
                                    "Bearer ",
                                    "Bearer alice",
                                    std::string(kToken),
                                    absl::StrCat("Basic ", kToken),
                                    absl::StrCat("Bearer ", kToken, " ", kToken),
                                    std::string("Bearer \0", 8),
                                    std::string(70000, 'B')};
  for (size_t i = 0; i < kToken.size(); ++i) {
    for (const int change : {1, 32, 128}) {
      std::string token(kToken);
      token[i] = static_cast<char>(token[i] ^ change);
      wrong.push_back(absl::StrCat("Bearer ", token));
    }
    wrong.push_back(absl::StrCat("Bearer ", kToken.substr(0, i)));
  }
  wrong.push_back(absl::StrCat("Bearer ", kToken, "x"));
  wrong.push_back(absl::StrCat("Bearer ", kToken, std::string(1, '\0')));
  for (const std::string& header : wrong) {
    const absl::Status status = (*access)->Admit(kForward, Bearing(header));
    EXPECT_EQ(status.code(), absl::StatusCode::kUnauthenticated) << header;
    EXPECT_THAT(std::string(status.message()), Not(HasSubstr(std::string(kToken))));
  }
  Presented twice = Bearing(right);
  twice.authorization.push_back(right);
  EXPECT_EQ((*access)->Admit(kForward, twice).code(), absl::StatusCode::kUnauthenticated);
}

// Names of certificates that hold what no pattern shows are no names.
TEST_F(AccessTest, HostileNamesOfCertificates) {
  const auto access = Open("", "dns:*.ops.example all\ncn:root operator");
  ASSERT_TRUE(access.ok()) << access.status();
  const auto shown = [](absl::string_view kind, absl::string_view value) {
    Presented presented;
    presented.names.emplace_back(kind, value);
    return presented;
  };
  EXPECT_TRUE((*access)->Admit(kCreate, shown("dns", "a.ops.example")).ok());
  using namespace std::string_view_literals;
  for (const std::string_view value : {"evil\0.ops.example"sv, "evil\n.ops.example"sv,
                                       "\xff.ops.example"sv, "a.ops.example\0"sv, ""sv}) {
    EXPECT_EQ((*access)->Admit(kCreate, shown("dns", {value.data(), value.size()})).code(),
              absl::StatusCode::kUnauthenticated);
  }
  // One name can't pass for another's kind.
  EXPECT_EQ((*access)->Admit(kCreate, shown("dns", "cn:root")).code(),
            absl::StatusCode::kPermissionDenied);
  EXPECT_EQ((*access)->Admit(kCreate, shown("uri", "dns:a.ops.example")).code(),
            absl::StatusCode::kPermissionDenied);
}

// Files of chance: read whole or refused, and what was let in is a token of the file.
TEST_F(AccessTest, FilesOfChance) {
  std::mt19937 random(20261128);
  const std::string base = absl::StrCat("alice ", kToken, "\n# x\nbob ", kOther, "\n");
  const std::string rules = "token:alice operator,trainer\nuid:7 read-only\ndns:*.x trainer\n";
  constexpr char kLiked[] = {'\0', '\n', '\r', '\t', ' ',  '#',   ':',
                             ',',  '*',  '[',  ']',  '\\', '\xff'};
  int read = 0, refused = 0;
  for (int trial = 0; trial < 600; ++trial) {
    std::string tokens_content = base, roles_content = rules;
    for (std::string* content : {&tokens_content, &roles_content}) {
      const int changes = static_cast<int>(random() % 3);
      for (int i = 0; i < changes; ++i) {
        const size_t at = random() % content->size();
        const char byte = random() % 2 == 0 ? kLiked[random() % sizeof(kLiked)]
                                            : static_cast<char>(random() % 256);
        switch (random() % 3) {
          case 0:
            (*content)[at] = byte;
            break;
          case 1:
            content->insert(at, 1 + random() % 3, byte);
            break;
          default:
            content->erase(at, 1 + random() % 5);
        }
      }
    }
    const auto access = Open(tokens_content, roles_content);
    if (!access.ok()) {
      ++refused;
      ASSERT_EQ(access.status().code(), absl::StatusCode::kFailedPrecondition);
      ASSERT_TRUE(absl::c_all_of(access.status().message(), absl::ascii_isprint));
      ASSERT_THAT(std::string(access.status().message()), Not(HasSubstr(std::string(kToken))));
      continue;
    }
    ++read;
    for (const absl::string_view token : {kToken, kOther}) {
      if (Knows(**access, token)) {
        ASSERT_TRUE(absl::StrContains(tokens_content, token));
      }
    }
  }
  EXPECT_GT(read, 100);
  EXPECT_GT(refused, 100);
}

}  // namespace
}  // namespace lamina
