// The memory flags: what each drops from the plan, that the plan is still the allocation, that
// gradients keep their bits, and when a stack must refuse.
#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "counting_backend.h"
#include "lamina/transformer/plan.h"
#include "rig.h"

namespace lamina::testing {
namespace {

using absl::StatusCode;
using Gradients = std::map<std::string, std::vector<float>>;

struct Flags {
  bool gelu_checkpoint, normalize_invertible, activation_checkpointing;

  std::string Name() const {
    return absl::StrCat(gelu_checkpoint ? "gelu_checkpoint " : "",
                        normalize_invertible ? "normalize_invertible " : "",
                        activation_checkpointing ? "activation_checkpointing" : "");
  }
};

std::vector<Flags> AllFlags() {
  std::vector<Flags> all;
  for (const bool layers : {false, true})
    for (const bool norms : {false, true})
      for (const bool gelu : {false, true}) all.push_back({gelu, norms, layers});
  return all;
}

StackConfig With(const Flags& flags, bool pre_layer_norm, DType dtype) {
  StackConfig config = SmallConfig();
  config.num_hidden_layers = 3;
  config.attn_dropout_ratio = 0.2;
  config.hidden_dropout_ratio = 0.1;
  config.pre_layer_norm = pre_layer_norm;
  config.dtype = dtype;
  config.gelu_checkpoint = flags.gelu_checkpoint;
  config.normalize_invertible = flags.normalize_invertible;
  config.activation_checkpointing = flags.activation_checkpointing;
  // On beside all of the others: it has nothing to drop and must change nothing.
  config.attn_dropout_checkpoint =
      flags.gelu_checkpoint || flags.normalize_invertible || flags.activation_checkpointing;
  return config;
}

class MemoryFlagsTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (backend_ != nullptr) counting_ = std::make_unique<CountingBackend>(std::move(backend_));
  }
  std::unique_ptr<Stack> Make(const StackConfig& config) {
    std::unique_ptr<Stack> stack =
        Value(Stack::Create(*counting_, Value(Resolve(config, counting_->info().ordinal))));
    Perturb(*stack, 100);
    return stack;
  }
  std::unique_ptr<CountingBackend> counting_;
};

// --- the same gradients ---

struct Steps {
  std::vector<CallResult> results;
  Gradients gradients;
};

// All of a stack and a part of it, dense and packed, smaller than the largest call.
Steps RunAll(Backend& backend, Stack& stack) {
  Steps run;
  CallData dense = NoiseCall(stack.config(), 2, 5);
  dense.lengths = {3, 5};
  const CallData packed = NoisePackedCall(stack.config(), {2, 7, 1, 4});
  for (const CallData* data : {&std::as_const(dense), &packed})
    for (const LayerRange range : {LayerRange{0, 3}, LayerRange{0, 2}, LayerRange{1, 2}})
      run.results.push_back(RunTraining(backend, stack, *data, range));
  run.gradients = ReadAll(stack, ParameterPart::kGradient);
  return run;
}

// gelu_checkpoint and activation_checkpointing compute what they dropped as Forward did: any
// combination with them has the bits of the run without them. normalize_invertible is other
// arithmetic in Backward, but for Pre-LN layers that are computed again; OracleTest's cases with it
// bound what it may cost.
TEST_P(MemoryFlagsTest, RecomputationHasTheSameBits) {
  for (const bool pre : {true, false})
    for (const DType dtype : kDTypes) {
      Steps plain, inverted;
      for (const Flags& flags : AllFlags()) {
        SCOPED_TRACE(absl::StrCat(pre ? "Pre-LN " : "Post-LN ", Name(dtype), " ", flags.Name()));
        const std::unique_ptr<Stack> stack = Make(With(flags, pre, dtype));
        Steps run = RunAll(*counting_, *stack);
        Steps& baseline = flags.normalize_invertible && !(flags.activation_checkpointing && pre)
                              ? inverted
                              : plain;
        if (baseline.results.empty()) baseline = run;
        for (size_t i = 0; i < run.results.size(); ++i) {
          EXPECT_EQ(run.results[i].output, plain.results[i].output) << i;
          EXPECT_EQ(run.results[i].input_grad, baseline.results[i].input_grad) << i;
        }
        EXPECT_EQ(run.gradients, baseline.gradients);
      }
      EXPECT_NE(inverted.gradients, plain.gradients) << "the norms' inputs were read after all";
    }
}

// --- the plan ---

std::map<std::string, PlanEntry> Entries(const MemoryPlan& plan, MemoryKind kind) {
  std::map<std::string, PlanEntry> entries;
  for (const PlanEntry& entry : plan.entries)
    if (entry.kind == kind) entries.emplace(entry.name, entry);
  return entries;
}

TEST_P(MemoryFlagsTest, PlanIsTheAllocationToTheByte) {
  for (const bool pre : {true, false})
    for (const DType dtype : kDTypes)
      for (const Flags& flags : AllFlags()) {
        SCOPED_TRACE(absl::StrCat(pre ? "Pre-LN " : "Post-LN ", Name(dtype), " ", flags.Name()));
        StackConfig config = With(flags, pre, dtype);
        config.max_contexts = 1;
        config = Value(Resolve(config, counting_->info().ordinal));
        const MemoryPlan plan = Value(PlanStack(config, counting_->sizes()));
        const std::unique_ptr<Stack> stack = Value(Stack::Create(*counting_, config));
        EXPECT_EQ(counting_->live_bytes, Allocated(plan));
        EXPECT_EQ(plan.Bytes(MemoryKind::kActivations), plan.context_bytes);
        // Each extreme fits: one call of all tokens, dense, packed whole, packed token by token.
        for (const CallData& data : {NoiseCall(config, 3, 7), NoisePackedCall(config, {7, 7, 7}),
                                     NoisePackedCall(config, std::vector<int32_t>(21, 1))}) {
          const DeviceCall call(*counting_, config, data, {0, 3});
          const DeviceTensor dy(*counting_, dtype, call.shape, data.output_grad);
          const int64_t allocations = counting_->allocations;
          const std::unique_ptr<Context> context = Value(stack->ForwardTraining(call.args));
          EXPECT_EQ(context->bytes(), plan.context_bytes);
          const int64_t packed_tokens = data.cu_seqlens.empty() ? 0 : 21;
          EXPECT_EQ(context->bytes(),
                    ContextBytes(config, counting_->sizes(), 3,
                                 config.Dims(data.batch, data.seq, packed_tokens)));
          EXPECT_OK(stack->Backward(*context, dy.view(), call.output.view()));
          EXPECT_EQ(counting_->allocations, allocations);
        }
      }
}

TEST_P(MemoryFlagsTest, EachFlagDropsItsBuffers) {
  constexpr MemoryKind kActivations = MemoryKind::kActivations;
  for (const bool pre : {true, false}) {
    const auto plan = [&](const Flags& flags) {
      StackConfig config = With(flags, pre, DType::kBF16);
      return Value(
          PlanStack(Value(Resolve(config, counting_->info().ordinal)), counting_->sizes()));
    };
    const MemoryPlan plain = plan({false, false, false});
    const auto dropped = [&](const Flags& flags) {
      std::vector<std::string> names;
      const auto left = Entries(plan(flags), kActivations);
      for (const auto& [name, entry] : Entries(plain, kActivations))
        if (left.count(name) == 0) names.push_back(name);
      return names;
    };
    using Names = std::vector<std::string>;
    EXPECT_EQ(dropped({true, false, false}), Names{"layer.inter"});
    EXPECT_EQ(
        dropped({false, true, false}),
        pre ? (Names{"context.input", "layer.attn_mean", "layer.attn_sum", "layer.norm_mean",
                     "layer.output"})
            : (Names{"layer.attn_mean", "layer.attn_sum", "layer.ffn_sum", "layer.norm_mean"}));
    // A norm's output is kept where its input is not, and the other way round.
    const auto inverted = Entries(plan({false, true, false}), kActivations);
    EXPECT_EQ(inverted.count("layer.ffn_in"), 1u);
    EXPECT_EQ(inverted.count("layer.attn_in"), pre ? 1u : 0u);
    EXPECT_EQ(Entries(plain, kActivations).count("layer.ffn_in"), 0u);
    EXPECT_EQ(Entries(plain, kActivations).count("layer.attn_in"), 0u);
    // Post-LN's last norm is the next layer's input: of every layer, the last one too.
    if (pre) {
      EXPECT_EQ(Entries(plain, kActivations).at("layer.output").instances, 2 * 2);
    } else {
      EXPECT_EQ(Entries(plain, kActivations).count("layer.output"), 0u);
      EXPECT_EQ(inverted.at("layer.output").instances, 2 * 3);
    }
    // Attention keeps nothing of its dropout with any of them, and the plan says so.
    EXPECT_EQ(Entries(plain, kActivations).at("layer.attn_dropout").bytes, 0u);

    for (const bool gelu : {false, true})
      for (const bool norms : {false, true}) {
        const MemoryPlan checkpointed = plan({gelu, norms, true});
        Names names;
        for (const auto& [name, entry] : Entries(checkpointed, kActivations)) names.push_back(name);
        EXPECT_EQ(names, (Names{"context.input", "context.keys", "context.rng", "layer.output"}));
        // One shared set instead, which the others shrink.
        auto shared = Entries(checkpointed, MemoryKind::kWorkspace);
        EXPECT_EQ(shared.at("recompute.qkv").instances, 1);
        EXPECT_EQ(shared.count("recompute.inter"), gelu ? 0u : 1u);
        const bool inverts = norms && !pre;
        EXPECT_EQ(shared.count("recompute.attn_sum"), inverts ? 0u : 1u);
        EXPECT_EQ(shared.count("recompute.ffn_in"), inverts ? 1u : 0u);
      }
    // Every flag saves, and each beside any other, but for the input that a Pre-LN layer has again.
    for (const Flags& f : AllFlags()) {
      const size_t total = plan(f).Total();
      if (!f.gelu_checkpoint) {
        EXPECT_LT(plan({true, f.normalize_invertible, f.activation_checkpointing}).Total(), total);
      }
      if (!f.normalize_invertible) {
        const size_t inverting =
            plan({f.gelu_checkpoint, true, f.activation_checkpointing}).Total();
        if (f.activation_checkpointing && pre) {
          EXPECT_EQ(inverting, total);
        } else {
          EXPECT_LT(inverting, total);
        }
      }
      if (!f.activation_checkpointing) {
        EXPECT_LT(plan({f.gelu_checkpoint, f.normalize_invertible, true}).Total(), total);
      }
    }
  }
}

// What docs/memory.md says of BERT-Large's layers in bf16, whatever the length and the device.
TEST(BytesOfALayer, AToken) {
  for (const char* device : {"cpu", "cuda"})
    for (const int64_t seq : {128, 512, 2048})
      for (const bool pre : {true, false})
        for (const Flags& flags : AllFlags()) {
          SCOPED_TRACE(
              absl::StrCat(device, " S ", seq, pre ? " Pre-LN " : " Post-LN ", flags.Name()));
          const std::unique_ptr<const OpSizes> sizes = Value(OpSizes::Of(device, 4));
          StackConfig config = With(flags, pre, DType::kBF16);
          config.batch_size = 2;
          config.max_seq_length = seq;
          config.max_contexts = 1;
          config.hidden_size = 1024;
          config.heads = 16;
          config.intermediate_size = 4096;
          const auto plan = [&](int64_t layers) {
            config.num_hidden_layers = layers;
            return Value(PlanStack(Value(Resolve(config, 0)), *sizes));
          };
          const auto tokens = static_cast<size_t>(2 * seq);
          const MemoryPlan three = plan(3), four = plan(4);
          const size_t kept = (four.context_bytes - three.context_bytes) / tokens;
          size_t again = 0;
          for (const auto& [name, entry] : Entries(four, MemoryKind::kWorkspace))
            if (name.rfind("recompute.", 0) == 0) again += entry.bytes / tokens;
          const size_t gelu = flags.gelu_checkpoint ? 8192 : 0;
          const size_t means = flags.normalize_invertible ? 8 : 0;
          if (!flags.activation_checkpointing) {
            EXPECT_EQ(kept, 28816 - gelu - means);
            EXPECT_EQ(again, 0u);
          } else {
            EXPECT_EQ(kept, 2048u);
            const size_t norms = pre || flags.normalize_invertible ? 2048 : 0;
            EXPECT_EQ(again, 28816 - gelu - norms - (pre ? 0 : means));
          }
        }
}

// --- weights that change under a context ---

TEST_P(MemoryFlagsTest, BackwardNeedsTheWeightsThatItComputesFrom) {
  for (const Flags& flags : AllFlags())
    for (const bool write : {true, false}) {
      SCOPED_TRACE(flags.Name());
      StackConfig config = With(flags, true, DType::kF32);
      const std::unique_ptr<Stack> stack = Make(config);
      const CallData data = NoiseCall(config, 3, 7);
      const DeviceCall call(*counting_, config, data, {0, 3});
      const DeviceTensor dy(*counting_, config.dtype, call.shape, data.output_grad);
      const std::unique_ptr<Context> context = Value(stack->ForwardTraining(call.args));
      if (write) {
        WriteFloats(*stack, "layers.0.norm_w", ParameterPart::kMaster,
                    ReadFloats(*stack, "layers.0.norm_w", ParameterPart::kMaster));
      } else {
        ASSERT_OK(stack->ApplyGradients({.learning_rate = 0.01}).status());
      }
      const absl::Status status = stack->Backward(*context, dy.view(), {});
      if (!flags.normalize_invertible && !flags.activation_checkpointing) {
        EXPECT_OK(status);
        continue;
      }
      EXPECT_THAT(status,
                  IsStatus(StatusCode::kFailedPrecondition, "weights of its layers have changed"));
      for (const auto& [name, g] : ReadAll(*stack, ParameterPart::kGradient))
        ASSERT_EQ(MaxAbs(g), 0) << name;
    }
}

TEST_P(MemoryFlagsTest, BackwardOfSomeLayersNeedsTheirWeightsAlone) {
  const StackConfig config = With({false, true, true}, true, DType::kF32);
  const std::unique_ptr<Stack> stack = Make(config);
  const CallData data = NoiseCall(config, 3, 7);
  const DeviceCall call(*counting_, config, data, {1, 2});
  const DeviceTensor dy(*counting_, config.dtype, call.shape, data.output_grad);
  for (const int changed : {0, 1, 2}) {
    SCOPED_TRACE(changed);
    const std::unique_ptr<Context> context = Value(stack->ForwardTraining(call.args));
    const std::string name = absl::StrCat("layers.", changed, ".attn_kw");
    WriteFloats(*stack, name, ParameterPart::kMaster,
                ReadFloats(*stack, name, ParameterPart::kMaster));
    const absl::Status status = stack->Backward(*context, dy.view(), {});
    if (changed == 1) {
      EXPECT_THAT(status, IsStatus(StatusCode::kFailedPrecondition, "have changed"));
    } else {
      EXPECT_OK(status);
    }
  }
}

// --- norms that can't be inverted ---

class InvertibleNormsTest : public MemoryFlagsTest {
 protected:
  void Begin(DType dtype, bool pre = true) {
    stack_ = Make(With({false, true, false}, pre, dtype));
    data_ = NoiseCall(stack_->config(), 3, 7);
  }
  absl::Status Forward(LayerRange layers = {0, 3}) {
    const DeviceCall call(*counting_, stack_->config(), data_, layers);
    const absl::Status status = stack_->ForwardTraining(call.args).status();
    EXPECT_OK(counting_->Synchronize());
    return status;
  }
  void Put(const std::string& name, size_t channel, float value) {
    std::vector<float> values = ReadFloats(*stack_, name, ParameterPart::kMaster);
    values[channel] = value;
    WriteFloats(*stack_, name, ParameterPart::kMaster, values);
  }
  std::unique_ptr<Stack> stack_;
  CallData data_;
};

TEST_P(InvertibleNormsTest, AGammaTooSmallRefusesByName) {
  for (const bool pre : {true, false}) {
    Begin(DType::kF32, pre);
    ASSERT_OK(Forward());
    const StackCounters counters = stack_->counters();
    for (const char* norm : {"attn_nw", "norm_w"}) {
      const std::string name = absl::StrCat("layers.1.", norm);
      for (const float bad : {0.0f, -0.0f, 1e-37f, std::nanf("")}) {
        Put(name, 5, bad);
        const absl::Status status = Forward();
        EXPECT_THAT(status, IsStatus(StatusCode::kFailedPrecondition, name + "[5], which is "));
        EXPECT_THAT(status, IsStatus(StatusCode::kFailedPrecondition, "in fp32"));
        EXPECT_THAT(status,
                    IsStatus(StatusCode::kFailedPrecondition, "turn normalize_invertible off"));
      }
      EXPECT_EQ(stack_->counters().rng_counter, counters.rng_counter);
      EXPECT_EQ(stack_->context_bytes_in_use(), 0u);
      EXPECT_THAT(Forward({1, 2}), IsStatus(StatusCode::kFailedPrecondition, name));
      // Layers without it, evaluation, and the stack without the flag go on.
      const uint64_t counter = stack_->counters().rng_counter;
      EXPECT_OK(Forward({0, 1}));
      EXPECT_OK(Forward({2, 3}));
      StackCounters back = counters;
      back.rng_counter = counter;
      stack_->set_counters(back);
      Put(name, 5, 0.0f);
      RunEval(*counting_, *stack_, data_, {0, 3});
      ASSERT_OK(stack_->Update({.normalize_invertible = false}));
      EXPECT_OK(Forward());
      stack_->set_counters(counters);
      ASSERT_OK(stack_->Update({.normalize_invertible = true}));
      EXPECT_THAT(Forward(), IsStatus(StatusCode::kFailedPrecondition, name));
      Put(name, 5, -1.0f);
      EXPECT_OK(Forward());
      stack_->set_counters(counters);
    }
  }
}

TEST_P(InvertibleNormsTest, TheLimitIsHalfOfTheDigits) {
  // gamma that is just large enough beside a shift, and one that is just too small.
  struct Case {
    DType dtype;
    float beta, enough, too_small;
  };
  for (const Case& c :
       {Case{DType::kF32, 4096.0f, 1.0f, 0.999f}, Case{DType::kBF16, -16.0f, 1.0f, 0.99f},
        Case{DType::kF16, 45.0f, -1.0f, -0.99f},           // 2^5.5 is 45.25
        Case{DType::kF16, 0.0f, 0x1.7p-9f, 0x1.6p-9f}}) {  // 2^-8.5 is 1.414 2^-9
    SCOPED_TRACE(Name(c.dtype));
    Begin(c.dtype);
    Put("layers.2.norm_b", 23, c.beta);
    Put("layers.2.norm_w", 23, c.enough);
    EXPECT_OK(Forward());
    Put("layers.2.norm_w", 23, c.too_small);
    EXPECT_THAT(Forward(), IsStatus(StatusCode::kFailedPrecondition, "layers.2.norm_w[23]"));
  }
}

TEST_P(InvertibleNormsTest, AStepIsJudgedByItselfAndAWriteByTheNextForward) {
  Begin(DType::kF32);
  Put("layers.0.attn_nw", 7, 1.0f);
  Put("layers.0.attn_nb", 7, 1.0f);
  const DeviceCall call(*counting_, stack_->config(), data_, {0, 3});
  const auto forward = [&] { return stack_->ForwardTraining(call.args).status(); };
  int64_t before = counting_->synchronizations;
  ASSERT_OK(forward());
  EXPECT_EQ(counting_->synchronizations, before + 1) << "weights were written";
  ASSERT_OK(forward());
  EXPECT_EQ(counting_->synchronizations, before + 1);

  // The first step of AdamW moves a weight by lr, whatever its gradient: from 1 to about 0.
  std::vector<float> gradient(24, 0.0f);
  gradient[7] = 0.25f;
  WriteFloats(*stack_, "layers.0.attn_nw", ParameterPart::kGradient, gradient);
  ASSERT_TRUE(Value(stack_->ApplyGradients({.learning_rate = 1})).applied);
  before = counting_->synchronizations;
  EXPECT_THAT(forward(), IsStatus(StatusCode::kFailedPrecondition, "layers.0.attn_nw[7]"));
  EXPECT_EQ(counting_->synchronizations, before);
}

// --- stochastic_mode ---

TEST_P(MemoryFlagsTest, StochasticModeIsBackwardsAlone) {
  for (const bool checkpointing : {false, true}) {
    const std::unique_ptr<Stack> stack =
        Make(With({false, false, checkpointing}, true, DType::kF32));
    const CallData data = NoiseCall(stack->config(), 3, 7);
    RunTraining(*counting_, *stack, data, {0, 3});
    EXPECT_EQ(counting_->unordered_ops, 0);
    ASSERT_OK(stack->Update({.stochastic_mode = true}));
    EXPECT_TRUE(stack->config().stochastic_mode);
    RunTraining(*counting_, *stack, data, {0, 3});
    // Pre-LN's Backward, whose neighbours share an op, without its recomputation, which is
    // Forward's arithmetic.
    EXPECT_EQ(counting_->unordered_ops, 3 * 12 - 2);
    ASSERT_OK(stack->ApplyGradients({.learning_rate = 0.01}).status());
    EXPECT_EQ(counting_->unordered_ops, 3 * 12 - 2);
    counting_->unordered_ops = 0;
  }
}

INSTANTIATE_TEST_SUITE_P(, MemoryFlagsTest, ::testing::ValuesIn(kDevices), DeviceName);
INSTANTIATE_TEST_SUITE_P(, InvertibleNormsTest, ::testing::ValuesIn(kDevices), DeviceName);

}  // namespace
}  // namespace lamina::testing
