// Dynamic loss scaling through the engine: whose scale a step divides by, how it changes, what is
// told and counted.
#include <cstring>
#include <string>

#include "engine_rig.h"

namespace lamina::testing {
namespace {

class LossScale : public ::testing::Test {
 protected:
  LossScale() {
    StackConfig config = TinyConfig(DType::kF16);
    config.attn_dropout_ratio = config.hidden_dropout_ratio = 0;  // each step has one gradient
    config.dynamic_loss_scale = true;
    config.initial_loss_scale = 1024;
    config.loss_scale_growth_interval = 2;
    config.loss_scale_hysteresis = 2;
    config.min_loss_scale = 512;
    rig_.Create("s", config);
  }
  // Forward, Backward and a step; `finite`: whether the gradients are.
  ApplyResult Step(bool finite, const OptimizerOptions& options = {.learning_rate = 1e-3}) {
    const std::string id = rig_.Forward("s", kSession, 1);
    OwnedTensor grad = Noise(2, DType::kF16, {3, 8, 16});
    const uint16_t infinity = 0x7C00;
    if (!finite) std::memcpy(grad.bytes.data(), &infinity, sizeof(infinity));
    Value(rig_.engine().Backward(
        {.stack = "s", .session = kSession, .context_id = id, .output_grad = grad.view()}, {}));
    return Value(rig_.engine().ApplyGradients("s", options, true, {})).result;
  }
  void Expect(const ApplyResult& result, bool applied, double scale, double next) {
    EXPECT_EQ(result.applied, applied);
    EXPECT_EQ(result.loss_scale, scale);
    EXPECT_EQ(result.next_loss_scale, next);
    EXPECT_EQ(Value(rig_.engine().GetStack("s")).loss_scale, next);
    EXPECT_EQ(rig_.Metric("lamina_loss_scale"), next);
  }

  Rig rig_;
};

TEST_F(LossScale, GrowsAfterCleanStepsAndBacksOffAfterOverflows) {
  EXPECT_EQ(Value(rig_.engine().GetStack("s")).loss_scale, 1024);
  Expect(Step(true), true, 1024, 1024);
  Expect(Step(true), true, 1024, 2048);
  EXPECT_EQ(rig_.Metric("lamina_loss_scale_changes_total{change=\"growth\"}"), 1);
  const std::string before = rig_.Snapshot("s");
  Expect(Step(false), false, 2048, 2048);  // the hysteresis tolerates one
  Expect(Step(false), false, 2048, 1024);
  EXPECT_EQ(rig_.Metric("lamina_loss_scale_changes_total{change=\"backoff\"}"), 1);
  EXPECT_EQ(rig_.Metric("lamina_skipped_steps_total"), 2);
  const StackCounters counters = Value(rig_.engine().GetStack("s")).counters;
  EXPECT_EQ(counters.skipped_steps, 2);
  EXPECT_EQ(counters.optimizer_step, 2);
  const size_t weights = static_cast<size_t>(Value(rig_.engine().GetStack("s")).parameter_count *
                                             static_cast<int64_t>(sizeof(float)));
  EXPECT_EQ(rig_.Snapshot("s").substr(0, weights), before.substr(0, weights)) << "skipped";
  for (int i = 0; i < 8; ++i) Step(false);
  EXPECT_EQ(Value(rig_.engine().GetStack("s")).loss_scale, 512) << "min_loss_scale";
}

TEST_F(LossScale, IsWhatAStepDividesByUnlessItIsGivenOne) {
  const double own = Step(true, {.learning_rate = 0}).grad_norm;
  const ApplyResult given = Step(true, {.learning_rate = 0, .loss_scale = 64});
  EXPECT_EQ(given.loss_scale, 64);
  EXPECT_NEAR(given.grad_norm / own, 1024.0 / 64.0, 1e-4);
}

TEST(FixedLossScale, IsOneUnlessItIsGiven) {
  Rig rig;
  rig.Create("s", TinyConfig());
  EXPECT_EQ(Value(rig.engine().GetStack("s")).loss_scale, 1);
  rig.ForwardBackward("s", kSession, 1);
  ApplyResult result =
      Value(rig.engine().ApplyGradients("s", {.learning_rate = 0}, false, {})).result;
  EXPECT_EQ(result.loss_scale, 1);
  EXPECT_EQ(result.next_loss_scale, 1);
  const double norm = result.grad_norm;
  result = Value(rig.engine().ApplyGradients("s", {.learning_rate = 0, .loss_scale = 8}, false, {}))
               .result;
  EXPECT_EQ(result.loss_scale, 8);
  EXPECT_EQ(result.next_loss_scale, 8);
  EXPECT_NEAR(result.grad_norm * 8, norm, 1e-5 * norm);
  EXPECT_EQ(rig.Metric("lamina_loss_scale_changes_total{change=\"growth\"}"), 0);
}

}  // namespace
}  // namespace lamina::testing
