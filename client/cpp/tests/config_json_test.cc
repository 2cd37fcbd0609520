#include "cli/config_json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using Json = nlohmann::json;

std::string Error(const char* text) {
  return std::string(ConfigFromJson(Json::parse(text)).status().message());
}

TEST(ConfigJson, EveryFieldSurvives) {
  client::StackConfig config;
  config.batch_size = 3;
  config.max_seq_length = 51;
  config.hidden_size = 1024;
  config.intermediate_size = 77;
  config.heads = 16;
  config.num_hidden_layers = 24;
  config.attn_dropout_ratio = 0.1;
  config.hidden_dropout_ratio = 0.2;
  config.initializer_range = 0.03;
  config.layer_norm_eps = 1e-6;
  config.local_rank = 1;
  config.seed = int64_t{1} << 60;
  config.fp16 = true;
  config.dtype = client::DType::kFloat16;
  config.pre_layer_norm = false;
  config.normalize_invertible = true;
  config.gelu_checkpoint = true;
  config.attn_dropout_checkpoint = true;
  config.stochastic_mode = true;
  config.adjust_init_range = false;
  config.training = false;
  config.gelu = client::Gelu::kTanh;
  config.max_contexts = 9;
  config.activation_checkpointing = true;
  config.causal = true;
  config.dynamic_loss_scale = true;
  config.initial_loss_scale = 1024;
  config.loss_scale_growth_interval = 10;
  config.loss_scale_growth_factor = 4;
  config.loss_scale_backoff_factor = 0.25;
  config.loss_scale_hysteresis = 3;
  config.min_loss_scale = 2;
  const Json json = ToJson(config);
  EXPECT_EQ(json.size(), 32u);
  const auto back = ConfigFromJson(json);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(ToJson(*back), json);
  // Every value above differs from the default, so a field that is not read would show.
  const Json defaults = ToJson(client::StackConfig());
  for (const auto& [key, value] : json.items()) EXPECT_NE(defaults[key], value) << key;
}

TEST(ConfigJson, MissingAndNullTakeDefaults) {
  const auto config = ConfigFromJson(Json::parse(R"({"heads": 4, "seed": null})"));
  ASSERT_TRUE(config.ok());
  EXPECT_EQ(config->heads, 4);
  EXPECT_EQ(config->seed, -1);
  EXPECT_TRUE(config->pre_layer_norm);
}

TEST(ConfigJson, RefusesWithTheField) {
  EXPECT_THAT(Error(R"({"hiden_size": 4})"),
              AllOf(HasSubstr("hiden_size"), HasSubstr("hidden_size")));
  EXPECT_THAT(Error(R"({"heads": "4"})"),
              AllOf(HasSubstr("'heads' is \"4\""), HasSubstr("integer")));
  EXPECT_THAT(Error(R"({"heads": 4.5})"), HasSubstr("integer"));
  EXPECT_THAT(Error(R"({"seed": 18446744073709551615})"), HasSubstr("64 bits"));
  EXPECT_THAT(Error(R"({"local_rank": 4294967296})"), HasSubstr("32 bits"));
  EXPECT_THAT(Error(R"({"training": 1})"), HasSubstr("true or false"));
  EXPECT_THAT(Error(R"({"dtype": "fp8"})"), HasSubstr("bf16"));
  EXPECT_THAT(Error(R"({"dtype": "int32"})"), HasSubstr("bf16"));
  EXPECT_THAT(Error(R"({"gelu": true})"), HasSubstr("erf"));
  EXPECT_THAT(Error("[1]"), HasSubstr("not a JSON object"));
}

TEST(ConfigJson, FileErrorsNameTheFile) {
  EXPECT_THAT(std::string(ReadConfigFile("/nowhere/c.json").status().message()),
              AllOf(HasSubstr("/nowhere/c.json"), HasSubstr("No such file")));
}

}  // namespace
}  // namespace lamina::cli
