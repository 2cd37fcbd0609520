// Memory flags on stacks that live: created with, turned on and off between steps, refused.
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine_rig.h"

namespace lamina::testing {
namespace {

struct FlagCase {
  const char* name;
  StackChanges on, off;
  bool same_arithmetic;  // what Backward recomputes is bit for bit what Forward computed
};

const std::vector<FlagCase>& FlagCases() {
  static const std::vector<FlagCase> cases = {
      {"normalize_invertible",
       {.normalize_invertible = true},
       {.normalize_invertible = false},
       false},
      {"gelu_checkpoint", {.gelu_checkpoint = true}, {.gelu_checkpoint = false}, true},
      {"attn_dropout_checkpoint",
       {.attn_dropout_checkpoint = true},
       {.attn_dropout_checkpoint = false},
       true},
      {"activation_checkpointing",
       {.activation_checkpointing = true},
       {.activation_checkpointing = false},
       true},
      {"stochastic_mode", {.stochastic_mode = true}, {.stochastic_mode = false}, false},
      {"all",
       {.normalize_invertible = true,
        .gelu_checkpoint = true,
        .attn_dropout_checkpoint = true,
        .activation_checkpointing = true,
        .stochastic_mode = true},
       {.normalize_invertible = false,
        .gelu_checkpoint = false,
        .attn_dropout_checkpoint = false,
        .activation_checkpointing = false,
        .stochastic_mode = false},
       false}};
  return cases;
}

StackConfig With(StackConfig config, const StackChanges& changes) {
  config.normalize_invertible = changes.normalize_invertible.value_or(config.normalize_invertible);
  config.gelu_checkpoint = changes.gelu_checkpoint.value_or(config.gelu_checkpoint);
  config.attn_dropout_checkpoint =
      changes.attn_dropout_checkpoint.value_or(config.attn_dropout_checkpoint);
  config.activation_checkpointing =
      changes.activation_checkpointing.value_or(config.activation_checkpointing);
  config.stochastic_mode = changes.stochastic_mode.value_or(config.stochastic_mode);
  return config;
}

// Gammas of 0.5 to 1.5 and betas that are not zero: as in a model that has been trained.
void SetNorms(Rig& rig, const std::string& stack) {
  for (const char* layer : {"layers.0.", "layers.1."})
    for (const char* norm : {"attn_n", "norm_"}) {
      OwnedTensor gamma = Noise(5, DType::kF32, {16}), beta = Noise(6, DType::kF32, {16});
      for (size_t i = 0; i < 16; ++i) {
        float value = 0;
        std::memcpy(&value, gamma.bytes.data() + 4 * i, 4);
        value = 1 + value / 2;
        std::memcpy(gamma.bytes.data() + 4 * i, &value, 4);
      }
      ASSERT_OK(rig.engine().WriteParameters(stack,
                                             {{absl::StrCat(layer, norm, "w"), gamma.view()},
                                              {absl::StrCat(layer, norm, "b"), beta.view()}},
                                             {}));
    }
}

struct FlagsParam {
  DType dtype;
  bool pre_layer_norm;
};

class MemoryFlags : public ::testing::TestWithParam<FlagsParam> {
 protected:
  StackConfig Config() {
    StackConfig config = TinyConfig(GetParam().dtype);
    config.pre_layer_norm = GetParam().pre_layer_norm;
    return config;
  }
  // Forward, Backward, then the accumulated gradients: compared with the plain run's.
  void ExpectSame(Rig& rig, const std::string& a, const std::string& b, bool bitwise) {
    const DType dtype = GetParam().dtype;
    const std::string x = rig.ForwardBackward(a, kSession, 9), dx = rig.Gradients(a);
    const std::string y = rig.ForwardBackward(b, kSession, 9), dy = rig.Gradients(b);
    EXPECT_EQ(x.substr(0, x.size() / 2), y.substr(0, y.size() / 2)) << "the output never changes";
    if (bitwise) {
      EXPECT_TRUE(x == y) << "input gradients differ";
      EXPECT_TRUE(dx == dy) << "parameter gradients differ";
      return;
    }
    // x^ = (y - beta) / gamma from a y that was rounded once: |x^| + |beta / gamma| roundoffs,
    // which two layers then multiply.
    const double tolerance = dtype == DType::kF32 ? 4e-6 : dtype == DType::kF16 ? 8e-3 : 6e-2;
    EXPECT_LT(RelativeError(ToDoubles(x, dtype), ToDoubles(y, dtype)), tolerance);
    EXPECT_LT(RelativeError(ToDoubles(dx, DType::kF32), ToDoubles(dy, DType::kF32)), tolerance);
  }
};

TEST_P(MemoryFlags, CreatedWithGivesThePlainRunsGradients) {
  for (const FlagCase& flag : FlagCases()) {
    SCOPED_TRACE(flag.name);
    Rig rig;
    rig.Create("plain", Config());
    rig.Create("flagged", With(Config(), flag.on));
    SetNorms(rig, "plain");
    SetNorms(rig, "flagged");
    ExpectSame(rig, "flagged", "plain", flag.same_arithmetic);
  }
}

TEST_P(MemoryFlags, TurnedOnAndOffBetweenSteps) {
  for (const FlagCase& flag : FlagCases()) {
    SCOPED_TRACE(flag.name);
    Rig rig;
    Engine& engine = rig.engine();
    rig.Create("plain", Config());
    rig.Create("live", Config());
    SetNorms(rig, "plain");
    SetNorms(rig, "live");
    const MemoryPlan plain = Value(engine.GetStack("plain")).plan;
    EXPECT_EQ(rig.Step("live", kSession, 1), rig.Step("plain", kSession, 1));
    const StackInfo on = Value(engine.UpdateStack("live", flag.on, {}));
    EXPECT_EQ(on.plan.Total(), Value(engine.PlanMemory(With(Config(), flag.on))).plan.Total());
    EXPECT_EQ(rig.backend().live_bytes, plain.Total() + on.plan.Total());
    EXPECT_EQ(rig.Metric("lamina_device_memory_bytes{kind=\"activations\"}"),
              static_cast<double>(plain.Bytes(MemoryKind::kActivations) +
                                  on.plan.Bytes(MemoryKind::kActivations)));
    ExpectSame(rig, "live", "plain", flag.same_arithmetic);
    const StackInfo off = Value(engine.UpdateStack("live", flag.off, {}));
    EXPECT_EQ(off.plan.Total(), plain.Total());
    EXPECT_EQ(rig.backend().live_bytes, 2 * plain.Total());
    // Weights and moments went through it all; the gradients may differ by now.
    ASSERT_OK(engine.ZeroGradients("live", {}));
    ASSERT_OK(engine.ZeroGradients("plain", {}));
    EXPECT_EQ(rig.Step("live", kSession, 30), rig.Step("plain", kSession, 30));
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, MemoryFlags,
    ::testing::Values(FlagsParam{DType::kF32, true}, FlagsParam{DType::kF32, false},
                      FlagsParam{DType::kBF16, true}, FlagsParam{DType::kF16, false}),
    [](const auto& test) {
      return std::string(Name(test.param.dtype)) + (test.param.pre_layer_norm ? "_pre" : "_post");
    });

TEST(MemoryFlagUpdates, AreRefusedWhileContextsWait) {
  Rig rig;
  Engine& engine = rig.engine();
  rig.Create("s", TinyConfig());
  const std::string id = rig.Forward("s", kSession, 1);
  const std::string before = rig.Snapshot("s");
  for (const StackChanges& changes :
       {StackChanges{.normalize_invertible = true}, StackChanges{.gelu_checkpoint = true},
        StackChanges{.activation_checkpointing = true}, StackChanges{.training = false},
        StackChanges{.attn_dropout_ratio = 0.5, .gelu_checkpoint = true}})
    EXPECT_THAT(engine.UpdateStack("s", changes, {}).status(), IsStatus(kPrecondition, "context"));
  EXPECT_EQ(rig.Snapshot("s"), before) << "the ratio beside a flag neither";
  // What lays out no memory anew may change.
  EXPECT_OK(engine.UpdateStack("s", {.hidden_dropout_ratio = 0.5}, {}).status());
  EXPECT_OK(engine.UpdateStack("s", {.gelu_checkpoint = false}, {}).status());  // as it is
  OwnedTensor grad = Noise(2, DType::kF32, {3, 8, 16});
  EXPECT_OK(
      engine
          .Backward(
              {.stack = "s", .session = kSession, .context_id = id, .output_grad = grad.view()}, {})
          .status());
  EXPECT_OK(engine.UpdateStack("s", {.gelu_checkpoint = true}, {}).status());
}

TEST(MemoryFlagUpdates, AreRefusedWhereTheNewPlanDoesNotFit) {
  Rig rig;
  Engine& engine = rig.engine();
  StackConfig config = TinyConfig();
  config.activation_checkpointing = true;
  rig.Create("s", config);
  const std::string before = rig.Snapshot("s");
  const size_t live = rig.backend().live_bytes;
  const int64_t allocations = rig.backend().allocations;
  rig.backend().free_bytes = 100;
  EXPECT_THAT(
      engine.UpdateStack("s", {.hidden_dropout_ratio = 0.4, .activation_checkpointing = false}, {})
          .status(),
      IsStatus(kExhausted, "100"));
  EXPECT_EQ(rig.Metric("lamina_admission_rejections_total{reason=\"stack_memory\"}"), 1);
  EXPECT_EQ(rig.backend().allocations, allocations);
  EXPECT_EQ(rig.backend().live_bytes, live);
  EXPECT_EQ(rig.Snapshot("s"), before);
  EXPECT_OK(engine.health());
  rig.Step("s", kSession, 1);
  rig.backend().free_bytes = CountingBackend::kAsItIs;
  EXPECT_OK(engine.UpdateStack("s", {.activation_checkpointing = false}, {}).status());
}

TEST(MemoryFlagUpdates, AnAllocationThatFailsLeavesTheStackAsItWas) {
  Rig rig;
  Rig twin;
  StackConfig config = TinyConfig();
  config.activation_checkpointing = true;
  rig.Create("s", config);
  twin.Create("s", config);
  const size_t live = rig.backend().live_bytes;
  for (int64_t nth = 0;; ++nth) {
    ASSERT_LT(nth, 100);
    rig.backend().fail_allocation = nth;
    const absl::Status status =
        rig.engine().UpdateStack("s", {.activation_checkpointing = false}, {}).status();
    rig.backend().fail_allocation = -1;
    if (status.ok()) break;
    EXPECT_EQ(status.code(), kExhausted);
    EXPECT_EQ(rig.backend().live_bytes, live);
    EXPECT_OK(rig.engine().health());
    const uint64_t seed = static_cast<uint64_t>(nth);
    EXPECT_EQ(rig.Step("s", kSession, seed), twin.Step("s", kSession, seed));
  }
}

// What was not kept would be computed from other weights than the Forward's.
TEST(Recomputation, IsRefusedOnceWeightsHaveChanged) {
  for (const bool whole : {true, false}) {
    Rig rig;
    Engine& engine = rig.engine();
    StackConfig config = TinyConfig();
    (whole ? config.activation_checkpointing : config.normalize_invertible) = true;
    rig.Create("s", config);
    const std::string id = rig.Forward("s", kSession, 1);
    Value(engine.ApplyGradients("s", {.learning_rate = 1e-3}, false, {}));
    const std::string before = rig.Snapshot("s");
    OwnedTensor grad = Noise(2, DType::kF32, {3, 8, 16});
    EXPECT_THAT(
        engine
            .Backward(
                {.stack = "s", .session = kSession, .context_id = id, .output_grad = grad.view()},
                {})
            .status(),
        IsStatus(kPrecondition, "weights of its layers have changed"));
    EXPECT_EQ(rig.Snapshot("s"), before) << "the context is unspent";
    EXPECT_OK(engine.ReleaseContext("s", kSession, id, {}));
    rig.ForwardBackward("s", kSession, 3);
  }
}

TEST(NormalizeInvertible, RefusesAGammaThatIsTooSmall) {
  Rig rig;
  StackConfig config = TinyConfig();
  config.normalize_invertible = true;
  rig.Create("s", config);
  OwnedTensor gamma = Zeros(DType::kF32, {16});
  for (size_t i = 0; i < 16; ++i) {
    const float value = i == 3 ? 0.0f : 1.0f;
    std::memcpy(gamma.bytes.data() + 4 * i, &value, 4);
  }
  ASSERT_OK(rig.engine().WriteParameters("s", {{"layers.1.norm_w", gamma.view()}}, {}));
  const std::string before = rig.Snapshot("s");
  OwnedTensor input = Noise(1, DType::kF32, {3, 8, 16});
  ForwardCall call{.stack = "s", .session = kSession, .input = input.view()};
  const absl::Status refused = rig.engine().Forward(call, {}).status();
  EXPECT_THAT(refused, IsStatus(kPrecondition, "layers.1.norm_w"));
  EXPECT_THAT(refused, IsStatus(kPrecondition, "3"));
  EXPECT_EQ(rig.Snapshot("s"), before);
  EXPECT_OK(rig.engine().health());
  call.training = false;
  EXPECT_OK(rig.engine().Forward(call, {}).status());  // an evaluation keeps nothing
  // Without the flag the same weights train.
  ASSERT_OK(rig.engine().UpdateStack("s", {.normalize_invertible = false}, {}).status());
  call.training = true;
  EXPECT_OK(rig.engine().Forward(call, {}).status());
}

}  // namespace
}  // namespace lamina::testing
