#include "server/tcp_address.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/string_view.h"

namespace lamina {
namespace {

TEST(TcpAddressTest, TakesAddressesAndNames) {
  for (const char* text : {"127.0.0.1:0", "[::1]:7070", "[fe80::1%eth0]:1", "localhost:65535",
                           "node-3.rack_1.example:07070"}) {
    const auto address = ParseTcpAddress(text);
    ASSERT_TRUE(address) << text;
    EXPECT_THAT(std::string(text), ::testing::StartsWith(address->host + ":"));
  }
  EXPECT_EQ(ParseTcpAddress("[::1]:7070")->bare_host(), "::1");
  EXPECT_EQ(ParseTcpAddress("[::1]:0")->WithPort(81), "[::1]:81");
  EXPECT_EQ(ParseTcpAddress("a:07070")->port, 7070);
}

TEST(TcpAddressTest, RefusesAllElse) {
  using namespace std::string_view_literals;
  for (const std::string_view text :
       {""sv, ":"sv, ":1"sv, "a"sv, "a:"sv, "a:65536"sv, "a:-1"sv, "a:+1"sv, "a: 1"sv, "a:1 "sv,
        "a:000001"sv, "a:1x"sv, "a:9999999999"sv, "a:1\0"sv, "a\0b:1"sv, "a b:1"sv, "a\n:1"sv,
        // The HTTP server's own syntax: lists, both families at once, an encrypted port.
        "1.2.3.4:1,2.3.4.5:2"sv, "a,b:1"sv, "+:1"sv, "a:1s"sv,
        // IPv6 without brackets is not clear about where its port begins.
        "::1:7070"sv, "[]:1"sv, "[::1:1"sv, "::1]:1"sv, "[::1]"sv, "[::1]x:1"sv, "[[::1]]:1"sv,
        "\xff\xfe:1"sv, "unix:/a:1"sv, "dns:///a:1"sv, "*:1"sv}) {
    EXPECT_FALSE(ParseTcpAddress(absl::string_view(text.data(), text.size()))) << text;
  }
}

TEST(TcpAddressTest, LoopbackIsToldByNumbers) {
  for (const char* text : {"127.0.0.1:1", "127.8.8.8:1", "localhost:1", "[::1]:1", "[0:0::1]:1"})
    EXPECT_TRUE(ParseTcpAddress(text)->IsLoopback()) << text;
  for (const char* text : {"0.0.0.0:1", "128.0.0.1:1", "127.example.com:1", "127.0.0.1.nip.io:1",
                           "localhost.example.com:1", "[::]:1", "[::ffff:8.8.8.8]:1", "127:1"})
    EXPECT_FALSE(ParseTcpAddress(text)->IsLoopback()) << text;
}

}  // namespace
}  // namespace lamina
