#include "src/channel.h"

#include <gtest/gtest.h>

namespace lamina::client::internal {
namespace {

// A token goes to a loopback address unencrypted, and nowhere else.
TEST(LoopbackTest, IsOfNumbersAndNotOfNamesThatBeginLikeOne) {
  for (const char* host : {"127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]"})
    EXPECT_TRUE(IsLoopback(host)) << host;
  for (const char* host : {"", "127.example.com", "127.0.0.1.example.com", "localhost.example.com",
                           "128.0.0.1", "0.0.0.0", "::", "1127.0.0.1"})
    EXPECT_FALSE(IsLoopback(host)) << host;
}

}  // namespace
}  // namespace lamina::client::internal
