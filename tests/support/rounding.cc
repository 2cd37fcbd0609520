#include "support/rounding.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace lamina::testing {
namespace {

struct Format {
  int mantissa_bits, exponent_bits;
};

Format FormatOf(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return {7, 8};
    case DType::kF16:
      return {10, 5};
    default:
      return {23, 8};
  }
}

// 2^n for n in [-1022, 1023]. The suites round many millions of numbers: ldexp would take most of
// their time.
double PowerOfTwo(int n) { return std::bit_cast<double>(static_cast<uint64_t>(n + 1023) << 52); }
// n with 2^n <= |value| < 2^(n + 1); of what is subnormal in double some n below -1022.
int Exponent(double value) {
  return static_cast<int>(std::bit_cast<uint64_t>(value) >> 52 & 0x7FFu) - 1023;
}
// For 0 <= value < 2^51: to the nearest integer, ties to even. There the sum's last bit is worth 1.
double Nearest(double value) { return value + 0x1p52 - 0x1p52; }

uint32_t Bits(DType dtype, double value) {
  const Format f = FormatOf(dtype);
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const uint32_t sign = std::signbit(value) ? 1u << (f.mantissa_bits + f.exponent_bits) : 0u;
  const uint32_t infinity = ((1u << f.exponent_bits) - 1u) << f.mantissa_bits;
  if (std::isnan(value)) return sign | infinity | (1u << (f.mantissa_bits - 1));
  const double magnitude = std::abs(value);
  if (std::isinf(magnitude)) return sign | infinity;
  if (magnitude == 0.0) return sign;
  // Subnormals share the smallest normal exponent.
  const int exponent = std::max(Exponent(magnitude), 1 - bias);
  // The significand in units of the last place.
  const auto units =
      static_cast<uint32_t>(Nearest(magnitude * PowerOfTwo(f.mantissa_bits - exponent)));
  // A significand that rounds up to the next power of two carries into the exponent by itself, and
  // from the largest number into infinity.
  const uint32_t hidden = 1u << f.mantissa_bits;
  if (units < hidden) return sign | units;
  const int64_t bits = (static_cast<int64_t>(exponent + bias) << f.mantissa_bits) +
                       static_cast<int64_t>(units - hidden);
  return sign | (bits >= infinity ? infinity : static_cast<uint32_t>(bits));
}

double Value(DType dtype, uint32_t bits) {
  const Format f = FormatOf(dtype);
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const uint32_t mantissa = bits & ((1u << f.mantissa_bits) - 1u);
  const auto exponent =
      static_cast<int>((bits >> f.mantissa_bits) & ((1u << f.exponent_bits) - 1u));
  const double sign = (bits >> (f.mantissa_bits + f.exponent_bits)) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << f.exponent_bits) - 1)
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * mantissa * PowerOfTwo(1 - bias - f.mantissa_bits);
  return sign * (mantissa + (1u << f.mantissa_bits)) *
         PowerOfTwo(exponent - bias - f.mantissa_bits);
}

}  // namespace

double Round(DType dtype, double value) {
  if (dtype == DType::kF32) return static_cast<double>(static_cast<float>(value));
  return Value(dtype, Bits(dtype, value));
}

std::vector<double> Round(DType dtype, std::vector<double> values) {
  for (double& value : values) value = Round(dtype, value);
  return values;
}

std::vector<uint8_t> Encode(DType dtype, const std::vector<double>& values) {
  const size_t size = SizeOf(dtype);
  std::vector<uint8_t> bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint32_t bits = Bits(dtype, values[i]);
    std::memcpy(bytes.data() + i * size, &bits, size);  // little-endian
  }
  return bytes;
}

std::vector<double> Decode(DType dtype, const std::vector<uint8_t>& bytes) {
  const size_t size = SizeOf(dtype);
  std::vector<double> values(bytes.size() / size);
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, bytes.data() + i * size, size);
    values[i] = Value(dtype, bits);
  }
  return values;
}

double UnitRoundoff(DType dtype) { return std::ldexp(1.0, -FormatOf(dtype).mantissa_bits - 1); }

double Tiny(DType dtype) { return dtype == DType::kF16 ? 0x1p-25 : 0x1p-126; }

std::vector<double> Noise(DType dtype, uint64_t seed, int64_t count, double spread, double offset) {
  std::vector<double> values(static_cast<size_t>(count));
  uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
  for (double& value : values) {
    // splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014)
    uint64_t z = (state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    const double uniform = static_cast<double>(z >> 11) * 0x1p-52 - 1.0;
    value = Round(dtype, offset + spread * uniform);
  }
  return values;
}

}  // namespace lamina::testing
