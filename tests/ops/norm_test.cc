// LayerNorm, DropoutAddNorm and their gradients against the oracle.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "op_rig.h"

namespace lamina::testing {
namespace {

struct RowCase {
  LayerShape shape;
  float ratio = 0.0f;  // hidden dropout, where the op has one
  int64_t offset = 0;
  std::string Name() const {
    return absl::StrCat(shape.Name(), "_p", std::lround(1000 * ratio),
                        offset != 0 ? "_unaligned" : "");
  }
};

std::vector<RowCase> RowCases() {
  const float ratios[] = {0.1f, 0.0f, 0.5f, 0.999f};
  std::vector<RowCase> cases;
  size_t i = 0;
  for (const LayerShape& s : kOpShapes) cases.push_back({s, ratios[i++ % 4]});
  for (const float ratio : ratios) {
    cases.push_back({{4, 32, 72, 3, 8}, ratio});
    cases.push_back({{2, 9, 37, 1, 8}, ratio, 1});
  }
  cases.push_back({{2, 5, 64, 4, 96}, 0.1f, 3});
  return cases;
}

// Sums and means over a row of `values`.
struct Row {
  const double* values;
  size_t h;
  double Average(double (*f)(double)) const {
    double sum = 0;
    for (size_t c = 0; c < h; ++c) sum += f(values[c]);
    return sum / static_cast<double>(h);
  }
  double AverageAbs() const {
    return Average([](double v) { return std::abs(v); });
  }
};

class RowTest : public OpTest<RowCase> {
 protected:
  int64_t t() const { return param().shape.tokens(); }
  int64_t h() const { return param().shape.hidden; }
  size_t rows() const { return static_cast<size_t>(t()); }
  size_t cols() const { return static_cast<size_t>(h()); }
  LayerDims Dims() const { return param().shape.Dims(act()); }
  double u() const { return UnitRoundoff(act()); }
  Vec Gamma() const { return Noise(act(), 21, h(), 0.5, 1.0); }
  Vec Beta() const { return Noise(act(), 22, h(), 0.5); }
  ref::Mask HostMask() const {
    return ref::Mask{param().ratio, RngState{0xABCDEF0123456789u, 77},
                     DropoutStream(3, DropoutSite::kAttentionOutput)};
  }
  Dropout DeviceMask(OpRun& run) const {
    if (param().ratio == 0.0f) return Dropout{};  // no rng is needed then
    const ref::Mask mask = HostMask();
    return Dropout{mask.ratio, run.Rng(mask.rng), mask.stream};
  }

  // One row far from zero, whose variance a sum of squares would lose, and one of equal values.
  Vec NormInputs() const {
    Vec x = Noise(act(), 23, t() * h());
    if (rows() >= 3)
      for (size_t c = 0; c < cols(); ++c) {
        x[cols() + c] = Round(act(), 50.0 + x[cols() + c]);
        x[2 * cols() + c] = Round(act(), 0.3);
      }
    return x;
  }

  struct NormBounds {
    Vec y, mean, rstd;
  };
  NormBounds BoundsOf(const ref::NormResult& n, const Vec& x, const Vec& gamma,
                      const Vec& beta) const {
    NormBounds b{Vec(n.y.size()), Vec(rows()), Vec(rows())};
    for (size_t r = 0; r < rows(); ++r) {
      const double rstd = n.rstd[r];
      const double mean_error = Growth(h()) * Row{&x[r * cols()], cols()}.AverageAbs();
      const double rstd_error = Growth(h()) + std::pow(mean_error * rstd, 2);
      b.mean[r] = mean_error + kF32Roundoff * std::abs(n.mean[r]);
      b.rstd[r] = (rstd_error + 4 * kF32Roundoff) * rstd;
      for (size_t c = 0; c < cols(); ++c) {
        const size_t i = r * cols() + c;
        const double xhat = (x[i] - n.mean[r]) * rstd;
        b.y[i] = u() * std::abs(n.y[i]) +
                 std::abs(gamma[c]) * (rstd * mean_error + std::abs(xhat) * rstd_error) +
                 4 * kF32Roundoff * (std::abs(gamma[c] * xhat) + std::abs(beta[c])) + Tiny(act());
      }
    }
    return b;
  }

  // A gradient's inputs. mean and rstd as the device has them, in fp32; y as it has it, in act.
  struct NormPoint {
    Vec dy, x, y, gamma, beta, mean, rstd;
  };
  // A row of equal values must not overflow fp16: rstd stays below 317 with this eps.
  NormPoint PointOf(const Vec& dy, const Vec& x) const {
    NormPoint p{.dy = dy, .x = x, .gamma = Gamma(), .beta = Beta()};
    for (size_t c = 1; c < cols(); c += 2) p.gamma[c] = -p.gamma[c];
    const ref::NormResult n = ref::LayerNorm(x, p.gamma, p.beta, 1e-5, t(), h());
    p.y = Round(act(), n.y);
    p.mean = Round(DType::kF32, n.mean);
    p.rstd = Round(DType::kF32, n.rstd);
    return p;
  }
  // Of which of the two the normalised values come.
  enum class Source { kInput, kOutput };
  static const char* NameOf(Source source) {
    return source == Source::kInput ? "from the input" : "from the output";
  }

  // Whether, and where, the norm's output is asked for again.
  enum class Again { kNo, kApart, kOverDy };
  // dy and what y_again needs. Source::kInput alone.
  template <typename Args>
  void SetAgain(OpRun& run, Again again, const NormPoint& p, Args& args) const {
    args.dy = again == Again::kOverDy ? run.InOut("y_again", act(), {t(), h()}, p.dy)
                                      : run.In(act(), {t(), h()}, p.dy);
    if (again == Again::kNo) return;
    args.beta = run.In(act(), {h()}, p.beta);
    args.y_again = again == Again::kOverDy ? args.dy : run.Out("y_again", act(), {t(), h()});
  }
  void ExpectAgain(const Results& results, const NormPoint& p) const {
    const Vec want = ref::LayerNormOutput(p.x, p.gamma, p.beta, p.mean, p.rstd, t(), h());
    Vec bound(want.size());
    for (size_t i = 0; i < want.size(); ++i) {
      const double beta = std::abs(p.beta[i % cols()]);
      bound[i] =
          u() * std::abs(want[i]) + 4 * kF32Roundoff * (std::abs(want[i]) + 2 * beta) + Tiny(act());
    }
    ExpectWithin("y_again", results.Values("y_again", act()), want, bound);
  }

  // ds = d(LayerNorm) . dy + other, and its error in fp32 before it is rounded.
  //
  // Source::kOutput: xhat = (y - beta) / gamma, a subtraction of exact numbers and a division; its
  // own roundings are covered as those of (x - mean) * rstd are.
  struct NormGradient {
    Vec ds, error, dgamma, dbeta, dgamma_bound, dbeta_bound;
  };
  NormGradient GradientOf(const NormPoint& p, Source source, const Vec& other,
                          const Vec& dgamma_before, const Vec& dbeta_before) const {
    const ref::NormGradients g =
        source == Source::kInput
            ? ref::LayerNormBackward(p.dy, p.x, p.gamma, p.mean, p.rstd, t(), h())
            : ref::LayerNormBackwardFromOutput(p.dy, p.y, p.beta, p.gamma, p.rstd, t(), h());
    NormGradient result{g.dx, Vec(g.dx.size()), g.dgamma, g.dbeta, Vec(cols()), Vec(cols())};
    const double row_growth = Growth(h()), column_growth = Growth(t());
    Vec xhat(cols()), abs_g(cols()), abs_gx(cols());
    for (size_t r = 0; r < rows(); ++r) {
      for (size_t c = 0; c < cols(); ++c) {
        const size_t i = r * cols() + c;
        xhat[c] = source == Source::kInput ? (p.x[i] - p.mean[r]) * p.rstd[r]
                                           : (p.y[i] - p.beta[c]) / p.gamma[c];
        abs_g[c] = std::abs(p.dy[i] * p.gamma[c]);
        abs_gx[c] = abs_g[c] * std::abs(xhat[c]);
        result.dgamma_bound[c] += column_growth * std::abs(p.dy[i] * xhat[c]);
        result.dbeta_bound[c] += column_growth * std::abs(p.dy[i]);
      }
      const double average_g = Row{abs_g.data(), cols()}.AverageAbs();
      const double average_gx = Row{abs_gx.data(), cols()}.AverageAbs();
      for (size_t c = 0; c < cols(); ++c) {
        const size_t i = r * cols() + c;
        const double added = other.empty() ? 0.0 : other[i];
        result.ds[i] += added;
        result.error[i] =
            row_growth * p.rstd[r] * (abs_g[c] + average_g + std::abs(xhat[c]) * average_gx) +
            2 * kF32Roundoff * (std::abs(added) + std::abs(result.ds[i]));
      }
    }
    for (size_t c = 0; c < cols(); ++c) {
      result.dgamma[c] += dgamma_before[c];
      result.dbeta[c] += dbeta_before[c];
      result.dgamma_bound[c] += column_growth * std::abs(dgamma_before[c]);
      result.dbeta_bound[c] += column_growth * std::abs(dbeta_before[c]);
    }
    return result;
  }

  // How far apart the two sources' gradients are. The recovered xhat carries the rounding of y, at
  // most u |y| / |gamma|; and that of rstd and mean in fp32, which it does not see and x's does: a
  // relative one of rstd, and mean's times rstd.
  struct SourceGap {
    Vec dx, dgamma;
  };
  SourceGap GapOf(const NormPoint& p) const {
    SourceGap gap{Vec(p.x.size()), Vec(cols())};
    Vec xhat(cols()), error(cols());
    for (size_t r = 0; r < rows(); ++r) {
      double average_gx = 0, average_error = 0;
      for (size_t c = 0; c < cols(); ++c) {
        const size_t i = r * cols() + c;
        xhat[c] = std::abs((p.x[i] - p.mean[r]) * p.rstd[r]);
        error[c] = (u() * std::abs(p.y[i]) + Tiny(act())) / std::abs(p.gamma[c]) +
                   kF32Roundoff * (xhat[c] + std::abs(p.mean[r]) * p.rstd[r]);
        const double g = std::abs(p.dy[i] * p.gamma[c]) / static_cast<double>(h());
        average_gx += g * xhat[c];
        average_error += g * error[c];
        gap.dgamma[c] += std::abs(p.dy[i]) * error[c];
      }
      for (size_t c = 0; c < cols(); ++c)
        gap.dx[r * cols() + c] =
            p.rstd[r] * (error[c] * (average_gx + average_error) + xhat[c] * average_error);
    }
    return gap;
  }
};

class LayerNormTest : public RowTest {};

TEST_P(LayerNormTest, Forward) {
  const Vec x = NormInputs(), gamma = Gamma(), beta = Beta();
  for (const float eps : {1e-12f, 1e-5f})
    for (const bool statistics : {true, false}) {
      SCOPED_TRACE(::testing::Message() << "eps " << eps << " statistics " << statistics);
      const Results results = RunTwice(
          backend(),
          [&](OpRun& run) {
            return backend().LayerNorm(
                run.WorkspaceFor(Dims()),
                {.x = run.In(act(), {t(), h()}, x),
                 .gamma = run.In(act(), {h()}, gamma),
                 .beta = run.In(act(), {h()}, beta),
                 .eps = eps,
                 .y = run.Out("y", act(), {t(), h()}),
                 .mean = statistics ? run.Out("mean", DType::kF32, {t()}) : TensorView{},
                 .rstd = statistics ? run.Out("rstd", DType::kF32, {t()}) : TensorView{}});
          },
          param().offset);
      const ref::NormResult want =
          ref::LayerNorm(x, gamma, beta, static_cast<double>(eps), t(), h());
      const NormBounds bounds = BoundsOf(want, x, gamma, beta);
      ExpectWithin("y", results.Values("y", act()), want.y, bounds.y);
      if (!statistics) continue;
      ExpectWithin("mean", results.Values("mean", DType::kF32), want.mean, bounds.mean);
      ExpectWithin("rstd", results.Values("rstd", DType::kF32), want.rstd, bounds.rstd);
    }
}

TEST_P(LayerNormTest, Backward) {
  const NormPoint p = PointOf(Noise(act(), 24, t() * h()), NormInputs());
  const Vec residual = Noise(act(), 25, t() * h());
  const Vec dgamma_before = Noise(DType::kF32, 26, h(), 3.0);
  const Vec dbeta_before = Noise(DType::kF32, 27, h(), 3.0);
  enum class Residual { kAbsent, kApart, kInPlace };
  struct Variant {
    Source source;
    Residual residual;
    bool any_order;
    Again again = Again::kNo;
  };
  for (const Variant v : {Variant{Source::kInput, Residual::kAbsent, false},
                          Variant{Source::kInput, Residual::kApart, true},
                          Variant{Source::kInput, Residual::kInPlace, false},
                          Variant{Source::kInput, Residual::kApart, false, Again::kApart},
                          Variant{Source::kInput, Residual::kInPlace, false, Again::kOverDy},
                          Variant{Source::kOutput, Residual::kAbsent, false},
                          Variant{Source::kOutput, Residual::kApart, true},
                          Variant{Source::kOutput, Residual::kInPlace, false}}) {
    SCOPED_TRACE(::testing::Message()
                 << NameOf(v.source) << ", residual_grad " << static_cast<int>(v.residual)
                 << ", y_again " << static_cast<int>(v.again));
    const auto op = [&](OpRun& run) {
      LayerNormBackwardArgs args;
      SetAgain(run, v.again, p, args);
      if (v.source == Source::kInput) {
        args.x = run.In(act(), {t(), h()}, p.x);
        args.mean = run.In(DType::kF32, {t()}, p.mean);
      } else {
        args.y = run.In(act(), {t(), h()}, p.y);
        args.beta = run.In(act(), {h()}, p.beta);
      }
      args.gamma = run.In(act(), {h()}, p.gamma);
      args.rstd = run.In(DType::kF32, {t()}, p.rstd);
      args.dx = v.residual == Residual::kInPlace ? run.InOut("dx", act(), {t(), h()}, residual)
                                                 : run.Out("dx", act(), {t(), h()});
      if (v.residual == Residual::kApart) args.residual_grad = run.In(act(), {t(), h()}, residual);
      if (v.residual == Residual::kInPlace) args.residual_grad = args.dx;
      args.dgamma = run.InOut("dgamma", DType::kF32, {h()}, dgamma_before);
      args.dbeta = run.InOut("dbeta", DType::kF32, {h()}, dbeta_before);
      return backend().LayerNormBackward(run.WorkspaceFor(Dims()), args);
    };
    const Results results = v.any_order ? RunInAnyOrder(backend(), op, param().offset)
                                        : RunTwice(backend(), op, param().offset);
    const Vec other = v.residual == Residual::kAbsent ? Vec{} : residual;
    NormGradient want = GradientOf(p, v.source, other, dgamma_before, dbeta_before);
    const auto compare = [&] {
      Vec bound = want.error;
      for (size_t i = 0; i < bound.size(); ++i)
        bound[i] += u() * std::abs(want.ds[i]) + Tiny(act());
      ExpectWithin("dx", results.Values("dx", act()), want.ds, bound);
      ExpectWithin("dgamma", results.Values("dgamma", DType::kF32), want.dgamma, want.dgamma_bound);
      ExpectWithin("dbeta", results.Values("dbeta", DType::kF32), want.dbeta, want.dbeta_bound);
    };
    compare();
    if (v.again != Again::kNo) ExpectAgain(results, p);
    if (v.source == Source::kInput) continue;
    // And it is the gradient that the input would have given, but for what y has lost.
    SCOPED_TRACE("against the gradient from the input");
    want = GradientOf(p, Source::kInput, other, dgamma_before, dbeta_before);
    const SourceGap gap = GapOf(p);
    for (size_t i = 0; i < gap.dx.size(); ++i) want.error[i] += (1 + u()) * gap.dx[i];
    for (size_t c = 0; c < cols(); ++c) want.dgamma_bound[c] += gap.dgamma[c];
    compare();
  }
}

LAMINA_OP_SUITE(LayerNormTest, RowCases());

class DropoutAddNormTest : public RowTest {};

TEST_P(DropoutAddNormTest, Forward) {
  const Vec x = Noise(act(), 31, t() * h()), bias = Noise(act(), 32, h());
  const Vec residual = Noise(act(), 33, t() * h()), gamma = Gamma(), beta = Beta();
  const float eps = 1e-12f;
  const Vec sum = ref::DropoutAdd(x, bias, residual, HostMask(), t(), h());
  const Vec factors = ref::DropoutFactors(HostMask(), t(), h());
  Vec sum_bound(sum.size());
  for (size_t i = 0; i < sum.size(); ++i)
    sum_bound[i] =
        u() * std::abs(sum[i]) + Tiny(act()) +
        4 * kF32Roundoff *
            (std::abs(residual[i]) + factors[i] * (std::abs(x[i]) + std::abs(bias[i % cols()])));
  Vec stored;  // the sum as the first variant has it, which is the norm's input in each of them
  struct Variant {
    const char* name;
    bool norm, sum, statistics, in_place;
  };
  for (const Variant v : {Variant{"training", true, true, true, false},
                          Variant{"training, in place", true, true, true, true},
                          Variant{"Pre-LN evaluation", true, true, false, false},
                          Variant{"Post-LN evaluation", true, false, false, false},
                          Variant{"no norm", false, true, false, false},
                          Variant{"no norm, in place", false, true, false, true}}) {
    SCOPED_TRACE(v.name);
    const Results results = RunTwice(
        backend(),
        [&](OpRun& run) {
          DropoutAddNormArgs args;
          args.x =
              v.in_place ? run.InOut("sum", act(), {t(), h()}, x) : run.In(act(), {t(), h()}, x);
          args.bias = run.In(act(), {h()}, bias);
          args.residual = run.In(act(), {t(), h()}, residual);
          args.dropout = DeviceMask(run);
          if (v.sum) args.sum = v.in_place ? args.x : run.Out("sum", act(), {t(), h()});
          args.eps = eps;
          if (v.norm) {
            args.gamma = run.In(act(), {h()}, gamma);
            args.beta = run.In(act(), {h()}, beta);
            args.y = run.Out("y", act(), {t(), h()});
          }
          if (v.statistics) {
            args.mean = run.Out("mean", DType::kF32, {t()});
            args.rstd = run.Out("rstd", DType::kF32, {t()});
          }
          return backend().DropoutAddNorm(run.WorkspaceFor(Dims()), args);
        },
        param().offset);
    if (v.sum) {
      ExpectWithin("sum", results.Values("sum", act()), sum, sum_bound);
      if (stored.empty()) stored = results.Values("sum", act());
      EXPECT_EQ(results.Values("sum", act()), stored);
    }
    if (!v.norm) continue;
    const ref::NormResult want =
        ref::LayerNorm(stored, gamma, beta, static_cast<double>(eps), t(), h());
    const NormBounds bounds = BoundsOf(want, stored, gamma, beta);
    ExpectWithin("y", results.Values("y", act()), want.y, bounds.y);
    if (!v.statistics) continue;
    ExpectWithin("mean", results.Values("mean", DType::kF32), want.mean, bounds.mean);
    ExpectWithin("rstd", results.Values("rstd", DType::kF32), want.rstd, bounds.rstd);
  }
}

TEST_P(DropoutAddNormTest, Backward) {
  const NormPoint p = PointOf(Noise(act(), 42, t() * h()), Noise(act(), 41, t() * h()));
  const Vec dsum = Noise(act(), 43, t() * h());
  const Vec dbias_before = Noise(DType::kF32, 44, h(), 3.0);
  const Vec dgamma_before = Noise(DType::kF32, 45, h(), 3.0);
  const Vec dbeta_before = Noise(DType::kF32, 46, h(), 3.0);
  const Vec factors = ref::DropoutFactors(HostMask(), t(), h());
  struct Variant {
    const char* name;
    bool dy, dsum, dresidual, in_place;
    Source source = Source::kInput;
    bool any_order = false;
    Again again = Again::kNo;
  };
  for (const Variant v :
       {Variant{"dy and dsum", true, true, true, false},
        Variant{"dy and dsum, in place", true, true, true, true},
        Variant{"dy alone", true, false, true, false, Source::kInput, true},
        Variant{"dy alone, no dresidual", true, false, false, false},
        Variant{"dy and dsum, y_again", true, true, true, false, Source::kInput, false,
                Again::kApart},
        Variant{"dy and dsum, in place, y_again over dy", true, true, true, true, Source::kInput,
                false, Again::kOverDy},
        Variant{"dy alone, no dresidual, y_again over dy", true, false, false, false,
                Source::kInput, true, Again::kOverDy},
        Variant{"dsum alone", false, true, false, false},
        Variant{"dsum alone, with dresidual", false, true, true, false, Source::kInput, true},
        Variant{"dy and dsum", true, true, true, false, Source::kOutput, true},
        Variant{"dy and dsum, in place", true, true, true, true, Source::kOutput},
        Variant{"dy alone, no dresidual", true, false, false, false, Source::kOutput}}) {
    SCOPED_TRACE(::testing::Message() << v.name << " " << NameOf(v.source));
    const auto op = [&](OpRun& run) {
      DropoutAddNormBackwardArgs args;
      if (v.dy) {
        SetAgain(run, v.again, p, args);
        if (v.source == Source::kInput) {
          args.sum = run.In(act(), {t(), h()}, p.x);
          args.mean = run.In(DType::kF32, {t()}, p.mean);
        } else {
          args.y = run.In(act(), {t(), h()}, p.y);
          args.beta = run.In(act(), {h()}, p.beta);
        }
        args.gamma = run.In(act(), {h()}, p.gamma);
        args.rstd = run.In(DType::kF32, {t()}, p.rstd);
        args.dgamma = run.InOut("dgamma", DType::kF32, {h()}, dgamma_before);
        args.dbeta = run.InOut("dbeta", DType::kF32, {h()}, dbeta_before);
      }
      if (v.dsum)
        args.dsum = v.in_place ? run.InOut("dresidual", act(), {t(), h()}, dsum)
                               : run.In(act(), {t(), h()}, dsum);
      args.dropout = DeviceMask(run);
      if (v.dresidual)
        args.dresidual = v.in_place ? args.dsum : run.Out("dresidual", act(), {t(), h()});
      args.dx = run.Out("dx", act(), {t(), h()});
      args.dbias = run.InOut("dbias", DType::kF32, {h()}, dbias_before);
      return backend().DropoutAddNormBackward(run.WorkspaceFor(Dims()), args);
    };
    const Results results = v.any_order ? RunInAnyOrder(backend(), op, param().offset)
                                        : RunTwice(backend(), op, param().offset);

    if (v.again != Again::kNo) ExpectAgain(results, p);
    NormGradient want;
    if (v.dy) {
      want = GradientOf(p, v.source, v.dsum ? dsum : Vec{}, dgamma_before, dbeta_before);
      ExpectWithin("dgamma", results.Values("dgamma", DType::kF32), want.dgamma, want.dgamma_bound);
      ExpectWithin("dbeta", results.Values("dbeta", DType::kF32), want.dbeta, want.dbeta_bound);
    } else {
      want.ds = dsum;
      want.error = Vec(dsum.size(), 0.0);
    }
    const Vec dx = ref::DropoutAddBackward(want.ds, HostMask(), t(), h());
    Vec ds_bound(dx.size()), dx_bound(dx.size());
    // dx may come from ds in fp32 or as stored; the column sums from dx in either form. Each
    // rounding is an independent error of u.
    Vec dbias = ref::ColumnSums(dx, t(), h()), dbias_bound(cols(), 0.0), squares(cols(), 0.0);
    for (size_t i = 0; i < dx.size(); ++i) {
      const double u_ds = v.dy ? u() : 0.0;  // without dy, ds is dsum and exact
      ds_bound[i] = want.error[i] + u_ds * std::abs(want.ds[i]) + Tiny(act());
      dx_bound[i] = factors[i] * (want.error[i] + Tiny(act())) +
                    (u_ds + u() + 4 * kF32Roundoff) * std::abs(dx[i]) + Tiny(act());
      squares[i % cols()] += dx[i] * dx[i];
      dbias_bound[i % cols()] += Growth(t()) * std::abs(dx[i]) + factors[i] * want.error[i];
    }
    for (size_t c = 0; c < cols(); ++c) {
      dbias[c] += dbias_before[c];
      dbias_bound[c] += 8 * u() * std::sqrt(squares[c]) +
                        Growth(t()) * (std::abs(dbias_before[c]) + std::abs(dbias[c]));
    }
    if (v.dresidual)
      ExpectWithin("dresidual", results.Values("dresidual", act()), want.ds, ds_bound);
    ExpectWithin("dx", results.Values("dx", act()), dx, dx_bound);
    ExpectWithin("dbias", results.Values("dbias", DType::kF32), dbias, dbias_bound);
  }
}

// The norm's input is the sum as it is stored, so LayerNorm of that gives the same bits; and so
// does what Backward makes again.
TEST_P(DropoutAddNormTest, TheOutputAgainHasTheSameBits) {
  const Vec gamma = Gamma(), beta = Beta();
  const auto norm = [&](OpRun& run, auto& args) {
    args.gamma = run.In(act(), {h()}, gamma);
    args.beta = run.In(act(), {h()}, beta);
    args.eps = 1e-5f;
    args.y = run.Out("y", act(), {t(), h()});
    args.mean = run.Out("mean", DType::kF32, {t()});
    args.rstd = run.Out("rstd", DType::kF32, {t()});
  };
  const Results forward = RunTwice(
      backend(),
      [&](OpRun& run) {
        DropoutAddNormArgs args;
        args.x = run.In(act(), {t(), h()}, Noise(act(), 51, t() * h()));
        args.bias = run.In(act(), {h()}, Noise(act(), 52, h()));
        args.residual = run.In(act(), {t(), h()}, NormInputs());
        args.dropout = DeviceMask(run);
        args.sum = run.Out("sum", act(), {t(), h()});
        norm(run, args);
        return backend().DropoutAddNorm(run.WorkspaceFor(Dims()), args);
      },
      param().offset);
  const Vec sum = forward.Values("sum", act());
  const Results alone = RunTwice(
      backend(),
      [&](OpRun& run) {
        LayerNormArgs args;
        args.x = run.In(act(), {t(), h()}, sum);
        norm(run, args);
        return backend().LayerNorm(run.WorkspaceFor(Dims()), args);
      },
      param().offset);
  for (const char* name : {"y", "mean", "rstd"})
    EXPECT_EQ(alone.Bytes(name), forward.Bytes(name)) << name;

  const auto backward = [&](OpRun& run, auto& args) {
    args.dy = run.InOut("y_again", act(), {t(), h()}, Noise(act(), 53, t() * h()));
    args.y_again = args.dy;
    args.beta = run.In(act(), {h()}, beta);
    args.gamma = run.In(act(), {h()}, gamma);
    args.mean = run.In(DType::kF32, {t()}, forward.Values("mean", DType::kF32));
    args.rstd = run.In(DType::kF32, {t()}, forward.Values("rstd", DType::kF32));
    args.dx = run.Out("dx", act(), {t(), h()});
    args.dgamma = run.InOut("dgamma", DType::kF32, {h()}, Vec(cols(), 0.0));
    args.dbeta = run.InOut("dbeta", DType::kF32, {h()}, Vec(cols(), 0.0));
  };
  const Results of_norm = RunTwice(
      backend(),
      [&](OpRun& run) {
        LayerNormBackwardArgs args;
        args.x = run.In(act(), {t(), h()}, sum);
        backward(run, args);
        return backend().LayerNormBackward(run.WorkspaceFor(Dims()), args);
      },
      param().offset);
  const Results of_sum = RunTwice(
      backend(),
      [&](OpRun& run) {
        DropoutAddNormBackwardArgs args;
        args.sum = run.In(act(), {t(), h()}, sum);
        backward(run, args);
        args.dropout = DeviceMask(run);
        args.dbias = run.InOut("dbias", DType::kF32, {h()}, Vec(cols(), 0.0));
        return backend().DropoutAddNormBackward(run.WorkspaceFor(Dims()), args);
      },
      param().offset);
  EXPECT_EQ(of_norm.Bytes("y_again"), forward.Bytes("y"));
  EXPECT_EQ(of_sum.Bytes("y_again"), forward.Bytes("y"));
}

// A norm and the sum below it may have their gradients from one op or from one each: the stack
// chooses by what a call holds, and its bits must not depend on that.
TEST_P(DropoutAddNormTest, BackwardOfANormAndOfTheSumBelowHasTheSameBitsApart) {
  const NormPoint p = PointOf(Noise(act(), 61, t() * h()), Noise(act(), 62, t() * h()));
  const Vec dsum = Noise(act(), 63, t() * h());
  const auto norm = [&](OpRun& run, auto& args) {
    args.dy = run.In(act(), {t(), h()}, p.dy);
    args.gamma = run.In(act(), {h()}, p.gamma);
    args.mean = run.In(DType::kF32, {t()}, p.mean);
    args.rstd = run.In(DType::kF32, {t()}, p.rstd);
    args.dgamma = run.InOut("dgamma", DType::kF32, {h()}, Vec(cols(), 0.0));
    args.dbeta = run.InOut("dbeta", DType::kF32, {h()}, Vec(cols(), 0.0));
  };
  const auto sum = [&](OpRun& run, DropoutAddNormBackwardArgs& args) {
    args.dropout = DeviceMask(run);
    args.dx = run.Out("dx", act(), {t(), h()});
    args.dbias = run.InOut("dbias", DType::kF32, {h()}, Vec(cols(), 0.0));
    return backend().DropoutAddNormBackward(run.WorkspaceFor(Dims()), args);
  };
  const Results together = RunTwice(
      backend(),
      [&](OpRun& run) {
        DropoutAddNormBackwardArgs args;
        norm(run, args);
        args.sum = run.In(act(), {t(), h()}, p.x);
        args.dsum = run.In(act(), {t(), h()}, dsum);
        args.dresidual = run.Out("ds", act(), {t(), h()});
        return sum(run, args);
      },
      param().offset);
  const Results of_norm = RunTwice(
      backend(),
      [&](OpRun& run) {
        LayerNormBackwardArgs args;
        norm(run, args);
        args.x = run.In(act(), {t(), h()}, p.x);
        args.residual_grad = run.In(act(), {t(), h()}, dsum);
        args.dx = run.Out("ds", act(), {t(), h()});
        return backend().LayerNormBackward(run.WorkspaceFor(Dims()), args);
      },
      param().offset);
  const Results of_sum = RunTwice(
      backend(),
      [&](OpRun& run) {
        DropoutAddNormBackwardArgs args;
        args.dsum = run.In(act(), {t(), h()}, of_norm.Values("ds", act()));
        return sum(run, args);
      },
      param().offset);
  for (const char* name : {"ds", "dgamma", "dbeta"})
    EXPECT_EQ(together.Bytes(name), of_norm.Bytes(name)) << name;
  for (const char* name : {"dx", "dbias"})
    EXPECT_EQ(together.Bytes(name), of_sum.Bytes(name)) << name;
}

LAMINA_OP_SUITE(DropoutAddNormTest, RowCases());

}  // namespace
}  // namespace lamina::testing
