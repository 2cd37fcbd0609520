// AdamW and LAMB through the stack: against references in double, clipping, loss scale and
// skipping, and going on from a saved state bit for bit.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "rig.h"

namespace lamina::testing {
namespace {

using absl::StatusCode;

class OptimizerTest : public DeviceTest {
 protected:
  std::unique_ptr<Stack> Make(StackConfig config = SmallConfig()) {
    std::unique_ptr<Stack> stack =
        Value(Stack::Create(*backend_, Value(Resolve(config, backend_->info().ordinal))));
    Perturb(*stack, 7);
    return stack;
  }
};

// Both optimizers in double, with the fp32 constants that a kernel is given: AdamW as PyTorch's
// torch.optim.AdamW computes it, LAMB as Algorithm 2 of You et al. (2020) with the identity as phi.
struct Reference {
  std::map<std::string, std::vector<double>> w, m, v;
  int64_t step = 0;
  double largest_ratio = 1;  // of any tensor in any step; 1 for AdamW

  explicit Reference(Stack& stack) {
    for (const auto& [name, values] : ReadAll(stack, ParameterPart::kMaster)) {
      w[name].assign(values.begin(), values.end());
      m[name].assign(values.size(), 0.0);
      v[name].assign(values.size(), 0.0);
    }
  }

  // Returns the gradient norm before clipping.
  double Step(const std::map<std::string, std::vector<float>>& gradients,
              const OptimizerOptions& o) {
    const double loss_scale = o.loss_scale == 0 ? 1 : o.loss_scale;
    double squares = 0;
    for (const auto& [name, g] : gradients)
      for (float x : g) squares += (x / loss_scale) * (x / loss_scale);
    const double norm = std::sqrt(squares);
    const double clip =
        o.max_grad_norm > 0 && norm > o.max_grad_norm ? o.max_grad_norm / norm : 1.0;
    ++step;
    const double b1 = static_cast<float>(o.beta1), b2 = static_cast<float>(o.beta2);
    const double c1 = 1 - std::pow(b1, static_cast<double>(step));
    const double c2 = 1 - std::pow(b2, static_cast<double>(step));
    for (const auto& [name, g] : gradients) {
      const std::string kind = name.substr(name.rfind('.') + 1);
      const bool matrix =
          kind == "attn_qkvw" || kind == "attn_ow" || kind == "inter_w" || kind == "output_w";
      const double decay = matrix || o.decay_biases_and_norms ? o.weight_decay : 0.0;
      std::vector<double>&wn = w[name], &mn = m[name], &vn = v[name];
      for (size_t i = 0; i < g.size(); ++i) {
        const double x = g[i] * clip / loss_scale;
        mn[i] = b1 * mn[i] + (1 - b1) * x;
        vn[i] = b2 * vn[i] + (1 - b2) * x * x;
      }
      if (o.kind == OptimizerKind::kAdamW) {
        for (size_t i = 0; i < g.size(); ++i) {
          wn[i] *= 1 - o.learning_rate * decay;
          wn[i] -= o.learning_rate / c1 * mn[i] / (std::sqrt(vn[i]) / std::sqrt(c2) + o.epsilon);
        }
        continue;
      }
      std::vector<double> update(g.size());
      double weights = 0, updates = 0;
      for (size_t i = 0; i < g.size(); ++i) {
        update[i] = mn[i] / c1 / (std::sqrt(vn[i] / c2) + o.epsilon) + decay * wn[i];
        weights += wn[i] * wn[i];
        updates += update[i] * update[i];
      }
      double ratio = 1;
      if ((matrix || o.adapt_biases_and_norms) && weights > 0 && updates > 0) {
        ratio = std::max(std::sqrt(weights / updates), o.min_trust_ratio);
        if (o.max_trust_ratio > 0) ratio = std::min(ratio, o.max_trust_ratio);
      }
      largest_ratio = std::max(largest_ratio, ratio);
      for (size_t i = 0; i < g.size(); ++i) wn[i] -= o.learning_rate * ratio * update[i];
    }
    return norm;
  }
};

void SetGradients(Stack& stack, const std::map<std::string, std::vector<float>>& gradients) {
  for (const auto& [name, g] : gradients) WriteFloats(stack, name, ParameterPart::kGradient, g);
}

std::map<std::string, std::vector<float>> NoiseGradients(Stack& stack, uint64_t seed, float scale) {
  std::map<std::string, std::vector<float>> gradients;
  for (const ParameterInfo& p : stack.parameters()) {
    gradients[p.name] = Noise(++seed * 977, p.shape.elements());
    for (float& g : gradients[p.name]) g *= scale;
  }
  return gradients;
}

TEST_P(OptimizerTest, HundredStepsAgreeWithTheDoubleReference) {
  constexpr int kSteps = 100;
  constexpr OptimizerKind kLamb = OptimizerKind::kLamb;
  struct Case {
    DType dtype;
    OptimizerOptions options;
    float gradient_scale;
  };
  const Case cases[] = {
      {DType::kF32, {.learning_rate = 0.01}, 1},
      {DType::kF32, {.learning_rate = 0.01, .weight_decay = 0.1}, 1},
      {DType::kF32,
       {.learning_rate = 0.01, .weight_decay = 0.1, .decay_biases_and_norms = true},
       1},
      {DType::kF32, {.learning_rate = 0.01, .beta1 = 0.0, .beta2 = 0.0}, 1},
      {DType::kF32, {.learning_rate = 0.01, .max_grad_norm = 1.0}, 1},     // clips
      {DType::kF32, {.learning_rate = 0.01, .max_grad_norm = 1000.0}, 1},  // does not
      {DType::kF32, {.learning_rate = 0.01, .max_grad_norm = 1.0, .loss_scale = 1024}, 1024},
      {DType::kBF16, {.learning_rate = 0.01, .epsilon = 1e-3, .weight_decay = 0.1}, 1},
      {DType::kF16, {.learning_rate = 0.01, .loss_scale = 65536}, 65536},
      {DType::kF32, {.kind = kLamb, .learning_rate = 0.01}, 1},
      {DType::kF32,
       {.kind = kLamb, .learning_rate = 0.01, .epsilon = 1e-6, .weight_decay = 0.1},
       1},
      {DType::kF32,
       {.kind = kLamb,
        .learning_rate = 0.01,
        .weight_decay = 0.1,
        .decay_biases_and_norms = true,
        .adapt_biases_and_norms = true},
       1},
      {DType::kF32, {.kind = kLamb, .learning_rate = 0.01, .min_trust_ratio = 0.9}, 1},
      {DType::kF32,
       {.kind = kLamb,
        .learning_rate = 0.01,
        .adapt_biases_and_norms = true,
        .min_trust_ratio = 0.01,
        .max_trust_ratio = 0.2},
       1},
      {DType::kBF16, {.kind = kLamb, .learning_rate = 0.01, .max_grad_norm = 1.0}, 1},
      {DType::kF16,
       {.kind = kLamb, .learning_rate = 0.01, .weight_decay = 0.01, .loss_scale = 65536},
       65536},
  };
  for (const Case& c : cases) {
    StackConfig config = SmallConfig();
    config.dtype = c.dtype;
    const std::unique_ptr<Stack> stack = Make(config);
    Reference reference(*stack);
    for (uint64_t step = 1; step <= kSteps; ++step) {
      const auto gradients = NoiseGradients(*stack, step, c.gradient_scale);
      SetGradients(*stack, gradients);
      const ApplyResult result = Value(stack->ApplyGradients(c.options));
      const double norm = reference.Step(gradients, c.options);
      EXPECT_TRUE(result.applied);
      EXPECT_EQ(result.step, static_cast<int64_t>(step));
      EXPECT_NEAR(result.grad_norm, norm, 1e-5 * norm);
    }
    EXPECT_EQ(stack->counters().optimizer_step, kSteps);
    for (const ParameterInfo& p : stack->parameters()) {
      const std::vector<float> master = ReadFloats(*stack, p.name, ParameterPart::kMaster);
      const std::vector<float> m = ReadFloats(*stack, p.name, ParameterPart::kMoment1);
      const std::vector<float> v = ReadFloats(*stack, p.name, ParameterPart::kMoment2);
      for (size_t i = 0; i < master.size(); ++i) {
        // Each step rounds w once (half an ulp of a value below 2) and moves it by at most about
        // lr times the trust ratio, that move with a handful of roundings and the clip factor's.
        const double step_error =
            0x1p-24 + 16 * 0x1p-24 * c.options.learning_rate * 4 * reference.largest_ratio;
        ASSERT_NEAR(master[i], reference.w[p.name][i], kSteps * step_error) << p.name << " " << i;
        // Moments are means of gradients of at most 1, rounded thrice a step.
        ASSERT_NEAR(m[i], reference.m[p.name][i], kSteps * 4 * 0x1p-24) << p.name << " " << i;
        ASSERT_NEAR(v[i], reference.v[p.name][i], kSteps * 8 * 0x1p-24) << p.name << " " << i;
      }
      if (c.dtype == DType::kF32) continue;
      std::vector<uint8_t> weights(Value(stack->ParameterBytes(p.name, ParameterPart::kWeights)));
      ASSERT_OK(
          stack->ReadParameter(p.name, ParameterPart::kWeights, weights.data(), weights.size()));
      EXPECT_EQ(weights, DeviceTensor(*backend_, c.dtype, p.shape, master).Bytes()) << p.name;
    }
  }
}

TEST_P(OptimizerTest, ANonFiniteGradientSkipsTheStep) {
  for (float bad : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                    std::numeric_limits<float>::quiet_NaN()}) {
    const std::unique_ptr<Stack> stack = Make();
    Reference reference(*stack);
    const OptimizerOptions options{.learning_rate = 0.01, .max_grad_norm = 1};
    const auto good = NoiseGradients(*stack, 1, 1);
    SetGradients(*stack, good);
    ASSERT_TRUE(Value(stack->ApplyGradients(options)).applied);
    reference.Step(good, options);
    const auto w = ReadAll(*stack, ParameterPart::kMaster);
    const auto m = ReadAll(*stack, ParameterPart::kMoment1);
    const auto v = ReadAll(*stack, ParameterPart::kMoment2);

    auto gradients = NoiseGradients(*stack, 2, 1);
    gradients.at("layers.1.norm_b").back() = bad;
    SetGradients(*stack, gradients);
    const ApplyResult skipped = Value(stack->ApplyGradients(options));
    EXPECT_FALSE(skipped.applied);
    EXPECT_EQ(skipped.step, 1);
    EXPECT_FALSE(std::isfinite(skipped.grad_norm));
    EXPECT_EQ(ReadAll(*stack, ParameterPart::kMaster), w);
    EXPECT_EQ(ReadAll(*stack, ParameterPart::kMoment1), m);
    EXPECT_EQ(ReadAll(*stack, ParameterPart::kMoment2), v);
    EXPECT_EQ(stack->counters().skipped_steps, 1);
    EXPECT_EQ(stack->counters().optimizer_step, 1);

    // The next good step is the second, with the second's bias corrections.
    SetGradients(*stack, good);
    EXPECT_EQ(Value(stack->ApplyGradients(options)).step, 2);
    reference.Step(good, options);
    for (const auto& [name, values] : ReadAll(*stack, ParameterPart::kMaster))
      for (size_t i = 0; i < values.size(); ++i)
        ASSERT_NEAR(values[i], reference.w[name][i], 1e-6) << name;
  }
}

TEST_P(OptimizerTest, LossScaleIsDividedOut) {
  // A power of two scales without rounding: the same bits.
  std::vector<std::map<std::string, std::vector<float>>> results;
  for (float scale : {1.0f, 4096.0f}) {
    const std::unique_ptr<Stack> stack = Make();
    SetGradients(*stack, NoiseGradients(*stack, 3, scale));
    const ApplyResult result =
        Value(stack->ApplyGradients({.learning_rate = 0.01, .loss_scale = scale}));
    EXPECT_TRUE(result.applied);
    results.push_back(ReadAll(*stack, ParameterPart::kMaster));
  }
  EXPECT_EQ(results[0], results[1]);
}

TEST_P(OptimizerTest, GradientsStayUntilZeroed) {
  const std::unique_ptr<Stack> stack = Make();
  const auto gradients = NoiseGradients(*stack, 3, 1);
  SetGradients(*stack, gradients);
  ASSERT_OK(stack->ApplyGradients({.learning_rate = 0.01, .max_grad_norm = 0.1}).status());
  EXPECT_EQ(ReadAll(*stack, ParameterPart::kGradient), gradients);
}

TEST_P(OptimizerTest, OptionsAreChecked) {
  const std::unique_ptr<Stack> stack = Make();
  SetGradients(*stack, NoiseGradients(*stack, 3, 1));
  const auto before = ReadAll(*stack, ParameterPart::kMaster);
  const std::pair<const char*, OptimizerOptions> cases[] = {
      {"learning_rate is -1; it must be finite and >= 0", {.learning_rate = -1}},
      {"learning_rate is nan;", {.learning_rate = kNaN}},
      {"learning_rate is inf;", {.learning_rate = kInf}},
      {"beta1 is 1; it must be in [0, 1)", {.beta1 = 1}},
      {"beta1 is -0.1;", {.beta1 = -0.1}},
      {"beta1 is nan;", {.beta1 = kNaN}},
      {"beta2 is 1;", {.beta2 = 1}},
      {"beta2 is nan;", {.beta2 = kNaN}},
      {"epsilon is 0; it must be finite and > 0", {.epsilon = 0}},
      {"epsilon is nan;", {.epsilon = kNaN}},
      {"weight_decay is -0.5; it must be finite and >= 0", {.weight_decay = -0.5}},
      {"weight_decay is inf;", {.weight_decay = kInf}},
      {"max_grad_norm is -1; it must be finite and >= 0", {.max_grad_norm = -1}},
      {"max_grad_norm is nan;", {.max_grad_norm = kNaN}},
      {"loss_scale is -2; it must be finite and > 0 in fp32, or 0", {.loss_scale = -2}},
      {"loss_scale is inf;", {.loss_scale = kInf}},
      {"loss_scale is nan;", {.loss_scale = kNaN}},
      {"optimizer kind is 7", {.kind = static_cast<OptimizerKind>(7)}},
      {"LAMB: learning_rate is -1;", {.kind = OptimizerKind::kLamb, .learning_rate = -1}},
      {"min_trust_ratio is -1; it must be finite and >= 0",
       {.kind = OptimizerKind::kLamb, .min_trust_ratio = -1}},
      {"max_trust_ratio is 1; it must be finite and >= min_trust_ratio",
       {.kind = OptimizerKind::kLamb, .min_trust_ratio = 2, .max_trust_ratio = 1}},
      {"max_trust_ratio is nan;", {.kind = OptimizerKind::kLamb, .max_trust_ratio = kNaN}},
      {"are LAMB's", {.adapt_biases_and_norms = true}},
      {"are LAMB's", {.max_trust_ratio = 10}},
  };
  for (const auto& [message, options] : cases)
    EXPECT_THAT(stack->ApplyGradients(options).status(),
                IsStatus(StatusCode::kInvalidArgument, message));
  EXPECT_EQ(ReadAll(*stack, ParameterPart::kMaster), before);
  EXPECT_EQ(stack->counters().optimizer_step, 0);
}

TEST_P(OptimizerTest, ASavedStackGoesOnBitForBit) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    StackConfig config = SmallConfig();
    config.dtype = dtype;
    config.attn_dropout_ratio = config.hidden_dropout_ratio = 0.1;
    const auto train = [&](Stack& stack, uint64_t first, uint64_t last) {
      std::vector<CallResult> results;
      for (uint64_t step = first; step < last; ++step) {
        results.push_back(RunTraining(*backend_, stack, NoiseCall(config, 3, 7, step), {0, 2}));
        EXPECT_OK(stack.ApplyGradients({.learning_rate = 0.01, .weight_decay = 0.01}).status());
        EXPECT_OK(stack.ZeroGradients());
      }
      return results;
    };
    const std::unique_ptr<Stack> stack = Make(config);
    train(*stack, 1, 4);
    // A gradient that was accumulated and not yet applied belongs to the state too.
    RunTraining(*backend_, *stack, NoiseCall(config, 2, 3, 9), {0, 2});

    config.seed = 11;  // the dropout masks' seed: part of the config
    const std::unique_ptr<Stack> restored =
        Value(Stack::Create(*backend_, Value(Resolve(config, backend_->info().ordinal))));
    for (ParameterPart part : {ParameterPart::kMaster, ParameterPart::kGradient,
                               ParameterPart::kMoment1, ParameterPart::kMoment2})
      for (const auto& [name, values] : ReadAll(*stack, part))
        WriteFloats(*restored, name, part, values);
    restored->set_counters(stack->counters());

    const std::vector<CallResult> expected = train(*stack, 4, 7);
    const std::vector<CallResult> got = train(*restored, 4, 7);
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(got[i].output, expected[i].output) << i;
      EXPECT_EQ(got[i].input_grad, expected[i].input_grad) << i;
    }
    for (ParameterPart part :
         {ParameterPart::kMaster, ParameterPart::kMoment1, ParameterPart::kMoment2})
      EXPECT_EQ(ReadAll(*restored, part), ReadAll(*stack, part));
  }
}

// The segments' table follows the options from call to call, and survives training off and on.
TEST_P(OptimizerTest, LambsExclusionsMayChangeBetweenSteps) {
  const std::unique_ptr<Stack> stack = Make();
  const auto train = [&](Reference& reference, uint64_t first) {
    for (uint64_t step = first; step < first + 4; ++step) {
      const OptimizerOptions options{.kind = OptimizerKind::kLamb,
                                     .learning_rate = 0.01,
                                     .weight_decay = 0.5,
                                     .decay_biases_and_norms = step % 4 >= 2,
                                     .adapt_biases_and_norms = step % 2 == 1};
      const auto gradients = NoiseGradients(*stack, step, 1);
      SetGradients(*stack, gradients);
      ASSERT_TRUE(Value(stack->ApplyGradients(options)).applied);
      reference.Step(gradients, options);
    }
    for (const auto& [name, values] : ReadAll(*stack, ParameterPart::kMaster))
      for (size_t i = 0; i < values.size(); ++i)
        ASSERT_NEAR(values[i], reference.w[name][i], 1e-6) << name;
  };
  Reference reference(*stack);
  train(reference, 0);
  ASSERT_OK(stack->Update({.training = false}));
  ASSERT_OK(stack->Update({.training = true}));
  Reference again(*stack);
  train(again, 3);
}

// --- dynamic loss scaling ---

StackConfig Scaled() {
  StackConfig config = SmallConfig();
  config.dtype = DType::kF16;
  config.dynamic_loss_scale = true;
  config.initial_loss_scale = 8;
  config.min_loss_scale = 2;
  config.loss_scale_growth_interval = 3;
  config.loss_scale_hysteresis = 2;
  return config;
}

// One step whose gradients overflow, or not.
ApplyResult StepOnce(Stack& stack, bool overflow, double loss_scale = 0) {
  auto gradients = NoiseGradients(stack, 3, 1);
  if (overflow) gradients.at("layers.0.attn_ob").front() = std::numeric_limits<float>::infinity();
  SetGradients(stack, gradients);
  return Value(stack.ApplyGradients({.learning_rate = 1e-4, .loss_scale = loss_scale}));
}

TEST_P(OptimizerTest, TheLossScaleFollowsOverflows) {
  const std::unique_ptr<Stack> stack = Make(Scaled());
  EXPECT_EQ(stack->loss_scale(), 8);
  const std::pair<bool, double> steps[] = {
      {false, 8},  {false, 8},  {false, 16},             // the third clean step doubles it
      {false, 16}, {true, 16},                           // one overflow is tolerated
      {false, 16}, {false, 16}, {false, 32},             // it started the count over
      {true, 32},  {true, 16},                           // growth renewed what is tolerated
      {false, 16}, {true, 8},   {true, 4},   {true, 2},  // clean steps did not
      {true, 2},                                         // the least
      {false, 2},  {false, 2},  {false, 4},  {true, 4}, {true, 2},
  };
  double before = 8;
  int64_t applied = 0, skipped = 0;
  for (const auto& [overflow, after] : steps) {
    const ApplyResult result = StepOnce(*stack, overflow);
    ++(overflow ? skipped : applied);
    EXPECT_EQ(result.applied, !overflow);
    EXPECT_EQ(result.loss_scale, before);
    EXPECT_EQ(result.next_loss_scale, after) << "after " << applied << " and " << skipped;
    EXPECT_EQ(stack->loss_scale(), after);
    EXPECT_EQ(result.step, applied);
    EXPECT_EQ(stack->counters().skipped_steps, skipped);
    before = after;
  }
}

TEST_P(OptimizerTest, TheLossScaleGoesOnFromItsCounters) {
  const std::unique_ptr<Stack> stack = Make(Scaled()), restored = Make(Scaled());
  for (const bool overflow : {false, false, false, true, false}) StepOnce(*stack, overflow);
  restored->set_counters(stack->counters());
  for (const bool overflow : {false, false, false, true, true, true}) {
    const ApplyResult a = StepOnce(*stack, overflow), b = StepOnce(*restored, overflow);
    EXPECT_EQ(a.loss_scale, b.loss_scale);
    EXPECT_EQ(a.next_loss_scale, b.next_loss_scale);
  }
  EXPECT_EQ(stack->counters().clean_steps, restored->counters().clean_steps);
  EXPECT_EQ(stack->counters().overflows_tolerated, restored->counters().overflows_tolerated);
}

TEST_P(OptimizerTest, TheStacksLossScaleIsDividedOut) {
  const std::unique_ptr<Stack> own = Make(Scaled()), told = Make(Scaled());
  const ApplyResult a = StepOnce(*own, false), b = StepOnce(*told, false, 8);
  EXPECT_EQ(a.grad_norm, b.grad_norm);
  EXPECT_EQ(ReadAll(*own, ParameterPart::kMaster), ReadAll(*told, ParameterPart::kMaster));
  EXPECT_EQ(told->counters().clean_steps, 1) << "told what it is";

  // Another scale than the stack's own says nothing about the stack's own.
  const ApplyResult other = StepOnce(*told, true, 64);
  EXPECT_EQ(other.loss_scale, 64);
  EXPECT_EQ(other.next_loss_scale, 8);
  EXPECT_EQ(told->counters().clean_steps, 1);
  EXPECT_EQ(told->counters().overflows_tolerated, 2);
}

TEST_P(OptimizerTest, ALossScaleThatIsNotDynamicStays) {
  const std::unique_ptr<Stack> stack = Make();
  EXPECT_EQ(stack->loss_scale(), 1);
  EXPECT_EQ(StepOnce(*stack, false).next_loss_scale, 1);
  const ApplyResult skipped = StepOnce(*stack, true, 1024);
  EXPECT_EQ(skipped.loss_scale, 1024);
  EXPECT_EQ(skipped.next_loss_scale, 1024);
  EXPECT_EQ(stack->loss_scale(), 1);
}

TEST_P(OptimizerTest, GrowthOfTheLossScaleEnds) {
  StackConfig config = Scaled();
  config.initial_loss_scale = StackConfig::kMaxLossScale / 2;
  config.loss_scale_growth_interval = 1;
  const std::unique_ptr<Stack> stack = Make(config);
  for (int step = 0; step < 3; ++step)
    EXPECT_EQ(StepOnce(*stack, false).next_loss_scale, StackConfig::kMaxLossScale);
}

INSTANTIATE_TEST_SUITE_P(, OptimizerTest, ::testing::ValuesIn(kDevices), DeviceName);

}  // namespace
}  // namespace lamina::testing
