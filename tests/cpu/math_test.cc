// The vector functions against double precision, over every 251st float, for each instruction set
// that this processor has. The bounds are those that simd/math.h states.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "math_points.h"

namespace lamina::cpu {
namespace {

constexpr double kSqrtHalf = 0.70710678118654752440;
constexpr double kSqrtTwoOverPi = 0.79788456080286535588;
constexpr double kInverseSqrtTwoPi = 0.39894228040143267794;

double TanhGate(double x) {
  return 1.0 / (1.0 + std::exp(-2.0 * kSqrtTwoOverPi * (x + 0.044715 * x * x * x)));
}
double Phi(double x) { return 0.5 * std::erfc(-x * kSqrtHalf); }
double GeluErf(double x) { return x * Phi(x); }
double GeluErfDerivative(double x) {
  return Phi(x) + x * kInverseSqrtTwoPi * std::exp(-0.5 * x * x);
}
double GeluTanh(double x) { return x * TanhGate(x); }
double GeluTanhDerivative(double x) {
  const double gate = TanhGate(x);
  return gate + x * gate * (1.0 - gate) * 2.0 * kSqrtTwoOverPi * (1.0 + 3.0 * 0.044715 * x * x);
}

float FloatOf(uint32_t bits) { return __builtin_bit_cast(float, bits); }

using Function = void (*)(const MathPoints&, const float*, float*, int64_t);

template <void (*MathPoints::*kFunction)(const float*, float*, int64_t)>
void Value(const MathPoints& points, const float* x, float* out, int64_t n) {
  (points.*kFunction)(x, out, n);
}
template <void (*MathPoints::*kFunction)(const float*, float*, float*, int64_t)>
void Slope(const MathPoints& points, const float* x, float* out, int64_t n) {
  std::vector<float> value(static_cast<size_t>(n));
  (points.*kFunction)(x, value.data(), out, n);
}

// What error is allowed at x: `ulps` times 2^-23, relative to the true value; and `growth` more for
// each unit of `argument`, the exponential's argument there, whose rounding it multiplies.
struct Bound {
  double ulps = 0;
  double growth = 0;
  double (*argument)(double x) = nullptr;
  double absolute = 0;  // added
};

struct Worst {
  double share = 0;  // of the bound
  float at = 0;
};

// Over every `step`th float from -|limit| to |limit|.
Worst Measure(const MathPoints& points, Function f, double (*truth)(double), const Bound& bound,
              float limit, uint32_t step) {
  Worst worst;
  constexpr size_t kBatch = 4096;
  std::vector<float> x, y(kBatch);
  const auto flush = [&] {
    const size_t used = x.size();
    x.resize((used + 15) / 16 * 16, 0.0f);
    f(points, x.data(), y.data(), static_cast<int64_t>(x.size()));
    for (size_t i = 0; i < used; ++i) {
      const double expected = truth(double{x[i]});
      double ulps = bound.ulps;
      if (bound.argument != nullptr) ulps += bound.growth * std::abs(bound.argument(double{x[i]}));
      const double allowed = ulps * 0x1p-23 * std::abs(expected) + bound.absolute;
      const double share = std::abs(double{y[i]} - expected) / allowed;
      // A NaN must not pass for a small error.
      if (!(share <= worst.share)) worst = {share, x[i]};
    }
    x.clear();
  };
  for (uint32_t sign : {0u, 0x80000000u})
    for (uint32_t bits = 0; bits <= __builtin_bit_cast(uint32_t, limit); bits += step) {
      x.push_back(FloatOf(bits | sign));
      if (x.size() == kBatch) flush();
    }
  flush();
  return worst;
}

std::vector<const MathPoints*> Supported() {
  std::vector<const MathPoints*> all{&kBaselineMath};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(&kAvx2Math);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    all.push_back(&kAvx512Math);
  return all;
}

struct FunctionCase {
  const char* name;
  Function function;
  double (*truth)(double);
  Bound bound;
  float limit;
};

class MathBoundTest : public ::testing::TestWithParam<FunctionCase> {};

TEST_P(MathBoundTest, StaysWithinItsBound) {
#ifdef __SANITIZE_ADDRESS__
  constexpr uint32_t kStep = 16001;  // memory is looked at here: the values are another build's
#else
  constexpr uint32_t kStep = 251;
#endif
  const FunctionCase& c = GetParam();
  for (const MathPoints* points : Supported()) {
    const Worst worst = Measure(*points, c.function, c.truth, c.bound, c.limit, kStep);
    EXPECT_LE(worst.share, 1.0) << points->isa << " at " << worst.at;
    RecordProperty(std::string(points->isa) + "_share", std::to_string(worst.share));
  }
}

double HalfSquare(double x) { return std::min(0.5 * x * x, 88.0); }
double TwoU(double x) {
  return std::clamp(2.0 * kSqrtTwoOverPi * (x + 0.044715 * x * x * x), -88.0, 88.0);
}
// Only the negative side has a tail.
double HalfSquareTail(double x) { return x < 0.0 ? HalfSquare(x) : 0.0; }
double TwoUTail(double x) { return x < 0.0 ? TwoU(x) : 0.0; }

INSTANTIATE_TEST_SUITE_P(
    All, MathBoundTest,
    ::testing::Values(
        FunctionCase{"Exp",
                     Value<&MathPoints::exp>,
                     [](double x) { return std::exp(x); },
                     {.ulps = 2, .absolute = 0x1p-126},
                     88.7f},
        FunctionCase{"GeluErf",
                     Value<&MathPoints::gelu_erf>,
                     GeluErf,
                     {.ulps = 4, .growth = 0.5, .argument = HalfSquareTail, .absolute = 2e-37},
                     3e38f},
        FunctionCase{"GeluErfDerivative",
                     Slope<&MathPoints::gelu_erf_point>,
                     GeluErfDerivative,
                     {.ulps = 3, .absolute = 0x1p-23},
                     3e38f},
        FunctionCase{"GeluTanh",
                     Value<&MathPoints::gelu_tanh>,
                     GeluTanh,
                     {.ulps = 4, .growth = 1.5, .argument = TwoUTail, .absolute = 2e-37},
                     3e38f},
        FunctionCase{"GeluTanhDerivative",
                     Slope<&MathPoints::gelu_tanh_point>,
                     GeluTanhDerivative,
                     {.ulps = 3, .absolute = 0x1p-23},
                     3e38f}),
    [](const auto& param) { return std::string(param.param.name); });

TEST(MathTest, ExpAtItsEnds) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::array<float, 16> x{-infinity, -1e9f, -88.0f,   -0.0f, 0.0f,
                                89.0f,     1e9f,  infinity, nan,   -1e-45f};
  for (const MathPoints* points : Supported()) {
    std::array<float, 16> y{};
    points->exp(x.data(), y.data(), 16);
    for (size_t i : {0, 1, 2}) EXPECT_EQ(y[i], 0.0f) << points->isa << ' ' << x[i];
    for (size_t i : {3, 4, 9}) EXPECT_EQ(y[i], 1.0f) << points->isa << ' ' << x[i];
    for (size_t i : {5, 6, 7}) EXPECT_EQ(y[i], infinity) << points->isa << ' ' << x[i];
    EXPECT_TRUE(std::isnan(y[8])) << points->isa;
  }
}

TEST(MathTest, NanAndInfinityGoThroughGelu) {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::array<float, 16> x{std::numeric_limits<float>::quiet_NaN(), infinity, 3e38f, -3e38f};
  for (const MathPoints* points : Supported())
    for (bool tanh : {false, true}) {
      std::array<float, 16> y{}, point{}, dy{};
      (tanh ? points->gelu_tanh : points->gelu_erf)(x.data(), y.data(), 16);
      (tanh ? points->gelu_tanh_point : points->gelu_erf_point)(x.data(), point.data(), dy.data(),
                                                                16);
      EXPECT_EQ(std::memcmp(y.data() + 1, point.data() + 1, 3 * sizeof(float)), 0);
      EXPECT_TRUE(std::isnan(y[0]) && std::isnan(dy[0])) << points->isa << tanh;
      EXPECT_EQ(y[1], infinity) << points->isa << tanh;
      EXPECT_EQ(y[2], 3e38f) << points->isa << tanh;
      EXPECT_EQ(y[3], 0.0f) << points->isa << tanh;
      EXPECT_EQ(dy[2], 1.0f) << points->isa << tanh;
      EXPECT_EQ(dy[3], 0.0f) << points->isa << tanh;
    }
}

// What one kernel makes of GELU's input another makes again, with or without the derivative.
TEST(MathTest, APointsValueHasGelusBits) {
  std::vector<float> x(1 << 16), y(x.size()), value(x.size()), slope(x.size());
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = 12.0f * std::sin(static_cast<float>(i)) * static_cast<float>(i) /
           static_cast<float>(x.size());
  const auto n = static_cast<int64_t>(x.size());
  for (const MathPoints* points : Supported()) {
    points->gelu_erf(x.data(), y.data(), n);
    points->gelu_erf_point(x.data(), value.data(), slope.data(), n);
    EXPECT_EQ(y, value) << points->isa;
    points->gelu_tanh(x.data(), y.data(), n);
    points->gelu_tanh_point(x.data(), value.data(), slope.data(), n);
    EXPECT_EQ(y, value) << points->isa;
  }
}

}  // namespace
}  // namespace lamina::cpu
