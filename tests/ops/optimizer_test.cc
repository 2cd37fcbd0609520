// GradientStats and AdamW against the oracle.
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

class AdamWTest : public OpTest<SizeCase> {
 protected:
  Vec master_, grad_, m_, v_;
  AdamWArgs settings_;

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
  Results Step(const OptimizerControl& control, bool with_weights) {
    return RunTwice(
        backend(),
        [&](OpRun& run) {
          const Shape shape{param().n};
          AdamWArgs args = settings_;
          args.master = run.InOut("master", DType::kF32, shape, master_);
          if (with_weights) args.weights = run.Out("weights", act(), shape);
          args.grad = run.In(DType::kF32, shape, grad_);
          args.m = run.InOut("m", DType::kF32, shape, m_);
          args.v = run.InOut("v", DType::kF32, shape, v_);
          args.control = run.ControlIn(control);
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
    const bool with_weights = act() != DType::kF32;
    const Results results =
        Step({.grad_scale = variant.grad_scale, .grad_norm = 1.0f}, with_weights);
    const ref::AdamWSettings s{.lr = static_cast<double>(settings_.lr),
                               .beta1 = static_cast<double>(settings_.beta1),
                               .beta2 = static_cast<double>(settings_.beta2),
                               .eps = static_cast<double>(settings_.eps),
                               .weight_decay = static_cast<double>(settings_.weight_decay),
                               .correction1 = static_cast<double>(settings_.correction1),
                               .correction2 = static_cast<double>(settings_.correction2)};
    const auto grad_scale = static_cast<double>(variant.grad_scale);
    Vec master = master_, m = m_, v = v_;
    ref::AdamW(s, grad_scale, grad_, master, m, v);
    // Each formula is a handful of fp32 operations on terms of which only m's can cancel.
    Vec master_bound(m.size()), m_bound(m.size()), v_bound(m.size());
    for (size_t i = 0; i < m.size(); ++i) {
      const double m_terms =
          std::abs(s.beta1 * m_[i]) + std::abs((1 - s.beta1) * grad_[i] * grad_scale);
      m_bound[i] = 4 * kF32Roundoff * m_terms + Tiny(DType::kF32);
      v_bound[i] = 6 * kF32Roundoff * v[i] + Tiny(DType::kF32);
      const double denominator = std::sqrt(v[i] / s.correction2) + s.eps;
      master_bound[i] = 2 * kF32Roundoff * (std::abs(master_[i]) + std::abs(master[i])) +
                        s.lr * (4 * kF32Roundoff * s.weight_decay * std::abs(master_[i]) +
                                16 * kF32Roundoff * m_terms / s.correction1 / denominator);
    }
    ExpectWithin("master", results.Values("master", DType::kF32), master, master_bound);
    ExpectWithin("m", results.Values("m", DType::kF32), m, m_bound);
    ExpectWithin("v", results.Values("v", DType::kF32), v, v_bound);
    if (with_weights) {
      EXPECT_EQ(results.Bytes("weights"), Encode(act(), results.Values("master", DType::kF32)))
          << "weights are not master rounded to nearest even";
    }
  }
}

TEST_P(AdamWTest, SkipChangesNothing) {
  Fill();
  // What GradientStats leaves where a gradient is not finite.
  grad_[0] = std::numeric_limits<double>::infinity();
  grad_.back() = std::nan("");
  const OptimizerControl control{.grad_scale = std::numeric_limits<float>::quiet_NaN(),
                                 .grad_norm = std::numeric_limits<float>::infinity(),
                                 .skip = 1};
  const bool with_weights = act() != DType::kF32;
  const Results results = Step(control, with_weights);
  EXPECT_EQ(results.Bytes("master"), Encode(DType::kF32, master_));
  EXPECT_EQ(results.Bytes("m"), Encode(DType::kF32, m_));
  EXPECT_EQ(results.Bytes("v"), Encode(DType::kF32, v_));
  // Untouched: the poison is still there.
  if (with_weights) {
    EXPECT_EQ(results.Bytes("weights"),
              std::vector<uint8_t>(static_cast<size_t>(param().n) * SizeOf(act()), 0xFF));
  }
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

}  // namespace
}  // namespace lamina::testing
