// The tests' own rounding, which the op suite's expectations rest on.
#include "support/rounding.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace lamina::testing {
namespace {

uint32_t BitsOf(DType dtype, double value) {
  const std::vector<uint8_t> bytes = Encode(dtype, {value});
  uint32_t bits = 0;
  std::memcpy(&bits, bytes.data(), bytes.size());
  return bits;
}

TEST(Rounding, KnownBits) {
  EXPECT_EQ(BitsOf(DType::kF32, 1.0), 0x3F800000u);
  EXPECT_EQ(BitsOf(DType::kBF16, 1.0), 0x3F80u);
  EXPECT_EQ(BitsOf(DType::kBF16, -3.140625), 0xC049u);
  EXPECT_EQ(BitsOf(DType::kF16, 1.0), 0x3C00u);
  EXPECT_EQ(BitsOf(DType::kF16, -2.0), 0xC000u);
  EXPECT_EQ(BitsOf(DType::kF16, 65504.0), 0x7BFFu);
  EXPECT_EQ(BitsOf(DType::kF16, 65519.99), 0x7BFFu);
  EXPECT_EQ(BitsOf(DType::kF16, 65520.0), 0x7C00u);  // half way: to infinity
  EXPECT_EQ(BitsOf(DType::kF16, 0x1p-24), 0x0001u);
  EXPECT_EQ(BitsOf(DType::kF16, 0x1p-25), 0x0000u);  // half way: to even
  EXPECT_EQ(BitsOf(DType::kF16, 0x1.8p-24), 0x0002u);
  EXPECT_EQ(BitsOf(DType::kF16, 0x1p-14), 0x0400u);
  EXPECT_EQ(BitsOf(DType::kF16, -std::numeric_limits<double>::infinity()), 0xFC00u);
  EXPECT_EQ(BitsOf(DType::kBF16, -0.0), 0x8000u);
  EXPECT_EQ(BitsOf(DType::kBF16, 1.0 + 0x1p-8), 0x3F80u);      // half way: to even
  EXPECT_EQ(BitsOf(DType::kBF16, 1.0 + 3 * 0x1p-8), 0x3F82u);  // half way: to even
  EXPECT_EQ(BitsOf(DType::kBF16, 1.0 + 0x1.001p-8), 0x3F81u);
}

TEST(Rounding, DecodeUndoesEncodeForEvery16BitPattern) {
  for (DType dtype : {DType::kBF16, DType::kF16})
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      const std::vector<uint8_t> bytes = {static_cast<uint8_t>(bits),
                                          static_cast<uint8_t>(bits >> 8)};
      const std::vector<double> value = Decode(dtype, bytes);
      if (std::isnan(value[0])) continue;
      ASSERT_EQ(Encode(dtype, value), bytes) << std::hex << bits;
    }
}

TEST(Rounding, Fp32IsTheHardwares) {
  for (double v : {0.1, -1e-45, 1e-40, 3.5e38, 16777217.0, 1.0 / 3}) {
    const auto f = static_cast<float>(v);
    uint32_t bits = 0;
    std::memcpy(&bits, &f, sizeof(bits));
    EXPECT_EQ(BitsOf(DType::kF32, v), bits) << v;
    EXPECT_EQ(Round(DType::kF32, v), static_cast<double>(f)) << v;
  }
}

TEST(Rounding, NoiseIsReproducibleAndInRange) {
  const std::vector<double> a = Noise(DType::kF32, 7, 10000, 2.0, 5.0);
  EXPECT_EQ(a, Noise(DType::kF32, 7, 10000, 2.0, 5.0));
  EXPECT_NE(a, Noise(DType::kF32, 8, 10000, 2.0, 5.0));
  double sum = 0;
  for (double v : a) {
    EXPECT_GE(v, 3.0);
    EXPECT_LE(v, 7.0);
    sum += v;
  }
  EXPECT_NEAR(sum / 10000, 5.0, 0.05);
}

}  // namespace
}  // namespace lamina::testing
