// Stacks' lives, steps against a stack driven by hand, and the engine's own end.
#include <atomic>
#include <cmath>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine_rig.h"

namespace lamina::testing {
namespace {

// --- stacks ---

TEST(Stacks, AreCreatedShownAndDeleted) {
  Rig rig;
  Engine& engine = rig.engine();
  const StackInfo created = Value(engine.CreateStack("b.2_x-Y", TinyConfig(), {}));
  EXPECT_EQ(created.name, "b.2_x-Y");
  EXPECT_EQ(created.config.intermediate_size, 32);
  EXPECT_EQ(created.parameters.size(), 24u);
  // 2 layers of 4H^2 + 2HI matrices, 9H + I + ... vectors: 3H + H + 4H + I + H of them.
  EXPECT_EQ(created.parameter_count, 2 * (4 * 256 + 2 * 512 + 9 * 16 + 32));
  rig.Create("a", TinyConfig(DType::kBF16));
  const std::vector<StackInfo> all = engine.ListStacks();
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[0].name, "a");
  EXPECT_EQ(all[1].name, "b.2_x-Y");
  EXPECT_EQ(rig.Metric("lamina_stacks"), 2);
  EXPECT_EQ(rig.Metric("lamina_device_memory_bytes{kind=\"weights\"}"),
            static_cast<double>(all[0].plan.Bytes(MemoryKind::kWeights) +
                                all[1].plan.Bytes(MemoryKind::kWeights)));
  EXPECT_EQ(rig.backend().live_bytes, all[0].plan.Total() + all[1].plan.Total());
  EXPECT_OK(engine.DeleteStack("a", {}));
  EXPECT_THAT(engine.DeleteStack("a", {}), IsStatus(kNotFound, "\"a\""));
  EXPECT_THAT(engine.GetStack("a").status(), IsStatus(kNotFound, "\"a\""));
  EXPECT_EQ(rig.backend().live_bytes, all[1].plan.Total());
  EXPECT_EQ(rig.Metric("lamina_stacks"), 1);
}

TEST(Stacks, NamesAreChecked) {
  Rig rig;
  for (const std::string& name :
       {std::string(), std::string("."), std::string(".hidden"), std::string("../up"),
        std::string("a/b"), std::string("a b"), std::string("a\0b", 3), std::string("caf\xc3\xa9"),
        std::string(65, 'x'), std::string("a\n")})
    EXPECT_THAT(rig.engine().CreateStack(name, TinyConfig(), {}).status(),
                IsStatus(kInvalid, "name:"));
  EXPECT_TRUE(rig.engine().ListStacks().empty());
  rig.Create(std::string(64, 'x'), TinyConfig());
  rig.Create("s", TinyConfig());
  const std::string before = rig.Snapshot("s");
  EXPECT_THAT(rig.engine().CreateStack("s", TinyConfig(), {}).status(),
              IsStatus(kExists, "there is a stack \"s\""));
  EXPECT_EQ(rig.Snapshot("s"), before);
}

TEST(Stacks, ConfigsAreChecked) {
  Rig rig;
  StackConfig config = TinyConfig();
  config.heads = 3;
  EXPECT_THAT(rig.engine().CreateStack("s", config, {}).status(), IsStatus(kInvalid, "heads"));
  EXPECT_THAT(rig.engine().PlanMemory(config).status(), IsStatus(kInvalid, "heads"));
  config = TinyConfig();
  config.loss_scale_hysteresis = 0;
  EXPECT_THAT(rig.engine().CreateStack("s", config, {}).status(),
              IsStatus(kInvalid, "loss_scale_hysteresis"));
  EXPECT_TRUE(rig.engine().ListStacks().empty());
}

TEST(Stacks, APlanThatDoesNotFitIsRefusedWithItsNumbers) {
  Rig rig;
  const PlanOutcome plan = Value(rig.engine().PlanMemory(TinyConfig()));
  rig.backend().free_bytes = plan.plan.Total() - 1;
  EXPECT_EQ(Value(rig.engine().PlanMemory(TinyConfig())).free_bytes, plan.plan.Total() - 1);
  const int64_t allocations = rig.backend().allocations;
  const absl::Status refused = rig.engine().CreateStack("s", TinyConfig(), {}).status();
  EXPECT_THAT(refused, IsStatus(kExhausted, absl::StrCat(plan.plan.Total())));
  EXPECT_THAT(refused, IsStatus(kExhausted, absl::StrCat(plan.plan.Total() - 1)));
  EXPECT_EQ(rig.backend().allocations, allocations) << "refused before anything was allocated";
  EXPECT_EQ(rig.Metric("lamina_admission_rejections_total{reason=\"stack_memory\"}"), 1);
  rig.backend().free_bytes = plan.plan.Total();
  rig.Create("s", TinyConfig());
  EXPECT_EQ(rig.backend().live_bytes, plan.plan.Total());
}

TEST(Stacks, AnAllocationThatFailsLeavesNothing) {
  Rig rig;
  for (int64_t nth = 0;; ++nth) {
    rig.backend().fail_allocation = nth;
    const absl::Status status = rig.engine().CreateStack("s", TinyConfig(), {}).status();
    if (status.ok()) {
      EXPECT_GT(nth, 0);
      break;
    }
    EXPECT_EQ(status.code(), kExhausted);
    EXPECT_EQ(rig.backend().live_bytes, 0u);
    EXPECT_TRUE(rig.engine().ListStacks().empty());
    EXPECT_OK(rig.engine().health());
  }
}

TEST(Stacks, UpdateChangesWhatCanChange) {
  Rig rig;
  Engine& engine = rig.engine();
  rig.Create("s", TinyConfig());
  const std::string before = rig.Snapshot("s");
  EXPECT_THAT(engine.UpdateStack("s", {}, {}).status(), IsStatus(kInvalid, "nothing to change"));
  EXPECT_THAT(engine.UpdateStack("none", {.training = true}, {}).status(),
              IsStatus(kNotFound, "none"));
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  // Both ratios are checked before the first change, training too.
  EXPECT_THAT(
      engine
          .UpdateStack(
              "s", {.attn_dropout_ratio = 0.3, .hidden_dropout_ratio = 1.0, .training = false}, {})
          .status(),
      IsStatus(kInvalid, "hidden_dropout_ratio"));
  EXPECT_THAT(engine.UpdateStack("s", {.attn_dropout_ratio = kNan}, {}).status(),
              IsStatus(kInvalid, "attn_dropout_ratio"));
  EXPECT_THAT(
      engine.UpdateStack("s", {.attn_dropout_ratio = -1, .gelu_checkpoint = true}, {}).status(),
      IsStatus(kInvalid, "attn_dropout_ratio"));
  EXPECT_EQ(rig.Snapshot("s"), before);
  const StackInfo info = Value(engine.UpdateStack(
      "s", {.attn_dropout_ratio = 0.25, .hidden_dropout_ratio = 0.5, .gelu_checkpoint = false},
      {}));
  EXPECT_EQ(info.config.attn_dropout_ratio, 0.25);
  EXPECT_EQ(info.config.hidden_dropout_ratio, 0.5);

  const size_t with = info.plan.Total();
  const StackInfo off = Value(engine.UpdateStack("s", {.training = false}, {}));
  EXPECT_LT(off.plan.Total(), with);
  EXPECT_EQ(rig.backend().live_bytes, off.plan.Total());
  EXPECT_EQ(rig.Metric("lamina_device_memory_bytes{kind=\"gradients\"}"), 0);
  rig.backend().free_bytes = 100;
  EXPECT_THAT(engine.UpdateStack("s", {.training = true}, {}).status(),
              IsStatus(kExhausted, "100"));
  EXPECT_EQ(rig.backend().live_bytes, off.plan.Total());
  rig.backend().free_bytes = CountingBackend::kAsItIs;
  EXPECT_EQ(Value(engine.UpdateStack("s", {.training = true}, {})).plan.Total(), with);
}

// --- steps ---

struct StepCase {
  DType dtype;
  bool host_memory;
};

class StepTest : public ::testing::TestWithParam<StepCase> {
 protected:
  StepTest() : rig_({.host_memory = GetParam().host_memory}) {
    rig_.Create("s", TinyConfig(GetParam().dtype));
    reference_ = Value(Stack::Create(*backend_, Value(Resolve(TinyConfig(GetParam().dtype), 0))));
  }
  Rig rig_;
  std::unique_ptr<Backend> backend_ = Value(Backend::Create("cpu", 1));
  std::unique_ptr<Stack> reference_;
};

TEST_P(StepTest, GivesWhatTheStackGives) {
  const DType dtype = GetParam().dtype;
  Engine& engine = rig_.engine();
  for (const int variant : {0, 1, 2}) {
    SCOPED_TRACE(variant);
    const int64_t batch = 3 - variant, seq = 8 - 3 * variant;
    const Shape shape{batch, seq, 16};
    const LayerRange layers = variant == 1 ? LayerRange{1, 2} : LayerRange{0, 2};
    OwnedTensor input = Noise(11, dtype, shape), grad = Noise(12, dtype, shape);
    OwnedTensor mask = Noise(13, DType::kF32, {batch, 1, 1, seq});
    std::vector<int32_t> lengths(static_cast<size_t>(batch), 2);
    OwnedTensor output = Zeros(dtype, shape), input_grad = Zeros(dtype, shape);
    OwnedTensor want_output = Zeros(dtype, shape), want_grad = Zeros(dtype, shape);

    ForwardArgs args{.layers = layers,
                     .input = {input.bytes.data(), dtype, shape},
                     .output = {want_output.bytes.data(), dtype, shape}};
    ForwardCall call{.stack = "s", .session = kSession, .input = input.view()};
    if (variant == 1) call.layers = layers;
    if (variant == 0) {
      args.mask = {mask.bytes.data(), DType::kF32, {batch, seq}};
      call.mask = mask.view();
    }
    if (variant == 2) {
      args.lengths = {lengths.data(), DType::kI32, {batch}};
      call.lengths = {.data = lengths.data(), .dtype = DType::kI32, .shape = {batch}};
    }

    // Evaluation, into memory and inline.
    ASSERT_OK(reference_->ForwardEval(args));
    call.training = false;
    call.output = output.view();
    const ForwardOutcome eval = Value(engine.Forward(call, {}));
    EXPECT_EQ(output.bytes, want_output.bytes);
    EXPECT_EQ(eval.context_id, "");
    EXPECT_EQ(eval.inline_output, "");
    EXPECT_EQ(eval.output_shape, shape);
    EXPECT_EQ(eval.output_dtype, dtype);
    EXPECT_GT(eval.times.compute_seconds, 0);
    call.output = {};
    EXPECT_EQ(Value(engine.Forward(call, {})).inline_output,
              std::string(want_output.bytes.begin(), want_output.bytes.end()));

    // Training, with an input gradient and without.
    auto context = Value(reference_->ForwardTraining(args));
    call.training = true;
    call.output = output.view();
    const ForwardOutcome forward = Value(engine.Forward(call, {}));
    EXPECT_EQ(output.bytes, want_output.bytes);
    const bool wanted = variant != 1;
    ASSERT_OK(reference_->Backward(
        *context, {grad.bytes.data(), dtype, shape},
        wanted ? TensorView{want_grad.bytes.data(), dtype, shape} : TensorView{}));
    const BackwardOutcome backward =
        Value(engine.Backward({.stack = "s",
                               .session = kSession,
                               .context_id = forward.context_id,
                               .output_grad = grad.view(),
                               .input_grad = wanted ? input_grad.view() : CallTensor{},
                               .want_input_grad = wanted},
                              {}));
    EXPECT_EQ(input_grad.bytes, want_grad.bytes);
    EXPECT_EQ(backward.inline_input_grad, "");
  }
  // The gradients of all three, then the optimizer.
  const OptimizerOptions options{.learning_rate = 0.01, .weight_decay = 0.1, .max_grad_norm = 0.5};
  const ApplyResult want = Value(reference_->ApplyGradients(options));
  const ApplyOutcome got = Value(engine.ApplyGradients("s", options, false, {}));
  EXPECT_EQ(got.result.applied, want.applied);
  EXPECT_EQ(got.result.grad_norm, want.grad_norm);
  EXPECT_EQ(got.result.step, 1);
  for (const ParameterInfo& p : reference_->parameters()) {
    const size_t bytes = static_cast<size_t>(p.shape.elements()) * sizeof(float);
    std::vector<char> a(bytes), b(bytes);
    for (const bool gradients : {false, true}) {
      ASSERT_OK(reference_->ReadParameter(
          p.name, gradients ? ParameterPart::kGradient : ParameterPart::kMaster, a.data(), bytes));
      ASSERT_OK(engine.ReadParameters("s", {p.name}, DType::kF32, gradients, b.data(), bytes, {}));
      EXPECT_EQ(a, b) << p.name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, StepTest,
    ::testing::Values(StepCase{DType::kF32, true}, StepCase{DType::kBF16, true},
                      StepCase{DType::kF16, true}, StepCase{DType::kF32, false},
                      StepCase{DType::kBF16, false}),
    [](const auto& test) {
      return std::string(Name(test.param.dtype)) + (test.param.host_memory ? "_direct" : "_staged");
    });

TEST(Steps, AreCounted) {
  Rig rig;
  rig.Create("s", TinyConfig());
  rig.Step("s", kSession, 1);
  const std::string forward = "{direction=\"forward_training\"}";
  EXPECT_EQ(rig.Metric("lamina_steps_total" + forward), 2);
  EXPECT_EQ(rig.Metric("lamina_samples_total" + forward), 6);
  EXPECT_EQ(rig.Metric("lamina_tokens_total{direction=\"forward_training\",kind=\"real\"}"), 48);
  EXPECT_EQ(rig.Metric("lamina_steps_total{direction=\"backward\"}"), 2);
  EXPECT_EQ(rig.Metric("lamina_steps_total{direction=\"apply\"}"), 1);
  EXPECT_EQ(rig.Metric("lamina_steps_total{direction=\"forward_eval\"}"), 0);
  const double flops = Stack::ForwardFlops(Value(rig.engine().GetStack("s")).config, 2, 24, 3 * 64);
  EXPECT_NEAR(rig.Metric("lamina_flops_total" + forward), 2 * flops, 1);
  EXPECT_NEAR(rig.Metric("lamina_flops_total{direction=\"backward\"}"), 4 * flops, 1);
  EXPECT_GT(rig.Metric("lamina_achieved_flops_per_second{direction=\"backward\"}"), 0);
  EXPECT_EQ(
      rig.Metric("lamina_step_duration_seconds_count{direction=\"backward\",phase=\"compute\"}"),
      2);
  EXPECT_GT(rig.Metric("lamina_gradient_norm"), 0);
  EXPECT_EQ(rig.Metric("lamina_skipped_steps_total"), 0);
  // Inputs came from memory that the rig calls a region; results went inline.
  EXPECT_EQ(rig.Metric("lamina_tensor_bytes_total{role=\"input\",transport=\"memfd\"}"), 4 * 1536);
  EXPECT_EQ(rig.Metric("lamina_tensor_bytes_total{role=\"output\",transport=\"inline\"}"),
            4 * 1536);
}

TEST(Steps, AGradientThatIsNotFiniteSkipsTheStep) {
  Rig rig;
  rig.Create("s", TinyConfig());
  const std::string id = rig.Forward("s", kSession, 1);
  OwnedTensor grad = Noise(2, DType::kF32, {3, 8, 16});
  const float infinity = std::numeric_limits<float>::infinity();
  std::memcpy(grad.bytes.data(), &infinity, sizeof(infinity));
  ASSERT_OK(
      rig.engine()
          .Backward(
              {.stack = "s", .session = kSession, .context_id = id, .output_grad = grad.view()}, {})
          .status());
  const ApplyResult result =
      Value(rig.engine().ApplyGradients("s", {.learning_rate = 1}, true, {})).result;
  EXPECT_FALSE(result.applied);
  EXPECT_EQ(result.step, 0);
  EXPECT_EQ(rig.Metric("lamina_skipped_steps_total"), 1);
  EXPECT_EQ(Value(rig.engine().GetStack("s")).counters.skipped_steps, 1);
  EXPECT_TRUE(
      Value(rig.engine().ApplyGradients("s", {.learning_rate = 1}, true, {})).result.applied)
      << "the gradients were zeroed";
}

TEST(Steps, ACallThatIsDroppedInTheQueueChangesNothing) {
  Rig rig({.queue_capacity = 1});
  rig.Create("s", TinyConfig());
  const std::string before = rig.Snapshot("s");
  OwnedTensor input = Noise(1, DType::kF32, {3, 8, 16});
  const ForwardCall call{.stack = "s", .session = kSession, .input = input.view()};
  {
    Blocker blocker(rig.engine());
    EXPECT_EQ(rig.engine()
                  .Forward(call, {.deadline = absl::Now() + absl::Milliseconds(20)})
                  .status()
                  .code(),
              absl::StatusCode::kDeadlineExceeded);
    std::thread cancelled([&] {
      EXPECT_EQ(rig.engine().Forward(call, {.cancelled = [] { return true; }}).status().code(),
                absl::StatusCode::kCancelled);
    });
    WaitUntil([&] { return rig.Metric("lamina_queue_depth") == 1; });
    EXPECT_THAT(rig.engine().Forward(call, {}).status(), IsStatus(kExhausted, "queue is full"));
    EXPECT_EQ(Value(rig.engine().GetStack("s")).outstanding_contexts, 0) << "not in the queue";
    blocker.Release();
    cancelled.join();
  }
  EXPECT_EQ(rig.Snapshot("s"), before);
  EXPECT_EQ(rig.Metric("lamina_admission_rejections_total{reason=\"deadline\"}"), 1);
  EXPECT_EQ(rig.Metric("lamina_admission_rejections_total{reason=\"cancelled\"}"), 2);
  EXPECT_EQ(rig.Metric("lamina_admission_rejections_total{reason=\"queue_full\"}"), 1);
}

TEST(Steps, FromManyThreadsAtOnce) {
  Rig rig;
  rig.Create("a", TinyConfig());
  rig.Create("b", TinyConfig(DType::kBF16));
  std::atomic<bool> stop{false};
  std::thread watcher([&] {
    while (!stop) {
      for (const StackInfo& info : rig.engine().ListStacks())
        EXPECT_EQ(info.parameters.size(), 24u);
      EXPECT_OK(rig.engine().PlanMemory(TinyConfig()).status());
      EXPECT_FALSE(rig.metrics().Text().empty());
      rig.engine().device_free_bytes();
    }
  });
  std::vector<std::thread> threads;
  for (SessionKey session = 1; session <= 2; ++session)
    threads.emplace_back([&, session] {
      for (uint64_t i = 0; i < 15; ++i) {
        rig.ForwardBackward(session == 1 ? "a" : "b", session, i);
        Value(rig.engine().ApplyGradients("a", {.learning_rate = 1e-3}, false, {}));
        rig.engine().ReleaseContext("a", session, "7", {}).IgnoreError();
      }
      rig.Forward("b", session, 1);
      rig.engine().EndSession(session);
    });
  for (std::thread& thread : threads) thread.join();
  stop = true;
  watcher.join();
  EXPECT_EQ(Value(rig.engine().GetStack("a")).counters.optimizer_step, 30);
  EXPECT_EQ(rig.Metric("lamina_contexts"), 0);
}

// --- the end ---

TEST(Drain, RefusesWhatIsNewAndLetsTheFinalCheckpointThrough) {
  TemporaryFolder folder;
  Rig rig({.checkpoint_dir = folder.path()});
  Engine& engine = rig.engine();
  rig.Create("s", TinyConfig());
  const std::string id = rig.Forward("s", kSession, 1);
  EXPECT_EQ(rig.Metric("lamina_serving"), 1);
  {
    Blocker blocker(engine);
    std::thread queued([&] { EXPECT_OK(engine.ZeroGradients("s", {})); });
    WaitUntil([&] { return rig.Metric("lamina_queue_depth") == 1; });
    std::thread drainer([&] { engine.Drain(); });
    WaitUntil([&] { return rig.Metric("lamina_serving") == 0; });
    WaitUntil(
        [&] { return absl::IsUnavailable(engine.ZeroGradients("s", {.deadline = absl::Now()})); });
    blocker.Release();
    queued.join();
    drainer.join();
  }
  OwnedTensor input = Noise(1, DType::kF32, {3, 8, 16});
  EXPECT_THAT(
      engine.Forward({.stack = "s", .session = kSession, .input = input.view()}, {}).status(),
      IsStatus(kUnavailable, "draining"));
  EXPECT_EQ(engine.CreateStack("t", TinyConfig(), {}).status().code(), kUnavailable);
  EXPECT_EQ(engine.GetStack("s").status().code(), kUnavailable);
  EXPECT_EQ(engine.PlanMemory(TinyConfig()).status().code(), kUnavailable);
  EXPECT_EQ(engine.LoadCheckpoint("s", "", false, {}).status().code(), kUnavailable);
  EXPECT_EQ(engine.ReleaseContext("s", kSession, id, {}).code(), kUnavailable);
  EXPECT_OK(engine.SaveCheckpoint("s", "final", {}).status());
  EXPECT_THAT(folder.Files(), ::testing::ElementsAre("final.safetensors"));
  engine.EndSession(kSession);
  EXPECT_EQ(rig.Metric("lamina_contexts"), 0);
  engine.Drain();
}

TEST(DeviceFailure, StopsEverythingAfterwards) {
  Rig rig;
  Engine& engine = rig.engine();
  rig.Create("s", TinyConfig());
  const std::string id = rig.Forward("s", kSession, 1);
  rig.backend().fail_op = 3;
  OwnedTensor grad = Noise(2, DType::kF32, {3, 8, 16});
  const BackwardCall call{
      .stack = "s", .session = kSession, .context_id = id, .output_grad = grad.view()};
  EXPECT_OK(engine.health());
  EXPECT_THAT(engine.Backward(call, {}).status(),
              IsStatus(absl::StatusCode::kInternal, "on demand"));
  EXPECT_THAT(engine.health(), IsStatus(kUnavailable, "on demand"));
  EXPECT_EQ(rig.Metric("lamina_serving"), 0);
  EXPECT_THAT(engine.Backward(call, {}).status(), IsStatus(kUnavailable, "the device failed"));
  EXPECT_EQ(engine.CreateStack("t", TinyConfig(), {}).status().code(), kUnavailable);
  EXPECT_EQ(engine.GetStack("s").status().code(), kUnavailable);
  EXPECT_EQ(engine.ZeroGradients("s", {}).code(), kUnavailable);
  EXPECT_EQ(engine.DeleteStack("s", {}).code(), kUnavailable);
  EXPECT_EQ(engine.ReleaseContext("s", kSession, id, {}).code(), kUnavailable);
  EXPECT_GE(rig.Metric("lamina_admission_rejections_total{reason=\"device_failed\"}"), 5);
  engine.EndSession(kSession);  // and the destructor: both must come to an end
}

TEST(DeviceFailure, WhileOthersWait) {
  Rig rig;
  rig.Create("s", TinyConfig());
  OwnedTensor input = Noise(1, DType::kF32, {3, 8, 16});
  const ForwardCall call{.stack = "s", .session = kSession, .input = input.view()};
  rig.backend().fail_op = 0;
  Blocker blocker(rig.engine());
  std::atomic<int> internal{0}, unavailable{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i)
    threads.emplace_back([&] {
      const absl::Status status = rig.engine().Forward(call, {}).status();
      internal += absl::IsInternal(status);
      unavailable += absl::IsUnavailable(status);
    });
  WaitUntil([&] { return rig.Metric("lamina_queue_depth") == 3; });
  blocker.Release();
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(internal, 1);
  EXPECT_EQ(unavailable, 2);
}

TEST(Create, ChecksItsOptions) {
  MetricSet metrics({.version = "0", .commit = "", .backend = "cpu", .device = "test"});
  EXPECT_THAT(
      Engine::Create(Value(Backend::Create("cpu", 1)), &metrics, {.queue_capacity = 0}).status(),
      IsStatus(kInvalid, "queue capacity"));
  EXPECT_THAT(Engine::Create(Value(Backend::Create("cpu", 1)), &metrics,
                             {.checkpoint_dir = "/proc/none/here"})
                  .status(),
              IsStatus(kPrecondition, "/proc/none/here"));
  EXPECT_THAT(Engine::Create(Value(Backend::Create("cpu", 1)), &metrics,
                             {.checkpoint_dir = "/etc/hostname"})
                  .status(),
              IsStatus(kPrecondition, "/etc/hostname"));
}

}  // namespace
}  // namespace lamina::testing
