#include "cli/offline_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "cli/config_json.h"
#include "lamina/transformer/config.h"
#include "lamina/transformer/plan.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

client::StackConfig Model(const std::string& name) {
  return ConfigFromJson(ModelFields(name).value()).value();
}

TEST(OfflinePlan, BothLibrariesWriteTheSameConfig) {
  // Nothing of a config may get lost between the two: the keys and the defaults are the same.
  EXPECT_EQ(ToJson(client::StackConfig()),
            nlohmann::json::parse(lamina::ToJson(lamina::StackConfig())));
}

TEST(OfflinePlan, KindsKeepTheirNames) {
  for (int kind = 0; kind < kMemoryKinds; ++kind) {
    EXPECT_STREQ(Name(static_cast<lamina::MemoryKind>(kind)),
                 client::Name(static_cast<client::MemoryKind>(kind + 1)));
  }
}

TEST(OfflinePlan, CountsWeightsAndOptimizer) {
  client::StackConfig config = Model("bert-large");
  config.batch_size = 4;
  config.max_seq_length = 128;
  config.dtype = client::DType::kBFloat16;
  const client::MemoryPlan plan = PlanOffline(config, "cuda").value();
  const uint64_t parameters = uint64_t{24} * (12 * 1024 * 1024 + 13 * 1024);
  // Padding is a few bytes a tensor.
  const auto is_about = [](uint64_t bytes) {
    return AllOf(::testing::Ge(bytes), ::testing::Lt(bytes + bytes / 1000));
  };
  EXPECT_THAT(plan.Bytes(client::MemoryKind::kWeights), is_about(2 * parameters));
  EXPECT_THAT(plan.Bytes(client::MemoryKind::kMasterWeights), is_about(4 * parameters));
  EXPECT_THAT(plan.Bytes(client::MemoryKind::kGradients), is_about(4 * parameters));
  EXPECT_THAT(plan.Bytes(client::MemoryKind::kOptimizer), is_about(8 * parameters));
  EXPECT_GT(plan.Bytes(client::MemoryKind::kActivations), 0u);
  uint64_t sum = 0;
  for (const client::MemoryPlanEntry& entry : plan.entries) sum += entry.bytes;
  EXPECT_EQ(sum, plan.total_bytes);
}

TEST(OfflinePlan, Refuses) {
  EXPECT_THAT(std::string(ModelFields("bert-huge").status().message()),
              AllOf(HasSubstr("'bert-huge'"), HasSubstr("bert-large")));
  client::StackConfig config = Model("bert-base");
  EXPECT_THAT(std::string(PlanOffline(config, "cuda").status().message()), HasSubstr("batch_size"));
  config.batch_size = config.max_seq_length = 8;
  EXPECT_THAT(std::string(PlanOffline(config, "tpu").status().message()), HasSubstr("tpu"));
  EXPECT_THAT(std::string(CapacityOffline(config, "cuda", 1 << 30, {9000}).status().message()),
              HasSubstr("max_seq_length"));
  EXPECT_TRUE(CapacityOffline(config, "cuda", 1, {128})->empty());
}

}  // namespace
}  // namespace lamina::cli
