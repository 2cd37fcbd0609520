// Each documented refusal of a step, once; and that a refusal changes nothing.
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "engine_rig.h"

namespace lamina::testing {
namespace {

// A Forward that would succeed; each case spoils one thing.
struct ForwardFixture {
  OwnedTensor input = Noise(1, DType::kF32, {3, 8, 16});
  OwnedTensor mask = Zeros(DType::kF32, {3, 1, 1, 8});
  OwnedTensor lengths = Zeros(DType::kI32, {3});
  OwnedTensor output = Zeros(DType::kF32, {3, 8, 16});
  ForwardCall call;

  ForwardFixture() {
    SetLengths({8, 1, 5});
    call = {.stack = "s", .session = kSession, .input = input.view(), .output = output.view()};
  }
  void SetLengths(const std::vector<int32_t>& values) {
    std::memcpy(lengths.bytes.data(), values.data(), values.size() * sizeof(int32_t));
  }
};

struct ForwardCase {
  const char* name;
  std::function<void(ForwardFixture&)> spoil;
  absl::StatusCode code;
  const char* text;
};

const std::vector<ForwardCase>& ForwardCases() {
  using F = ForwardFixture;
  static const std::vector<ForwardCase> cases = {
      {"NoStack", [](F& f) { f.call.stack = "other"; }, kNotFound, "no stack \"other\""},
      {"StackNameGarbage", [](F& f) { f.call.stack = "../x\n"; }, kNotFound, "stack:"},
      {"LayersBeyond",
       [](F& f) {
         f.call.layers = LayerRange{0, 3};
       },
       kInvalid, "layers: is [0, 3); it must be a range of one layer or more within [0, 2)"},
      {"LayersEmpty",
       [](F& f) {
         f.call.layers = LayerRange{1, 1};
       },
       kInvalid, "layers:"},
      {"LayersNegative",
       [](F& f) {
         f.call.layers = LayerRange{-1, 1};
       },
       kInvalid, "layers:"},
      {"InputMissing", [](F& f) { f.call.input = {}; }, kInvalid, "input: is missing"},
      {"InputDtype", [](F& f) { f.call.input.dtype = DType::kF16; }, kInvalid,
       "input.dtype: is fp16; the stack's is fp32"},
      {"InputRank",
       [](F& f) {
         f.call.input.shape = Shape{24, 16};
       },
       kInvalid, "input.shape: is [24, 16]"},
      {"InputBatch",
       [](F& f) {
         f.call.input.shape = Shape{4, 6, 16};
       },
       kInvalid, "B in 1..3"},
      {"InputBatchZero",
       [](F& f) {
         f.call.input.shape = Shape{0, 8, 16};
       },
       kInvalid, "B in 1..3"},
      {"InputSeq",
       [](F& f) {
         f.call.input.shape = Shape{2, 9, 16};
       },
       kInvalid, "S in 1..8"},
      {"InputSeqNegative",
       [](F& f) {
         f.call.input.shape = Shape{2, -1, 16};
       },
       kInvalid, "S in 1..8"},
      {"InputHidden",
       [](F& f) {
         f.call.input.shape = Shape{3, 4, 32};
       },
       kInvalid, "[B, S, 16]"},
      {"InputMisaligned",
       [](F& f) { f.call.input.data = static_cast<char*>(f.call.input.data) + 2; }, kInvalid,
       "input: begins at an address that is no multiple of 4"},
      {"MaskDtype",
       [](F& f) {
         f.call.mask = f.mask.view();
         f.call.mask.dtype = DType::kI32;
       },
       kInvalid, "mask.dtype: is int32; it must be fp32"},
      {"MaskShape",
       [](F& f) {
         f.call.mask = f.mask.view();
         f.call.mask.shape = Shape{3, 1, 8, 1};
       },
       kInvalid, "mask.shape: is [3, 1, 8, 1]; it must be [3, 1, 1, 8] or [3, 8]"},
      {"MaskAndLengths",
       [](F& f) {
         f.call.mask = f.mask.view();
         f.call.lengths = f.lengths.view();
       },
       kInvalid, "mask, lengths, cumulative_lengths: more than one is given"},
      {"LengthsDtype",
       [](F& f) {
         f.call.lengths = f.lengths.view();
         f.call.lengths.dtype = DType::kF32;
       },
       kInvalid, "lengths.dtype: is fp32; it must be int32"},
      {"LengthsShape",
       [](F& f) {
         f.call.lengths = f.lengths.view();
         f.call.lengths.shape = Shape{2};
       },
       kInvalid, "lengths.shape: is [2]; it must be [3]"},
      {"LengthZero",
       [](F& f) {
         f.SetLengths({8, 0, 5});
         f.call.lengths = f.lengths.view();
       },
       kInvalid, "lengths[1]: is 0; it must be in 1..8"},
      {"LengthTooLong",
       [](F& f) {
         f.SetLengths({8, 1, 9});
         f.call.lengths = f.lengths.view();
       },
       kInvalid, "lengths[2]: is 9; it must be in 1..8"},
      {"LengthNegative",
       [](F& f) {
         f.SetLengths({-7, 1, 5});
         f.call.lengths = f.lengths.view();
       },
       kInvalid, "lengths[0]: is -7"},
      {"OutputSize",
       [](F& f) {
         f.call.output.shape = Shape{3, 7, 16};
       },
       kInvalid, "output.slice.size_bytes: is 1344; the result has 1536 bytes"},
      {"OutputMisaligned",
       [](F& f) { f.call.output.data = static_cast<char*>(f.call.output.data) + 1; }, kInvalid,
       "output: begins at an address"},
      {"OutputIsInput", [](F& f) { f.call.output = f.call.input; }, kInvalid,
       "output: overlaps input"},
      {"OutputTouchesInput",
       [](F& f) {
         f.input.bytes.resize(4096);
         f.call.input = f.input.view();
         f.call.output.data = f.input.bytes.data() + 1532;
       },
       kInvalid, "output: overlaps input"},
      {"OutputOverlapsMask",
       [](F& f) {
         f.call.mask = f.mask.view();
         f.call.mask.data = f.output.bytes.data() + 64;
       },
       kInvalid, "output: overlaps mask"},
      {"OutputOverlapsLengths",
       [](F& f) {
         f.SetLengths({1, 1, 1});
         std::memcpy(f.output.bytes.data(), f.lengths.bytes.data(), 12);
         f.call.lengths = f.lengths.view();
         f.call.lengths.data = f.output.bytes.data();
       },
       kInvalid, "output: overlaps lengths"},
      {"InlineAboveTheCap", [](F& f) { f.call.output = {}; }, kInvalid,
       "output.inline: the result has 1536 bytes, above the inline cap of 1024"},
  };
  return cases;
}

// Also as on a card: the same refusals, and nothing staged is left behind.
class ForwardValidation : public ::testing::TestWithParam<bool> {};

TEST_P(ForwardValidation, EachRefusalNamesTheFieldAndChangesNothing) {
  Rig rig({.host_memory = GetParam(), .inline_cap_bytes = 1024});
  rig.Create("s", TinyConfig());
  const std::string before = rig.Snapshot("s");
  const int64_t ops = rig.backend().ops;
  for (const ForwardCase& c : ForwardCases()) {
    SCOPED_TRACE(c.name);
    for (const bool training : {true, false}) {
      ForwardFixture f;
      f.call.training = training;
      c.spoil(f);
      EXPECT_THAT(rig.engine().Forward(f.call, {}).status(), IsStatus(c.code, c.text));
    }
  }
  EXPECT_EQ(rig.backend().ops, ops) << "a refused call ran something";
  EXPECT_EQ(rig.Snapshot("s"), before);
  EXPECT_OK(rig.engine().health());
  ForwardFixture good;
  EXPECT_OK(rig.engine().Forward(good.call, {}).status());
}

INSTANTIATE_TEST_SUITE_P(HostMemory, ForwardValidation, ::testing::Bool(),
                         [](const auto& test) { return test.param ? "direct" : "staged"; });

TEST(ForwardValidation, TouchingTensorsDoNotOverlap) {
  Rig rig;
  rig.Create("s", TinyConfig());
  ForwardFixture f;
  f.input.bytes.resize(2 * 1536);
  f.call.input = f.input.view();
  f.call.output.data = f.input.bytes.data() + 1536;
  EXPECT_OK(rig.engine().Forward(f.call, {}).status());
}

TEST(ForwardValidation, TrainingOfAStackThatKeepsNoGradients) {
  Rig rig;
  StackConfig config = TinyConfig();
  config.training = false;
  rig.Create("s", config);
  ForwardFixture f;
  f.call.training = true;
  EXPECT_THAT(rig.engine().Forward(f.call, {}).status(), IsStatus(kPrecondition, "training:"));
  f.call.training.reset();  // as the stack says: evaluation
  EXPECT_EQ(Value(rig.engine().Forward(f.call, {})).context_id, "");
}

TEST(BackwardValidation, EachRefusalLeavesTheContextUnspent) {
  Rig rig({.inline_cap_bytes = 1024});
  rig.Create("s", TinyConfig());
  ForwardFixture forward;
  const std::string id = Value(rig.engine().Forward(forward.call, {})).context_id;
  const std::string before = rig.Snapshot("s");
  OwnedTensor grad = Noise(2, DType::kF32, {3, 8, 16});
  OwnedTensor input_grad = Zeros(DType::kF32, {3, 8, 16});
  const BackwardCall good{.stack = "s",
                          .session = kSession,
                          .context_id = id,
                          .output_grad = grad.view(),
                          .input_grad = input_grad.view(),
                          .want_input_grad = true};
  const auto expect = [&](absl::StatusCode code, const char* text,
                          const std::function<void(BackwardCall&)>& spoil) {
    SCOPED_TRACE(text);
    BackwardCall call = good;
    spoil(call);
    EXPECT_THAT(rig.engine().Backward(call, {}).status(), IsStatus(code, text));
  };
  expect(kNotFound, "no stack \"other\"", [](BackwardCall& c) {
    c.stack = "other";
    c.context_id = "99";
  });
  expect(kInvalid, "stack: is \"other\"; the context belongs to stack \"s\"", [&](BackwardCall& c) {
    rig.Create("other", TinyConfig());
    c.stack = "other";
  });
  expect(kInvalid, "output_grad: is missing", [](BackwardCall& c) { c.output_grad = {}; });
  expect(kInvalid, "output_grad.dtype: is bf16; it must be fp32",
         [](BackwardCall& c) { c.output_grad.dtype = DType::kBF16; });
  expect(kInvalid, "output_grad.shape: is [3, 7, 16]; it must be [3, 8, 16]", [](BackwardCall& c) {
    c.output_grad.shape = Shape{3, 7, 16};
  });
  expect(kInvalid, "output_grad: begins at",
         [](BackwardCall& c) { c.output_grad.data = static_cast<char*>(c.output_grad.data) + 3; });
  expect(kInvalid, "input_grad.slice.size_bytes: is 768; the result has 1536", [](BackwardCall& c) {
    c.input_grad.shape = Shape{3, 4, 16};
  });
  expect(kInvalid, "input_grad: overlaps output_grad",
         [](BackwardCall& c) { c.input_grad = c.output_grad; });
  expect(kInvalid, "input_grad.inline: the result has 1536 bytes",
         [](BackwardCall& c) { c.input_grad = {}; });
  EXPECT_EQ(rig.Snapshot("s"), before);
  EXPECT_OK(rig.engine().Backward(good, {}).status());
  EXPECT_NE(rig.Snapshot("s"), before);
}

TEST(ApplyValidation, EachHyperParameterHasItsRange) {
  Rig rig;
  rig.Create("s", TinyConfig());
  rig.ForwardBackward("s", kSession, 3);
  const std::string before = rig.Snapshot("s");
  const OptimizerOptions good{.learning_rate = 1e-3};
  const auto expect = [&](const char* text, const std::function<void(OptimizerOptions&)>& spoil) {
    OptimizerOptions options = good;
    spoil(options);
    EXPECT_THAT(rig.engine().ApplyGradients("s", options, true, {}).status(),
                IsStatus(kInvalid, text));
  };
  static constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  expect("learning_rate", [](OptimizerOptions& o) { o.learning_rate = -1; });
  expect("learning_rate", [](OptimizerOptions& o) { o.learning_rate = HUGE_VAL; });
  expect("beta1", [](OptimizerOptions& o) { o.beta1 = 1; });
  expect("beta2", [](OptimizerOptions& o) { o.beta2 = kNan; });
  expect("epsilon", [](OptimizerOptions& o) { o.epsilon = 0; });
  expect("weight_decay", [](OptimizerOptions& o) { o.weight_decay = -0.1; });
  expect("max_grad_norm", [](OptimizerOptions& o) { o.max_grad_norm = kNan; });
  expect("loss_scale", [](OptimizerOptions& o) { o.loss_scale = -1; });
  expect("loss_scale", [](OptimizerOptions& o) { o.loss_scale = kNan; });
  const auto lamb = [](double low, double high) {
    return [low, high](OptimizerOptions& o) {
      o.kind = OptimizerKind::kLamb;
      o.min_trust_ratio = low;
      o.max_trust_ratio = high;
    };
  };
  expect("min_trust_ratio", lamb(-0.5, 0));
  expect("min_trust_ratio", lamb(kNan, 0));
  expect("max_trust_ratio", lamb(2, 1));
  expect("max_trust_ratio", lamb(0, kNan));
  EXPECT_THAT(rig.engine().ApplyGradients("none", good, true, {}).status(),
              IsStatus(kNotFound, "none"));
  EXPECT_EQ(rig.Snapshot("s"), before) << "gradients are there still: a refusal zeroes nothing";
  EXPECT_TRUE(Value(rig.engine().ApplyGradients("s", good, true, {})).result.applied);
}

TEST(ApplyValidation, NeedsTraining) {
  Rig rig;
  StackConfig config = TinyConfig();
  config.training = false;
  rig.Create("s", config);
  EXPECT_EQ(rig.engine().ApplyGradients("s", {.learning_rate = 1}, false, {}).status().code(),
            kPrecondition);
  EXPECT_EQ(rig.engine().ZeroGradients("s", {}).code(), kPrecondition);
  EXPECT_THAT(rig.engine().ZeroGradients("none", {}), IsStatus(kNotFound, "none"));
}

// A call is weighed before its shape is checked.
TEST(ValidationTest, NoCallOfAnImpossibleShapeIsLight) {
  Rig rig;
  rig.Create("s", TinyConfig());
  for (const Effort effort : {Effort::kForward, Effort::kBackward}) {
    EXPECT_TRUE(rig.engine().IsLight("s", effort, 16));
    for (const double elements : {-1.0, -1e30, 1e30, static_cast<double>(NAN)})
      EXPECT_FALSE(rig.engine().IsLight("s", effort, elements)) << elements;
  }
}

}  // namespace
}  // namespace lamina::testing
