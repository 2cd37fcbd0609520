#include "src/float16.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace lamina::client::internal {
namespace {

// The value of a binary format from its definition (IEEE 754): an oracle that shares no code.
double ValueOf(uint16_t half, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (half >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = half & ((1 << mantissa_bits) - 1);
  const double sign = half & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  const double fraction = std::ldexp(mantissa, -mantissa_bits);
  return exponent == 0 ? sign * std::ldexp(fraction, 1 - bias)
                       : sign * std::ldexp(1 + fraction, exponent - bias);
}

template <class ToFloat, class FromFloat>
void CheckAll(ToFloat to_float, FromFloat from_float, int exponent_bits, int mantissa_bits) {
  const uint16_t infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits);
  for (uint32_t i = 0; i <= 0xffff; ++i) {
    const auto half = static_cast<uint16_t>(i);
    const double value = ValueOf(half, exponent_bits, mantissa_bits);
    const float widened = to_float(half);
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(widened)) << i;
      ASSERT_TRUE(std::isnan(to_float(from_float(widened)))) << i;
      continue;
    }
    ASSERT_EQ(static_cast<double>(widened), value) << i;
    ASSERT_EQ(from_float(widened), half) << i;
    // The midpoint to the next one up goes to the even one, a touch to either side to the nearer.
    if ((half & 0x7fff) + 1 >= infinity) continue;
    const auto next = static_cast<uint16_t>(half + 1);
    const auto middle =
        static_cast<float>((value + ValueOf(next, exponent_bits, mantissa_bits)) / 2);
    const float away = half & 0x8000 ? -INFINITY : INFINITY;
    ASSERT_EQ(from_float(middle), half & 1 ? next : half) << i;
    ASSERT_EQ(from_float(std::nextafter(middle, 0.0f)), half) << i;
    ASSERT_EQ(from_float(std::nextafter(middle, away)), next) << i;
  }
}

TEST(Float16, EveryFp16ValueAndMidpoint) { CheckAll(FloatFromFloat16, Float16FromFloat, 5, 10); }

TEST(Float16, EveryBf16ValueAndMidpoint) { CheckAll(FloatFromBFloat16, BFloat16FromFloat, 8, 7); }

TEST(Float16, OverflowsToInfinity) {
  EXPECT_EQ(Float16FromFloat(65519.996f), 0x7bff);
  EXPECT_EQ(Float16FromFloat(65520.0f), 0x7c00);
  EXPECT_EQ(Float16FromFloat(-1e30f), 0xfc00);
  EXPECT_EQ(BFloat16FromFloat(std::numeric_limits<float>::max()), 0x7f80);
}

}  // namespace
}  // namespace lamina::client::internal
