// GradientStats, AdamW and Lamb against the oracle.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "op_rig.h"

namespace lamina::testing {
namespace {

struct SizeCase {
  int64_t n;
  int64_t offset = 0;
  std::string Name() const { return absl::StrCat("n", n, offset != 0 ? "_unaligned" : ""); }
};
constexpr SizeCase kSizes[] = {{1}, {3}, {1000}, {1025}, {1025, 1}, {300007}};

// Stands for any stack: workspace is enough for GradientStats of any length at any dims.
LayerDims AnyDims(DType act) { return LayerShape{1, 1, 8, 1, 8}.Dims(act); }

OptimizerControl ControlOf(const Results& results, const char* name) {
  OptimizerControl control;
  std::memcpy(&control, results.Bytes(name).data(), sizeof(control));
  return control;
}

class GradientStatsTest : public OpTest<SizeCase> {
 protected:
  OptimizerControl Stats(const Vec& grad, float loss_scale, float max_norm) {
    const Results results = RunTwice(
        backend(),
        [&](OpRun& run) {
          return backend().GradientStats(run.WorkspaceFor(AnyDims(act())),
                                         {.grad = run.In(DType::kF32, {param().n}, grad),
                                          .loss_scale = loss_scale,
                                          .max_norm = max_norm,
                                          .control = run.ControlOut("control")});
        },
        param().offset);
    return ControlOf(results, "control");
  }
};

TEST_P(GradientStatsTest, NormScaleAndClip) {
  const Vec grad = Noise(DType::kF32, 71, param().n, 2.0);
  const double norm = ref::GradientStats(grad, 1.0, 0.0).grad_norm;
  // Squares are all positive: their sum's relative error is Growth(n), the root's half of it; then
  // a few roundings.
  const double tolerance = Growth(param().n) / 2 + 4 * kF32Roundoff;
  struct Variant {
    float loss_scale;
    double max_norm;
  };
  for (const Variant v :
       {Variant{1.0f, 0.0}, Variant{1024.0f, 0.0}, Variant{1.0f, norm * 0.25},
        Variant{1.0f, norm * 4}, Variant{512.0f, norm / 1024}, Variant{0.125f, norm * 4}}) {
    SCOPED_TRACE(::testing::Message()
                 << "loss_scale " << v.loss_scale << " max_norm " << v.max_norm);
    const auto max_norm = static_cast<float>(v.max_norm);
    const OptimizerControl got = Stats(grad, v.loss_scale, max_norm);
    const ref::Stats want =
        ref::GradientStats(grad, static_cast<double>(v.loss_scale), static_cast<double>(max_norm));
    EXPECT_EQ(got.skip, 0);
    EXPECT_NEAR(static_cast<double>(got.grad_norm), want.grad_norm, tolerance * want.grad_norm);
    EXPECT_NEAR(static_cast<double>(got.grad_scale), want.grad_scale, tolerance * want.grad_scale);
  }
}

TEST_P(GradientStatsTest, SkipsWhereAGradientIsNotFinite) {
  const float bad[] = {std::numeric_limits<float>::infinity(),
                       -std::numeric_limits<float>::infinity(),
                       std::numeric_limits<float>::quiet_NaN()};
  const auto n = static_cast<size_t>(param().n);
  for (const size_t where : {size_t{0}, n / 2, n - 1})
    for (const float value : bad) {
      Vec grad = Noise(DType::kF32, 72, param().n);
      grad[where] = static_cast<double>(value);
      const OptimizerControl got = Stats(grad, 1.0f, 1.0f);
      EXPECT_EQ(got.skip, 1) << value << " at " << where;
      EXPECT_FALSE(std::isfinite(got.grad_norm)) << value << " at " << where;
    }
}

// Finite gradients are not to be skipped because their squares leave fp32.
TEST_P(GradientStatsTest, LargeAndSmallGradientsAreFinite) {
  for (const double size : {1e25, 1e-30}) {
    Vec grad = Noise(DType::kF32, 73, param().n);
    for (double& g : grad) g = Round(DType::kF32, g * size);
    const double norm = ref::GradientStats(grad, 1.0, 0.0).grad_norm;
    const OptimizerControl got = Stats(grad, 1.0f, 0.0f);
    EXPECT_EQ(got.skip, 0) << size;
    EXPECT_NEAR(static_cast<double>(got.grad_norm), norm,
                (Growth(param().n) + 4 * kF32Roundoff) * norm)
        << size;
  }
}

TEST_P(GradientStatsTest, ZeroGradients) {
  const OptimizerControl got = Stats(Vec(static_cast<size_t>(param().n), 0.0), 2.0f, 1.0f);
  EXPECT_EQ(got.skip, 0);
  EXPECT_EQ(got.grad_norm, 0.0f);
  EXPECT_EQ(got.grad_scale, 0.5f);
}

LAMINA_OP_SUITE(GradientStatsTest, kSizes);

// What a step starts from: AdamWArgs or LambArgs.
template <typename Args>
class StepTest : public OpTest<SizeCase> {
 protected:
  Vec master_, grad_, m_, v_;
  Args settings_;

  bool with_weights() const { return act() != DType::kF32; }
  ref::AdamWSettings HostSettings() const {
    return {.lr = static_cast<double>(settings_.lr),
            .beta1 = static_cast<double>(settings_.beta1),
            .beta2 = static_cast<double>(settings_.beta2),
            .eps = static_cast<double>(settings_.eps),
            .weight_decay = static_cast<double>(settings_.weight_decay),
            .correction1 = static_cast<double>(settings_.correction1),
            .correction2 = static_cast<double>(settings_.correction2)};
  }
  void Fill() {
    master_ = Noise(DType::kF32, 81, param().n);
    grad_ = Noise(DType::kF32, 82, param().n, 4.0);
    m_ = Noise(DType::kF32, 83, param().n, 0.5);
    v_ = Noise(DType::kF32, 84, param().n, 0.1, 0.11);  // positive
    // A fresh weight: no gradient yet, and none now.
    grad_[0] = m_[0] = v_[0] = 0.0;
    settings_.lr = 0.01f;
    settings_.beta1 = 0.9f;
    settings_.beta2 = 0.98f;
    settings_.eps = 1e-6f;
    settings_.weight_decay = 0.05f;
    settings_.correction1 = 0.271f;
    settings_.correction2 = 0.0588f;
  }
  // The settings with the tensors.
  Args ArgsOf(OpRun& run, const OptimizerControl& control) const {
    const Shape shape{param().n};
    Args args = settings_;
    args.master = run.InOut("master", DType::kF32, shape, master_);
    if (with_weights()) args.weights = run.Out("weights", act(), shape);
    args.grad = run.In(DType::kF32, shape, grad_);
    args.m = run.InOut("m", DType::kF32, shape, m_);
    args.v = run.InOut("v", DType::kF32, shape, v_);
    args.control = run.ControlIn(control);
    return args;
  }

  // What GradientStats leaves where a gradient is not finite.
  static constexpr OptimizerControl kSkip{.grad_scale = std::numeric_limits<float>::quiet_NaN(),
                                          .grad_norm = std::numeric_limits<float>::infinity(),
                                          .skip = 1};
  void ExpectUnchanged(const Results& results) const {
    EXPECT_EQ(results.Bytes("master"), Encode(DType::kF32, master_));
    EXPECT_EQ(results.Bytes("m"), Encode(DType::kF32, m_));
    EXPECT_EQ(results.Bytes("v"), Encode(DType::kF32, v_));
    // Untouched: the poison is still there.
    if (with_weights()) {
      EXPECT_EQ(results.Bytes("weights"),
                std::vector<uint8_t>(static_cast<size_t>(param().n) * SizeOf(act()), 0xFF));
    }
  }

  // How far m, v and m / correction1 / (sqrt(v / correction2) + eps) may be off at element i, when
  // v is `v_after`. Each formula is a handful of fp32 operations on terms of which only m's can
  // cancel.
  struct MomentBounds {
    double m, v, step;
  };
  MomentBounds BoundsAt(size_t i, double grad_scale, double v_after) const {
    const ref::AdamWSettings s = HostSettings();
    const double m_terms =
        std::abs(s.beta1 * m_[i]) + std::abs((1 - s.beta1) * grad_[i] * grad_scale);
    const double denominator = std::sqrt(v_after / s.correction2) + s.eps;
    return {4 * kF32Roundoff * m_terms + Tiny(DType::kF32),
            6 * kF32Roundoff * v_after + Tiny(DType::kF32),
            16 * kF32Roundoff * m_terms / s.correction1 / denominator};
  }
};

class AdamWTest : public StepTest<AdamWArgs> {
 protected:
  Results Step(const OptimizerControl& control) {
    return RunTwice(
        backend(),
        [&](OpRun& run) {
          const AdamWArgs args = ArgsOf(run, control);
          return backend().AdamW(run.WorkspaceFor(AnyDims(act())), args);
        },
        param().offset);
  }
};

TEST_P(AdamWTest, Step) {
  Fill();
  struct Variant {
    float grad_scale, weight_decay, beta1;
  };
  for (const Variant variant :
       {Variant{1.0f, 0.05f, 0.9f}, Variant{0x1p-10f, 0.0f, 0.9f}, Variant{0.37f, 0.05f, 0.0f}}) {
    SCOPED_TRACE(::testing::Message() << "grad_scale " << variant.grad_scale);
    settings_.weight_decay = variant.weight_decay;
    settings_.beta1 = variant.beta1;
    const Results results = Step({.grad_scale = variant.grad_scale, .grad_norm = 1.0f});
    const ref::AdamWSettings s = HostSettings();
    const auto grad_scale = static_cast<double>(variant.grad_scale);
    Vec master = master_, m = m_, v = v_;
    ref::AdamW(s, grad_scale, grad_, master, m, v);
    Vec master_bound(m.size()), m_bound(m.size()), v_bound(m.size());
    for (size_t i = 0; i < m.size(); ++i) {
      const MomentBounds moments = BoundsAt(i, grad_scale, v[i]);
      m_bound[i] = moments.m;
      v_bound[i] = moments.v;
      master_bound[i] =
          2 * kF32Roundoff * (std::abs(master_[i]) + std::abs(master[i])) +
          s.lr * (4 * kF32Roundoff * s.weight_decay * std::abs(master_[i]) + moments.step);
    }
    ExpectWithin("master", results.Values("master", DType::kF32), master, master_bound);
    ExpectWithin("m", results.Values("m", DType::kF32), m, m_bound);
    ExpectWithin("v", results.Values("v", DType::kF32), v, v_bound);
    if (with_weights()) {
      EXPECT_EQ(results.Bytes("weights"), Encode(act(), results.Values("master", DType::kF32)))
          << "weights are not master rounded to nearest even";
    }
  }
}

TEST_P(AdamWTest, SkipChangesNothing) {
  Fill();
  grad_[0] = std::numeric_limits<double>::infinity();
  grad_.back() = std::nan("");
  ExpectUnchanged(Step(kSkip));
}

// The two together, as a step uses them: what one leaves in memory is what the other reads.
TEST_P(AdamWTest, ReadsWhatGradientStatsWrote) {
  Fill();
  const double norm = ref::GradientStats(grad_, 8.0, 0.0).grad_norm;
  const auto max_norm = static_cast<float>(norm / 3);
  for (const bool poisoned : {false, true}) {
    Vec grad = grad_;
    if (poisoned) grad.back() = std::nan("");
    const Results results = RunTwice(backend(), [&](OpRun& run) {
      const Shape shape{param().n};
      const Workspace workspace = run.WorkspaceFor(AnyDims(act()));
      const TensorView grad_view = run.In(DType::kF32, shape, grad);
      OptimizerControl* control = run.ControlOut("control");
      absl::Status status = backend().GradientStats(
          workspace,
          {.grad = grad_view, .loss_scale = 8.0f, .max_norm = max_norm, .control = control});
      if (!status.ok()) return status;
      AdamWArgs args = settings_;
      args.beta1 = 0.0f;  // m becomes the scaled gradient
      args.master = run.InOut("master", DType::kF32, shape, master_);
      args.grad = grad_view;
      args.m = run.InOut("m", DType::kF32, shape, m_);
      args.v = run.InOut("v", DType::kF32, shape, v_);
      args.control = control;
      return backend().AdamW(workspace, args);
    });
    if (poisoned) {
      EXPECT_EQ(results.Bytes("m"), Encode(DType::kF32, m_));
      EXPECT_EQ(results.Bytes("master"), Encode(DType::kF32, master_));
      continue;
    }
    const double scale = ref::GradientStats(grad, 8.0, static_cast<double>(max_norm)).grad_scale;
    Vec want = grad, bound(grad.size());
    for (size_t i = 0; i < grad.size(); ++i) {
      want[i] *= scale;
      bound[i] = (Growth(param().n) + 8 * kF32Roundoff) * std::abs(want[i]) + Tiny(DType::kF32);
    }
    ExpectWithin("m", results.Values("m", DType::kF32), want, bound);
  }
}

LAMINA_OP_SUITE(AdamWTest, kSizes);

class LambTest : public StepTest<LambArgs> {
 protected:
  std::vector<LambSegment> segments_;

  // With elements of none before, between and after them where n allows it. Longest first: a
  // segment that many threads share, then short ones, down to a single element.
  void FillSegments() {
    const int64_t n = param().n;
    if (n < 64) {
      segments_ = {{.begin = 0, .end = n}};
      return;
    }
    const int64_t half = n / 2, rest = n - half;
    segments_ = {{.begin = 1, .end = half},
                 {.begin = half, .end = half + 1},
                 {.begin = half + 4, .end = half + rest / 8, .decay = 0, .adapt = 0},
                 {.begin = half + rest / 8, .end = half + rest / 4, .decay = 0},
                 {.begin = half + rest / 4 + 1, .end = half + rest / 2},
                 {.begin = half + rest / 2, .end = n - 3, .adapt = 0},
                 {.begin = n - 3, .end = n - 2, .adapt = 0}};
  }
  Results Step(const OptimizerControl& control) {
    return RunTwice(
        backend(),
        [&](OpRun& run) {
          LambArgs args = ArgsOf(run, control);
          args.segments = run.Segments(segments_);
          args.segment_count = static_cast<int64_t>(segments_.size());
          return backend().Lamb(run.WorkspaceFor(AnyDims(act())), args);
        },
        param().offset);
  }
  void ExpectStep(float grad_scale);
};

// Per segment, with w the weights and u the updates: u is off by AdamW's bound and two roundings of
// the decay's term, and so ||u|| by the norm of those errors at most. The norms are sums of n
// squares, all positive: a relative error of Growth(n), halved by the root. Clamping moves no error
// outwards.
void LambTest::ExpectStep(float grad_scale_f32) {
  const Results results = Step({.grad_scale = grad_scale_f32, .grad_norm = 1.0f});
  const auto grad_scale = static_cast<double>(grad_scale_f32);
  const ref::LambSettings s{HostSettings(), static_cast<double>(settings_.min_ratio),
                            static_cast<double>(settings_.max_ratio)};
  Vec master = master_, m = m_, v = v_;
  ref::Lamb(s, segments_, grad_scale, grad_, master, m, v);
  // Outside of the segments nothing may change.
  Vec master_bound(m.size(), 0.0), m_bound(m.size(), 0.0), v_bound(m.size(), 0.0);
  std::vector<bool> stepped(m.size(), false);
  for (const LambSegment& segment : segments_) {
    const auto begin = static_cast<size_t>(segment.begin), end = static_cast<size_t>(segment.end);
    const double decay = segment.decay != 0 ? s.adam.weight_decay : 0.0;
    Vec u(end - begin), u_error(end - begin);
    double w_squares = 0, u_squares = 0, error_squares = 0;
    for (size_t i = begin; i < end; ++i) {
      const MomentBounds moments = BoundsAt(i, grad_scale, v[i]);
      m_bound[i] = moments.m;
      v_bound[i] = moments.v;
      stepped[i] = true;
      u[i - begin] =
          m[i] / s.adam.correction1 / (std::sqrt(v[i] / s.adam.correction2) + s.adam.eps) +
          decay * master_[i];
      u_error[i - begin] =
          moments.step + 2 * kF32Roundoff * (decay * std::abs(master_[i]) + std::abs(u[i - begin]));
      w_squares += master_[i] * master_[i];
      u_squares += u[i - begin] * u[i - begin];
      error_squares += u_error[i - begin] * u_error[i - begin];
    }
    double ratio = 1.0, ratio_error = 0.0;
    if (segment.adapt != 0 && w_squares > 0 && u_squares > 0) {
      ratio = std::sqrt(w_squares / u_squares);
      ratio_error = ratio * (Growth(segment.end - segment.begin) + 8 * kF32Roundoff +
                             std::sqrt(error_squares / u_squares));
      ratio = std::max(ratio, s.min_ratio);
      if (s.max_ratio > 0) ratio = std::min(ratio, s.max_ratio);
    }
    for (size_t i = begin; i < end; ++i)
      master_bound[i] = 2 * kF32Roundoff * (std::abs(master_[i]) + std::abs(master[i])) +
                        s.adam.lr * (ratio * u_error[i - begin] +
                                     (ratio_error + 4 * kF32Roundoff * ratio) *
                                         (std::abs(u[i - begin]) + u_error[i - begin]));
  }
  ExpectWithin("master", results.Values("master", DType::kF32), master, master_bound);
  ExpectWithin("m", results.Values("m", DType::kF32), m, m_bound);
  ExpectWithin("v", results.Values("v", DType::kF32), v, v_bound);
  if (!with_weights()) return;
  std::vector<uint8_t> weights = Encode(act(), results.Values("master", DType::kF32));
  for (size_t i = 0; i < stepped.size(); ++i)
    if (!stepped[i])
      std::fill_n(weights.begin() + static_cast<ptrdiff_t>(i * SizeOf(act())), SizeOf(act()), 0xFF);
  EXPECT_TRUE(results.Bytes("weights") == weights)
      << "weights are not master rounded to nearest even, or written outside of the segments";
}

TEST_P(LambTest, Step) {
  Fill();
  FillSegments();
  // Some segments' ratios lie above the clamps, some between them, some below.
  struct Variant {
    float grad_scale, weight_decay, beta1, min_ratio, max_ratio;
  };
  for (const Variant v :
       {Variant{1.0f, 0.05f, 0.9f, 0.0f, 0.0f}, Variant{0x1p-10f, 0.0f, 0.9f, 0.4f, 0.0f},
        Variant{0.37f, 0.05f, 0.0f, 0.01f, 0.3f}, Variant{0.37f, 0.5f, 0.9f, 0.45f, 0.45f}}) {
    SCOPED_TRACE(::testing::Message() << "grad_scale " << v.grad_scale << " ratio in ["
                                      << v.min_ratio << ", " << v.max_ratio << "]");
    settings_.weight_decay = v.weight_decay;
    settings_.beta1 = v.beta1;
    settings_.min_ratio = v.min_ratio;
    settings_.max_ratio = v.max_ratio;
    ExpectStep(v.grad_scale);
  }
}

// Weights of zero in every other segment, and updates of zero in the rest: the ratio is 1, whatever
// the clamps.
TEST_P(LambTest, ZeroNorms) {
  Fill();
  FillSegments();
  settings_.weight_decay = 0.0f;
  settings_.min_ratio = 2.0f;
  settings_.max_ratio = 3.0f;
  for (size_t s = 0; s < segments_.size(); ++s)
    for (auto i = static_cast<size_t>(segments_[s].begin);
         i < static_cast<size_t>(segments_[s].end); ++i)
      if (s % 2 == 0)
        master_[i] = 0.0;
      else
        grad_[i] = m_[i] = 0.0;
  ExpectStep(1.0f);
}

// Norms whose squares leave fp32.
TEST_P(LambTest, LargeAndSmallWeights) {
  for (const double size : {1e25, 1e-25}) {
    SCOPED_TRACE(size);
    Fill();
    FillSegments();
    settings_.weight_decay = 0.0f;
    for (double& w : master_) w = Round(DType::kF32, w * size);
    ExpectStep(1.0f);
  }
}

TEST_P(LambTest, SkipChangesNothing) {
  Fill();
  FillSegments();
  grad_[0] = std::numeric_limits<double>::infinity();
  grad_.back() = std::nan("");
  ExpectUnchanged(Step(kSkip));
}

constexpr SizeCase kLambSizes[] = {{1}, {3}, {1000}, {1025, 1}, {300007}, {1000003}};
LAMINA_OP_SUITE(LambTest, kLambSizes);

}  // namespace
}  // namespace lamina::testing
