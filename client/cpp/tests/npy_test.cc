#include "cli/npy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"

namespace lamina::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class Npy : public ::testing::Test {
 protected:
  std::string Path() const {
    return absl::StrCat(::testing::TempDir(), "lamina_npy_test_", getpid(), ".npy");
  }
  void TearDown() override { std::remove(Path().c_str()); }

  void Write(const std::string& bytes) { std::ofstream(Path(), std::ios::binary) << bytes; }
  std::string Error(const std::string& bytes) {
    Write(bytes);
    return std::string(ReadNpy(Path()).status().message());
  }
  // A version 1 file around a header and data.
  static std::string File(const std::string& header, const std::string& data) {
    std::string bytes("\x93NUMPY\x01\x00", 8);
    bytes += static_cast<char>(header.size() & 0xff);
    bytes += static_cast<char>(header.size() >> 8);
    return bytes + header + data;
  }
  static std::string Dict(const std::string& descr, const std::string& shape,
                          const std::string& fortran = "False") {
    return "{'descr': '" + descr + "', 'fortran_order': " + fortran + ", 'shape': " + shape + ", }";
  }
};

TEST_F(Npy, WritesWhatItReads) {
  const float values[] = {1, -2, 3.5, 4, 5, 6};
  NpyArray array{.type = NpyArray::Type::kFloat32, .shape = {2, 3}};
  array.data.assign(reinterpret_cast<const char*>(values), sizeof(values));
  ASSERT_TRUE(WriteNpy(Path(), array).ok());
  const NpyArray back = ReadNpy(Path()).value();
  EXPECT_THAT(back.shape, ElementsAre(2, 3));
  EXPECT_EQ(back.descr(), "<f4");
  EXPECT_THAT(back.ToFloats().value(), ElementsAre(1, -2, 3.5, 4, 5, 6));
  // NumPy aligns the data to 64 bytes and ends the header with a line's end.
  std::ifstream file(Path(), std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), {});
  EXPECT_EQ((bytes.size() - sizeof(values)) % 64, 0u);
  EXPECT_EQ(bytes[bytes.size() - sizeof(values) - 1], '\n');
}

TEST_F(Npy, OneAxisKeepsItsComma) {
  NpyArray array{.type = NpyArray::Type::kInt32, .shape = {2}, .data = std::string(8, '\0')};
  ASSERT_TRUE(WriteNpy(Path(), array).ok());
  EXPECT_THAT(ReadNpy(Path()).value().shape, ElementsAre(2));
}

TEST_F(Npy, ReadsOtherTypes) {
  Write(File(Dict("<f2", "(2,)"), std::string("\x00\x3c\x00\xc0", 4)));
  EXPECT_THAT(ReadNpy(Path()).value().ToFloats().value(), ElementsAre(1, -2));
  const int64_t longs[] = {7, -9};
  Write(File(Dict("<i8", "(2,)"), std::string(reinterpret_cast<const char*>(longs), 16)));
  EXPECT_THAT(ReadNpy(Path()).value().ToInts().value(), ElementsAre(7, -9));
  EXPECT_FALSE(ReadNpy(Path()).value().ToFloats().ok());
  const int64_t wide[] = {int64_t{1} << 31};
  Write(File(Dict("<i8", "(1,)"), std::string(reinterpret_cast<const char*>(wide), 8)));
  EXPECT_THAT(std::string(ReadNpy(Path()).value().ToInts().status().message()),
              HasSubstr("2147483648"));
}

TEST_F(Npy, ReadsVersion2AndOtherKeyOrders) {
  const std::string header = "{ \"shape\":(1,1), 'fortran_order':False ,'descr':'<f4'}";
  std::string bytes("\x93NUMPY\x02\x00", 8);
  bytes += static_cast<char>(header.size());
  bytes += std::string(3, '\0');
  Write(bytes + header + std::string(4, '\0'));
  const auto array = ReadNpy(Path());
  ASSERT_TRUE(array.ok()) << array.status();
  EXPECT_THAT(array->shape, ElementsAre(1, 1));
}

TEST_F(Npy, RefusesDamagedFiles) {
  EXPECT_THAT(Error("PK\x03\x04 not this at all"), HasSubstr("is not a .npy file"));
  EXPECT_THAT(Error(""), HasSubstr("is not a .npy file"));
  EXPECT_THAT(Error(File(Dict("<f4", "(2,)"), "1234")), HasSubstr("has 4 bytes of elements"));
  EXPECT_THAT(Error(File(Dict("<f4", "(1,)"), "12345678")), HasSubstr("needs 4"));
  EXPECT_THAT(Error(File(Dict(">f4", "(1,)"), "1234")), HasSubstr("'>f4'"));
  EXPECT_THAT(Error(File(Dict("<c8", "(1,)"), "12345678")), HasSubstr("'<c8'"));
  EXPECT_THAT(Error(File(Dict("<f4", "(1, 1)", "True"), "1234")), HasSubstr("Fortran"));
  EXPECT_THAT(Error(File(Dict("<f4", "(4611686018427387904, 4)"), "")), HasSubstr("overflows"));
  EXPECT_THAT(Error(File(Dict("<f4", "(99999999999999999999,)"), "")), HasSubstr("header"));
  EXPECT_THAT(Error(File(Dict("<f4", "(-1,)"), "")), HasSubstr("header"));
  EXPECT_THAT(Error(File("{'descr': '<f4'}", "1234")), HasSubstr("header"));
  EXPECT_THAT(Error(File("__import__('os')", "1234")), HasSubstr("header"));
  EXPECT_THAT(Error(std::string("\x93NUMPY\x01\x00\xff\x7f{'descr'", 18)),
              HasSubstr("ends within its header"));
  EXPECT_THAT(Error(std::string("\x93NUMPY\x09\x00\x04\x00{}  ", 14)), HasSubstr("version 9"));
}

TEST_F(Npy, NamesTheFile) {
  const auto missing = ReadNpy("/nowhere/x.npy");
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(missing.status().message()),
              ::testing::AllOf(HasSubstr("/nowhere/x.npy"), HasSubstr("No such file")));
  EXPECT_EQ(WriteNpy("/nowhere/x.npy", {}).code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace lamina::cli
