#include "cli/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <random>
#include <span>

#include "absl/strings/str_cat.h"

namespace lamina::cli {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string Length(uint64_t bytes) {
  std::string text;
  for (int i = 0; i < 8; ++i) text += static_cast<char>((bytes >> (8 * i)) & 0xff);
  return text;
}

std::string File(const std::string& header, const std::string& data) {
  return absl::StrCat(Length(header.size()), header, data);
}

std::string Tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& offsets) {
  return absl::StrCat("\"", name, "\":{\"dtype\":\"", dtype, "\",\"shape\":", shape,
                      ",\"data_offsets\":", offsets, "}");
}

// What is wrong with a header before `data_bytes` of elements.
std::string Wrong(const std::string& header, uint64_t data_bytes) {
  const auto parsed = ParseSafetensorsHeader(header, data_bytes);
  EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument) << header;
  return std::string(parsed.status().message());
}

template <typename Values>
std::span<std::byte> AsBytes(Values* values) {
  return std::as_writable_bytes(std::span(*values));
}

class SafetensorsOpen : public ::testing::Test {
 protected:
  std::string Path() const {
    return absl::StrCat(::testing::TempDir(), "lamina_safetensors_test_", getpid());
  }
  void TearDown() override { std::remove(Path().c_str()); }
  absl::StatusOr<SafetensorsFile> Open(const std::string& bytes) {
    std::ofstream(Path(), std::ios::binary) << bytes;
    return SafetensorsFile::Open(Path());
  }
  std::string Error(const std::string& bytes) {
    const auto file = Open(bytes);
    EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(file.status().message()), HasSubstr(Path()));
    return std::string(file.status().message());
  }
};

TEST_F(SafetensorsOpen, ReadsTensorsAndMetadata) {
  const std::string header = absl::StrCat(
      "{\"__metadata__\":{\"format\":\"pt\"},", Tensor("b", "F32", "[2,1]", "[2,10]"), ",",
      Tensor("a", "BF16", "[]", "[0,2]"), ",", Tensor("none", "I64", "[3,0]", "[2,2]"), "}   ");
  auto opened = Open(File(header, std::string("\x80\x3f\0\0\x80\x3f\0\0\0\xc0", 10)));
  ASSERT_TRUE(opened.ok()) << opened.status();
  const SafetensorsFile file = std::move(*opened);  // a move keeps it open
  EXPECT_EQ(file.header().metadata.at("format"), "pt");
  ASSERT_EQ(file.header().tensors.size(), 3u);
  const SafetensorsTensor& b = file.header().tensors.at("b");
  EXPECT_EQ(b.dtype, "F32");
  EXPECT_THAT(b.shape, ElementsAre(2, 1));
  std::array<float, 2> values{};
  ASSERT_EQ(b.bytes(), sizeof(values));
  ASSERT_TRUE(file.ReadAt(file.data_offset() + b.begin, AsBytes(&values)).ok());
  EXPECT_THAT(values, ElementsAre(1.0f, -2.0f));
  EXPECT_EQ(file.data_offset(), 8 + header.size());
  EXPECT_TRUE(file.header().tensors.at("a").shape.empty());
  EXPECT_EQ(file.header().tensors.at("none").bytes(), 0u);
}

TEST_F(SafetensorsOpen, ReadsWhatItWrites) {
  const std::vector<NewSafetensorsTensor> tensors = {
      {.name = "w", .dtype = client::DType::kFloat16, .shape = {2, 3}},
      {.name = "v\"\n", .dtype = client::DType::kFloat32, .shape = {1}}};
  const std::string start = SafetensorsStart(tensors, {{"format", "pt"}});
  EXPECT_EQ(start.size() % 8, 0u);
  auto file = Open(start + std::string(16, '\0'));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->header().metadata.at("format"), "pt");
  EXPECT_EQ(file->header().tensors.at("w").begin, 0u);
  EXPECT_EQ(file->header().tensors.at("w").end, 12u);
  EXPECT_EQ(file->header().tensors.at("v\"\n").begin, 12u);
  EXPECT_THAT(start, HasSubstr("{\"__metadata__\":{\"format\":\"pt\"},\"w\":{\"dtype\":\"F16\","
                               "\"shape\":[2,3],\"data_offsets\":[0,12]}"));
}

TEST_F(SafetensorsOpen, RefusesFilesThatAreCutOrLie) {
  EXPECT_THAT(Error(""), HasSubstr("has 0 bytes"));
  EXPECT_THAT(Error("1234567"), HasSubstr("at least 8"));
  EXPECT_THAT(Error(Length(2)), HasSubstr("ends within its header"));
  EXPECT_THAT(Error(Length(3) + "{}"), HasSubstr("ends within its header"));
  EXPECT_THAT(Error(Length(100'000'001) + "{}"), HasSubstr("at most 100000000"));
  EXPECT_THAT(Error(Length(UINT64_MAX) + "{}"), HasSubstr("18446744073709551615"));
  const std::string header = absl::StrCat("{", Tensor("a", "F32", "[2]", "[0,8]"), "}");
  EXPECT_THAT(Error(File(header, "1234567")), HasSubstr("the file has 7"));
  EXPECT_THAT(Error(File(header, "123456789")), HasSubstr("end at byte 8 of 9"));
  EXPECT_TRUE(Open(File(header, "12345678")).ok());
  EXPECT_TRUE(Open(File("{}", "")).ok());
}

// Somebody cuts the file short after it was found good: whoever reads on is told where it ends.
TEST_F(SafetensorsOpen, FilesThatAreCutShortWhileTheyAreRead) {
  const std::string header = absl::StrCat("{", Tensor("a", "U8", "[8]", "[0,8]"), ",",
                                          Tensor("b", "U8", "[8]", "[8,16]"), "}");
  const std::string path = Path();
  const uint64_t start = 8 + header.size();
  const auto file = Open(File(header, "01234567abcdefgh"));
  ASSERT_TRUE(file.ok()) << file.status();
  std::array<char, 8> bytes{};
  const auto error = [&](uint64_t offset) {
    const absl::Status status = file->ReadAt(offset, AsBytes(&bytes));
    EXPECT_EQ(status.code(), absl::StatusCode::kAborted);
    return std::string(status.message());
  };
  ASSERT_EQ(truncate(path.c_str(), static_cast<off_t>(start + 11)), 0);
  EXPECT_TRUE(file->ReadAt(start, AsBytes(&bytes)).ok());
  EXPECT_EQ(std::string(bytes.data(), bytes.size()), "01234567");
  EXPECT_EQ(error(start + 8),
            absl::StrCat("'", path, "': was cut short while it was read: tensor 'b' is at bytes [",
                         start + 8, ", ", start + 16, "), and the file ends at byte ", start + 11,
                         " now"));
  // The tensor that is read is named, not the one that the file ends in.
  ASSERT_EQ(truncate(path.c_str(), static_cast<off_t>(start + 2)), 0);
  EXPECT_THAT(error(start + 8), AllOf(HasSubstr("tensor 'b'"),
                                      HasSubstr(absl::StrCat("ends at byte ", start + 2, " now"))));
  EXPECT_THAT(error(start), HasSubstr("tensor 'a'"));
  ASSERT_EQ(truncate(path.c_str(), 0), 0);
  EXPECT_THAT(error(0), AllOf(HasSubstr(absl::StrCat("it had ", start + 16, " bytes")),
                              HasSubstr("ends at byte 0 now")));
  // Another file of that name is another file.
  ASSERT_EQ(std::remove(path.c_str()), 0);
  ASSERT_TRUE(Open(File(header, "01234567abcdefgh")).ok());
  EXPECT_THAT(error(start), HasSubstr("tensor 'a'"));
}

TEST_F(SafetensorsOpen, RefusesWhatIsNoFile) {
  EXPECT_THAT(std::string(SafetensorsFile::Open("/nowhere/x").status().message()),
              HasSubstr("No such file"));
  EXPECT_THAT(std::string(SafetensorsFile::Open("/").status().message()),
              HasSubstr("not a regular file"));
  ASSERT_EQ(mkfifo(Path().c_str(), 0600), 0);
  EXPECT_THAT(std::string(SafetensorsFile::Open(Path()).status().message()),
              HasSubstr("not a regular file"));
}

TEST(SafetensorsHeaderTest, RefusesOffsets) {
  const auto one = [](const std::string& shape, const std::string& offsets) {
    return absl::StrCat("{", Tensor("a", "F32", shape, offsets), "}");
  };
  EXPECT_THAT(Wrong(one("[2]", "[8,0]"), 8), HasSubstr("[8, 0)"));
  EXPECT_THAT(Wrong(one("[2]", "[0,12]"), 8), HasSubstr("the file has 8"));
  EXPECT_THAT(Wrong(one("[2]", "[18446744073709551608,18446744073709551615]"), 8),
              HasSubstr("the file has 8"));
  EXPECT_THAT(Wrong(one("[2]", "[18446744073709551616,8]"), 8), HasSubstr("64 bits"));
  EXPECT_THAT(Wrong(one("[2]", "[-8,0]"), 8), HasSubstr("negative"));
  EXPECT_THAT(Wrong(one("[2]", "[0.0,8]"), 8), HasSubstr("no integer"));
  EXPECT_THAT(Wrong(one("[2]", "[0]"), 8), HasSubstr("two data_offsets"));
  EXPECT_THAT(Wrong(one("[2]", "[0,8,16]"), 8), HasSubstr("more than two"));
  EXPECT_THAT(Wrong(one("[2]", "[[0,8]]"), 8), HasSubstr("an array"));
  EXPECT_THAT(Wrong(one("[2]", "{}"), 8), HasSubstr("an object"));
  EXPECT_THAT(Wrong(one("[2]", "\"0\""), 8), HasSubstr("a string"));
}

TEST(SafetensorsHeaderTest, RefusesShapes) {
  const auto one = [](const std::string& dtype, const std::string& shape) {
    return absl::StrCat("{", Tensor("a", dtype, shape, "[0,8]"), "}");
  };
  EXPECT_THAT(Wrong(one("F32", "[3]"), 8), HasSubstr("F32 [3] needs 12"));
  EXPECT_THAT(Wrong(one("F16", "[2]"), 8), HasSubstr("F16 [2] needs 4"));
  EXPECT_THAT(Wrong(one("F32", "[4611686018427387904,4]"), 8), HasSubstr("overflows"));
  EXPECT_THAT(Wrong(one("F32", "[4294967296,4294967296]"), 8), HasSubstr("overflows"));
  // 2^62 + 2 elements of 4 bytes are 8 bytes, modulo 2^64.
  EXPECT_THAT(Wrong(one("F32", "[4611686018427387906]"), 8), HasSubstr("overflows"));
  EXPECT_THAT(Wrong(one("F32", "[9223372036854775808]"), 8), HasSubstr("overflows"));
  EXPECT_THAT(Wrong(one("F32", "[-2]"), 8), HasSubstr("negative"));
  EXPECT_THAT(Wrong(one("F32", "2"), 8), HasSubstr("a number"));
  EXPECT_THAT(Wrong(one("F32", "null"), 8), HasSubstr("null"));
  std::string axes = "[2";
  for (int i = 0; i < 64; ++i) axes += ",1";
  EXPECT_THAT(Wrong(one("F32", axes + "]"), 8), HasSubstr("more than 64 axes"));
  EXPECT_THAT(Wrong(one("F31", "[2]"), 8), AllOf(HasSubstr("'F31'"), HasSubstr("BF16")));
}

TEST(SafetensorsHeaderTest, RefusesOverlapsAndGaps) {
  const auto two = [](const std::string& first, const std::string& second) {
    return absl::StrCat("{", Tensor("a", "U8", "[4]", first), ",", Tensor("b", "U8", "[4]", second),
                        "}");
  };
  EXPECT_TRUE(ParseSafetensorsHeader(two("[4,8]", "[0,4]"), 8).ok());
  EXPECT_THAT(Wrong(two("[0,4]", "[2,6]"), 8), HasSubstr("within the one before it"));
  EXPECT_THAT(Wrong(two("[0,4]", "[0,4]"), 8), HasSubstr("within the one before it"));
  EXPECT_THAT(Wrong(two("[0,4]", "[5,9]"), 9), HasSubstr("leaves a gap after byte 4"));
  EXPECT_THAT(Wrong(two("[1,5]", "[5,9]"), 9), HasSubstr("leaves a gap after byte 0"));
  EXPECT_THAT(Wrong("{}", 1), HasSubstr("end at byte 0 of 1"));
}

TEST(SafetensorsHeaderTest, RefusesOtherJson) {
  const std::string good = Tensor("a", "U8", "[0]", "[0,0]");
  EXPECT_THAT(Wrong("", 0), HasSubstr("begin with '{'"));
  EXPECT_THAT(Wrong("[]", 0), HasSubstr("begin with '{'"));
  EXPECT_THAT(Wrong(" {}", 0), HasSubstr("begin with '{'"));
  EXPECT_THAT(Wrong(absl::StrCat("{", good), 0), HasSubstr("not JSON"));
  EXPECT_THAT(Wrong(absl::StrCat("{", good, "}x"), 0), HasSubstr("not JSON"));
  EXPECT_THAT(Wrong("{\"a\xff\":{}}", 0), HasSubstr("not JSON"));
  EXPECT_THAT(Wrong(absl::StrCat("{", good, ",", good, "}"), 0), HasSubstr("'a' twice"));
  EXPECT_THAT(Wrong("{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\"}}", 0), HasSubstr("twice"));
  EXPECT_THAT(Wrong("{\"a\":{\"dtype\":\"U8\",\"shape\":[0]}}", 0), HasSubstr("data_offsets"));
  EXPECT_THAT(Wrong("{\"a\":{\"shape\":[0],\"data_offsets\":[0,0]}}", 0), HasSubstr("dtype"));
  EXPECT_THAT(Wrong("{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,0]}}", 0), HasSubstr("shape"));
  EXPECT_THAT(Wrong("{\"a\":{\"kind\":1}}", 0), HasSubstr("'kind'"));
  EXPECT_THAT(Wrong("{\"a\":3}", 0), AllOf(HasSubstr("'a'"), HasSubstr("a number")));
  EXPECT_THAT(Wrong("{\"a\":[]}", 0), HasSubstr("an array"));
  EXPECT_THAT(Wrong("{\"a\":null}", 0), HasSubstr("null"));
  EXPECT_THAT(Wrong("{\"__metadata__\":{\"k\":1}}", 0), HasSubstr("expected a string"));
  EXPECT_THAT(Wrong("{\"__metadata__\":{\"k\":{}}}", 0), HasSubstr("expected a string"));
  EXPECT_THAT(Wrong("{\"__metadata__\":\"k\"}", 0), HasSubstr("expected an object"));
  EXPECT_THAT(Wrong("{\"__metadata__\":{\"k\":\"\",\"k\":\"\"}}", 0), HasSubstr("twice"));
  EXPECT_THAT(Wrong("{\"__metadata__\":{},\"__metadata__\":{}}", 0), HasSubstr("twice"));
}

TEST(SafetensorsHeaderTest, MessagesStayShortAndPrintable) {
  const std::string name(1 << 20, 'x');
  EXPECT_LT(Wrong(absl::StrCat("{", Tensor(name, "U8", "[1]", "[0,0]"), "}"), 0).size(), 400u);
  EXPECT_LT(Wrong(absl::StrCat("{\"a\":{\"dtype\":\"", name, "\"}}"), 0).size(), 400u);
  EXPECT_LT(Wrong(absl::StrCat("{\"a\":{", std::string(1 << 20, '1'), "}}"), 0).size(), 400u);
  EXPECT_THAT(Wrong("{\"\\u001b[2J\":3}", 0), HasSubstr("'\\x1b[2J'"));
}

TEST(SafetensorsHeaderTest, DeepNestingEndsAtOnce) {
  const std::string deep(10'000'000, '[');
  EXPECT_THAT(Wrong(absl::StrCat("{\"a\":", deep), 0), HasSubstr("an array"));
  std::string objects;
  for (int i = 0; i < 1'000'000; ++i) objects += "{\"a\":";
  EXPECT_THAT(Wrong(objects, 0), HasSubstr("'a'"));
}

// No byte of a header may lead to a read outside the file: every change of one byte of a good file
// gives a file that is refused, or one whose tensors can be read to their ends.
TEST(SafetensorsHeaderTest, AnyByteMayChange) {
  const std::string good = absl::StrCat("{", Tensor("a", "F32", "[2,3]", "[0,24]"), ",",
                                        Tensor("b", "F16", "[4]", "[24,32]"), "}");
  std::mt19937 random(1);
  int accepted = 0;
  for (size_t at = 0; at < good.size(); ++at) {
    for (int i = 0; i < 64; ++i) {
      std::string header = good;
      header[at] = static_cast<char>(random() % 256);
      const auto parsed = ParseSafetensorsHeader(header, 32);
      if (!parsed.ok()) continue;
      ++accepted;
      for (const auto& [name, tensor] : parsed->tensors) {
        EXPECT_LE(tensor.begin, tensor.end);
        EXPECT_LE(tensor.end, 32u);
      }
    }
  }
  EXPECT_GT(accepted, 0);  // a name's letter may change
}

}  // namespace
}  // namespace lamina::cli
