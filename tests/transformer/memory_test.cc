// The plan is the allocation, refusals come before damage, and contexts share one arena.
#include <memory>
#include <string>
#include <vector>

#include "counting_backend.h"
#include "lamina/transformer/plan.h"
#include "rig.h"

namespace lamina::testing {
namespace {

using absl::StatusCode;

class MemoryTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (backend_ != nullptr) counting_ = std::make_unique<CountingBackend>(std::move(backend_));
  }
  std::unique_ptr<CountingBackend> counting_;
};

TEST_P(MemoryTest, PlanIsTheAllocationToTheByte) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (bool training : {true, false}) {
      for (bool pre : {true, false}) {
        StackConfig config = SmallConfig();
        config.dtype = dtype;
        config.training = training;
        config.pre_layer_norm = pre;
        config.max_contexts = 3;
        config = Value(Resolve(config, counting_->info().ordinal));
        const MemoryPlan plan = Value(PlanStack(config, counting_->sizes()));
        {
          const std::unique_ptr<Stack> stack = Value(Stack::Create(*counting_, config));
          EXPECT_EQ(counting_->live_bytes, Allocated(plan));
          EXPECT_EQ(stack->plan().Total(), plan.Total());
          EXPECT_EQ(plan.Bytes(MemoryKind::kMasterWeights) == 0, dtype == DType::kF32);
          EXPECT_EQ(plan.Bytes(MemoryKind::kGradients) == 0, !training);
          EXPECT_EQ(plan.Bytes(MemoryKind::kOptimizer) == 0, !training);
          EXPECT_EQ(plan.Bytes(MemoryKind::kActivations), training ? plan.context_bytes * 3 : 0u);
          EXPECT_EQ(plan.Bytes(MemoryKind::kStaging) == 0, counting_->info().host_memory);
          EXPECT_EQ(plan.Bytes(MemoryKind::kGraphs), counting_->sizes().StepCacheBytes());
          size_t by_kind = 0;
          for (int kind = 0; kind < kMemoryKinds; ++kind)
            by_kind += plan.Bytes(static_cast<MemoryKind>(kind));
          EXPECT_EQ(by_kind, plan.Total());
          for (const PlanEntry& entry : plan.entries)
            EXPECT_EQ(entry.bytes % 256, 0u) << entry.name;
        }
        EXPECT_EQ(counting_->live_bytes, 0u) << "all of it is freed";
      }
    }
  }
}

TEST_P(MemoryTest, WeightsAreAsManyAsTheShapesSay) {
  StackConfig config = SmallConfig();
  config.hidden_size = 128;  // every parameter is a multiple of the alignment: no padding
  config.heads = 4;
  config.intermediate_size = 256;
  config.dtype = DType::kBF16;
  config = Value(Resolve(config, counting_->info().ordinal));
  const MemoryPlan plan = Value(PlanStack(config, counting_->sizes()));
  const size_t h = 128, i = 256, elements = 2 * (4 * h * h + 2 * h * i + 9 * h + i);
  const size_t segments = (2 * 12 * sizeof(LambSegment) + 255) / 256 * 256;
  EXPECT_EQ(plan.Bytes(MemoryKind::kWeights), elements * 2);
  EXPECT_EQ(plan.Bytes(MemoryKind::kMasterWeights), elements * 4);
  EXPECT_EQ(plan.Bytes(MemoryKind::kGradients), elements * 4);
  EXPECT_EQ(plan.Bytes(MemoryKind::kOptimizer), elements * 8 + 256 + segments);
}

TEST_P(MemoryTest, NoStepAllocates) {
  StackConfig config = SmallConfig();
  config.attn_dropout_ratio = config.hidden_dropout_ratio = 0.1;
  config = Value(Resolve(config, counting_->info().ordinal));
  const std::unique_ptr<Stack> stack = Value(Stack::Create(*counting_, config));
  const Shape shape{3, 7, 24};
  const DeviceTensor x(*counting_, config.dtype, shape, Noise(1, shape.elements()));
  const DeviceTensor dy(*counting_, config.dtype, shape, Noise(2, shape.elements()));
  const DeviceTensor y(*counting_, config.dtype, shape), dx(*counting_, config.dtype, shape);
  const int64_t before = counting_->allocations;
  ForwardArgs args{.layers = {0, 2}, .input = x.view(), .output = y.view()};
  for (int step = 0; step < 2; ++step) {
    ASSERT_OK(stack->ForwardEval(args));
    const std::unique_ptr<Context> context = Value(stack->ForwardTraining(args));
    ASSERT_OK(stack->Backward(*context, dy.view(), dx.view()));
    ASSERT_OK(stack->ApplyGradients({.learning_rate = 1e-3}).status());
    ASSERT_OK(stack->ZeroGradients());
  }
  EXPECT_EQ(counting_->allocations, before);
}

TEST_P(MemoryTest, RefusesBeforeItAllocates) {
  const StackConfig config = Value(Resolve(SmallConfig(), counting_->info().ordinal));
  const size_t total = Value(PlanStack(config, counting_->sizes())).Total();
  counting_->free_bytes = total - 1;
  const absl::Status status = Stack::Create(*counting_, config).status();
  EXPECT_THAT(status, IsStatus(StatusCode::kResourceExhausted,
                               "needs " + std::to_string(total) + " more bytes"));
  EXPECT_THAT(status,
              IsStatus(StatusCode::kResourceExhausted, std::to_string(total - 1) + " are free"));
  EXPECT_THAT(status, IsStatus(StatusCode::kResourceExhausted, "activations "));
  EXPECT_EQ(counting_->allocations, 0);
  counting_->free_bytes = total;
  EXPECT_OK(Stack::Create(*counting_, config).status());
}

TEST_P(MemoryTest, FailedAllocationLeavesNothingBehind) {
  const StackConfig config = Value(Resolve(SmallConfig(), counting_->info().ordinal));
  for (int64_t nth = 0;; ++nth) {
    counting_->fail_allocation = nth;
    const absl::Status status = Stack::Create(*counting_, config).status();
    counting_->fail_allocation = -1;
    EXPECT_EQ(counting_->live_bytes, 0u);
    if (status.ok()) {
      EXPECT_EQ(nth, 4) << "weights, workspace, training, contexts";
      break;
    }
    EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  }
}

TEST_P(MemoryTest, OverflowIsAnInvalidArgument) {
  StackConfig config = SmallConfig();
  config.batch_size = StackConfig::kMaxBatchSize;
  config.max_seq_length = StackConfig::kMaxSeqLength;
  config.hidden_size = StackConfig::kMaxHiddenSize;
  config.heads = 1024;
  config.intermediate_size = StackConfig::kMaxIntermediateSize;
  config.num_hidden_layers = StackConfig::kMaxLayers;
  config.max_contexts = 1024;
  config = Value(Resolve(config, counting_->info().ordinal));
  EXPECT_THAT(PlanStack(config, counting_->sizes()).status(),
              IsStatus(StatusCode::kInvalidArgument, "overflow"));
  EXPECT_THAT(Stack::Create(*counting_, config).status(),
              IsStatus(StatusCode::kInvalidArgument, "overflow"));
}

TEST_P(MemoryTest, TrainingIsTurnedOffAndOn) {
  const StackConfig config = Value(Resolve(SmallConfig(), counting_->info().ordinal));
  StackConfig off = config;
  off.training = false;
  const size_t with_training = Value(PlanStack(config, counting_->sizes())).Total();
  const MemoryPlan plan_without = Value(PlanStack(off, counting_->sizes()));
  const size_t without = plan_without.Total();
  const std::unique_ptr<Stack> stack = Value(Stack::Create(*counting_, config));
  const CallData data = NoiseCall(config, 3, 7);
  const std::vector<float> before = RunEval(*counting_, *stack, data, {0, 2});
  const CallResult trained = RunTraining(*counting_, *stack, data, {0, 2});
  ASSERT_OK(stack->ApplyGradients({.learning_rate = 0}).status());

  ASSERT_OK(stack->Update({.training = false}));
  EXPECT_EQ(counting_->live_bytes, Allocated(plan_without));
  EXPECT_EQ(stack->plan().Total(), without);
  EXPECT_FALSE(stack->config().training);
  EXPECT_EQ(RunEval(*counting_, *stack, data, {0, 2}), before);
  EXPECT_EQ(stack->counters().optimizer_step, 0) << "the moments are gone";
  const std::string name = "layers.0.attn_ow";
  float value[24 * 24];
  EXPECT_OK(stack->ReadParameter(name, ParameterPart::kMaster, value, sizeof(value)));
  for (ParameterPart part :
       {ParameterPart::kGradient, ParameterPart::kMoment1, ParameterPart::kMoment2})
    EXPECT_THAT(stack->ReadParameter(name, part, value, sizeof(value)),
                IsStatus(StatusCode::kFailedPrecondition, "training is off"));
  EXPECT_THAT(stack->ZeroGradients(), IsStatus(StatusCode::kFailedPrecondition, "training is off"));
  EXPECT_THAT(stack->ApplyGradients({}).status(),
              IsStatus(StatusCode::kFailedPrecondition, "training is off"));
  const Shape shape{3, 7, 24};
  const DeviceTensor x(*counting_, config.dtype, shape), y(*counting_, config.dtype, shape);
  EXPECT_THAT(
      stack->ForwardTraining({.layers = {0, 2}, .input = x.view(), .output = y.view()}).status(),
      IsStatus(StatusCode::kFailedPrecondition, "training is off"));

  // Not enough memory: nothing changes.
  counting_->free_bytes = with_training - without - 1;
  EXPECT_THAT(stack->Update({.training = true}),
              IsStatus(StatusCode::kResourceExhausted, "are free"));
  counting_->free_bytes = CountingBackend::kAsItIs;
  for (int64_t nth = 0; nth < 2; ++nth) {
    counting_->fail_allocation = nth;
    EXPECT_EQ(stack->Update({.training = true}).code(), StatusCode::kResourceExhausted);
  }
  EXPECT_FALSE(stack->config().training);
  EXPECT_EQ(stack->plan().Total(), without);

  ASSERT_OK(stack->Update({.training = true}));
  EXPECT_EQ(stack->plan().Total(), with_training);
  const CallResult again = RunTraining(*counting_, *stack, data, {0, 2});
  EXPECT_EQ(again.input_grad, trained.input_grad);
  for (float m : ReadFloats(*stack, name, ParameterPart::kMoment1)) ASSERT_EQ(m, 0.0f);
}

TEST_P(MemoryTest, StagingHoldsTheLargestCall) {
  if (!counting_->info().host_memory)
    GTEST_SKIP() << "the wrapper can claim host memory only where the backend's is that";
  const StackConfig config = Value(Resolve(SmallConfig(), counting_->info().ordinal));
  // Where kernels read host memory there is none; the wrapper can claim either.
  counting_->set_host_memory(true);
  const std::unique_ptr<Stack> host = Value(Stack::Create(*counting_, config));
  EXPECT_THAT(host->StagingView(Stack::Staging::kInput, DType::kF32, {1}).status(),
              IsStatus(StatusCode::kFailedPrecondition, "host memory"));

  counting_->set_host_memory(false);
  const std::unique_ptr<Stack> device = Value(Stack::Create(*counting_, config));
  EXPECT_EQ(device->plan().Total() - host->plan().Total(),
            device->plan().Bytes(MemoryKind::kStaging));
  std::vector<TensorView> views;
  views.push_back(Value(device->StagingView(Stack::Staging::kInput, DType::kF32, {3, 7, 24})));
  views.push_back(Value(device->StagingView(Stack::Staging::kOutput, DType::kF32, {3, 7, 24})));
  views.push_back(Value(device->StagingView(Stack::Staging::kMask, DType::kF32, {3, 7})));
  views.push_back(Value(device->StagingView(Stack::Staging::kLengths, DType::kI32, {3})));
  views.push_back(Value(device->StagingView(Stack::Staging::kCuSeqlens, DType::kI32, {3 * 7 + 1})));
  for (const TensorView& view : views) {
    EXPECT_OK(counting_->SetZero(view.data, view.bytes()));
    for (const TensorView& other : views) {
      if (other.data == view.data) continue;
      EXPECT_TRUE(view.as<char>() + view.bytes() <= other.as<char>() ||
                  other.as<char>() + other.bytes() <= view.as<char>());
    }
  }
  EXPECT_OK(counting_->Synchronize());
  EXPECT_THAT(device->StagingView(Stack::Staging::kMask, DType::kF32, {3, 8}).status(),
              IsStatus(StatusCode::kInvalidArgument, "96 bytes"));
}

// --- contexts ---

class ContextTest : public MemoryTest {
 protected:
  void SetUp() override {
    MemoryTest::SetUp();
    if (counting_ == nullptr) return;
    StackConfig config = SmallConfig();
    config.max_contexts = 2;
    config_ = Value(Resolve(config, counting_->info().ordinal));
    stack_ = Value(Stack::Create(*counting_, config_));
  }
  absl::StatusOr<std::unique_ptr<Context>> Forward(int64_t batch, int64_t seq, LayerRange layers) {
    const Shape shape{batch, seq, config_.hidden_size};
    const DeviceTensor x(*counting_, config_.dtype, shape, Noise(3, shape.elements()));
    const DeviceTensor y(*counting_, config_.dtype, shape);
    auto context =
        stack_->ForwardTraining({.layers = layers, .input = x.view(), .output = y.view()});
    EXPECT_OK(counting_->Synchronize());
    return context;
  }
  StackConfig config_;
  std::unique_ptr<Stack> stack_;
};

TEST_P(ContextTest, TakesWhatThePlanSays) {
  const std::unique_ptr<Context> full = Value(Forward(3, 7, {0, 2}));
  EXPECT_EQ(full->bytes(), stack_->plan().context_bytes);
  EXPECT_EQ(full->bytes(), ContextBytes(config_, counting_->sizes(), 2, config_.Dims(3, 7)));
  EXPECT_EQ(stack_->context_bytes_in_use(), full->bytes());
  const std::unique_ptr<Context> small = Value(Forward(2, 5, {1, 2}));
  EXPECT_EQ(small->bytes(), ContextBytes(config_, counting_->sizes(), 1, config_.Dims(2, 5)));
  EXPECT_LT(small->bytes(), full->bytes());
  EXPECT_EQ(small->batch(), 2);
  EXPECT_EQ(small->seq(), 5);
  EXPECT_EQ(small->layers().begin, 1);
  EXPECT_EQ(small->layers().end, 2);
}

TEST_P(ContextTest, AFullArenaRefusesAndChangesNothing) {
  std::unique_ptr<Context> a = Value(Forward(3, 7, {0, 2}));
  const std::unique_ptr<Context> b = Value(Forward(3, 7, {0, 2}));
  EXPECT_EQ(stack_->context_bytes_in_use(), stack_->plan().Bytes(MemoryKind::kActivations));
  const int64_t ops = counting_->ops;
  const absl::Status status = Forward(1, 1, {0, 1}).status();
  EXPECT_THAT(status, IsStatus(StatusCode::kResourceExhausted, "by 2 contexts"));
  EXPECT_THAT(
      status,
      IsStatus(StatusCode::kResourceExhausted,
               std::to_string(ContextBytes(config_, counting_->sizes(), 1, config_.Dims(1, 1)))));
  EXPECT_THAT(status, IsStatus(StatusCode::kResourceExhausted, "max_contexts"));
  EXPECT_EQ(counting_->ops, ops);
  EXPECT_EQ(stack_->counters().rng_counter, 2u);
  a.reset();
  EXPECT_OK(Forward(3, 7, {0, 2}).status());
  EXPECT_EQ(stack_->counters().rng_counter, 3u);
}

TEST_P(ContextTest, SmallContextsFillTheArenaAndGapsJoinAgain) {
  std::vector<std::unique_ptr<Context>> contexts;
  for (;;) {
    auto context = Forward(1, 3, {0, 1});
    if (!context.ok()) break;
    contexts.push_back(*std::move(context));
  }
  const size_t each = ContextBytes(config_, counting_->sizes(), 1, config_.Dims(1, 3));
  const size_t arena = stack_->plan().Bytes(MemoryKind::kActivations);
  EXPECT_EQ(contexts.size(), arena / each);
  EXPECT_GT(contexts.size(), 4u);
  EXPECT_EQ(stack_->context_bytes_high_water(), each * contexts.size());

  // Every second one is released: much is free, but in small pieces.
  for (size_t i = 0; i < contexts.size(); i += 2) contexts[i].reset();
  EXPECT_THAT(Forward(3, 7, {0, 2}).status(),
              IsStatus(StatusCode::kResourceExhausted, "largest free range"));
  EXPECT_OK(Forward(1, 3, {0, 1}).status());
  for (auto& context : contexts) context.reset();
  EXPECT_EQ(stack_->context_bytes_in_use(), 0u);
  const auto a = Forward(3, 7, {0, 2}), b = Forward(3, 7, {0, 2});
  EXPECT_OK(a.status());
  EXPECT_OK(b.status());
}

TEST_P(ContextTest, OutstandingContextsKeepTrainingOn) {
  std::unique_ptr<Context> context = Value(Forward(3, 7, {0, 2}));
  EXPECT_THAT(stack_->Update({.training = false}),
              IsStatus(StatusCode::kFailedPrecondition, "1 activation contexts are outstanding"));
  EXPECT_TRUE(stack_->config().training);
  context.reset();
  EXPECT_OK(stack_->Update({.training = false}));
}

TEST_P(ContextTest, AFailedOpGivesEverythingBack) {
  const int64_t before = counting_->ops;
  { ASSERT_OK(Forward(3, 7, {0, 2}).status()); }
  const int64_t forward_ops = counting_->ops - before;
  const StackCounters counters = stack_->counters();
  for (int64_t nth = 0; nth < forward_ops; ++nth) {
    counting_->fail_op = nth;
    EXPECT_THAT(Forward(3, 7, {0, 2}).status(), IsStatus(StatusCode::kInternal, "on demand"));
    EXPECT_EQ(stack_->context_bytes_in_use(), 0u);
    EXPECT_EQ(stack_->counters().rng_counter, counters.rng_counter);
  }
  EXPECT_OK(Forward(3, 7, {0, 2}).status());
}

INSTANTIATE_TEST_SUITE_P(, MemoryTest, ::testing::ValuesIn(kDevices), DeviceName);
INSTANTIATE_TEST_SUITE_P(, ContextTest, ::testing::ValuesIn(kDevices), DeviceName);

}  // namespace
}  // namespace lamina::testing
