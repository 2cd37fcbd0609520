// Packed batches: what padding would have given, without it; and causal attention's promise.
// Against the oracle they are in oracle_test.cc.
#include <algorithm>
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

class PackedTest : public DeviceTest {
 protected:
  std::unique_ptr<Stack> Make(const StackConfig& config) {
    std::unique_ptr<Stack> stack =
        Value(Stack::Create(*backend_, Value(Resolve(config, backend_->info().ordinal))));
    Perturb(*stack, 100);
    return stack;
  }
};

// Tokens [begin, end) of [T, H].
std::vector<float> Tokens(const std::vector<float>& values, int64_t hidden, int64_t begin,
                          int64_t end) {
  return {values.begin() + begin * hidden, values.begin() + end * hidden};
}

TEST_P(PackedTest, EqualLengthsHaveTheBitsOfADenseBatch) {
  for (const bool pre : {true, false})
    for (const bool causal : {true, false})
      for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
        StackConfig config = SmallConfig();
        config.pre_layer_norm = pre;
        config.causal = causal;
        config.dtype = dtype;
        config.attn_dropout_ratio = 0.2;
        config.hidden_dropout_ratio = 0.1;
        const std::unique_ptr<Stack> stack = Make(config);
        const CallData dense = NoiseCall(config, 3, 7);
        CallData packed = dense;
        packed.cu_seqlens = {0, 7, 14, 21};
        const CallResult want = RunTraining(*backend_, *stack, dense, {0, 2});
        const Gradients gradients = ReadAll(*stack, ParameterPart::kGradient);
        const std::vector<float> eval = RunEval(*backend_, *stack, dense, {0, 2});
        stack->set_counters({});
        ASSERT_OK(stack->ZeroGradients());
        const CallResult got = RunTraining(*backend_, *stack, packed, {0, 2});
        EXPECT_EQ(got.output, want.output);
        EXPECT_EQ(got.input_grad, want.input_grad);
        EXPECT_EQ(ReadAll(*stack, ParameterPart::kGradient), gradients);
        EXPECT_EQ(RunEval(*backend_, *stack, packed, {0, 2}), eval);
      }
}

TEST_P(PackedTest, EachSequenceIsAsIfAlone) {
  for (const bool pre : {true, false}) {
    StackConfig config = SmallConfig();
    config.pre_layer_norm = pre;
    const std::unique_ptr<Stack> stack = Make(config);
    // More sequences than batch_size.
    const CallData packed = NoisePackedCall(config, {3, 7, 1, 1, 5});
    const CallResult whole = RunTraining(*backend_, *stack, packed, {0, 2});
    const std::vector<float> eval = RunEval(*backend_, *stack, packed, {0, 2});
    const Gradients gradients = ReadAll(*stack, ParameterPart::kGradient);
    ASSERT_OK(stack->ZeroGradients());
    // Products of another number of rows may sum in another order: each sum has at most 72 terms,
    // and ten such sums of a layer follow each other.
    const double bound = 2 * 10 * 72 * 0x1p-24;
    for (size_t i = 0; i + 1 < packed.cu_seqlens.size(); ++i) {
      const int64_t begin = packed.cu_seqlens[i], end = packed.cu_seqlens[i + 1];
      CallData alone{.batch = 1, .seq = end - begin};
      alone.input = Tokens(packed.input, 24, begin, end);
      alone.output_grad = Tokens(packed.output_grad, 24, begin, end);
      const CallResult want = RunTraining(*backend_, *stack, alone, {0, 2});
      EXPECT_LE(MaxAbsDifference(Tokens(whole.output, 24, begin, end), want.output),
                bound * MaxAbs(want.output));
      EXPECT_LE(
          MaxAbsDifference(Tokens(eval, 24, begin, end), RunEval(*backend_, *stack, alone, {0, 2})),
          bound * MaxAbs(want.output));
      EXPECT_LE(MaxAbsDifference(Tokens(whole.input_grad, 24, begin, end), want.input_grad),
                bound * MaxAbs(want.input_grad));
    }
    for (const auto& [name, g] : ReadAll(*stack, ParameterPart::kGradient))
      EXPECT_LE(MaxAbsDifference(g, gradients.at(name)), bound * MaxAbs(g)) << name;
  }
}

TEST_P(PackedTest, AContextOutlivesTheCallersOffsets) {
  StackConfig config = SmallConfig();
  config.attn_dropout_ratio = 0.2;
  const std::unique_ptr<Stack> stack = Make(config);
  const CallData data = NoisePackedCall(config, {3, 7, 1});
  const CallResult want = RunTraining(*backend_, *stack, data, {0, 2});
  stack->set_counters({});
  const DeviceCall call(*backend_, config, data, {0, 2});
  const std::unique_ptr<Context> context = Value(stack->ForwardTraining(call.args));
  EXPECT_TRUE(context->packed());
  EXPECT_EQ(context->tokens(), 11);
  EXPECT_EQ(context->batch(), 3);
  EXPECT_EQ(context->seq(), 7);
  EXPECT_EQ(context->activation_shape(), (Shape{11, 24}));
  ASSERT_OK(backend_->SetZero(call.args.cu_seqlens.data, call.args.cu_seqlens.bytes()));
  const DeviceTensor dense(*backend_, config.dtype, {1, 11, 24});
  EXPECT_THAT(stack->Backward(*context, dense.view(), {}),
              IsStatus(StatusCode::kInvalidArgument, "it must be [11, 24]"));
  const DeviceTensor dy(*backend_, config.dtype, call.shape, data.output_grad);
  const DeviceTensor dx(*backend_, config.dtype, call.shape);
  ASSERT_OK(stack->Backward(*context, dy.view(), dx.view()));
  EXPECT_EQ(dx.Floats(), want.input_grad);
}

TEST_P(PackedTest, RefusesBadOnesByName) {
  const StackConfig config = SmallConfig();
  const std::unique_ptr<Stack> stack = Make(config);
  const CallData data = NoisePackedCall(config, {3, 7, 1});
  const DeviceCall call(*backend_, config, data, {0, 2});
  const DeviceTensor big(*backend_, DType::kF32, {22, 24});
  const DeviceTensor mask(*backend_, DType::kF32, {1, 11}, Noise(1, 11));
  const DeviceTensor lengths(*backend_, std::vector<int32_t>{11});
  const DeviceTensor offsets(*backend_, std::vector<int32_t>(13, 1));
  struct Case {
    const char* message;
    std::function<void(ForwardArgs&)> spoil;
  };
  const std::vector<Case> cases = {
      {"packed input has shape [1, 11, 24]; it must be [T, 24] with T in [1, 21]",
       [&](auto& a) {
         a.input = a.input.Reshaped({1, 11, 24});
       }},
      {"packed input has shape [22, 24];", [&](auto& a) { a.input = big.view(); }},
      {"packed input has shape [22, 12];",
       [&](auto& a) {
         a.input = a.input.Reshaped({22, 12});
       }},
      {"mask is present with cu_seqlens", [&](auto& a) { a.mask = mask.view(); }},
      {"lengths is present with cu_seqlens", [&](auto& a) { a.lengths = lengths.view(); }},
      {"cu_seqlens has shape [1]; it must be [n + 1]",
       [&](auto& a) { a.cu_seqlens = lengths.view(); }},
      {"cu_seqlens has shape [13]; it must be [n + 1] for n sequences, n in [1, 11]",
       [&](auto& a) { a.cu_seqlens = offsets.view(); }},
      {"cu_seqlens is fp32", [&](auto& a) { a.cu_seqlens.dtype = DType::kF32; }},
      {"longest is 3; of 3 sequences with 11 tokens the longest has a length in [4, 7]",
       [&](auto& a) { a.longest = 3; }},
      {"longest is 8;", [&](auto& a) { a.longest = 8; }},
      {"output has shape [1, 11, 24]; it must be [11, 24]",
       [&](auto& a) {
         a.output = a.output.Reshaped({1, 11, 24});
       }},
      {"output overlaps cu_seqlens", [&](auto& a) { a.cu_seqlens.data = a.output.data; }},
      {"input has shape [11, 24]; it must be [B, S, 24]", [&](auto& a) { a.cu_seqlens = {}; }},
  };
  for (const Case& bad : cases) {
    ForwardArgs args = call.args;
    bad.spoil(args);
    EXPECT_THAT(stack->ForwardEval(args), IsStatus(StatusCode::kInvalidArgument, bad.message));
    EXPECT_THAT(stack->ForwardTraining(args).status(),
                IsStatus(StatusCode::kInvalidArgument, bad.message));
  }
  EXPECT_OK(stack->ForwardEval(call.args));
  EXPECT_EQ(stack->context_bytes_high_water(), 0u);
}

TEST_P(PackedTest, CausalTokensDoNotSeeTheFuture) {
  StackConfig config = SmallConfig();
  config.causal = true;
  const std::unique_ptr<Stack> stack = Make(config);
  for (const CallData& data :
       {NoiseCall(config, 3, 7), NoisePackedCall(config, {7, 7, 7}, /*seed=*/1)}) {
    const std::vector<float> before = RunEval(*backend_, *stack, data, {0, 2});
    CallData changed = data;
    for (int64_t i = (7 + 4) * 24; i < (7 + 5) * 24; ++i)  // token 4 of the second sequence
      changed.input[static_cast<size_t>(i)] += 1.0f;
    const std::vector<float> after = RunEval(*backend_, *stack, changed, {0, 2});
    for (int64_t t = 0; t < 21; ++t)
      EXPECT_EQ(Tokens(after, 24, t, t + 1) == Tokens(before, 24, t, t + 1), t < 11 || t >= 14)
          << t;
  }
}

INSTANTIATE_TEST_SUITE_P(, PackedTest, ::testing::ValuesIn(kDevices), DeviceName);

}  // namespace
}  // namespace lamina::testing
