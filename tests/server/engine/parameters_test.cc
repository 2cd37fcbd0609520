#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "engine_rig.h"

namespace lamina::testing {
namespace {

class ParametersTest : public ::testing::TestWithParam<DType> {
 protected:
  ParametersTest() { rig_.Create("s", TinyConfig(GetParam())); }
  std::vector<char> Read(const std::vector<std::string>& names, DType dtype) {
    size_t bytes = 0;
    for (const ParameterRead& read :
         Value(rig_.engine().DescribeParameters("s", names, dtype, false)))
      bytes += static_cast<size_t>(read.info.shape.elements()) * SizeOf(read.dtype);
    std::vector<char> values(bytes);
    EXPECT_OK(
        rig_.engine().ReadParameters("s", names, dtype, false, values.data(), values.size(), {}));
    return values;
  }
  absl::Status Write(const std::vector<ParameterValue>& values) {
    return rig_.engine().WriteParameters("s", values, {});
  }
  Rig rig_;
};

TEST_P(ParametersTest, AreDescribedInOrderAndByName) {
  const auto all = Value(rig_.engine().DescribeParameters("s", {}, DType::kF32, false));
  ASSERT_EQ(all.size(), 24u);
  EXPECT_EQ(all[0].info.name, "layers.0.attn_qkvw");
  EXPECT_EQ(all[0].info.shape, (Shape{48, 16}));
  EXPECT_EQ(all[23].info.name, "layers.1.norm_b");
  const auto some = Value(rig_.engine().DescribeParameters(
      "s", {"layers.1.attn_kb", "layers.0.inter_w"}, DType::kF32, true));
  ASSERT_EQ(some.size(), 2u);
  EXPECT_EQ(some[0].info.shape, Shape{16});
  EXPECT_EQ(some[1].info.shape, (Shape{32, 16}));
}

TEST_P(ParametersTest, WriteThenReadGivesTheSame) {
  OwnedTensor matrix = Noise(1, DType::kF32, {16, 32});
  OwnedTensor bias = Noise(2, GetParam(), {48});
  ASSERT_OK(Write({{"layers.1.output_w", matrix.view()}, {"layers.0.attn_qkvb", bias.view()}}));
  EXPECT_EQ(Read({"layers.1.output_w"}, DType::kF32), matrix.bytes);
  EXPECT_EQ(Read({"layers.0.attn_qkvb"}, GetParam()), bias.bytes);
  // The parts of the fused one, and several in one read.
  const size_t third = bias.bytes.size() / 3;
  EXPECT_EQ(Read({"layers.0.attn_kb"}, GetParam()),
            std::vector<char>(bias.bytes.begin() + static_cast<std::ptrdiff_t>(third),
                              bias.bytes.begin() + static_cast<std::ptrdiff_t>(2 * third)));
  EXPECT_EQ(Read({"layers.0.attn_qb", "layers.0.attn_kb", "layers.0.attn_vb"}, GetParam()),
            bias.bytes);
  OwnedTensor key = Noise(3, DType::kF32, {16, 16});
  ASSERT_OK(Write({{"layers.0.attn_kw", key.view()}}));
  EXPECT_EQ(Read({"layers.0.attn_kw"}, DType::kF32), key.bytes);
  EXPECT_EQ(rig_.Metric("lamina_tensor_bytes_total{role=\"input\",transport=\"memfd\"}"),
            static_cast<double>(matrix.bytes.size() + bias.bytes.size() + key.bytes.size()));
}

TEST_P(ParametersTest, AreWrittenAllOrNone) {
  const std::string before = rig_.Snapshot("s");
  OwnedTensor good = Noise(1, DType::kF32, {16});
  OwnedTensor bad = Noise(1, DType::kF32, {17});
  OwnedTensor integers = Zeros(DType::kI32, {16});
  const ParameterValue first{"layers.0.norm_w", good.view()};
  EXPECT_THAT(Write({first, {"layers.0.norm_b", bad.view()}}),
              IsStatus(kInvalid, "tensors[1].tensor.shape: is [17]; it must be [16]"));
  EXPECT_THAT(Write({first, {"layers.0.norm_b", integers.view()}}),
              IsStatus(kInvalid, "tensors[1].tensor.dtype: is int32; it must be fp32"));
  EXPECT_THAT(Write({first, {"layers.2.norm_b", good.view()}}),
              IsStatus(kNotFound, "tensors[1].name: no parameter \"layers.2.norm_b\""));
  EXPECT_THAT(Write({first, {"layers.0.norm_b", {}}}),
              IsStatus(kInvalid, "tensors[1].tensor: is missing"));
  EXPECT_THAT(Write({first, first}), IsStatus(kInvalid, "\"layers.0.norm_w\" is given twice"));
  EXPECT_THAT(rig_.engine().WriteParameters("none", {first}, {}), IsStatus(kNotFound, "none"));
  EXPECT_EQ(rig_.Snapshot("s"), before);
  EXPECT_OK(Write({first}));
  EXPECT_NE(rig_.Snapshot("s"), before);
}

TEST_P(ParametersTest, ReadsAreChecked) {
  std::vector<char> buffer(16 * 4);
  Engine& engine = rig_.engine();
  const std::vector<std::string> one = {"layers.0.norm_w"};
  EXPECT_THAT(engine.ReadParameters("s", one, DType::kF32, false, buffer.data(), 60, {}),
              IsStatus(kInvalid, "is 60; the tensors have 64 bytes"));
  EXPECT_THAT(engine.ReadParameters("s", {"norm_w"}, DType::kF32, false, buffer.data(), 64, {}),
              IsStatus(kNotFound, "\"norm_w\""));
  EXPECT_THAT(engine.DescribeParameters("s", one, DType::kI32, false).status(),
              IsStatus(kInvalid, "dtype: is int32"));
  EXPECT_THAT(engine.DescribeParameters("none", one, DType::kF32, false).status(),
              IsStatus(kNotFound, "none"));
  const DType other = GetParam() == DType::kBF16 ? DType::kF16 : DType::kBF16;
  EXPECT_THAT(engine.DescribeParameters("s", one, other, false).status(),
              IsStatus(kInvalid, "it must be fp32"));
  if (GetParam() != DType::kF32) {
    EXPECT_THAT(engine.DescribeParameters("s", one, GetParam(), true).status(),
                IsStatus(kInvalid, "gradients are fp32"));
  }
  EXPECT_OK(engine.UpdateStack("s", {.training = false}, {}).status());
  EXPECT_THAT(engine.DescribeParameters("s", one, DType::kF32, true).status(),
              IsStatus(kPrecondition, "training is off"));
}

TEST_P(ParametersTest, GradientsAreWhatBackwardLeft) {
  std::vector<float> before(16), after(16);
  Engine& engine = rig_.engine();
  ASSERT_OK(
      engine.ReadParameters("s", {"layers.1.norm_b"}, DType::kF32, true, before.data(), 64, {}));
  for (const float v : before) EXPECT_EQ(v, 0);
  rig_.ForwardBackward("s", 1, 5);
  ASSERT_OK(
      engine.ReadParameters("s", {"layers.1.norm_b"}, DType::kF32, true, after.data(), 64, {}));
  double sum = 0;
  for (const float v : after) sum += std::abs(v);
  EXPECT_GT(sum, 0);
  EXPECT_OK(engine.ZeroGradients("s", {}));
  ASSERT_OK(
      engine.ReadParameters("s", {"layers.1.norm_b"}, DType::kF32, true, after.data(), 64, {}));
  EXPECT_EQ(after, before);
}

INSTANTIATE_TEST_SUITE_P(DTypes, ParametersTest,
                         ::testing::Values(DType::kF32, DType::kBF16, DType::kF16),
                         [](const auto& test) { return Name(test.param); });

}  // namespace
}  // namespace lamina::testing
