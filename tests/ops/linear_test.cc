// Linear, LinearInputGrad, LinearWeightGrad against the oracle.
#include <cmath>
#include <vector>

#include "op_rig.h"

namespace lamina::testing {
namespace {

struct ProductCase {
  LayerShape shape;
  const char* role;  // which of the layer's products
  int64_t k, n;
  int64_t offset = 0;
  bool many_blocks = false;
  std::string Name() const { return shape.Name() + "_" + role + (offset != 0 ? "_unaligned" : ""); }
};

std::vector<ProductCase> ProductCases() {
  std::vector<ProductCase> cases;
  for (const LayerShape& s : kOpShapes) {
    // The widest would take the oracle most of the suite's time; "output" has their width.
    if (s.hidden <= 1024) cases.push_back({s, "qkv", s.hidden, 3 * s.hidden});
    cases.push_back({s, "inter", s.hidden, s.intermediate});
    cases.push_back({s, "output", s.intermediate, s.hidden});
  }
  // As many tiles as make every block of a GPU go over several, each longer than its pipeline.
  const LayerShape many{1, 2100, 456, 1, 2056};
  cases.push_back({many, "inter", many.hidden, many.intermediate, 0, true});
  cases.push_back({many, "output", many.intermediate, many.hidden, 0, true});
  cases.push_back({{3, 7, 24, 3, 40}, "inter", 24, 40, 1});
  cases.push_back({{2, 51, 64, 4, 96}, "qkv", 64, 192, 3});
  return cases;
}

class LinearTest : public OpTest<ProductCase> {
 protected:
  int64_t t() const { return param().shape.tokens(); }
  int64_t k() const { return param().k; }
  int64_t n() const { return param().n; }
  ref::ProductShape Product() const { return {t(), k(), n()}; }
  LayerDims Dims() const { return param().shape.Dims(act()); }
  // Weights of which a product of K terms has about the inputs' size.
  Vec Weights() const {
    return Noise(act(), 2, n() * k(), std::sqrt(3.0 / static_cast<double>(k())));
  }

  // Bounds a sum of |a b| over rows a and b by the product of their lengths (Cauchy-Schwarz).
  static Vec RowLengths(const Vec& m, int64_t rows, int64_t cols) {
    Vec lengths(static_cast<size_t>(rows));
    for (size_t r = 0; r < lengths.size(); ++r) {
      double squares = 0;
      for (size_t c = 0; c < static_cast<size_t>(cols); ++c)
        squares += std::pow(m[r * static_cast<size_t>(cols) + c], 2);
      lengths[r] = std::sqrt(squares);
    }
    return lengths;
  }
  static Vec Transposed(const Vec& m, int64_t rows, int64_t cols) {
    Vec result(m.size());
    const auto r_count = static_cast<size_t>(rows), c_count = static_cast<size_t>(cols);
    for (size_t r = 0; r < r_count; ++r)
      for (size_t c = 0; c < c_count; ++c) result[c * r_count + r] = m[r * c_count + c];
    return result;
  }
  // The accumulation's part of the bound of a product with `terms` terms an element.
  static Vec Accumulation(const Vec& row_lengths, const Vec& col_lengths, int64_t terms) {
    const double growth = Growth(terms);
    Vec bound;
    bound.reserve(row_lengths.size() * col_lengths.size());
    for (double r : row_lengths)
      for (double c : col_lengths) bound.push_back(growth * r * c);
    return bound;
  }
};

TEST_P(LinearTest, Forward) {
  const Vec x = Noise(act(), 1, t() * k()), w = Weights(), bias = Noise(act(), 3, n());
  const Vec product = ref::Linear(Product(), x, w, {});
  const Vec accumulation = Accumulation(RowLengths(x, t(), k()), RowLengths(w, n(), k()), k() + 1);
  const double u = UnitRoundoff(act());

  enum class Keep { kNothing, kSlope, kPre };
  struct Variant {
    bool bias, gelu;
    Keep keep;
    GeluKind kind;
  };
  for (const Variant v : {Variant{true, false, Keep::kNothing, GeluKind::kErf},
                          Variant{false, false, Keep::kNothing, GeluKind::kErf},
                          Variant{true, true, Keep::kSlope, GeluKind::kErf},
                          Variant{true, true, Keep::kPre, GeluKind::kErf},
                          Variant{true, true, Keep::kNothing, GeluKind::kTanh},
                          Variant{true, true, Keep::kSlope, GeluKind::kTanh},
                          Variant{false, true, Keep::kPre, GeluKind::kTanh}}) {
    SCOPED_TRACE(::testing::Message()
                 << "bias " << v.bias << " gelu " << v.gelu << " keep " << static_cast<int>(v.keep)
                 << " kind " << static_cast<int>(v.kind));
    const auto kept = [&](OpRun& run, Keep what, const char* name) {
      return v.keep == what ? run.Out(name, act(), {t(), n()}) : TensorView{};
    };
    const Results results = RunTwice(
        backend(),
        [&](OpRun& run) {
          return backend().Linear(run.WorkspaceFor(Dims()),
                                  {.x = run.In(act(), {t(), k()}, x),
                                   .w = run.In(act(), {n(), k()}, w),
                                   .bias = v.bias ? run.In(act(), {n()}, bias) : TensorView{},
                                   .y = run.Out("y", act(), {t(), n()}),
                                   .apply_gelu = v.gelu,
                                   .gelu = v.kind,
                                   .slope = kept(run, Keep::kSlope, "slope"),
                                   .pre = kept(run, Keep::kPre, "pre")});
        },
        param().offset);

    Vec pre = product, pre_bound(pre.size()), y(pre.size()), y_bound(pre.size());
    Vec slope(pre.size()), slope_bound(pre.size());
    for (size_t i = 0; i < pre.size(); ++i) {
      const double b = v.bias ? bias[i % static_cast<size_t>(n())] : 0.0;
      pre[i] += b;
      const double sum = accumulation[i] + kF32Roundoff * (std::abs(b) + std::abs(pre[i]));
      pre_bound[i] = sum + u * std::abs(pre[i]) + Tiny(act());
      if (v.gelu) {
        // gelu may be taken of the sum or of the sum as `pre` holds it; its slope stays below 1.13.
        // It loses a few ulps of x * (1 + erf) in fp32.
        y[i] = ref::Gelu(v.kind, pre[i]);
        y_bound[i] = u * std::abs(y[i]) + 1.13 * pre_bound[i] +
                     8 * kF32Roundoff * std::abs(pre[i]) + Tiny(act());
        // The slope's own slope is largest at 0, sqrt(2 / pi) in either form.
        slope[i] = ref::GeluDerivative(v.kind, pre[i]);
        slope_bound[i] =
            u * std::abs(slope[i]) + 0.8 * pre_bound[i] + GeluDerivativeError(pre[i]) + Tiny(act());
      } else {
        y[i] = pre[i];
        y_bound[i] = pre_bound[i];
      }
    }
    ExpectWithin("y", results.Values("y", act()), y, y_bound);
    if (v.keep == Keep::kPre) ExpectWithin("pre", results.Values("pre", act()), pre, pre_bound);
    if (v.keep == Keep::kSlope)
      ExpectWithin("slope", results.Values("slope", act()), slope, slope_bound);
  }
}

TEST_P(LinearTest, InputGrad) {
  const Vec dy = Noise(act(), 4, t() * n()), w = Weights(), before = Noise(act(), 10, t() * k());
  const Vec product = ref::LinearInputGrad(Product(), dy, w);
  const Vec accumulation =
      Accumulation(RowLengths(dy, t(), n()), RowLengths(Transposed(w, n(), k()), k(), n()), n());
  for (const bool accumulate : {false, true}) {
    SCOPED_TRACE(accumulate ? "onto what is there" : "by itself");
    const Results results = RunTwice(
        backend(),
        [&](OpRun& run) {
          return backend().LinearInputGrad(
              run.WorkspaceFor(Dims()),
              {.dy = run.In(act(), {t(), n()}, dy),
               .w = run.In(act(), {n(), k()}, w),
               .dx = accumulate ? run.InOut("dx", act(), {t(), k()}, before)
                                : run.Out("dx", act(), {t(), k()}),
               .accumulate = accumulate});
        },
        param().offset);
    Vec dx = product, bound = accumulation;
    for (size_t i = 0; i < dx.size(); ++i) {
      if (accumulate) {
        // The product may be as act has it when it is added.
        bound[i] += UnitRoundoff(act()) * std::abs(dx[i]) + Tiny(act()) +
                    kF32Roundoff * (std::abs(before[i]) + std::abs(dx[i] + before[i]));
        dx[i] += before[i];
      }
      bound[i] += UnitRoundoff(act()) * std::abs(dx[i]) + Tiny(act());
    }
    ExpectWithin("dx", results.Values("dx", act()), dx, bound);
  }
}

TEST_P(LinearTest, InputGradThroughGelu) {
  const Vec dy = Noise(act(), 4, t() * n()), w = Weights(), pre = Noise(act(), 9, t() * k(), 3.0);
  // Any numbers: nothing says that they are GELU's.
  const Vec slopes = Noise(act(), 10, t() * k(), 1.2);
  const Vec dbias_before = Noise(DType::kF32, 8, k(), 3.0);
  const Vec product = ref::LinearInputGrad(Product(), dy, w);
  const Vec accumulation =
      Accumulation(RowLengths(dy, t(), n()), RowLengths(Transposed(w, n(), k()), k(), n()), n());
  const double u = UnitRoundoff(act());
  struct Variant {
    GeluKind kind;
    bool by_pre, dbias, in_place = false, any_order = false;
  };
  for (const Variant v :
       {Variant{.kind = GeluKind::kErf, .by_pre = false, .dbias = true},
        Variant{.kind = GeluKind::kTanh, .by_pre = false, .dbias = false},
        Variant{.kind = GeluKind::kErf, .by_pre = true, .dbias = true, .in_place = true},
        Variant{.kind = GeluKind::kTanh, .by_pre = true, .dbias = true},
        Variant{.kind = GeluKind::kErf, .by_pre = true, .dbias = false},
        Variant{.kind = GeluKind::kTanh, .by_pre = false, .dbias = true, .any_order = true},
        Variant{.kind = GeluKind::kTanh, .by_pre = true, .dbias = true, .any_order = true}}) {
    SCOPED_TRACE(::testing::Message()
                 << "kind " << static_cast<int>(v.kind) << " by pre " << v.by_pre << " in place "
                 << v.in_place << " dbias " << v.dbias << " any order " << v.any_order);
    const auto op = [&](OpRun& run) {
      TensorView seen, y_again;
      if (v.by_pre && v.in_place) {
        seen = y_again = run.InOut("y_again", act(), {t(), k()}, pre);
      } else if (v.by_pre) {
        seen = run.In(act(), {t(), k()}, pre);
        y_again = run.Out("y_again", act(), {t(), k()});
      }
      return backend().LinearInputGrad(
          run.WorkspaceFor(Dims()),
          {.dy = run.In(act(), {t(), n()}, dy),
           .w = run.In(act(), {n(), k()}, w),
           .dx = run.Out("dx", act(), {t(), k()}),
           .apply_gelu = true,
           .gelu = v.kind,
           .slope = v.by_pre ? TensorView{} : run.In(act(), {t(), k()}, slopes),
           .pre = seen,
           .y_again = y_again,
           .dbias = v.dbias ? run.InOut("dbias", DType::kF32, {k()}, dbias_before) : TensorView{}});
    };
    const Results results = v.any_order ? RunInAnyOrder(backend(), op, param().offset)
                                        : RunTwice(backend(), op, param().offset);
    Vec dx(pre.size()), errors(pre.size()), bound(pre.size()), y(pre.size()), y_bound(pre.size());
    for (size_t e = 0; e < pre.size(); ++e) {
      const double slope = v.by_pre ? ref::GeluDerivative(v.kind, pre[e]) : slopes[e];
      // That of pre is rounded as if it had been kept.
      const double slope_error =
          v.by_pre ? u * std::abs(slope) + GeluDerivativeError(pre[e]) + Tiny(act()) : 0.0;
      dx[e] = product[e] * slope;
      // The product may be rounded before the slope is applied.
      errors[e] = std::abs(slope) * (accumulation[e] + u * std::abs(product[e]) + Tiny(act())) +
                  slope_error * std::abs(product[e]) + Tiny(act());
      bound[e] = u * std::abs(dx[e]) + errors[e];
      y[e] = ref::Gelu(v.kind, pre[e]);
      y_bound[e] = u * std::abs(y[e]) + 8 * kF32Roundoff * std::abs(pre[e]) + Tiny(act());
    }
    ExpectWithin("dx", results.Values("dx", act()), dx, bound);
    if (v.by_pre) ExpectWithin("y_again", results.Values("y_again", act()), y, y_bound);
    if (!v.dbias) continue;
    const Bounded sums = ColumnSumsAddedTo(dbias_before, act(), dx, errors);
    ExpectWithin("dbias", results.Values("dbias", DType::kF32), sums.want, sums.bound);
  }
}

// gelu_checkpoint's gradients have the bits of the run without it: the slopes that Linear keeps and
// those that LinearInputGrad makes of pre are the same, and so are Linear's y and y_again; and,
// where a backend has a pass of its own beside a product with GELU in it, theirs too.
TEST_P(LinearTest, TheSlopesAndWhatGeluSawGiveTheSameBits) {
  const Vec x = Noise(act(), 1, t() * k(), 2.0), w = Weights(), bias = Noise(act(), 3, n());
  // Of a product the other way: its input gradient is as wide as y.
  const Vec back = Noise(act(), 4, t() * k()), back_w = Noise(act(), 5, k() * n(), 0.1);
  const Vec dbias_before = Noise(DType::kF32, 8, n(), 3.0);
  for (const GeluKind kind : {GeluKind::kErf, GeluKind::kTanh}) {
    SCOPED_TRACE(static_cast<int>(kind));
    const auto forward = [&](bool pre) {
      return RunTwice(
          backend(),
          [&](OpRun& run) {
            return backend().Linear(
                run.WorkspaceFor(Dims()),
                {.x = run.In(act(), {t(), k()}, x),
                 .w = run.In(act(), {n(), k()}, w),
                 .bias = run.In(act(), {n()}, bias),
                 .y = run.Out("y", act(), {t(), n()}),
                 .apply_gelu = true,
                 .gelu = kind,
                 .slope = pre ? TensorView{} : run.Out("kept", act(), {t(), n()}),
                 .pre = pre ? run.Out("kept", act(), {t(), n()}) : TensorView{}});
          },
          param().offset);
    };
    const Results by_slope = forward(false), by_pre = forward(true);
    EXPECT_EQ(by_slope.Bytes("y"), by_pre.Bytes("y"));
    const Vec slope = by_slope.Values("kept", act()), pre = by_pre.Values("kept", act());

    const Results pass = RunTwice(
        backend(),
        [&](OpRun& run) {
          return backend().Gelu(run.WorkspaceFor(Dims()),
                                {.x = run.In(act(), {t(), n()}, pre),
                                 .y = run.Out("y", act(), {t(), n()}),
                                 .slope = run.Out("kept", act(), {t(), n()}),
                                 .gelu = kind});
        },
        param().offset);
    EXPECT_EQ(pass.Bytes("y"), by_slope.Bytes("y"));
    EXPECT_EQ(pass.Bytes("kept"), by_slope.Bytes("kept"));

    const auto backward = [&](bool with_pre) {
      return RunTwice(
          backend(),
          [&](OpRun& run) {
            const TensorView seen =
                with_pre ? run.InOut("y", act(), {t(), n()}, pre) : TensorView{};
            return backend().LinearInputGrad(
                run.WorkspaceFor(Dims()),
                {.dy = run.In(act(), {t(), k()}, back),
                 .w = run.In(act(), {k(), n()}, back_w),
                 .dx = run.Out("dx", act(), {t(), n()}),
                 .apply_gelu = true,
                 .gelu = kind,
                 .slope = with_pre ? TensorView{} : run.In(act(), {t(), n()}, slope),
                 .pre = seen,
                 .y_again = seen,
                 .dbias = run.InOut("dbias", DType::kF32, {n()}, dbias_before)});
          },
          param().offset);
    };
    const Results of_slope = backward(false), of_pre = backward(true);
    EXPECT_EQ(of_slope.Bytes("dx"), of_pre.Bytes("dx"));
    EXPECT_EQ(of_slope.Bytes("dbias"), of_pre.Bytes("dbias"));
    EXPECT_EQ(of_pre.Bytes("y"), by_slope.Bytes("y"));
  }
}

TEST_P(LinearTest, WeightGradAddsToWhatIsThere) {
  const Vec dy = Noise(act(), 5, t() * n()), x = Noise(act(), 6, t() * k());
  const Vec dw_before = Noise(DType::kF32, 7, n() * k(), 3.0);
  const Vec dw = ref::LinearWeightGrad(Product(), dy, x);
  const Vec dy_lengths = RowLengths(Transposed(dy, t(), n()), n(), t());
  const Vec accumulation =
      Accumulation(dy_lengths, RowLengths(Transposed(x, t(), k()), k(), t()), t());
  const double growth = Growth(t());
  Vec want_dw = dw, dw_bound = accumulation;
  for (size_t i = 0; i < dw.size(); ++i) {
    want_dw[i] += dw_before[i];
    // The old value may be added at the end or be what the accumulation starts from.
    dw_bound[i] += (kF32Roundoff + growth) * (std::abs(dw_before[i]) + std::abs(want_dw[i]));
  }
  for (const bool any_order : {false, true}) {
    SCOPED_TRACE(any_order ? "in any order" : "deterministic");
    const auto op = [&](OpRun& run) {
      return backend().LinearWeightGrad(
          run.WorkspaceFor(Dims()), {.dy = run.In(act(), {t(), n()}, dy),
                                     .x = run.In(act(), {t(), k()}, x),
                                     .dw = run.InOut("dw", DType::kF32, {n(), k()}, dw_before)});
    };
    const Results results = any_order ? RunInAnyOrder(backend(), op, param().offset)
                                      : RunTwice(backend(), op, param().offset);
    ExpectWithin("dw", results.Values("dw", DType::kF32), want_dw, dw_bound);
  }
}

LAMINA_OP_SUITE(LinearTest, ProductCases());

}  // namespace
}  // namespace lamina::testing
