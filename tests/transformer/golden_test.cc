// Layer and stack against PyTorch's fp64 results. The bound is FlashAttention's rule: our largest
// error against fp64 is within twice (gradients: three times) the largest error of PyTorch in the
// same precision, on the same inputs; plus one rounding of the stored result, for the cases in
// which PyTorch happened to round its last step exactly.
#include <algorithm>
#include <string>
#include <tuple>

#include "golden_file.h"
#include "rig.h"

namespace lamina::testing {
namespace {

constexpr const char* kCases[] = {
    "small-1-pre-erf-mask",    "small-1-pre-tanh-mask",    "small-2-pre-erf-lengths",
    "small-2-pre-tanh-none",   "wide-1-pre-erf-lengths",   "small-1-post-erf-mask",
    "small-1-post-tanh-mask",  "small-2-post-erf-lengths", "small-2-post-tanh-none",
    "wide-1-post-erf-lengths",
};

class GoldenTest : public ::testing::TestWithParam<std::tuple<const char*, DType, const char*>> {};

int64_t Int(const GoldenFile& file, const char* key) { return std::stoll(file.metadata.at(key)); }

TEST_P(GoldenTest, WithinASmallMultipleOfPyTorchsOwnError) {
  const auto& [device, dtype, name] = GetParam();
  std::string reason;
  const std::unique_ptr<Backend> backend = OpenDevice(device, &reason);
  if (backend == nullptr) GTEST_SKIP() << reason;
  const GoldenFile golden = ReadGolden(name);

  StackConfig config;
  // Larger than the call, as any call may be smaller than what was configured.
  config.batch_size = Int(golden, "batch") + 1;
  config.max_seq_length = Int(golden, "seq") + 2;
  config.hidden_size = Int(golden, "hidden");
  config.heads = Int(golden, "heads");
  config.intermediate_size = Int(golden, "inter");
  config.num_hidden_layers = Int(golden, "layers");
  config.pre_layer_norm = golden.metadata.at("pre") == "true";
  config.gelu = golden.metadata.at("gelu") == "tanh" ? GeluKind::kTanh : GeluKind::kErf;
  config.dtype = dtype;
  config.max_contexts = 1;
  config = Value(Resolve(config, backend->info().ordinal));
  const std::unique_ptr<Stack> stack = Value(Stack::Create(*backend, config));
  const GoldenFile weights = ReadGolden("weights-" + golden.metadata.at("set"));
  for (const ParameterInfo& p : stack->parameters())
    WriteFloats(*stack, p.name, ParameterPart::kMaster, weights.tensors.at(p.name).floats);

  CallData data{.batch = Int(golden, "batch"),
                .seq = Int(golden, "seq"),
                .input = golden.tensors.at("input").floats,
                .output_grad = golden.tensors.at("output_grad").floats};
  if (golden.tensors.count("mask") > 0) data.mask = golden.tensors.at("mask").floats;
  if (golden.tensors.count("lengths") > 0) data.lengths = golden.tensors.at("lengths").ints;
  const LayerRange all{0, config.num_hidden_layers};
  const std::vector<float> eval = RunEval(*backend, *stack, data, all);
  const CallResult result = RunTraining(*backend, *stack, data, all);

  const auto expect_near = [&](const std::string& tensor, const std::vector<float>& got,
                               double multiple, DType stored) {
    const std::vector<float>& truth = golden.tensors.at(tensor).floats;
    const std::string key = std::string("error.") + Name(dtype) + "." + tensor;
    const double torch_error = std::stod(golden.metadata.at(key));
    const double bound = multiple * torch_error + UnitRoundoff(stored) * MaxAbs(truth);
    EXPECT_LE(MaxAbsDifference(got, truth), bound)
        << tensor << ": PyTorch's error is " << torch_error << ", the largest value "
        << MaxAbs(truth);
  };
  expect_near("output", eval, 2, dtype);
  expect_near("output", result.output, 2, dtype);
  expect_near("input_grad", result.input_grad, 3, dtype);
  for (const ParameterInfo& p : stack->parameters())
    expect_near("grad." + p.name, ReadFloats(*stack, p.name, ParameterPart::kGradient), 3, dtype);
}

INSTANTIATE_TEST_SUITE_P(, GoldenTest,
                         ::testing::Combine(::testing::ValuesIn(kDevices),
                                            ::testing::Values(DType::kF32, DType::kBF16,
                                                              DType::kF16),
                                            ::testing::ValuesIn(kCases)),
                         [](const auto& test) {
                           std::string name = std::string(std::get<0>(test.param)) + "_" +
                                              Name(std::get<1>(test.param)) + "_" +
                                              std::get<2>(test.param);
                           for (char& c : name)
                             if (c == '-' || c == ':') c = '_';
                           return name;
                         });

}  // namespace
}  // namespace lamina::testing
