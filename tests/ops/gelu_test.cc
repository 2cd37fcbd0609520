// Gelu and GeluBackward against the oracle.
#include <cmath>
#include <vector>

#include "op_rig.h"

namespace lamina::testing {
namespace {

struct GeluCase {
  LayerShape shape;
  int64_t offset = 0;
  std::string Name() const { return shape.Name() + (offset != 0 ? "_unaligned" : ""); }
};

std::vector<GeluCase> GeluCases() {
  std::vector<GeluCase> cases;
  for (const LayerShape& s : kOpShapes) cases.push_back({s});
  cases.push_back({{2, 3, 5, 1, 7}, 1});
  cases.push_back({{2, 51, 64, 4, 96}, 5});
  return cases;
}

class GeluTest : public OpTest<GeluCase> {
 protected:
  int64_t t() const { return param().shape.tokens(); }
  int64_t i() const { return param().shape.intermediate; }
  LayerDims Dims() const { return param().shape.Dims(act()); }
  // Where gelu bends, its tails, and the points at which a naive formula overflows.
  Vec Inputs() const {
    Vec x = Noise(act(), 1, t() * i(), 4.0);
    const double special[] = {0.0, -0.0, 1e-4, -1e-4, 12.0, -12.0, 60.0, -60.0, 1000.0, -1000.0};
    for (size_t e = 0; e < x.size() / 8 && e < std::size(special); ++e)
      x[e * 7] = Round(act(), special[e]);
    return x;
  }
};

TEST_P(GeluTest, Forward) {
  const Vec x = Inputs();
  enum class Place { kApart, kYOverX, kSlopeOverX };
  struct Variant {
    bool slope;
    Place place;
  };
  for (const GeluKind kind : {GeluKind::kErf, GeluKind::kTanh})
    for (const Variant v : {Variant{false, Place::kApart}, Variant{false, Place::kYOverX},
                            Variant{true, Place::kYOverX}, Variant{true, Place::kSlopeOverX}}) {
      SCOPED_TRACE(::testing::Message() << "kind " << static_cast<int>(kind) << " slope " << v.slope
                                        << " place " << static_cast<int>(v.place));
      const Results results = RunTwice(
          backend(),
          [&](OpRun& run) {
            const Shape shape{t(), i()};
            GeluArgs args{.gelu = kind};
            if (v.place == Place::kYOverX) {
              args.x = args.y = run.InOut("y", act(), shape, x);
            } else {
              args.y = run.Out("y", act(), shape);
            }
            if (v.place == Place::kSlopeOverX) {
              args.x = args.slope = run.InOut("slope", act(), shape, x);
            } else if (v.slope) {
              args.slope = run.Out("slope", act(), shape);
            }
            if (!args.x) args.x = run.In(act(), shape, x);
            return backend().Gelu(run.WorkspaceFor(Dims()), args);
          },
          param().offset);
      Vec want(x.size()), bound(x.size());
      for (size_t e = 0; e < x.size(); ++e) {
        want[e] = ref::Gelu(kind, x[e]);
        // 1 + erf is known to a few ulps of 1 in fp32. Beyond |x| = 8 it is 0 or 2 to all bits, but
        // for tails below e^-28.
        bound[e] = UnitRoundoff(act()) * std::abs(want[e]) +
                   8 * kF32Roundoff * std::min(std::abs(x[e]), 8.0) + Tiny(act());
      }
      ExpectWithin("y", results.Values("y", act()), want, bound);
      if (!v.slope) continue;
      for (size_t e = 0; e < x.size(); ++e) {
        want[e] = ref::GeluDerivative(kind, x[e]);
        bound[e] =
            UnitRoundoff(act()) * std::abs(want[e]) + GeluDerivativeError(x[e]) + Tiny(act());
      }
      ExpectWithin("slope", results.Values("slope", act()), want, bound);
    }
}

TEST_P(GeluTest, Backward) {
  const Vec x = Inputs(), dy = Noise(act(), 2, t() * i());
  // Any numbers: nothing says that they are GELU's.
  const Vec slopes = Noise(act(), 4, t() * i(), 1.2);
  const Vec dbias_before = Noise(DType::kF32, 3, i(), 3.0);
  const double u = UnitRoundoff(act());
  struct Variant {
    GeluKind kind;
    bool by_x, in_place, dbias, any_order = false;
  };
  for (const Variant v :
       {Variant{GeluKind::kErf, true, false, true}, Variant{GeluKind::kErf, true, true, false},
        Variant{GeluKind::kTanh, true, true, true}, Variant{GeluKind::kTanh, true, false, false},
        Variant{GeluKind::kErf, true, false, true, true},
        Variant{GeluKind::kErf, false, true, true}, Variant{GeluKind::kTanh, false, false, false},
        Variant{GeluKind::kErf, false, true, true, true}}) {
    SCOPED_TRACE(::testing::Message()
                 << "kind " << static_cast<int>(v.kind) << " by x " << v.by_x << " in place "
                 << v.in_place << " dbias " << v.dbias << " any order " << v.any_order);
    const auto op = [&](OpRun& run) {
      const Shape shape{t(), i()};
      GeluBackwardArgs args{.gelu = v.kind};
      if (!v.by_x) {
        args.slope = run.In(act(), shape, slopes);
      } else if (v.in_place) {
        args.x = args.y_again = run.InOut("y_again", act(), shape, x);
      } else {
        args.x = run.In(act(), shape, x);
        args.y_again = run.Out("y_again", act(), shape);
      }
      args.dy = v.in_place ? run.InOut("dx", act(), shape, dy) : run.In(act(), shape, dy);
      args.dx = v.in_place ? args.dy : run.Out("dx", act(), shape);
      if (v.dbias) args.dbias = run.InOut("dbias", DType::kF32, {i()}, dbias_before);
      return backend().GeluBackward(run.WorkspaceFor(Dims()), args);
    };
    const Results results = v.any_order ? RunInAnyOrder(backend(), op, param().offset)
                                        : RunTwice(backend(), op, param().offset);
    Vec want(x.size()), errors(x.size()), bound(x.size());
    for (size_t e = 0; e < x.size(); ++e) {
      const double slope = v.by_x ? ref::GeluDerivative(v.kind, x[e]) : slopes[e];
      // That of x is rounded as if it had been kept.
      const double slope_error =
          v.by_x ? u * std::abs(slope) + GeluDerivativeError(x[e]) + Tiny(act()) : 0.0;
      want[e] = dy[e] * slope;
      errors[e] = slope_error * std::abs(dy[e]) + Tiny(act());
      bound[e] = u * std::abs(want[e]) + errors[e];
    }
    ExpectWithin("dx", results.Values("dx", act()), want, bound);
    if (v.dbias) {
      const Bounded sums = ColumnSumsAddedTo(dbias_before, act(), want, errors);
      ExpectWithin("dbias", results.Values("dbias", DType::kF32), sums.want, sums.bound);
    }
    if (!v.by_x) continue;
    for (size_t e = 0; e < x.size(); ++e) {
      want[e] = ref::Gelu(v.kind, x[e]);
      bound[e] =
          u * std::abs(want[e]) + 8 * kF32Roundoff * std::min(std::abs(x[e]), 8.0) + Tiny(act());
    }
    ExpectWithin("y_again", results.Values("y_again", act()), want, bound);
  }
}

LAMINA_OP_SUITE(GeluTest, GeluCases());

}  // namespace
}  // namespace lamina::testing
