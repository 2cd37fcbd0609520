// PlanCapacity against the plans that it stands for. Needs no device.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "lamina/transformer/plan.h"
#include "rig.h"

namespace lamina::testing {
namespace {

using absl::StatusCode;

class CapacityTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override { sizes_ = Value(OpSizes::Of(GetParam(), 2)); }
  std::unique_ptr<const OpSizes> sizes_;
};

StackConfig Model() {
  StackConfig config;
  config.batch_size = 1;
  config.max_seq_length = 1;
  config.hidden_size = 256;
  config.heads = 4;
  config.num_hidden_layers = 6;
  config.dtype = DType::kBF16;
  config.seed = 1;
  return config;
}

size_t TotalOf(const OpSizes& sizes, int64_t seq, int64_t batch,
               const std::vector<std::string>& flags) {
  StackConfig config = Model();
  config.batch_size = batch;
  config.max_seq_length = seq;
  config.max_contexts = 1;
  for (const std::string& flag : flags) {
    if (flag == "gelu_checkpoint") config.gelu_checkpoint = true;
    if (flag == "normalize_invertible") config.normalize_invertible = true;
    if (flag == "activation_checkpointing") config.activation_checkpointing = true;
  }
  return Value(PlanStack(Value(Resolve(config, 0)), sizes)).Total();
}

TEST_P(CapacityTest, EveryRowEndsWhereItsFlagsEnd) {
  const size_t memory = TotalOf(*sizes_, 128, 40, {});
  const std::vector<CapacityRow> rows =
      Value(PlanCapacity(Model(), *sizes_, memory, {512, 128, 512}));
  ASSERT_FALSE(rows.empty());
  int64_t seq = 128, next = 1;
  for (const CapacityRow& row : rows) {
    if (row.seq != seq) {
      EXPECT_EQ(row.seq, 512) << "by seq, each once";
      seq = row.seq;
      next = 1;
    }
    EXPECT_EQ(row.batch_from, next) << "no gap, no overlap";
    EXPECT_GE(row.batch_to, row.batch_from);
    next = row.batch_to + 1;
    EXPECT_EQ(row.bytes, TotalOf(*sizes_, row.seq, row.batch_to, row.flags));
    EXPECT_LE(row.bytes, memory);
    EXPECT_GT(TotalOf(*sizes_, row.seq, row.batch_to + 1, row.flags), memory);
  }
  EXPECT_EQ(seq, 512);
  EXPECT_TRUE(rows[0].flags.empty()) << "the first needs none";
  EXPECT_EQ(rows[0].batch_to, 40);
  // The last one of each seq is out of memory with every flag.
  std::vector<std::string> all = {"gelu_checkpoint", "activation_checkpointing"};
  EXPECT_EQ(rows.back().flags, all);
  all.push_back("normalize_invertible");
  EXPECT_GT(TotalOf(*sizes_, 512, rows.back().batch_to + 1, all), memory);
}

TEST_P(CapacityTest, RowsComeInTheOrderOfTheirCost) {
  const std::vector<CapacityRow> rows =
      Value(PlanCapacity(Model(), *sizes_, TotalOf(*sizes_, 128, 2000, {}), {128}));
  std::vector<std::vector<std::string>> flags;
  for (const CapacityRow& row : rows) flags.push_back(row.flags);
  // Pre-LN: gelu_checkpoint drops 4 H of activations a token and layer; normalize_invertible two
  // numbers, and H a token in all, which is some samples more here.
  const std::vector<std::vector<std::string>> expected = {
      {},
      {"gelu_checkpoint"},
      {"gelu_checkpoint", "normalize_invertible"},
      {"activation_checkpointing"},
      {"gelu_checkpoint", "activation_checkpointing"},
  };
  EXPECT_EQ(flags, expected);
}

TEST_P(CapacityTest, MoreMemoryNeverHoldsLess) {
  int64_t before = 0;
  for (size_t memory = size_t{64} << 20; memory <= size_t{1} << 30; memory *= 2) {
    const auto rows = Value(PlanCapacity(Model(), *sizes_, memory, {128}));
    const int64_t most = rows.empty() ? 0 : rows.back().batch_to;
    EXPECT_GE(most, before);
    before = most;
  }
  EXPECT_GT(before, 0);
}

TEST_P(CapacityTest, TheConfigsOwnFlagsAndBatchAreIgnored) {
  const size_t memory = TotalOf(*sizes_, 128, 20, {});
  StackConfig config = Model();
  config.batch_size = 0;
  config.max_seq_length = -3;
  config.max_contexts = 7;
  config.gelu_checkpoint = config.normalize_invertible = config.activation_checkpointing = true;
  const auto a = Value(PlanCapacity(config, *sizes_, memory, {128}));
  const auto b = Value(PlanCapacity(Model(), *sizes_, memory, {128}));
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].flags, b[i].flags);
    EXPECT_EQ(a[i].batch_to, b[i].batch_to);
    EXPECT_EQ(a[i].bytes, b[i].bytes);
  }
}

TEST_P(CapacityTest, Edges) {
  EXPECT_TRUE(Value(PlanCapacity(Model(), *sizes_, 1024, {128})).empty()) << "not even batch 1";
  EXPECT_TRUE(Value(PlanCapacity(Model(), *sizes_, size_t{1} << 30, {})).empty());
  EXPECT_THAT(PlanCapacity(Model(), *sizes_, size_t{1} << 30, {128, 0}).status(),
              IsStatus(StatusCode::kInvalidArgument, "max_seq_length is 0"));
  StackConfig bad = Model();
  bad.heads = 3;
  EXPECT_THAT(PlanCapacity(bad, *sizes_, size_t{1} << 30, {128}).status(),
              IsStatus(StatusCode::kInvalidArgument, "divisible by heads"));
  // Evaluation keeps no activations: no flag helps.
  StackConfig evaluation = Model();
  evaluation.training = false;
  const auto rows = Value(PlanCapacity(evaluation, *sizes_, size_t{1} << 28, {128}));
  ASSERT_EQ(rows.size(), 1u);
  EXPECT_TRUE(rows[0].flags.empty());
  // All the memory there could be: the largest batch that a config may have.
  EXPECT_EQ(Value(PlanCapacity(Model(), *sizes_, size_t{1} << 60, {16})).back().batch_to,
            StackConfig::kMaxBatchSize);
}

INSTANTIATE_TEST_SUITE_P(, CapacityTest, ::testing::Values("cpu", "cuda"),
                         [](const auto& instance) { return std::string(instance.param); });

}  // namespace
}  // namespace lamina::testing
