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
  for (const GeluKind kind : {GeluKind::kErf, GeluKind::kTanh})
    for (const bool in_place : {false, true}) {
      SCOPED_TRACE(::testing::Message()
                   << "kind " << static_cast<int>(kind) << " in place " << in_place);
      const Results results = RunTwice(
          backend(),
          [&](OpRun& run) {
            const TensorView in =
                in_place ? run.InOut("y", act(), {t(), i()}, x) : run.In(act(), {t(), i()}, x);
            const TensorView out = in_place ? in : run.Out("y", act(), {t(), i()});
            return backend().Gelu(run.WorkspaceFor(Dims()), {.x = in, .y = out, .gelu = kind});
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
    }
}

TEST_P(GeluTest, Backward) {
  const Vec x = Inputs(), dy = Noise(act(), 2, t() * i());
  const Vec dbias_before = Noise(DType::kF32, 3, i(), 3.0);
  const double u = UnitRoundoff(act());
  struct Variant {
    GeluKind kind;
    bool in_place, dbias, any_order = false;
  };
  for (const Variant v :
       {Variant{GeluKind::kErf, false, true}, Variant{GeluKind::kErf, true, false},
        Variant{GeluKind::kTanh, true, true}, Variant{GeluKind::kTanh, false, false},
        Variant{GeluKind::kErf, false, true, true}}) {
    SCOPED_TRACE(::testing::Message()
                 << "kind " << static_cast<int>(v.kind) << " in place " << v.in_place << " dbias "
                 << v.dbias << " any order " << v.any_order);
    const auto op = [&](OpRun& run) {
      const TensorView in =
          v.in_place ? run.InOut("dx", act(), {t(), i()}, dy) : run.In(act(), {t(), i()}, dy);
      return backend().GeluBackward(
          run.WorkspaceFor(Dims()),
          {.x = run.In(act(), {t(), i()}, x),
           .dy = in,
           .dx = v.in_place ? in : run.Out("dx", act(), {t(), i()}),
           .dbias = v.dbias ? run.InOut("dbias", DType::kF32, {i()}, dbias_before) : TensorView{},
           .gelu = v.kind});
    };
    const Results results = v.any_order ? RunInAnyOrder(backend(), op, param().offset)
                                        : RunTwice(backend(), op, param().offset);
    Vec want(x.size()), errors(x.size()), bound(x.size());
    for (size_t e = 0; e < x.size(); ++e) {
      want[e] = dy[e] * ref::GeluDerivative(v.kind, x[e]);
      errors[e] = GeluDerivativeError(x[e]) * std::abs(dy[e]) + Tiny(act());
      bound[e] = u * std::abs(want[e]) + errors[e];
    }
    ExpectWithin("dx", results.Values("dx", act()), want, bound);
    if (!v.dbias) continue;
    const Bounded sums = ColumnSumsAddedTo(dbias_before, act(), want, errors);
    ExpectWithin("dbias", results.Values("dbias", DType::kF32), sums.want, sums.bound);
  }
}

LAMINA_OP_SUITE(GeluTest, GeluCases());

}  // namespace
}  // namespace lamina::testing
