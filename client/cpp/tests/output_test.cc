#include "cli/output.h"

#include <gtest/gtest.h>

namespace lamina::cli {
namespace {

TEST(Output, Bytes) {
  EXPECT_EQ(HumanBytes(0), "0 B");
  EXPECT_EQ(HumanBytes(1023), "1023 B");
  EXPECT_EQ(HumanBytes(1024), "1.00 KiB");
  EXPECT_EQ(HumanBytes(1536), "1.50 KiB");
  EXPECT_EQ(HumanBytes((uint64_t{1} << 20) - 1), "1.00 MiB");
  EXPECT_EQ(HumanBytes(UINT64_MAX), "16.00 EiB");
}

TEST(Output, Counts) {
  EXPECT_EQ(HumanCount(0), "0");
  EXPECT_EQ(HumanCount(999), "999");
  EXPECT_EQ(HumanCount(1000), "1,000");
  EXPECT_EQ(HumanCount(-1234567), "-1,234,567");
  EXPECT_EQ(HumanCount(-100), "-100");
}

TEST(Output, Seconds) {
  EXPECT_EQ(HumanSeconds(0.0000125), "12.5 µs");
  EXPECT_EQ(HumanSeconds(0.25), "250.00 ms");
  EXPECT_EQ(HumanSeconds(61), "1 min 1 s");
  EXPECT_EQ(HumanSeconds(2 * 3600 + 5 * 60), "2 h 5 min");
  EXPECT_EQ(HumanSeconds(3 * 86400 + 3600), "3 d 1 h");
}

TEST(Output, TableAligns) {
  Table table({"NAME", "SIZE"});
  table.Add({"a", "1"});
  table.Add({"longer µ", "1,000"});
  table.Add({"short"});
  EXPECT_EQ(table.Text(),
            "NAME       SIZE\n"
            "a             1\n"
            "longer µ  1,000\n"
            "short");
}

TEST(Output, TextMayComeLast) {
  Table table({"N", "COUNT", "WORDS"}, /*text_last=*/true);
  table.Add({"a", "1", "one"});
  table.Add({"b", "12,345", "some more"});
  EXPECT_EQ(table.Text(),
            "N   COUNT  WORDS\n"
            "a       1  one\n"
            "b  12,345  some more");
}

}  // namespace
}  // namespace lamina::cli
