// Names, shapes, host copies and initial values of the parameters.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "rig.h"

namespace lamina::testing {
namespace {

using absl::StatusCode;

class ParametersTest : public DeviceTest {
 protected:
  std::unique_ptr<Stack> Make(StackConfig config) {
    return Value(Stack::Create(*backend_, Value(Resolve(config, backend_->info().ordinal))));
  }
};

TEST_P(ParametersTest, AreDeepSpeedsInItsOrder) {
  const std::unique_ptr<Stack> stack = Make(SmallConfig());
  const std::pair<const char*, Shape> expected[] = {
      {"attn_qkvw", {72, 24}}, {"attn_qkvb", {72}}, {"attn_ow", {24, 24}}, {"attn_ob", {24}},
      {"attn_nw", {24}},       {"attn_nb", {24}},   {"inter_w", {40, 24}}, {"inter_b", {40}},
      {"output_w", {24, 40}},  {"output_b", {24}},  {"norm_w", {24}},      {"norm_b", {24}},
  };
  ASSERT_EQ(stack->parameters().size(), 24u);
  for (size_t layer = 0; layer < 2; ++layer) {
    for (size_t kind = 0; kind < 12; ++kind) {
      const ParameterInfo& info = stack->parameters()[layer * 12 + kind];
      EXPECT_EQ(info.name, "layers." + std::to_string(layer) + "." + expected[kind].first);
      EXPECT_EQ(info.shape, expected[kind].second) << info.name;
      EXPECT_EQ(Value(stack->FindParameter(info.name)).shape, info.shape);
    }
  }
  EXPECT_EQ(Value(stack->FindParameter("layers.1.attn_kw")).shape, (Shape{24, 24}));
  EXPECT_EQ(Value(stack->FindParameter("layers.1.attn_vb")).shape, (Shape{24}));
}

TEST_P(ParametersTest, UnknownNamesSayWhatExists) {
  const std::unique_ptr<Stack> stack = Make(SmallConfig());
  for (const char* name :
       {"", "layers", "layers.0", "layers.0.", "layers.0.attn", "layers.2.attn_ow",
        "layers.-1.attn_ow", "layers.00.attn_ow", "layers.+1.attn_ow", "layers. 1.attn_ow",
        "layers.0.attn_ow.x", "layer.0.attn_ow", "layers.99999999999999999999.attn_ow"}) {
    const absl::Status status = stack->FindParameter(name).status();
    EXPECT_THAT(status, IsStatus(StatusCode::kNotFound, "layers.<0 to 1>")) << name;
    EXPECT_THAT(status, IsStatus(StatusCode::kNotFound, "attn_qkvw")) << name;
    float value = 0;
    EXPECT_EQ(stack->ReadParameter(name, ParameterPart::kMaster, &value, 4).code(),
              StatusCode::kNotFound);
    EXPECT_EQ(stack->WriteParameter(name, ParameterPart::kMaster, &value, 4).code(),
              StatusCode::kNotFound);
  }
}

TEST_P(ParametersTest, QueryKeyValueAreRowsOfTheFusedOnes) {
  const std::unique_ptr<Stack> stack = Make(SmallConfig());
  const std::string layer = "layers.1.";
  const char* weights[] = {"attn_qw", "attn_kw", "attn_vw"};
  const char* biases[] = {"attn_qb", "attn_kb", "attn_vb"};
  for (ParameterPart part : {ParameterPart::kMaster, ParameterPart::kGradient,
                             ParameterPart::kMoment1, ParameterPart::kMoment2}) {
    std::vector<float> expected_w, expected_b;
    for (size_t third = 0; third < 3; ++third) {
      const std::vector<float> w = Noise(10 + third, 24 * 24), b = Noise(20 + third, 24);
      WriteFloats(*stack, layer + weights[third], part, w);
      WriteFloats(*stack, layer + biases[third], part, b);
      EXPECT_EQ(ReadFloats(*stack, layer + weights[third], part), w);
      expected_w.insert(expected_w.end(), w.begin(), w.end());
      expected_b.insert(expected_b.end(), b.begin(), b.end());
    }
    EXPECT_EQ(ReadFloats(*stack, layer + "attn_qkvw", part), expected_w);
    EXPECT_EQ(ReadFloats(*stack, layer + "attn_qkvb", part), expected_b);
  }
}

TEST_P(ParametersTest, EveryPartOfEveryParameterHasItsOwnPlace) {
  const std::unique_ptr<Stack> stack = Make(SmallConfig());
  uint64_t seed = 0;
  const ParameterPart parts[] = {ParameterPart::kMaster, ParameterPart::kGradient,
                                 ParameterPart::kMoment1, ParameterPart::kMoment2};
  for (ParameterPart part : parts)
    for (const ParameterInfo& p : stack->parameters())
      WriteFloats(*stack, p.name, part, Noise(++seed, p.shape.elements()));
  seed = 0;
  for (ParameterPart part : parts)
    for (const ParameterInfo& p : stack->parameters())
      EXPECT_EQ(ReadFloats(*stack, p.name, part), Noise(++seed, p.shape.elements())) << p.name;
}

TEST_P(ParametersTest, MasterAndWeightsFollowEachOther) {
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    StackConfig config = SmallConfig();
    config.dtype = dtype;
    const std::unique_ptr<Stack> stack = Make(config);
    const std::string name = "layers.1.attn_kb";
    const size_t bytes = Value(stack->ParameterBytes(name, ParameterPart::kWeights));
    EXPECT_EQ(bytes, 48u);
    EXPECT_EQ(Value(stack->ParameterBytes(name, ParameterPart::kMaster)), 96u);

    const std::vector<float> master = Noise(5, 24);
    WriteFloats(*stack, name, ParameterPart::kMaster, master);
    EXPECT_EQ(ReadFloats(*stack, name, ParameterPart::kMaster), master) << "not rounded";
    std::vector<uint16_t> weights(24);
    ASSERT_OK(stack->ReadParameter(name, ParameterPart::kWeights, weights.data(), bytes));
    const DeviceTensor rounded(*backend_, dtype, {24}, master);
    const std::vector<uint8_t> rounded_bytes = rounded.Bytes();
    EXPECT_EQ(std::memcmp(weights.data(), rounded_bytes.data(), bytes), 0);

    ASSERT_OK(stack->WriteParameter(name, ParameterPart::kWeights, weights.data(), bytes));
    EXPECT_EQ(ReadFloats(*stack, name, ParameterPart::kMaster), rounded.Floats());
  }
}

TEST_P(ParametersTest, SizesMustBeExact) {
  const std::unique_ptr<Stack> stack = Make(SmallConfig());
  float values[25] = {};
  for (size_t bytes : {size_t{0}, size_t{92}, size_t{100}}) {
    EXPECT_THAT(stack->ReadParameter("layers.0.attn_ob", ParameterPart::kMaster, values, bytes),
                IsStatus(StatusCode::kInvalidArgument, "the parameter has 96"));
    EXPECT_THAT(stack->WriteParameter("layers.0.attn_ob", ParameterPart::kMaster, values, bytes),
                IsStatus(StatusCode::kInvalidArgument, "the parameter has 96"));
  }
}

// --- initial values ---

// A config whose matrices have enough elements for statistics.
StackConfig WideConfig() {
  StackConfig config = SmallConfig();
  config.hidden_size = 192;
  config.heads = 4;
  config.intermediate_size = 512;
  config.initializer_range = 0.02;
  config.seed = 3;
  return config;
}

TEST_P(ParametersTest, StartNormalZeroAndOne) {
  const StackConfig config = WideConfig();
  const std::unique_ptr<Stack> stack = Make(config);
  for (const ParameterInfo& p : stack->parameters()) {
    const std::vector<float> values = ReadFloats(*stack, p.name, ParameterPart::kMaster);
    if (p.shape.rank() == 1) {
      const std::string kind = p.name.substr(p.name.rfind('.') + 1);
      const float expected = kind == "attn_nw" || kind == "norm_w" ? 1.0f : 0.0f;
      for (float v : values) ASSERT_EQ(v, expected) << p.name;
      continue;
    }
    const bool output =
        p.name.find("attn_ow") != std::string::npos || p.name.find("output_w") != std::string::npos;
    const double deviation = output ? 0.02 / std::sqrt(2.0 * 2.0) : 0.02;
    double sum = 0, squares = 0, fourth = 0;
    int64_t within = 0;
    for (float v : values) {
      const double z = v / deviation;
      sum += z;
      squares += z * z;
      fourth += z * z * z * z;
      within += std::abs(z) < 1.0;
    }
    // Each statistic within five of its own standard deviations: the chance that an honest draw
    // fails one of the 32 is below 2e-5.
    const double n = static_cast<double>(values.size());
    EXPECT_NEAR(sum / n, 0.0, 5 / std::sqrt(n)) << p.name;
    EXPECT_NEAR(squares / n, 1.0, 5 * std::sqrt(2 / n)) << p.name;
    EXPECT_NEAR(fourth / n, 3.0, 5 * std::sqrt(96 / n)) << p.name;
    const double inside = 0.682689492137;
    EXPECT_NEAR(static_cast<double>(within) / n, inside, 5 * std::sqrt(inside * (1 - inside) / n))
        << p.name;
  }
}

TEST_P(ParametersTest, AdjustInitRangeCanBeOff) {
  StackConfig config = WideConfig();
  const std::unique_ptr<Stack> on = Make(config);
  config.adjust_init_range = false;
  const std::unique_ptr<Stack> off = Make(config);
  const std::string name = "layers.1.output_w";
  const std::vector<float> a = ReadFloats(*on, name, ParameterPart::kMaster);
  const std::vector<float> b = ReadFloats(*off, name, ParameterPart::kMaster);
  for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(b[i], 2 * a[i], 1e-8) << i;
  EXPECT_EQ(ReadFloats(*on, "layers.1.inter_w", ParameterPart::kMaster),
            ReadFloats(*off, "layers.1.inter_w", ParameterPart::kMaster));
}

TEST_P(ParametersTest, StartDependsOnSeedAndParameterAlone) {
  const auto a = ReadAll(*Make(WideConfig()), ParameterPart::kMaster);
  EXPECT_EQ(ReadAll(*Make(WideConfig()), ParameterPart::kMaster), a);
  StackConfig other_seed = WideConfig();
  other_seed.seed = 4;
  const auto b = ReadAll(*Make(other_seed), ParameterPart::kMaster);
  EXPECT_NE(b.at("layers.0.inter_w"), a.at("layers.0.inter_w"));
  EXPECT_NE(a.at("layers.0.inter_w"), a.at("layers.1.inter_w"));

  // The CPU's are the reference for every other backend.
  std::string reason;
  const std::unique_ptr<Backend> cpu = OpenDevice("cpu", &reason);
  ASSERT_NE(cpu, nullptr) << reason;
  const std::unique_ptr<Stack> there = Value(Stack::Create(*cpu, Value(Resolve(WideConfig(), 0))));
  EXPECT_EQ(ReadAll(*there, ParameterPart::kMaster), a);
}

TEST_P(ParametersTest, HalfWeightsStartAsTheRoundedMasters) {
  StackConfig config = WideConfig();
  const auto fp32 = ReadAll(*Make(config), ParameterPart::kMaster);
  config.dtype = DType::kBF16;
  const std::unique_ptr<Stack> stack = Make(config);
  EXPECT_EQ(ReadAll(*stack, ParameterPart::kMaster), fp32);
  const std::string name = "layers.1.inter_w";
  std::vector<uint8_t> weights(Value(stack->ParameterBytes(name, ParameterPart::kWeights)));
  ASSERT_OK(stack->ReadParameter(name, ParameterPart::kWeights, weights.data(), weights.size()));
  EXPECT_EQ(weights, DeviceTensor(*backend_, DType::kBF16, {512, 192}, fp32.at(name)).Bytes());
}

TEST_P(ParametersTest, ZeroRangeMeansZeroMatrices) {
  StackConfig config = SmallConfig();
  config.initializer_range = 0;
  EXPECT_EQ(MaxAbs(ReadFloats(*Make(config), "layers.0.inter_w", ParameterPart::kMaster)), 0.0);
}

INSTANTIATE_TEST_SUITE_P(, ParametersTest, ::testing::ValuesIn(kDevices), DeviceName);

}  // namespace
}  // namespace lamina::testing
