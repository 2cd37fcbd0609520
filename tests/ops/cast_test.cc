// Cast: every bit, for every pair of float dtypes.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "op_rig.h"

namespace lamina::testing {
namespace {

struct CastCase {
  DType to;
  int64_t offset;
  std::string Name() const {
    return std::string("to_") + ::lamina::Name(to) + (offset != 0 ? "_unaligned" : "");
  }
};

constexpr CastCase kCastCases[] = {{DType::kF32, 0},  {DType::kF32, 1}, {DType::kBF16, 0},
                                   {DType::kBF16, 1}, {DType::kF16, 0}, {DType::kF16, 1}};

class CastTest : public OpTest<CastCase> {};

// Ties, carries, overflow to infinity, subnormals of each dtype, signed zeros, NaN; then noise.
Vec Interesting() {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  Vec values = {0.0, -0.0, 1.0, -1.0, kInf, -kInf, std::nan("")};
  for (const double ulp : {0x1p-7, 0x1p-10, 0x1p-23})  // of 1 in bf16, fp16, fp32
    for (const double half_ulps : {0.5, 1.0, 1.5, 2.0, 3.0, 0.5 + 0x1p-8, 1.5 - 0x1p-8})
      for (const double sign : {1.0, -1.0}) values.push_back(sign * (1.0 + half_ulps * ulp));
  for (const double v : {65504.0, 65519.996, 65520.0, 65536.0, 3.3895313892515355e38,
                         3.3961775292304e38, 3.4028234663852886e38})
    for (const double sign : {1.0, -1.0}) values.push_back(sign * v);
  // Around fp16's smallest normal and its subnormals.
  for (const double v : {0x1p-14, 0x1.ffcp-15, 0x1.ffep-15, 0x1p-24, 0x1.8p-24, 0x1p-25,
                         0x1.000002p-25, 0x1p-26, 0x1.4p-20})
    for (const double sign : {1.0, -1.0}) values.push_back(sign * v);
  for (int e = -120; e <= 120; e += 3) {
    const Vec noise = Noise(DType::kF32, static_cast<uint64_t>(e + 500), 9);
    for (const double v : noise) values.push_back(std::ldexp(v, e));
  }
  return values;
}

TEST_P(CastTest, RoundsToNearestEven) {
  const DType to = param().to;
  for (const int64_t count : {int64_t{0}, int64_t{1}, int64_t{7}, int64_t{100003}}) {
    // 0 stands for the interesting values, in an odd number.
    const Vec src = Round(act(), count == 0 ? Interesting() : Noise(DType::kF32, 61, count, 3.0));
    const auto n = static_cast<int64_t>(src.size());
    SCOPED_TRACE(n);
    const Results results = RunTwice(
        backend(),
        [&](OpRun& run) {
          return backend().Cast(
              Workspace{}, {.src = run.In(act(), {n}, src), .dst = run.Out("dst", to, {1, n})});
        },
        param().offset);
    const Vec got = results.Values("dst", to);
    for (size_t i = 0; i < src.size(); ++i) {
      if (std::isnan(src[i])) {
        EXPECT_TRUE(std::isnan(got[i])) << i;
        continue;
      }
      const double want = Round(to, src[i]);
      ASSERT_TRUE(got[i] == want && std::signbit(got[i]) == std::signbit(want))
          << src[i] << " became " << got[i] << ", not " << want << ", at " << i;
    }
  }
}

LAMINA_OP_SUITE(CastTest, kCastCases);

}  // namespace
}  // namespace lamina::testing
