// Update: all or none, the new plan checked first, gradients and moments kept across flags.
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "counting_backend.h"
#include "lamina/transformer/plan.h"
#include "rig.h"

namespace lamina::testing {
namespace {

using absl::StatusCode;

class UpdateTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (backend_ == nullptr) return;
    counting_ = std::make_unique<CountingBackend>(std::move(backend_));
    config_ = Value(Resolve(SmallConfig(), counting_->info().ordinal));
    config_.attn_dropout_ratio = 0.2;
    stack_ = Make(config_);
    data_ = NoiseCall(config_, 3, 7);
  }
  std::unique_ptr<Stack> Make(const StackConfig& config) {
    std::unique_ptr<Stack> stack = Value(Stack::Create(*counting_, config));
    Perturb(*stack, 100);
    return stack;
  }
  MemoryPlan Plan(const StackConfig& config) {
    return Value(PlanStack(config, counting_->sizes()));
  }
  size_t Total(const StackConfig& config) { return Plan(config).Total(); }
  // What nothing may have changed.
  void ExpectUntouched() {
    EXPECT_EQ(ToJson(stack_->config()), ToJson(config_));
    EXPECT_EQ(stack_->plan().Total(), Total(config_));
    EXPECT_EQ(counting_->live_bytes, Allocated(Plan(config_)));
  }
  std::unique_ptr<CountingBackend> counting_;
  StackConfig config_;
  std::unique_ptr<Stack> stack_;
  CallData data_;
};

TEST_P(UpdateTest, FlagsChangeBetweenStepsAndTheStepsGoOn) {
  // The same steps without a change.
  const auto step = [&](Stack& stack) {
    CallResult result = RunTraining(*counting_, stack, data_, {0, 2});
    EXPECT_OK(stack.ApplyGradients({.learning_rate = 0.01}).status());
    return result;  // gradients stay, and accumulate
  };
  std::vector<CallResult> expected;
  {
    const std::unique_ptr<Stack> plain = Make(config_);
    for (int i = 0; i < 5; ++i) expected.push_back(step(*plain));
  }
  // A card adds in any order then, and its bits differ.
  const bool any_order = counting_->info().host_memory;
  const StackChanges changes[] = {
      {.gelu_checkpoint = true},
      {.attn_dropout_checkpoint = true, .activation_checkpointing = true},
      {.gelu_checkpoint = false, .stochastic_mode = any_order},
      {.activation_checkpointing = false, .stochastic_mode = false},
  };
  StackConfig wanted = config_;
  for (size_t i = 0; i < 5; ++i) {
    const CallResult got = step(*stack_);
    EXPECT_EQ(got.output, expected[i].output) << i;
    EXPECT_EQ(got.input_grad, expected[i].input_grad) << i;
    if (i == 4) break;
    ASSERT_OK(stack_->Update(changes[i]));
    const StackChanges& c = changes[i];
    wanted.gelu_checkpoint = c.gelu_checkpoint.value_or(wanted.gelu_checkpoint);
    wanted.attn_dropout_checkpoint =
        c.attn_dropout_checkpoint.value_or(wanted.attn_dropout_checkpoint);
    wanted.activation_checkpointing =
        c.activation_checkpointing.value_or(wanted.activation_checkpointing);
    wanted.stochastic_mode = c.stochastic_mode.value_or(wanted.stochastic_mode);
    EXPECT_EQ(ToJson(stack_->config()), ToJson(wanted));
    EXPECT_EQ(stack_->plan().Total(), Total(wanted));
    EXPECT_EQ(counting_->live_bytes, Allocated(Plan(wanted)));
  }
  EXPECT_EQ(stack_->counters().optimizer_step, 5);
}

TEST_P(UpdateTest, NothingChangesWhereOnePartIsBad) {
  for (const StackChanges& bad :
       {StackChanges{.attn_dropout_ratio = 1.0, .gelu_checkpoint = true},
        StackChanges{.attn_dropout_ratio = 0.5, .hidden_dropout_ratio = kNaN},
        StackChanges{.hidden_dropout_ratio = -0.1, .training = false}}) {
    EXPECT_THAT(stack_->Update(bad),
                IsStatus(StatusCode::kInvalidArgument, "it must be in [0, 1)"));
    ExpectUntouched();
  }
}

TEST_P(UpdateTest, OutstandingContextsKeepTheirLayout) {
  const CallResult want = RunTraining(*counting_, *stack_, data_, {0, 2});
  stack_->set_counters({});
  {
    const DeviceCall call(*counting_, config_, data_, {0, 2});
    const std::unique_ptr<Context> context = Value(stack_->ForwardTraining(call.args));
    for (const auto& [text, change] :
         {std::pair<const char*, StackChanges>{"gelu_checkpoint = true", {.gelu_checkpoint = true}},
          {"normalize_invertible = true", {.normalize_invertible = true}},
          {"activation_checkpointing = true", {.activation_checkpointing = true}},
          {"training = false", {.training = false}},
          {"gelu_checkpoint = true", {.attn_dropout_ratio = 0.0, .gelu_checkpoint = true}}}) {
      const absl::Status status = stack_->Update(change);
      EXPECT_THAT(status, IsStatus(StatusCode::kFailedPrecondition,
                                   "1 activation contexts are outstanding"));
      EXPECT_THAT(status, IsStatus(StatusCode::kFailedPrecondition, text));
      EXPECT_EQ(ToJson(stack_->config()), ToJson(config_));
    }
    // What lays nothing out anew may change, or stay as it is.
    ASSERT_OK(stack_->Update({.hidden_dropout_ratio = 0.5,
                              .training = true,
                              .gelu_checkpoint = false,
                              .attn_dropout_checkpoint = true}));
    const DeviceTensor dy(*counting_, config_.dtype, call.shape, data_.output_grad);
    const DeviceTensor dx(*counting_, config_.dtype, call.shape);
    ASSERT_OK(stack_->Backward(*context, dy.view(), dx.view()));
    EXPECT_EQ(dx.Floats(), want.input_grad);
  }
  EXPECT_OK(stack_->Update({.gelu_checkpoint = true}));
}

TEST_P(UpdateTest, ThePlanIsCheckedFirst) {
  StackConfig smaller = config_;
  smaller.activation_checkpointing = true;
  ASSERT_OK(stack_->Update({.activation_checkpointing = true}));
  const size_t more = Total(config_) - Total(smaller);
  const int64_t allocations = counting_->allocations;
  counting_->free_bytes = more - 1;
  EXPECT_THAT(stack_->Update({.activation_checkpointing = false}),
              IsStatus(StatusCode::kResourceExhausted, std::to_string(more) + " more bytes"));
  EXPECT_EQ(counting_->allocations, allocations);
  EXPECT_EQ(counting_->live_bytes, Allocated(Plan(smaller)));
  EXPECT_TRUE(stack_->config().activation_checkpointing);
  // What is freed counts.
  counting_->free_bytes = more;
  EXPECT_OK(stack_->Update({.activation_checkpointing = false}));
  EXPECT_EQ(counting_->live_bytes, Allocated(Plan(config_)));
  counting_->free_bytes = 0;
  EXPECT_OK(stack_->Update({.gelu_checkpoint = true}));  // a smaller plan always fits
}

TEST_P(UpdateTest, AFailedAllocationLeavesTheOldArena) {
  const CallResult want = RunTraining(*counting_, *stack_, data_, {0, 2});
  const auto expect_serves = [&] {
    stack_->set_counters({});
    EXPECT_EQ(RunTraining(*counting_, *stack_, data_, {0, 2}).input_grad, want.input_grad);
  };
  // The new arena does not fit beside the old one: it takes its place.
  counting_->fail_allocation = 0;
  ASSERT_OK(stack_->Update({.gelu_checkpoint = true}));
  expect_serves();
  ASSERT_OK(stack_->Update({.gelu_checkpoint = false}));

  // Nor there: the old one comes back.
  counting_->fail_allocation = 0;
  counting_->failing_allocations = 2;
  EXPECT_EQ(stack_->Update({.gelu_checkpoint = true}).code(), StatusCode::kResourceExhausted);
  ExpectUntouched();
  expect_serves();

  // Not even that: training Forwards are refused, all else goes on, and an Update mends it.
  counting_->fail_allocation = 0;
  counting_->failing_allocations = 3;
  EXPECT_THAT(stack_->Update({.gelu_checkpoint = true}),
              IsStatus(StatusCode::kInternal, "until an Update succeeds"));
  EXPECT_EQ(ToJson(stack_->config()), ToJson(config_));
  const DeviceCall call(*counting_, config_, data_, {0, 2});
  EXPECT_EQ(stack_->ForwardTraining(call.args).status().code(), StatusCode::kResourceExhausted);
  EXPECT_OK(stack_->ForwardEval(call.args));
  ASSERT_OK(stack_->Update({}));
  expect_serves();
}

TEST_P(UpdateTest, FlagsMayChangeWhileTrainingIsOff) {
  ASSERT_OK(stack_->Update({.training = false}));
  ASSERT_OK(stack_->Update({.gelu_checkpoint = true, .activation_checkpointing = true}));
  ASSERT_OK(stack_->Update({.training = true}));
  StackConfig wanted = config_;
  wanted.gelu_checkpoint = wanted.activation_checkpointing = true;
  EXPECT_EQ(ToJson(stack_->config()), ToJson(wanted));
  EXPECT_EQ(counting_->live_bytes, Allocated(Plan(wanted)));
  const CallResult got = RunTraining(*counting_, *stack_, data_, {0, 2});
  EXPECT_EQ(got.input_grad, RunTraining(*counting_, *Make(config_), data_, {0, 2}).input_grad);
}

INSTANTIATE_TEST_SUITE_P(, UpdateTest, ::testing::ValuesIn(kDevices), DeviceName);

}  // namespace
}  // namespace lamina::testing
