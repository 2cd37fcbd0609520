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

  struct Variant {
    bool bias, gelu, pre;
    GeluKind kind;
  };
  for (const Variant v :
       {Variant{true, false, false, GeluKind::kErf}, Variant{false, false, false, GeluKind::kErf},
        Variant{true, true, true, GeluKind::kErf}, Variant{true, true, false, GeluKind::kTanh},
        Variant{false, true, true, GeluKind::kTanh}}) {
    SCOPED_TRACE(::testing::Message() << "bias " << v.bias << " gelu " << v.gelu << " pre " << v.pre
                                      << " kind " << static_cast<int>(v.kind));
    const Results results = RunTwice(
        backend(),
        [&](OpRun& run) {
          return backend().Linear(
              run.WorkspaceFor(Dims()),
              {.x = run.In(act(), {t(), k()}, x),
               .w = run.In(act(), {n(), k()}, w),
               .bias = v.bias ? run.In(act(), {n()}, bias) : TensorView{},
               .y = run.Out("y", act(), {t(), n()}),
               .apply_gelu = v.gelu,
               .gelu = v.kind,
               .pre = v.pre ? run.Out("pre", act(), {t(), n()}) : TensorView{}});
        },
        param().offset);

    Vec pre = product, pre_bound(pre.size()), y(pre.size()), y_bound(pre.size());
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
      } else {
        y[i] = pre[i];
        y_bound[i] = pre_bound[i];
      }
    }
    ExpectWithin("y", results.Values("y", act()), y, y_bound);
    if (v.pre) ExpectWithin("pre", results.Values("pre", act()), pre, pre_bound);
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
      // As one more term of the sum.
      const double added = accumulate ? before[i] : 0.0;
      dx[i] += added;
      bound[i] += kF32Roundoff * (std::abs(added) + std::abs(dx[i])) +
                  UnitRoundoff(act()) * std::abs(dx[i]) + Tiny(act());
    }
    ExpectWithin("dx", results.Values("dx", act()), dx, bound);
  }
}

TEST_P(LinearTest, InputGradThroughGelu) {
  const Vec dy = Noise(act(), 4, t() * n()), w = Weights(), pre = Noise(act(), 9, t() * k(), 3.0);
  const Vec dbias_before = Noise(DType::kF32, 8, k(), 3.0);
  const Vec product = ref::LinearInputGrad(Product(), dy, w);
  const Vec accumulation =
      Accumulation(RowLengths(dy, t(), n()), RowLengths(Transposed(w, n(), k()), k(), n()), n());
  const double u = UnitRoundoff(act());
  struct Variant {
    GeluKind kind;
    bool dbias, any_order = false;
  };
  for (const Variant v : {Variant{GeluKind::kErf, true}, Variant{GeluKind::kTanh, true},
                          Variant{GeluKind::kErf, false}, Variant{GeluKind::kTanh, true, true}}) {
    SCOPED_TRACE(::testing::Message() << "kind " << static_cast<int>(v.kind) << " dbias " << v.dbias
                                      << " any order " << v.any_order);
    const auto op = [&](OpRun& run) {
      return backend().LinearInputGrad(
          run.WorkspaceFor(Dims()),
          {.dy = run.In(act(), {t(), n()}, dy),
           .w = run.In(act(), {n(), k()}, w),
           .dx = run.Out("dx", act(), {t(), k()}),
           .apply_gelu = true,
           .gelu = v.kind,
           .pre = run.In(act(), {t(), k()}, pre),
           .dbias = v.dbias ? run.InOut("dbias", DType::kF32, {k()}, dbias_before) : TensorView{}});
    };
    const Results results = v.any_order ? RunInAnyOrder(backend(), op, param().offset)
                                        : RunTwice(backend(), op, param().offset);
    Vec dx(pre.size()), errors(pre.size()), bound(pre.size());
    for (size_t e = 0; e < pre.size(); ++e) {
      const double slope = ref::GeluDerivative(v.kind, pre[e]);
      dx[e] = product[e] * slope;
      // The product may be rounded before the slope is applied.
      errors[e] = std::abs(slope) * (accumulation[e] + u * std::abs(product[e]) + Tiny(act())) +
                  GeluDerivativeError(pre[e]) * std::abs(product[e]) + Tiny(act());
      bound[e] = u * std::abs(dx[e]) + errors[e];
    }
    ExpectWithin("dx", results.Values("dx", act()), dx, bound);
    if (!v.dbias) continue;
    const Bounded sums = ColumnSumsAddedTo(dbias_before, act(), dx, errors);
    ExpectWithin("dbias", results.Values("dbias", DType::kF32), sums.want, sums.bound);
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
