// What a stack promises besides the right numbers: accumulation, ranges, contexts, determinism,
// refusals.
#include "lamina/transformer/stack.h"

#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "rig.h"

namespace lamina::testing {
namespace {

using absl::StatusCode;
using Gradients = std::map<std::string, std::vector<float>>;

class StackTest : public DeviceTest {
 protected:
  // A stack with weights far from the trivial ones.
  std::unique_ptr<Stack> Make(StackConfig config) {
    std::unique_ptr<Stack> stack =
        Value(Stack::Create(*backend_, Value(Resolve(config, backend_->info().ordinal))));
    Perturb(*stack, 100);
    return stack;
  }
  std::unique_ptr<Stack> Make() { return Make(SmallConfig()); }
};

StackConfig WithDropout(StackConfig config = SmallConfig()) {
  config.attn_dropout_ratio = 0.2;
  config.hidden_dropout_ratio = 0.1;
  return config;
}

// The tensors of one call, kept so that Backward can come later.
struct OpenCall : DeviceCall {
  OpenCall(Backend& backend, Stack& stack, const CallData& data, LayerRange layer_range = {0, 2})
      : DeviceCall(backend, stack.config(), data, layer_range),
        output_grad(backend, stack.config().dtype, shape, data.output_grad),
        input_grad(backend, stack.config().dtype, shape) {}
  absl::Status Backward(Stack& stack) {
    return stack.Backward(*context, output_grad.view(), input_grad.view());
  }
  DeviceTensor output_grad, input_grad;
  std::unique_ptr<Context> context;
};

TEST_P(StackTest, GradientsAccumulateUntilZeroed) {
  const std::unique_ptr<Stack> stack = Make();
  const CallData data = NoiseCall(stack->config(), 3, 7);
  RunTraining(*backend_, *stack, data, {0, 2});
  const Gradients once = ReadAll(*stack, ParameterPart::kGradient);
  RunTraining(*backend_, *stack, data, {0, 2});
  const Gradients twice = ReadAll(*stack, ParameterPart::kGradient);
  for (const auto& [name, g] : once) {
    // The second run sums its 21 products onto the first's result: their order may differ, so each
    // addition may round differently.
    const double bound = 2 * 21 * 0x1p-24 * 2 * MaxAbs(g);
    EXPECT_GT(MaxAbs(g), 0) << name;
    for (size_t i = 0; i < g.size(); ++i)
      ASSERT_NEAR(twice.at(name)[i], 2.0 * g[i], bound) << name << " " << i;
  }
  ASSERT_OK(stack->ZeroGradients());
  for (const auto& [name, g] : ReadAll(*stack, ParameterPart::kGradient))
    EXPECT_EQ(MaxAbs(g), 0.0) << name;
  RunTraining(*backend_, *stack, data, {0, 2});
  EXPECT_EQ(ReadAll(*stack, ParameterPart::kGradient), once);
}

TEST_P(StackTest, RangesComposeBitForBit) {
  for (bool pre : {true, false}) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      StackConfig config = SmallConfig();
      config.num_hidden_layers = 3;
      config.pre_layer_norm = pre;
      config.dtype = dtype;
      const std::unique_ptr<Stack> stack = Make(config);
      const CallData data = NoiseCall(config, 3, 7);
      const CallResult whole = RunTraining(*backend_, *stack, data, {0, 3});
      const Gradients gradients = ReadAll(*stack, ParameterPart::kGradient);
      const std::vector<float> eval = RunEval(*backend_, *stack, data, {0, 3});

      for (int64_t cut : {1, 2}) {
        ASSERT_OK(stack->ZeroGradients());
        OpenCall first(*backend_, *stack, data, {0, cut});
        first.context = Value(stack->ForwardTraining(first.args));
        CallData rest = data;
        rest.input = first.output.Floats();
        const CallResult second = RunTraining(*backend_, *stack, rest, {cut, 3});
        EXPECT_EQ(second.output, whole.output);
        const DeviceTensor dy(*backend_, dtype, first.shape, second.input_grad);
        ASSERT_OK(stack->Backward(*first.context, dy.view(), first.input_grad.view()));
        EXPECT_EQ(first.input_grad.Floats(), whole.input_grad);
        EXPECT_EQ(ReadAll(*stack, ParameterPart::kGradient), gradients);

        CallData eval_rest = data;
        eval_rest.input = RunEval(*backend_, *stack, data, {0, cut});
        EXPECT_EQ(RunEval(*backend_, *stack, eval_rest, {cut, 3}), eval);
      }
    }
  }
}

TEST_P(StackTest, ARangeTouchesItsOwnGradientsAlone) {
  const std::unique_ptr<Stack> stack = Make();
  RunTraining(*backend_, *stack, NoiseCall(stack->config(), 3, 7), {1, 2});
  for (const auto& [name, g] : ReadAll(*stack, ParameterPart::kGradient))
    EXPECT_EQ(MaxAbs(g) > 0, name.rfind("layers.1.", 0) == 0) << name;
}

TEST_P(StackTest, EvaluationHasNoDropoutAndKeepsNothing) {
  const std::unique_ptr<Stack> plain = Make();
  const std::unique_ptr<Stack> dropping = Make(WithDropout());
  const CallData data = NoiseCall(plain->config(), 3, 7);
  EXPECT_EQ(RunEval(*backend_, *dropping, data, {0, 2}), RunEval(*backend_, *plain, data, {0, 2}));
  EXPECT_EQ(dropping->counters().rng_counter, 0u);
  EXPECT_EQ(dropping->context_bytes_high_water(), 0u);
}

TEST_P(StackTest, EvaluationIsTrainingWithoutDropout) {
  for (bool pre : {true, false}) {
    StackConfig config = SmallConfig();
    config.pre_layer_norm = pre;
    const std::unique_ptr<Stack> stack = Make(config);
    const CallData data = NoiseCall(config, 2, 5);
    const std::vector<float> trained = RunTraining(*backend_, *stack, data, {0, 2}).output;
    // Kernels may fuse differently where nothing is kept: a few roundings of the result.
    EXPECT_LE(MaxAbsDifference(RunEval(*backend_, *stack, data, {0, 2}), trained),
              16 * 0x1p-24 * MaxAbs(trained));
  }
}

TEST_P(StackTest, MasksFollowTheCounterAndNothingElse) {
  const std::unique_ptr<Stack> stack = Make(WithDropout());
  const CallData data = NoiseCall(stack->config(), 3, 7);
  const CallResult first = RunTraining(*backend_, *stack, data, {0, 2});
  const Gradients gradients = ReadAll(*stack, ParameterPart::kGradient);
  EXPECT_EQ(stack->counters().rng_counter, 1u);
  EXPECT_NE(RunTraining(*backend_, *stack, data, {0, 2}).output, first.output);
  EXPECT_EQ(stack->counters().rng_counter, 2u);

  stack->set_counters({.optimizer_step = 5, .rng_counter = 0, .skipped_steps = 2});
  ASSERT_OK(stack->ZeroGradients());
  const CallResult again = RunTraining(*backend_, *stack, data, {0, 2});
  EXPECT_EQ(again.output, first.output);
  EXPECT_EQ(again.input_grad, first.input_grad);
  EXPECT_EQ(ReadAll(*stack, ParameterPart::kGradient), gradients);
  EXPECT_EQ(stack->counters().optimizer_step, 5);
  EXPECT_EQ(stack->counters().skipped_steps, 2);

  StackConfig other_seed = WithDropout();
  other_seed.seed = 12;
  EXPECT_NE(RunTraining(*backend_, *Make(other_seed), data, {0, 2}).output, first.output);
}

TEST_P(StackTest, TheSameStepsGiveTheSameBits) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    StackConfig config = WithDropout();
    config.dtype = dtype;
    std::vector<std::pair<CallResult, Gradients>> runs;
    for (int run = 0; run < 2; ++run) {
      const std::unique_ptr<Stack> stack = Make(config);
      CallResult last;
      for (uint64_t step = 0; step < 3; ++step) {
        last = RunTraining(*backend_, *stack, NoiseCall(config, 3, 7, step), {0, 2});
        ASSERT_OK(stack->ApplyGradients({.learning_rate = 0.01, .max_grad_norm = 1}).status());
      }
      runs.emplace_back(last, ReadAll(*stack, ParameterPart::kMaster));
    }
    EXPECT_EQ(runs[0].first.output, runs[1].first.output);
    EXPECT_EQ(runs[0].first.input_grad, runs[1].first.input_grad);
    EXPECT_EQ(runs[0].second, runs[1].second);
  }
}

TEST_P(StackTest, BackwardMayComeInAnyOrder) {
  StackConfig config = WithDropout();
  config.max_contexts = 3;
  const std::unique_ptr<Stack> stack = Make(config);
  // What each call gives by itself, with the counter that it will have.
  std::vector<CallData> data;
  std::vector<CallResult> expected;
  for (uint64_t i = 0; i < 3; ++i) {
    data.push_back(NoiseCall(config, i == 1 ? 2 : 3, i == 2 ? 4 : 7, i + 1));
    if (i == 0) data[i].lengths = {7, 2, 5};
    expected.push_back(RunTraining(*backend_, *stack, data[i], {0, 2}));
  }
  const Gradients sums = ReadAll(*stack, ParameterPart::kGradient);
  stack->set_counters({});
  ASSERT_OK(stack->ZeroGradients());

  std::vector<std::unique_ptr<OpenCall>> calls;
  for (const CallData& d : data) {
    calls.push_back(std::make_unique<OpenCall>(*backend_, *stack, d));
    calls.back()->context = Value(stack->ForwardTraining(calls.back()->args));
  }
  for (size_t i : {size_t{1}, size_t{2}, size_t{0}}) {
    ASSERT_OK(calls[i]->Backward(*stack));
    EXPECT_EQ(calls[i]->output.Floats(), expected[i].output);
    EXPECT_EQ(calls[i]->input_grad.Floats(), expected[i].input_grad);
  }
  for (const auto& [name, g] : ReadAll(*stack, ParameterPart::kGradient)) {
    // The same sums in another order: at most one rounding for each of the 47 token rows.
    EXPECT_LE(MaxAbsDifference(g, sums.at(name)), 47 * 0x1p-24 * 2 * MaxAbs(g)) << name;
  }
}

TEST_P(StackTest, TheCallersTensorsAreFreeAfterForward) {
  const std::unique_ptr<Stack> stack = Make(WithDropout());
  CallData data = NoiseCall(stack->config(), 3, 7);
  data.mask = Noise(9, 21);
  const CallResult expected = RunTraining(*backend_, *stack, data, {0, 2});
  const Gradients gradients = ReadAll(*stack, ParameterPart::kGradient);
  stack->set_counters({});
  ASSERT_OK(stack->ZeroGradients());

  OpenCall call(*backend_, *stack, data);
  call.context = Value(stack->ForwardTraining(call.args));
  for (const TensorView& view : {call.input.view(), call.args.mask, call.output.view()})
    ASSERT_OK(backend_->SetZero(view.data, view.bytes()));
  ASSERT_OK(call.Backward(*stack));
  EXPECT_EQ(call.input_grad.Floats(), expected.input_grad);
  EXPECT_EQ(ReadAll(*stack, ParameterPart::kGradient), gradients);
}

TEST_P(StackTest, ReusedContextMemoryIsAsGoodAsNew) {
  StackConfig config = WithDropout();
  config.max_contexts = 1;
  const std::unique_ptr<Stack> stack = Make(config);
  const CallData data = NoiseCall(config, 2, 3);
  const CallResult expected = RunTraining(*backend_, *stack, data, {0, 2});
  RunTraining(*backend_, *stack, NoiseCall(config, 3, 7, 5), {0, 2});  // fills all of the arena
  stack->set_counters({});
  const CallResult again = RunTraining(*backend_, *stack, data, {0, 2});
  EXPECT_EQ(again.output, expected.output);
  EXPECT_EQ(again.input_grad, expected.input_grad);
}

TEST_P(StackTest, InputGradientIsOptional) {
  for (bool pre : {true, false}) {
    StackConfig config = SmallConfig();
    config.pre_layer_norm = pre;
    const std::unique_ptr<Stack> stack = Make(config);
    const CallData data = NoiseCall(config, 3, 7);
    RunTraining(*backend_, *stack, data, {0, 2});
    const Gradients gradients = ReadAll(*stack, ParameterPart::kGradient);
    ASSERT_OK(stack->ZeroGradients());
    OpenCall call(*backend_, *stack, data);
    call.context = Value(stack->ForwardTraining(call.args));
    ASSERT_OK(stack->Backward(*call.context, call.output_grad.view(), TensorView{}));
    EXPECT_EQ(ReadAll(*stack, ParameterPart::kGradient), gradients);
  }
}

TEST_P(StackTest, AContextIsSpentByItsBackward) {
  const std::unique_ptr<Stack> stack = Make();
  OpenCall call(*backend_, *stack, NoiseCall(stack->config(), 3, 7));
  call.context = Value(stack->ForwardTraining(call.args));

  // Refused calls leave it usable and the gradients alone.
  const std::unique_ptr<Stack> other = Make();
  EXPECT_THAT(call.Backward(*other), IsStatus(StatusCode::kInvalidArgument, "another stack"));
  const DeviceTensor wrong_shape(*backend_, DType::kF32, {3, 6, 24});
  const DeviceTensor wrong_dtype(*backend_, DType::kBF16, {3, 7, 24});
  const TensorView dy = call.output_grad.view(), dx = call.input_grad.view();
  Stack& s = *stack;
  Context& c = *call.context;
  EXPECT_THAT(s.Backward(c, {}, dx),
              IsStatus(StatusCode::kInvalidArgument, "output_grad is absent"));
  EXPECT_THAT(s.Backward(c, wrong_shape.view(), dx),
              IsStatus(StatusCode::kInvalidArgument,
                       "output_grad has shape [3, 6, 24]; it must be [3, 7, 24]"));
  EXPECT_THAT(s.Backward(c, wrong_dtype.view(), dx),
              IsStatus(StatusCode::kInvalidArgument, "output_grad is bf16; it must be fp32"));
  EXPECT_THAT(s.Backward(c, dy, wrong_shape.view()),
              IsStatus(StatusCode::kInvalidArgument, "input_grad has shape"));
  EXPECT_THAT(s.Backward(c, dy, wrong_dtype.view()),
              IsStatus(StatusCode::kInvalidArgument, "input_grad is bf16"));
  EXPECT_THAT(s.Backward(c, dy, dy), IsStatus(StatusCode::kInvalidArgument, "overlaps"));
  for (const auto& [name, g] : ReadAll(s, ParameterPart::kGradient))
    EXPECT_EQ(MaxAbs(g), 0.0) << name;

  ASSERT_OK(call.Backward(s));
  const Gradients gradients = ReadAll(s, ParameterPart::kGradient);
  EXPECT_THAT(call.Backward(s), IsStatus(StatusCode::kFailedPrecondition, "spent"));
  EXPECT_EQ(ReadAll(s, ParameterPart::kGradient), gradients);
}

TEST_P(StackTest, RefusesBadForwardsByName) {
  const std::unique_ptr<Stack> stack = Make();
  const DeviceTensor x(*backend_, DType::kF32, {3, 7, 24}, Noise(1, 3 * 7 * 24));
  const DeviceTensor y(*backend_, DType::kF32, {3, 7, 24});
  const DeviceTensor big(*backend_, DType::kF32, {4, 8, 24});
  const DeviceTensor half(*backend_, DType::kBF16, {3, 7, 24});
  const DeviceTensor mask(*backend_, DType::kF32, {3, 7}, Noise(2, 21));
  const DeviceTensor lengths(*backend_, std::vector<int32_t>{7, 7, 7});
  struct Case {
    const char* message;
    std::function<void(ForwardArgs&)> spoil;
  };
  const std::vector<Case> cases = {
      {"layers are [-1, 2)", [&](auto& a) { a.layers.begin = -1; }},
      {"layers are [0, 3); they must be a range in [0, 2)", [&](auto& a) { a.layers.end = 3; }},
      {"layers are [1, 1)",
       [&](auto& a) {
         a.layers = {1, 1};
       }},
      {"layers are [2, 1)",
       [&](auto& a) {
         a.layers = {2, 1};
       }},
      {"input is absent", [&](auto& a) { a.input = {}; }},
      {"output is absent", [&](auto& a) { a.output = {}; }},
      {"input has shape [21, 24]",
       [&](auto& a) {
         a.input = x.view().Reshaped({21, 24});
       }},
      {"input has shape [4, 8, 24]; it must be [B, S, 24] with B in [1, 3] (batch_size) and S in "
       "[1, 7] (max_seq_length)",
       [&](auto& a) { a.input = big.view(); }},
      {"input has shape [4, 5, 24]",
       [&](auto& a) {
         a.input = big.view().Reshaped({4, 5, 24});
       }},
      {"input has shape [1, 8, 24]",
       [&](auto& a) {
         a.input = big.view().Reshaped({1, 8, 24});
       }},
      {"input has shape [0, 7, 24]",
       [&](auto& a) {
         a.input = x.view().Reshaped({0, 7, 24});
       }},
      {"input has shape [3, 7, 12]",
       [&](auto& a) {
         a.input = x.view().Reshaped({3, 7, 12});
       }},
      {"input is bf16; it must be fp32", [&](auto& a) { a.input = half.view(); }},
      {"output is bf16; it must be fp32", [&](auto& a) { a.output = half.view(); }},
      {"output has shape [3, 6, 24]; it must be [3, 7, 24]",
       [&](auto& a) {
         a.output = y.view().Reshaped({3, 6, 24});
       }},
      {"mask has shape [7, 3]",
       [&](auto& a) {
         a.mask = mask.view().Reshaped({7, 3});
       }},
      {"mask is int32",
       [&](auto& a) {
         a.mask = mask.view();
         a.mask.dtype = DType::kI32;
       }},
      {"lengths has shape [2]", [&](auto& a) { a.lengths = lengths.view().Reshaped({2}); }},
      {"lengths is fp32",
       [&](auto& a) {
         a.lengths = lengths.view();
         a.lengths.dtype = DType::kF32;
       }},
      {"both mask and lengths",
       [&](auto& a) {
         a.mask = mask.view();
         a.lengths = lengths.view();
       }},
      {"output overlaps input", [&](auto& a) { a.output = a.input; }},
      {"output overlaps mask",
       [&](auto& a) {
         a.mask = TensorView{a.output.data, DType::kF32, {3, 7}};
       }},
  };
  for (const Case& bad : cases) {
    ForwardArgs args{.layers = {0, 2}, .input = x.view(), .output = y.view()};
    bad.spoil(args);
    EXPECT_THAT(stack->ForwardEval(args), IsStatus(StatusCode::kInvalidArgument, bad.message));
    EXPECT_THAT(stack->ForwardTraining(args).status(),
                IsStatus(StatusCode::kInvalidArgument, bad.message));
  }
  EXPECT_EQ(stack->counters().rng_counter, 0u);
  EXPECT_EQ(stack->context_bytes_high_water(), 0u);
  // And then serves on.
  EXPECT_OK(stack->ForwardEval({.layers = {0, 2}, .input = x.view(), .output = y.view()}));
}

TEST_P(StackTest, DropoutRatiosCanChangeBetweenCalls) {
  const std::unique_ptr<Stack> stack = Make(WithDropout());
  const CallData data = NoiseCall(stack->config(), 3, 7);
  const CallResult expected = RunTraining(*backend_, *stack, data, {0, 2});
  const CallResult none = RunTraining(*backend_, *Make(), data, {0, 2});

  EXPECT_THAT(stack->Update({.attn_dropout_ratio = 1.0, .hidden_dropout_ratio = 0.1}),
              IsStatus(StatusCode::kInvalidArgument, "attn_dropout_ratio is 1;"));
  EXPECT_THAT(stack->Update({.attn_dropout_ratio = 0.1, .hidden_dropout_ratio = -0.5}),
              IsStatus(StatusCode::kInvalidArgument, "hidden_dropout_ratio is -0.5;"));
  EXPECT_THAT(stack->Update({.attn_dropout_ratio = kNaN}),
              IsStatus(StatusCode::kInvalidArgument, "nan"));
  EXPECT_EQ(stack->config().attn_dropout_ratio, 0.2) << "unchanged";

  // A context's Backward uses the ratios of its own Forward.
  stack->set_counters({});
  OpenCall call(*backend_, *stack, data);
  call.context = Value(stack->ForwardTraining(call.args));
  ASSERT_OK(stack->Update({.attn_dropout_ratio = 0.0, .hidden_dropout_ratio = 0.0}));
  ASSERT_OK(call.Backward(*stack));
  EXPECT_EQ(call.input_grad.Floats(), expected.input_grad);
  EXPECT_EQ(RunTraining(*backend_, *stack, data, {0, 2}).output, none.output);
  EXPECT_EQ(stack->config().hidden_dropout_ratio, 0.0);
}

TEST(Flops, AreCountedAsUsersCountThem) {
  StackConfig config;
  config.hidden_size = 1024;
  config.intermediate_size = 4096;
  const double tokens = 64.0 * 128, h = 1024, i = 4096;
  EXPECT_EQ(Stack::ForwardFlops(config, 24, 64 * 128, 64.0 * 128 * 128),
            24 * (2 * tokens * (4 * h * h + 2 * h * i) + 4 * tokens * 128 * h));
  // Packed lengths 3 and 5.
  EXPECT_EQ(Stack::ForwardFlops(config, 1, 8, 9 + 25),
            2 * 8.0 * (4 * h * h + 2 * h * i) + 4 * h * 34);
}

INSTANTIATE_TEST_SUITE_P(, StackTest, ::testing::ValuesIn(kDevices), DeviceName);

}  // namespace
}  // namespace lamina::testing
