// Packed batches: against each sequence by itself, every refusal of cumulative lengths, and how
// they are counted.
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine_rig.h"

namespace lamina::testing {
namespace {

// Five sequences in a stack of batch_size 3: of 3, 8, 1, 8 and 4 tokens, T = 24 = 3 * 8.
const std::vector<int32_t> kCumulative = {0, 3, 11, 12, 20, 24};
constexpr int64_t kTokens = 24;
constexpr double kSumOfSquares = 9 + 64 + 1 + 64 + 16;

// A packed mask is drawn by the token's place in the batch, a single sequence's by its own: without
// dropout they must agree.
StackConfig Config(DType dtype = DType::kF32) {
  StackConfig config = TinyConfig(dtype);
  config.attn_dropout_ratio = config.hidden_dropout_ratio = 0;
  return config;
}

// --- results ---

struct PackedCase {
  DType dtype;
  bool host_memory;
  bool causal;
};

class PackedTest : public ::testing::TestWithParam<PackedCase> {};

TEST_P(PackedTest, GivesWhatEachSequenceGivesByItself) {
  const DType dtype = GetParam().dtype;
  Rig rig({.host_memory = GetParam().host_memory});
  StackConfig config = Config(dtype);
  config.causal = GetParam().causal;
  rig.Create("packed", config);
  rig.Create("single", config);
  OwnedTensor input = Noise(1, dtype, {kTokens, 16}), grad = Noise(2, dtype, {kTokens, 16});
  OwnedTensor cumulative = Integers(kCumulative);
  const size_t row = 16 * SizeOf(dtype);

  std::string single_y, single_dx;
  for (size_t i = 0; i + 1 < kCumulative.size(); ++i) {
    const size_t begin = static_cast<size_t>(kCumulative[i]) * row;
    const int64_t length = kCumulative[i + 1] - kCumulative[i];
    CallTensor x = input.view(), dy = grad.view();
    x.data = input.bytes.data() + begin;
    dy.data = grad.bytes.data() + begin;
    x.shape = dy.shape = Shape{1, length, 16};
    const ForwardOutcome forward =
        Value(rig.engine().Forward({.stack = "single", .session = kSession, .input = x}, {}));
    single_y += forward.inline_output;
    single_dx += Value(rig.engine().Backward({.stack = "single",
                                              .session = kSession,
                                              .context_id = forward.context_id,
                                              .output_grad = dy,
                                              .want_input_grad = true},
                                             {}))
                     .inline_input_grad;
  }

  OwnedTensor output = Zeros(dtype, {kTokens, 16}), input_grad = Zeros(dtype, {kTokens, 16});
  ForwardCall call{.stack = "packed",
                   .session = kSession,
                   .input = input.view(),
                   .cumulative_lengths = cumulative.view(),
                   .output = output.view()};
  const ForwardOutcome forward = Value(rig.engine().Forward(call, {}));
  EXPECT_EQ(forward.output_shape, Shape({kTokens, 16}));
  // The context keeps its own lengths: neither the client's memory nor a later call changes them.
  cumulative = Integers({0, 8, 16, 24});
  call.cumulative_lengths = cumulative.view();
  call.training = false;
  call.output = {};
  const std::string other = Value(rig.engine().Forward(call, {})).inline_output;
  EXPECT_NE(other, std::string(output.bytes.begin(), output.bytes.end()));
  const BackwardOutcome backward = Value(rig.engine().Backward({.stack = "packed",
                                                                .session = kSession,
                                                                .context_id = forward.context_id,
                                                                .output_grad = grad.view(),
                                                                .input_grad = input_grad.view(),
                                                                .want_input_grad = true},
                                                               {}));
  EXPECT_EQ(backward.shape, Shape({kTokens, 16}));

  // The same sums in other orders: some units of the dtype's roundoff over two layers.
  const double tolerance = dtype == DType::kF32 ? 2e-6 : dtype == DType::kF16 ? 4e-3 : 3e-2;
  const auto doubles = [&](const OwnedTensor& tensor) {
    return ToDoubles({tensor.bytes.data(), tensor.bytes.size()}, dtype);
  };
  EXPECT_LT(RelativeError(doubles(output), ToDoubles(single_y, dtype)), tolerance);
  EXPECT_LT(RelativeError(doubles(input_grad), ToDoubles(single_dx, dtype)), tolerance);
  EXPECT_LT(RelativeError(ToDoubles(rig.Gradients("packed"), DType::kF32),
                          ToDoubles(rig.Gradients("single"), DType::kF32)),
            tolerance);
}

INSTANTIATE_TEST_SUITE_P(All, PackedTest,
                         ::testing::Values(PackedCase{DType::kF32, true, false},
                                           PackedCase{DType::kF32, false, false},
                                           PackedCase{DType::kF32, true, true},
                                           PackedCase{DType::kBF16, true, false},
                                           PackedCase{DType::kF16, false, true}),
                         [](const auto& test) {
                           return std::string(Name(test.param.dtype)) +
                                  (test.param.host_memory ? "_direct" : "_staged") +
                                  (test.param.causal ? "_causal" : "");
                         });

TEST(Packed, DropoutRepeatsWithTheSeed) {
  std::vector<std::string> results;
  for (int run = 0; run < 2; ++run) {
    Rig rig;
    rig.Create("s", TinyConfig());  // both ratios 0.1
    OwnedTensor input = Noise(1, DType::kF32, {kTokens, 16}), cumulative = Integers(kCumulative);
    const ForwardOutcome forward =
        Value(rig.engine().Forward({.stack = "s",
                                    .session = kSession,
                                    .input = input.view(),
                                    .cumulative_lengths = cumulative.view()},
                                   {}));
    Value(rig.engine().Backward({.stack = "s",
                                 .session = kSession,
                                 .context_id = forward.context_id,
                                 .output_grad = input.view()},
                                {}));
    results.push_back(forward.inline_output + rig.Gradients("s"));
  }
  EXPECT_EQ(results[0], results[1]);
}

// --- refusals ---

struct PackedFixture {
  OwnedTensor input = Noise(1, DType::kF32, {kTokens, 16});
  OwnedTensor output = Zeros(DType::kF32, {kTokens, 16});
  OwnedTensor cumulative, other;
  ForwardCall call;

  PackedFixture() {
    call = {.stack = "s", .session = kSession, .input = input.view(), .output = output.view()};
    Set(kCumulative);
  }
  void Set(const std::vector<int32_t>& values) {
    cumulative = Integers(values);
    call.cumulative_lengths = cumulative.view();
  }
};

struct RefusedCase {
  std::function<void(PackedFixture&)> spoil;
  const char* text;
};

const std::vector<RefusedCase>& RefusedCases() {
  using F = PackedFixture;
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  constexpr int32_t kLeast = std::numeric_limits<int32_t>::min();
  const auto lengths = [](std::vector<int32_t> values) {
    return [values](F& f) { f.Set(values); };
  };
  const auto input = [](const Shape& shape) {
    return [shape](F& f) { f.call.input.shape = shape; };
  };
  static const std::vector<RefusedCase> cases = {
      {lengths({1, 8, 16, 24}), "cumulative_lengths[0]: is 1; it must be 0"},
      {lengths({-1, 7, 16, 24}), "cumulative_lengths[0]: is -1; it must be 0"},
      {lengths({0, 8, 5, 13, 16, 24}), "cumulative_lengths[2]: is 5; it must be in 9..16"},
      {lengths({0, 8, 8, 16, 24}), "cumulative_lengths[2]: is 8; it must be in 9..16"},
      {lengths({0, 0, 8, 16, 24}), "cumulative_lengths[1]: is 0; it must be in 1..8"},
      {lengths({0, 9, 16, 24}), "cumulative_lengths[1]: is 9; it must be in 1..8"},
      {lengths({0, 8, 16, kMost}), "cumulative_lengths[3]: is 2147483647; it must be in 17..24"},
      {lengths({0, kMost, kLeast, 24}), "cumulative_lengths[1]: is 2147483647"},
      {lengths({0, 8, kLeast, 24}), "cumulative_lengths[2]: is -2147483648"},
      {lengths({0, 8, 16, 23}), "cumulative_lengths[3]: is 23; the last must be 24"},
      {lengths({0, 8, 16}), "cumulative_lengths[2]: is 16; the last must be 24"},
      {lengths({0, 8, 16, 24, 25}), "cumulative_lengths[4]: is 25; the last must be 24"},
      {lengths({0}), "cumulative_lengths.shape: is [1]; it must be [n + 1]"},
      {lengths(std::vector<int32_t>(26, 0)),
       "cumulative_lengths.shape: is [26]; it must be [n + 1] with n, the number of sequences, in "
       "1..24"},
      {[](F& f) {
         f.call.cumulative_lengths.shape = Shape{1, 6};
       },
       "cumulative_lengths.shape: is [1, 6]"},
      {[](F& f) { f.call.cumulative_lengths.dtype = DType::kF32; },
       "cumulative_lengths.dtype: is fp32; it must be int32"},
      {[](F& f) { f.call.cumulative_lengths.data = f.cumulative.bytes.data() + 1; },
       "cumulative_lengths: begins at an address that is no multiple of 4"},
      {input({3, 8, 16}), "input.shape: is [3, 8, 16]; with cumulative_lengths it must be [T, 16]"},
      {input({25, 16}), "T in 1..24, batch_size * max_seq_length"},
      {input({0, 16}), "T in 1..24"},
      {input({48, 8}), "[T, 16]"},
      {input({384}), "[T, 16]"},
      {[](F& f) { f.call.cumulative_lengths = {}; },
       "input.shape: is [24, 16]; it must be [B, S, 16]"},
      {[](F& f) {
         f.other = Zeros(DType::kF32, {3, 8});
         f.call.mask = f.other.view();
       },
       "mask, lengths, cumulative_lengths: more than one is given"},
      {[](F& f) {
         f.other = Integers({8, 8, 8});
         f.call.lengths = f.other.view();
       },
       "mask, lengths, cumulative_lengths: more than one is given"},
      {[](F& f) { f.call.output = f.call.input; }, "output: overlaps input"},
      {[](F& f) {
         std::memcpy(f.output.bytes.data() + 64, f.cumulative.bytes.data(), 24);
         f.call.cumulative_lengths.data = f.output.bytes.data() + 64;
       },
       "output: overlaps cumulative_lengths"},
      {[](F& f) {
         f.call.output.shape = Shape{23, 16};
       },
       "output.slice.size_bytes: is 1472; the result has 1536 bytes"},
  };
  return cases;
}

class PackedValidation : public ::testing::TestWithParam<bool> {};

TEST_P(PackedValidation, EachRefusalNamesTheIndexAndChangesNothing) {
  Rig rig({.host_memory = GetParam()});
  rig.Create("s", TinyConfig());
  const std::string before = rig.Snapshot("s");
  const int64_t ops = rig.backend().ops;
  for (const RefusedCase& c : RefusedCases()) {
    SCOPED_TRACE(c.text);
    for (const bool training : {true, false}) {
      PackedFixture f;
      f.call.training = training;
      c.spoil(f);
      EXPECT_THAT(rig.engine().Forward(f.call, {}).status(), IsStatus(kInvalid, c.text));
    }
  }
  EXPECT_EQ(rig.backend().ops, ops) << "a refused call ran something";
  EXPECT_EQ(rig.Snapshot("s"), before);
  PackedFixture good;
  EXPECT_OK(rig.engine().Forward(good.call, {}).status());
}

INSTANTIATE_TEST_SUITE_P(HostMemory, PackedValidation, ::testing::Bool(),
                         [](const auto& test) { return test.param ? "direct" : "staged"; });

TEST(Packed, TheSmallestAndTheMostSequences) {
  Rig rig;
  rig.Create("s", TinyConfig());
  PackedFixture f;
  f.call.output = {};
  std::vector<int32_t> ones(kTokens + 1);
  for (size_t i = 0; i < ones.size(); ++i) ones[i] = static_cast<int32_t>(i);
  f.Set(ones);
  EXPECT_OK(rig.engine().Forward(f.call, {}).status());
  f.call.input.shape = Shape{1, 16};
  f.Set({0, 1});
  EXPECT_EQ(Value(rig.engine().Forward(f.call, {})).inline_output.size(), 64u);
}

TEST(Packed, BackwardTakesTheForwardsShape) {
  Rig rig;
  rig.Create("s", TinyConfig());
  PackedFixture f;
  const std::string id = Value(rig.engine().Forward(f.call, {})).context_id;
  OwnedTensor grad = Noise(2, DType::kF32, {3, 8, 16});
  BackwardCall call{
      .stack = "s", .session = kSession, .context_id = id, .output_grad = grad.view()};
  EXPECT_THAT(rig.engine().Backward(call, {}).status(),
              IsStatus(kInvalid, "output_grad.shape: is [3, 8, 16]; it must be [24, 16]"));
  call.output_grad.shape = Shape{kTokens, 16};
  EXPECT_OK(rig.engine().Backward(call, {}).status());
}

TEST(Packed, ContextsRunOutAndComeBack) {
  Rig rig;
  rig.Create("s", TinyConfig());  // two contexts of 24 tokens
  PackedFixture f;
  const std::string id = Value(rig.engine().Forward(f.call, {})).context_id;
  EXPECT_OK(rig.engine().Forward(f.call, {}).status());
  const std::string before = rig.Snapshot("s");
  EXPECT_THAT(rig.engine().Forward(f.call, {}).status(), IsStatus(kExhausted, "bytes"));
  EXPECT_EQ(rig.Snapshot("s"), before);
  EXPECT_OK(rig.engine().ReleaseContext("s", kSession, id, {}));
  EXPECT_OK(rig.engine().Forward(f.call, {}).status());
}

TEST(Packed, IsCountedBySequencesAndTokens) {
  Rig rig;
  rig.Create("s", TinyConfig());
  PackedFixture f;
  const std::string id = Value(rig.engine().Forward(f.call, {})).context_id;
  OwnedTensor grad = Noise(2, DType::kF32, {kTokens, 16});
  Value(rig.engine().Backward(
      {.stack = "s", .session = kSession, .context_id = id, .output_grad = grad.view()}, {}));
  const double flops = Stack::ForwardFlops(TinyConfig(), 2, kTokens, kSumOfSquares);
  for (const auto& [direction, times] : {std::pair("forward_training", 1), {"backward", 2}}) {
    const std::string labels = std::string("{direction=\"") + direction + "\"}";
    EXPECT_EQ(rig.Metric("lamina_samples_total" + labels), 5);
    EXPECT_EQ(rig.Metric(
                  absl::StrCat("lamina_tokens_total{direction=\"", direction, "\",kind=\"real\"}")),
              24);
    EXPECT_NEAR(rig.Metric("lamina_flops_total" + labels), times * flops, 1);
  }
  EXPECT_EQ(rig.Metric("lamina_tensor_bytes_total{role=\"input\",transport=\"memfd\"}"),
            2 * 1536 + 6 * 4);
}

}  // namespace
}  // namespace lamina::testing
