#include "cli/byte_size.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lamina::cli {
namespace {

TEST(ByteSize, Units) {
  EXPECT_EQ(ParseByteSize("1").value(), 1u);
  EXPECT_EQ(ParseByteSize("17B").value(), 17u);
  EXPECT_EQ(ParseByteSize("2KiB").value(), 2048u);
  EXPECT_EQ(ParseByteSize("3MiB").value(), 3u << 20);
  EXPECT_EQ(ParseByteSize("32GiB").value(), uint64_t{32} << 30);
  EXPECT_EQ(ParseByteSize("2TiB").value(), uint64_t{2} << 40);
  EXPECT_EQ(ParseByteSize("2kb").value(), 2000u);
  EXPECT_EQ(ParseByteSize("512MB").value(), 512'000'000u);
  EXPECT_EQ(ParseByteSize(" 80 gb ").value(), 80'000'000'000u);
  EXPECT_EQ(ParseByteSize("1TB").value(), 1'000'000'000'000u);
}

TEST(ByteSize, FractionsRoundDown) {
  EXPECT_EQ(ParseByteSize("1.5GiB").value(), uint64_t{3} << 29);
  EXPECT_EQ(ParseByteSize("0.0015KB").value(), 1u);
  // Whole numbers are exact beyond a double's 53 bits.
  EXPECT_EQ(ParseByteSize("9007199254740993").value(), 9007199254740993u);
  EXPECT_EQ(ParseByteSize("9223372036854775807").value(), uint64_t{INT64_MAX});
}

TEST(ByteSize, RefusesTheRest) {
  for (const char* text : {"", "GiB", "32G", "32GiBs", "-1", "1e9", "1.2.3", "0x10", "nan", "."}) {
    EXPECT_THAT(std::string(ParseByteSize(text).status().message()),
                ::testing::HasSubstr("is not a size such as 32GiB"))
        << text;
  }
  for (const char* text : {"0", "0.4", "0GiB"}) {
    EXPECT_THAT(std::string(ParseByteSize(text).status().message()),
                ::testing::HasSubstr("less than a byte"));
  }
  for (const char* text :
       {"9223372036854775808", "8388608TiB", "99999999999999999999GiB", "8388608.0TiB"}) {
    EXPECT_THAT(std::string(ParseByteSize(text).status().message()), ::testing::HasSubstr("2^63"));
  }
}

}  // namespace
}  // namespace lamina::cli
