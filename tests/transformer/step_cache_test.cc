// Steps that come back: whatever the device keeps of them, they have the bits of steps that are
// launched op by op, and what changes a step makes it another one. On devices that keep nothing
// (the CPU) the same calls show that equal keys mean equal ops, which CountingBackend checks.
#include <algorithm>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "counting_backend.h"
#include "rig.h"

namespace lamina::testing {
namespace {

using absl::StatusCode;

// A call whose tensors stay where they are from step to step.
struct Caller {
  Caller(Backend& device, const StackConfig& config, const CallData& data, LayerRange layers)
      : backend(device),
        call(device, config, data, layers),
        dy(device, config.dtype, call.shape, data.output_grad),
        dx(device, config.dtype, call.shape),
        output_grad(dy.view()) {}

  // What a step doesn't write is zeros, which no result is.
  void Clear() {
    for (const TensorView& t : {call.output.view(), dx.view()})
      ASSERT_OK(backend.SetZero(t.data, t.bytes()));
  }
  CallResult Train(Stack& stack, bool want_input_grad = true) {
    Clear();
    const std::unique_ptr<Context> context = Value(stack.ForwardTraining(call.args));
    EXPECT_OK(stack.Backward(*context, output_grad, want_input_grad ? dx.view() : TensorView{}));
    return {call.output.Floats(), dx.Floats()};
  }
  std::vector<float> Evaluate(Stack& stack) {
    Clear();
    EXPECT_OK(stack.ForwardEval(call.args));
    return call.output.Floats();
  }

  Backend& backend;
  DeviceCall call;
  DeviceTensor dy, dx;
  TensorView output_grad;  // dy, unless a test gives another one
};

class StepCacheTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (backend_ == nullptr) return;
    counting_ = std::make_unique<CountingBackend>(std::move(backend_));
    config_ = SmallConfig();
    config_.attn_dropout_ratio = 0.2;
    config_.hidden_dropout_ratio = 0.1;
    config_.max_contexts = 2;
    config_ = Value(Resolve(config_, counting_->info().ordinal));
  }
  // `keep`: the device may keep this stack's steps.
  std::unique_ptr<Stack> Make(const StackConfig& config, bool keep) {
    counting_->keep_steps = keep;
    std::unique_ptr<Stack> stack = Value(Stack::Create(*counting_, config));
    Perturb(*stack, static_cast<uint64_t>(config.seed));
    return stack;
  }
  void Make() {
    plain_ = Make(config_, false);
    kept_ = Make(config_, true);
  }
  bool DeviceKeepsSteps() const { return counting_->sizes().StepCacheBytes() > 0; }
  // Ops that `work` enqueued, as far as they were not replayed.
  template <typename Work>
  int64_t OpsOf(const Work& work) {
    const int64_t before = counting_->ops;
    work();
    return counting_->ops - before;
  }
  // Both stacks' training steps and evaluations are the same, `times` times in a row.
  void ExpectTheSame(Caller& caller, int times = 4) {
    for (int i = 0; i < times; ++i) {
      SCOPED_TRACE(i);
      const CallResult want = caller.Train(*plain_), got = caller.Train(*kept_);
      EXPECT_EQ(got.output, want.output);
      EXPECT_EQ(got.input_grad, want.input_grad);
      EXPECT_EQ(caller.Evaluate(*kept_), caller.Evaluate(*plain_));
    }
    EXPECT_EQ(ReadAll(*kept_, ParameterPart::kGradient),
              ReadAll(*plain_, ParameterPart::kGradient));
  }
  void Update(const StackChanges& changes) {
    ASSERT_OK(plain_->Update(changes));
    ASSERT_OK(kept_->Update(changes));
  }

  std::unique_ptr<CountingBackend> counting_;
  StackConfig config_;
  std::unique_ptr<Stack> plain_, kept_;
};

TEST_P(StepCacheTest, AStepHasTheSameBitsEachTime) {
  for (const DType dtype : kDTypes)
    for (const bool pre : {true, false})
      for (const bool flags : {false, true}) {
        SCOPED_TRACE(std::string(Name(dtype)) + (pre ? " pre" : " post") + (flags ? " flags" : ""));
        config_.dtype = dtype;
        config_.pre_layer_norm = pre;
        config_.gelu_checkpoint = config_.normalize_invertible = config_.activation_checkpointing =
            flags;
        Make();
        Caller caller(*counting_, config_, NoiseCall(config_, 3, 7), {0, 2});
        std::vector<float> last;
        int64_t ops = 0;
        for (int step = 0; step < 5; ++step) {
          SCOPED_TRACE(step);
          const CallResult want = caller.Train(*plain_);
          CallResult got;
          const int64_t now = OpsOf([&] { got = caller.Train(*kept_); });
          EXPECT_EQ(got.output, want.output);
          EXPECT_EQ(got.input_grad, want.input_grad);
          EXPECT_NE(got.output, last) << "the dropout's state and the weights move on";
          last = got.output;
          if (step == 0) ops = now;
          // Launched, captured, replayed. Reading a tensor that is not fp32 takes a Cast.
          const int64_t casts = dtype == DType::kF32 ? 0 : 2;
          EXPECT_EQ(now, DeviceKeepsSteps() && step >= 2 ? casts : ops);
          for (Stack* stack : {plain_.get(), kept_.get()})
            ASSERT_OK(stack->ApplyGradients({.learning_rate = 0.01}).status());
        }
        for (const ParameterPart part : {ParameterPart::kGradient, ParameterPart::kMaster})
          EXPECT_EQ(ReadAll(*kept_, part), ReadAll(*plain_, part));
      }
}

TEST_P(StepCacheTest, WhatChangesAStepMakesItAnother) {
  Make();
  const StackConfig& c = config_;
  std::vector<CallData> calls = {NoiseCall(c, 3, 7),
                                 NoiseCall(c, 2, 7),
                                 NoiseCall(c, 3, 5),
                                 NoisePackedCall(c, {2, 7, 1, 4}),
                                 NoisePackedCall(c, {3, 5, 2, 4}),
                                 NoisePackedCall(c, {7, 6, 1})};
  calls.push_back(NoiseCall(c, 3, 7));
  calls.back().lengths = {3, 7, 5};
  calls.push_back(NoiseCall(c, 3, 7));
  calls.back().mask = Noise(9, 3 * 7);
  const StackChanges changes[] = {{},
                                  {.hidden_dropout_ratio = 0.4},
                                  {.attn_dropout_ratio = 0.0},
                                  {.gelu_checkpoint = true},
                                  {.normalize_invertible = true},
                                  {.activation_checkpointing = true},
                                  {.training = false},
                                  {.training = true, .activation_checkpointing = false}};
  std::vector<std::unique_ptr<Caller>> callers;
  for (const CallData& call : calls)
    for (const LayerRange range : {LayerRange{0, 2}, LayerRange{0, 1}, LayerRange{1, 2}})
      callers.push_back(std::make_unique<Caller>(*counting_, config_, call, range));
  for (size_t change = 0; change < std::size(changes); ++change) {
    Update(changes[change]);
    if (!kept_->config().training) continue;
    for (size_t i = 0; i < callers.size(); ++i) {
      SCOPED_TRACE(::testing::Message() << "after change " << change << ", caller " << i);
      ExpectTheSame(*callers[i], 3);
    }
  }
}

TEST_P(StepCacheTest, OtherAddressesAreAnotherStep) {
  Make();
  const CallData data = NoiseCall(config_, 3, 7), other = NoiseCall(config_, 3, 7, 5);
  Caller a(*counting_, config_, data, {0, 2}), b(*counting_, config_, other, {0, 2});
  for (int i = 0; i < 3; ++i) {
    ExpectTheSame(a, 1);
    ExpectTheSame(b, 1);
    // The input gradient is not wanted.
    EXPECT_EQ(a.Train(*kept_, false).output, a.Train(*plain_, false).output);
    // Only what is read lies elsewhere.
    std::swap(a.call.args.input, b.call.args.input);
    std::swap(a.output_grad, b.output_grad);
  }
  EXPECT_EQ(ReadAll(*kept_, ParameterPart::kGradient), ReadAll(*plain_, ParameterPart::kGradient));
}

// The tensors say which keys are seen. What lies at the address in use may differ from what lies at
// the one before.
TEST_P(StepCacheTest, OtherMasksAreAnotherStep) {
  Make();
  CallData masked = NoiseCall(config_, 3, 7), ragged = masked;
  masked.mask = Noise(9, 3 * 7);
  ragged.lengths = {3, 7, 5};
  Caller mask(*counting_, config_, masked, {0, 2}), length(*counting_, config_, ragged, {0, 2});
  Caller packed(*counting_, config_, NoisePackedCall(config_, {2, 7, 1, 4}), {0, 2});
  const DeviceTensor other_mask(*counting_, DType::kF32, {3, 7}, Noise(10, 3 * 7));
  const DeviceTensor other_lengths(*counting_, {7, 2, 1}),
      other_offsets(*counting_, {0, 1, 8, 9, 14});
  for (int i = 0; i < 6; ++i) {
    SCOPED_TRACE(i);
    for (Caller* caller : {&mask, &length, &packed}) ExpectTheSame(*caller, 1);
    if (i % 2 == 0) {
      mask.call.args.mask = other_mask.view();
      length.call.args.lengths = other_lengths.view();
      packed.call.args.cu_seqlens = other_offsets.view();
    } else {
      mask.call.args.mask = mask.call.optional[0].view();
      length.call.args.lengths = length.call.optional[0].view();
      packed.call.args.cu_seqlens = packed.call.optional[0].view();
    }
  }
}

TEST_P(StepCacheTest, FewerTokensAreAnotherStep) {
  Make();
  // As many sequences, as long a longest one, at the same addresses.
  Caller caller(*counting_, config_, NoisePackedCall(config_, {2, 7, 1, 4}), {0, 2});
  const std::vector<int32_t> all = {0, 2, 9, 10, 14}, fewer = {0, 2, 9, 10, 12};
  const TensorView dy = caller.dy.view(), dx = caller.dx.view();
  const TensorView input = caller.call.args.input, output = caller.call.args.output;
  for (int i = 0; i < 8; ++i) {
    SCOPED_TRACE(i);
    const std::vector<int32_t>& offsets = i % 2 == 0 ? all : fewer;
    const int64_t tokens = offsets.back();
    caller.call.args.input = input.Rows(0, tokens);
    caller.call.args.output = output.Rows(0, tokens);
    const TensorView cu = caller.call.args.cu_seqlens;
    ASSERT_OK(counting_->CopyIn(cu.data, offsets.data(), cu.bytes()));
    std::vector<std::vector<float>> results[2];
    for (Stack* stack : {plain_.get(), kept_.get()}) {
      caller.Clear();
      const std::unique_ptr<Context> context = Value(stack->ForwardTraining(caller.call.args));
      ASSERT_OK(stack->Backward(*context, dy.Rows(0, tokens), dx.Rows(0, tokens)));
      results[stack == kept_.get()] = {caller.call.output.Floats(), caller.dx.Floats()};
    }
    EXPECT_EQ(results[1], results[0]);
  }
  EXPECT_EQ(ReadAll(*kept_, ParameterPart::kGradient), ReadAll(*plain_, ParameterPart::kGradient));
}

TEST_P(StepCacheTest, ContentsMayChangeUnderAStep) {
  Make();
  CallData masked = NoiseCall(config_, 3, 7), ragged = masked;
  masked.mask = Noise(9, 3 * 7);
  ragged.lengths = {3, 7, 5};
  // As many tokens, sequences and tokens of the longest sequence each time.
  const std::vector<int32_t> offsets[] = {{0, 2, 9, 10, 14}, {0, 7, 8, 12, 14}, {0, 4, 6, 7, 14}};
  const std::vector<int32_t> lengths[] = {{3, 7, 5}, {1, 1, 7}, {7, 7, 7}};
  Caller mask(*counting_, config_, masked, {0, 2}), length(*counting_, config_, ragged, {0, 2});
  Caller packed(*counting_, config_, NoisePackedCall(config_, {2, 7, 1, 4}), {0, 2});
  const auto write = [&](const TensorView& to, const void* from) {
    ASSERT_OK(counting_->CopyIn(to.data, from, to.bytes()));
    ASSERT_OK(counting_->Synchronize());
  };
  const int64_t begin = counting_->steps, repeated = counting_->repeated_steps;
  for (int i = 0; i < 6; ++i) {
    SCOPED_TRACE(i);
    write(mask.call.args.mask, Noise(static_cast<uint64_t>(i), 3 * 7).data());
    write(length.call.args.lengths, lengths[i % 3].data());
    write(packed.call.args.cu_seqlens, offsets[i % 3].data());
    for (Caller* caller : {&mask, &length, &packed}) {
      write(caller->call.input.view(),
            Noise(static_cast<uint64_t>(100 + i), caller->call.shape.elements()).data());
      ExpectTheSame(*caller, 1);
    }
  }
  // Forward, Backward and evaluation of three calls by two stacks are new once.
  const int64_t all = counting_->steps - begin;
  EXPECT_EQ(all, 6 * 3 * 3 * 2);
  EXPECT_EQ(counting_->repeated_steps - repeated, all - 3 * 3 * 2);
}

TEST_P(StepCacheTest, ContextsKeepTheirPlacesAndRatios) {
  Make();
  Caller a(*counting_, config_, NoiseCall(config_, 3, 7), {0, 2});
  Caller b(*counting_, config_, NoiseCall(config_, 2, 5, 3), {0, 2});
  for (int i = 0; i < 8; ++i) {
    SCOPED_TRACE(i);
    std::vector<std::vector<float>> results[2];
    for (Stack* stack : {plain_.get(), kept_.get()}) {
      a.Clear();
      b.Clear();
      // Every other time b's context has the place that a's has else, and both have been made under
      // other ratios than those of their Backwards.
      ASSERT_OK(stack->Update({.hidden_dropout_ratio = i < 4 ? 0.1 : 0.3}));
      Caller &first = i % 2 == 0 ? a : b, &second = i % 2 == 0 ? b : a;
      const std::unique_ptr<Context> x = Value(stack->ForwardTraining(first.call.args));
      const std::unique_ptr<Context> y = Value(stack->ForwardTraining(second.call.args));
      ASSERT_OK(stack->Update({.hidden_dropout_ratio = 0.6}));
      ASSERT_OK(stack->Backward(*x, first.dy.view(), first.dx.view()));
      ASSERT_OK(stack->Backward(*y, second.dy.view(), second.dx.view()));
      results[stack == kept_.get()] = {a.call.output.Floats(), b.call.output.Floats(),
                                       a.dx.Floats(), b.dx.Floats()};
    }
    EXPECT_EQ(results[1], results[0]);
  }
  EXPECT_EQ(ReadAll(*kept_, ParameterPart::kGradient), ReadAll(*plain_, ParameterPart::kGradient));
}

TEST_P(StepCacheTest, ALayoutLeavesNoStepsToTheNext) {
  Make();
  Caller caller(*counting_, config_, NoiseCall(config_, 3, 7), {0, 2});
  for (int i = 0; i < 4; ++i) {
    SCOPED_TRACE(i);
    ExpectTheSame(caller, 3);
    // Without room for both, the new activations may take the old ones' place.
    for (Stack* stack : {plain_.get(), kept_.get()}) {
      counting_->fail_allocation = 0;
      const int64_t forgotten = counting_->forgotten;
      ASSERT_OK(stack->Update({.gelu_checkpoint = i % 2 == 0}));
      EXPECT_GT(counting_->forgotten, forgotten);
    }
  }
}

TEST_P(StepCacheTest, SumsInAnyOrderAreAnotherStep) {
  Make();
  Caller caller(*counting_, config_, NoiseCall(config_, 3, 7), {0, 2});
  for (int i = 0; i < 3; ++i) caller.Train(*kept_);
  ASSERT_OK(kept_->Update({.stochastic_mode = true}));
  const int64_t before = counting_->unordered_ops;
  caller.Train(*kept_);
  EXPECT_GT(counting_->unordered_ops, before);
  // And back: the ordered steps are still there.
  ASSERT_OK(kept_->Update({.stochastic_mode = false}));
  const int64_t ops = OpsOf([&] { caller.Train(*kept_); });
  EXPECT_EQ(ops == 0, DeviceKeepsSteps());
}

// As packed batches are: on a GPU each takes the place of the one before in the graphs' pieces.
TEST_P(StepCacheTest, StepsOfEverOtherSizes) {
  for (const int64_t layers : {1, 2, 5}) {
    SCOPED_TRACE(layers);
    kept_.reset();
    plain_.reset();
    config_.num_hidden_layers = layers;
    for (const DType dtype : kDTypes) {
      SCOPED_TRACE(Name(dtype));
      config_.dtype = dtype;
      Make();
      // The first three come back.
      const std::vector<std::vector<int32_t>> batches = {
          {7, 7, 7}, {1, 2}, {5},       {3, 4, 6}, {2, 2, 2, 2}, {7, 1}, {4, 4},
          {6, 5, 1}, {1},    {2, 7, 3}, {7, 7, 7}, {1, 2},       {5}};
      for (const std::vector<int32_t>& lengths : batches) {
        SCOPED_TRACE(::testing::PrintToString(lengths));
        Caller packed(*counting_, config_, NoisePackedCall(config_, lengths), {0, layers});
        const CallResult want = packed.Train(*plain_), got = packed.Train(*kept_);
        EXPECT_EQ(got.output, want.output);
        EXPECT_EQ(got.input_grad, want.input_grad);
        EXPECT_EQ(packed.Evaluate(*kept_), packed.Evaluate(*plain_));
        const int64_t batch = std::ssize(lengths) % 3 + 1;
        Caller dense(*counting_, config_, NoiseCall(config_, batch, lengths[0]), {0, layers});
        EXPECT_EQ(dense.Train(*kept_).output, dense.Train(*plain_).output);
      }
      EXPECT_EQ(ReadAll(*kept_, ParameterPart::kGradient),
                ReadAll(*plain_, ParameterPart::kGradient));
    }
  }
}

// A step is enqueued while the one before it, of another size, still runs: what changes in a
// piece's graph is not to reach that one's launch.
TEST_P(StepCacheTest, PiecesThatChangeWhileTheyRun) {
  if (!DeviceKeepsSteps()) GTEST_SKIP() << "this device keeps no steps";
  // Large enough that a layer takes longer than its capture.
  config_.dtype = DType::kBF16;
  config_.hidden_size = 512;
  config_.heads = 8;
  config_.intermediate_size = 2048;
  config_.num_hidden_layers = 6;
  config_.batch_size = 16;
  config_.max_seq_length = 512;
  config_.max_contexts = 3;
  Make();
  std::vector<std::unique_ptr<Caller>> callers;
  for (int32_t i = 0; i < 9; ++i) {
    std::vector<int32_t> lengths(14, 300 + 7 * i);
    lengths[static_cast<size_t>(i)] = 512;
    callers.push_back(std::make_unique<Caller>(
        *counting_, config_, NoisePackedCall(config_, lengths), LayerRange{0, 6}));
  }
  const auto train_three = [&](Stack& stack, size_t first) {
    std::vector<std::unique_ptr<Context>> contexts;
    for (size_t i = first; i < first + 3; ++i) callers[i]->Clear();
    for (size_t i = first; i < first + 3; ++i)
      contexts.push_back(Value(stack.ForwardTraining(callers[i]->call.args)));
    for (size_t i = first; i < first + 3; ++i) {
      EXPECT_OK(
          stack.Backward(*contexts[i - first], callers[i]->output_grad, callers[i]->dx.view()));
    }
    std::vector<CallResult> results;
    for (size_t i = first; i < first + 3; ++i)
      results.push_back({callers[i]->call.output.Floats(), callers[i]->dx.Floats()});
    return results;
  };
  for (const size_t first : {0, 3, 6}) {
    SCOPED_TRACE(first);
    const std::vector<CallResult> want = train_three(*plain_, first);
    const std::vector<CallResult> got = train_three(*kept_, first);
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(got[i].output, want[i].output) << i;
      EXPECT_EQ(got[i].input_grad, want[i].input_grad) << i;
    }
  }
  EXPECT_EQ(ReadAll(*kept_, ParameterPart::kGradient), ReadAll(*plain_, ParameterPart::kGradient));
}

// An op that fails while a piece is captured: the piece is launched, and the bits are the same.
TEST_P(StepCacheTest, APieceThatCannotBeCapturedIsLaunched) {
  config_.num_hidden_layers = 5;
  Make();
  for (int step = 0; step < 12; ++step) {
    SCOPED_TRACE(step);
    Caller caller(*counting_, config_, NoiseCall(config_, 1 + step % 3, 1 + step / 3), {0, 5});
    const CallResult want = caller.Train(*plain_);
    // A device that keeps no steps takes the failure for what it is.
    if (DeviceKeepsSteps() && step == 7) counting_->fail_op = 30;
    const CallResult got = caller.Train(*kept_);
    EXPECT_EQ(got.output, want.output);
    EXPECT_EQ(got.input_grad, want.input_grad);
  }
  EXPECT_EQ(ReadAll(*kept_, ParameterPart::kGradient), ReadAll(*plain_, ParameterPart::kGradient));
}

TEST_P(StepCacheTest, TheOldestStepsAreDropped) {
  Make();
  // More than any device keeps.
  std::vector<std::unique_ptr<Caller>> callers;
  for (int64_t batch = 1; batch <= 3; ++batch)
    for (int64_t seq = 1; seq <= 7; ++seq)
      for (const LayerRange range : {LayerRange{0, 2}, LayerRange{0, 1}, LayerRange{1, 2}}) {
        callers.push_back(
            std::make_unique<Caller>(*counting_, config_, NoiseCall(config_, batch, seq), range));
      }
  for (int round = 0; round < 2; ++round) {
    // Among so many keys one is captured at its fifth run.
    for (auto& caller : callers) ExpectTheSame(*caller, 5);
    // A step that was just used is replayed; one that came first is launched again.
    Caller &last = *callers.back(), &first = *callers.front();
    EXPECT_EQ(OpsOf([&] { last.Train(*kept_); }) == 0, DeviceKeepsSteps());
    EXPECT_GT(OpsOf([&] { first.Train(*kept_); }), 0);
    for (Caller* caller : {&last, &first}) caller->Train(*plain_);
  }
}

TEST_P(StepCacheTest, AStackLeavesNoStepsToTheNext) {
  for (const int64_t seed : {1, 2, 3}) {
    // The next stack may well lie where the one before did.
    kept_.reset();
    plain_.reset();
    config_.seed = seed;
    Make();
    Caller caller(*counting_, config_, NoiseCall(config_, 3, 7), {0, 2});
    ExpectTheSame(caller);
  }
}

TEST_P(StepCacheTest, AFailedStepIsNotKept) {
  Make();
  Caller caller(*counting_, config_, NoiseCall(config_, 3, 7), {0, 2});
  counting_->fail_op = 3;
  EXPECT_THAT(kept_->ForwardTraining(caller.call.args).status(),
              IsStatus(StatusCode::kInternal, "on demand"));
  ExpectTheSame(caller);
}

TEST_P(StepCacheTest, AStepThatCannotBeCapturedIsLaunched) {
  if (!DeviceKeepsSteps()) GTEST_SKIP() << "this device keeps no steps";
  for (const int64_t nth : {0, 5, 12, 20}) {
    SCOPED_TRACE(nth);
    Make();
    Caller caller(*counting_, config_, NoiseCall(config_, 3, 7), {0, 2});
    int64_t ops = 0;
    for (int step = 0; step < 4; ++step) {
      SCOPED_TRACE(step);
      const CallResult want = caller.Train(*plain_);
      CallResult got;
      // The op fails in the middle of the capture, Forward's or Backward's.
      if (step == 1) counting_->fail_op = nth;
      const int64_t now = OpsOf([&] { got = caller.Train(*kept_); });
      EXPECT_EQ(got.output, want.output);
      EXPECT_EQ(got.input_grad, want.input_grad);
      if (step == 0) ops = now;
      EXPECT_GT(now, 0) << "one of the two is launched";
      if (step >= 2) {
        EXPECT_LT(now, ops) << "and the other one replayed";
      }
    }
    EXPECT_EQ(ReadAll(*kept_, ParameterPart::kGradient),
              ReadAll(*plain_, ParameterPart::kGradient));
  }
}

// Deep stacks have large graphs: more than may be kept. Shallow ones have many small graphs.
TEST_P(StepCacheTest, GraphsTakeWhatThePlanSays) {
  if (!DeviceKeepsSteps()) GTEST_SKIP() << "this device keeps no steps";
  for (const int64_t layers : {1, 64}) {
    SCOPED_TRACE(layers);
    kept_.reset();
    plain_.reset();
    config_.num_hidden_layers = layers;
    config_.max_contexts = 1;
    Make();
    std::vector<std::unique_ptr<Caller>> callers;
    for (int64_t batch = 1; batch <= 3; ++batch)
      for (int64_t seq = 1; seq <= 7; ++seq)
        callers.push_back(std::make_unique<Caller>(
            *counting_, config_, NoiseCall(config_, batch, seq), LayerRange{0, layers}));
    const auto train = [&](Caller& caller) {
      EXPECT_EQ(caller.Train(*kept_).output, caller.Train(*plain_).output);
    };
    // The kernels are loaded at their first launch, and take memory of their own.
    for (auto& caller : callers) train(*caller);
    const size_t before = Value(counting_->FreeBytes());
    for (auto& caller : callers)
      for (int i = 0; i < 4; ++i) train(*caller);
    const size_t after = Value(counting_->FreeBytes());
    EXPECT_LE(before - std::min(before, after), kept_->plan().Bytes(MemoryKind::kGraphs));

    Caller &first = *callers.front(), &last = *callers.back();
    const auto replayed = [&](Caller& caller) { return OpsOf([&] { caller.Train(*kept_); }) == 0; };
    EXPECT_TRUE(replayed(first));
    EXPECT_EQ(replayed(last), layers == 1) << "there was no room left";
    for (Caller* caller : {&first, &last}) caller->Train(*plain_);
    // In the end graphs that nobody asks for any more make room.
    for (int i = 0; i < 200; ++i) last.Train(*kept_);
    EXPECT_TRUE(replayed(last));
    for (int i = 0; i < 201; ++i) last.Train(*plain_);
    for (auto& caller : callers) train(*caller);
    EXPECT_EQ(ReadAll(*kept_, ParameterPart::kGradient),
              ReadAll(*plain_, ParameterPart::kGradient));
  }
}

INSTANTIATE_TEST_SUITE_P(, StepCacheTest, ::testing::ValuesIn(kDevices), DeviceName);

}  // namespace
}  // namespace lamina::testing
