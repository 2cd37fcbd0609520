#include "lamina/transformer/config.h"

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "rig.h"

namespace lamina::testing {
namespace {

using absl::StatusCode;

TEST(Resolve, FillsInWhatIsLeftOpen) {
  StackConfig config = SmallConfig();
  config.intermediate_size = -1;
  config.seed = -1;
  const StackConfig a = Value(Resolve(config, 0));
  const StackConfig b = Value(Resolve(config, 0));
  EXPECT_EQ(a.intermediate_size, 96);
  EXPECT_GE(a.seed, 0);
  EXPECT_NE(a.seed, b.seed) << "two draws of 63 bits";
  EXPECT_EQ(a.dtype, DType::kF32);
  EXPECT_FALSE(a.fp16);
}

TEST(Resolve, KeepsWhatIsGiven) {
  const StackConfig config = Value(Resolve(SmallConfig(), 0));
  EXPECT_EQ(config.intermediate_size, 40);
  EXPECT_EQ(config.seed, 11);
}

TEST(Resolve, Fp16NamesTheDtype) {
  StackConfig config = SmallConfig();
  config.fp16 = true;
  EXPECT_EQ(Value(Resolve(config, 0)).dtype, DType::kF16);
  config.fp16 = false;
  config.dtype = DType::kF16;
  EXPECT_TRUE(Value(Resolve(config, 0)).fp16);
  config.dtype = DType::kBF16;
  EXPECT_FALSE(Value(Resolve(config, 0)).fp16);
  config.fp16 = true;
  EXPECT_THAT(Resolve(config, 0).status(), IsStatus(StatusCode::kInvalidArgument, "fp16"));
}

TEST(Resolve, LocalRankMustBeTheDevice) {
  StackConfig config = SmallConfig();
  config.local_rank = 2;
  EXPECT_OK(Resolve(config, 2).status());
  EXPECT_THAT(Resolve(config, 0).status(),
              IsStatus(StatusCode::kInvalidArgument, "local_rank is 2; it must be -1 or 0"));
}

TEST(Resolve, IsIdempotent) {
  StackConfig config = SmallConfig();
  config.intermediate_size = -1;
  config.fp16 = true;
  config.seed = -1;
  const StackConfig once = Value(Resolve(config, 0));
  EXPECT_EQ(ToJson(Value(Resolve(once, 0))), ToJson(once));
}

struct BadField {
  const char* message;  // must be part of the error
  std::function<void(StackConfig&)> spoil;
};

TEST(Resolve, RefusesEveryBadFieldByNameValueAndRange) {
  const std::vector<BadField> cases = {
      {"batch_size is 0; it must be in [1, 65536]", [](auto& c) { c.batch_size = 0; }},
      {"batch_size is 65537;", [](auto& c) { c.batch_size = 65537; }},
      {"max_seq_length is 0; it must be in [1, 8192]", [](auto& c) { c.max_seq_length = 0; }},
      {"max_seq_length is 8193;", [](auto& c) { c.max_seq_length = 8193; }},
      {"hidden_size is -24; it must be in [1, 65536]", [](auto& c) { c.hidden_size = -24; }},
      {"hidden_size is 65538;", [](auto& c) { c.hidden_size = 65538; }},
      {"hidden_size is 25; it must be divisible by heads, which is 3",
       [](auto& c) { c.hidden_size = 25; }},
      {"intermediate_size is 0; it must be in [1, 262144]",
       [](auto& c) { c.intermediate_size = 0; }},
      {"intermediate_size is -2;", [](auto& c) { c.intermediate_size = -2; }},
      {"intermediate_size is 262145;", [](auto& c) { c.intermediate_size = 262145; }},
      {"heads is 0; it must be in [1, 24]", [](auto& c) { c.heads = 0; }},
      {"heads is 25;", [](auto& c) { c.heads = 25; }},
      {"num_hidden_layers is 0; it must be in [1, 1024]", [](auto& c) { c.num_hidden_layers = 0; }},
      {"num_hidden_layers is 1025;", [](auto& c) { c.num_hidden_layers = 1025; }},
      {"attn_dropout_ratio is 1; it must be in [0, 1)",
       [](auto& c) { c.attn_dropout_ratio = 1.0; }},
      {"attn_dropout_ratio is -0.1;", [](auto& c) { c.attn_dropout_ratio = -0.1; }},
      {"attn_dropout_ratio is nan;", [](auto& c) { c.attn_dropout_ratio = kNaN; }},
      // Rounds to 1 in fp32.
      {"attn_dropout_ratio is", [](auto& c) { c.attn_dropout_ratio = 1.0 - 1e-12; }},
      {"hidden_dropout_ratio is 1.5; it must be in [0, 1)",
       [](auto& c) { c.hidden_dropout_ratio = 1.5; }},
      {"hidden_dropout_ratio is nan;", [](auto& c) { c.hidden_dropout_ratio = kNaN; }},
      {"initializer_range is -0.02; it must be finite and >= 0",
       [](auto& c) { c.initializer_range = -0.02; }},
      {"initializer_range is nan;", [](auto& c) { c.initializer_range = kNaN; }},
      {"initializer_range is inf;", [](auto& c) { c.initializer_range = kInf; }},
      {"layer_norm_eps is 0; it must be finite and >=", [](auto& c) { c.layer_norm_eps = 0; }},
      {"layer_norm_eps is 1e-50;", [](auto& c) { c.layer_norm_eps = 1e-50; }},
      {"layer_norm_eps is nan;", [](auto& c) { c.layer_norm_eps = kNaN; }},
      {"layer_norm_eps is inf;", [](auto& c) { c.layer_norm_eps = kInf; }},
      {"local_rank is -2;", [](auto& c) { c.local_rank = -2; }},
      {"seed is -2; it must be >= 0", [](auto& c) { c.seed = -2; }},
      {"dtype is int32; it must be fp32, bf16 or fp16", [](auto& c) { c.dtype = DType::kI32; }},
      {"gelu is 0; it must be erf (1) or tanh (2)",
       [](auto& c) { c.gelu = static_cast<GeluKind>(0); }},
      {"initial_loss_scale is 3; it must be a power of two in [1 (min_loss_scale), 16777216]",
       [](auto& c) { c.initial_loss_scale = 3; }},
      {"initial_loss_scale is 0.5; it must be a power of two in [1 (min_loss_scale)",
       [](auto& c) { c.initial_loss_scale = 0.5; }},
      {"initial_loss_scale is 3.35544e+07;", [](auto& c) { c.initial_loss_scale = 0x1p25; }},
      {"initial_loss_scale is nan;", [](auto& c) { c.initial_loss_scale = kNaN; }},
      {"initial_loss_scale is inf;", [](auto& c) { c.initial_loss_scale = kInf; }},
      {"min_loss_scale is 0; it must be in [1.17549e-38, 16777216]",
       [](auto& c) { c.min_loss_scale = 0; }},
      {"min_loss_scale is nan;", [](auto& c) { c.min_loss_scale = kNaN; }},
      {"loss_scale_growth_interval is 0; it must be in [1,",
       [](auto& c) { c.loss_scale_growth_interval = 0; }},
      {"loss_scale_growth_factor is 1; it must be in (1, 16777216]",
       [](auto& c) { c.loss_scale_growth_factor = 1; }},
      {"loss_scale_growth_factor is nan;", [](auto& c) { c.loss_scale_growth_factor = kNaN; }},
      {"loss_scale_backoff_factor is 1; it must be in (0, 1)",
       [](auto& c) { c.loss_scale_backoff_factor = 1; }},
      {"loss_scale_backoff_factor is 0;", [](auto& c) { c.loss_scale_backoff_factor = 0; }},
      {"loss_scale_backoff_factor is nan;", [](auto& c) { c.loss_scale_backoff_factor = kNaN; }},
      {"loss_scale_hysteresis is 0; it must be in [1,",
       [](auto& c) { c.loss_scale_hysteresis = 0; }},
      {"max_contexts is 0; it must be in [1, 1024]", [](auto& c) { c.max_contexts = 0; }},
      {"max_contexts is 1025;", [](auto& c) { c.max_contexts = 1025; }},
  };
  for (const BadField& bad : cases) {
    StackConfig config = SmallConfig();
    bad.spoil(config);
    EXPECT_THAT(Resolve(config, 0).status(), IsStatus(StatusCode::kInvalidArgument, bad.message));
  }
}

TEST(Resolve, AcceptsTheEdges) {
  for (const auto& edge : std::vector<std::function<void(StackConfig&)>>{
           [](auto& c) { c.batch_size = 65536; }, [](auto& c) { c.max_seq_length = 8192; },
           [](auto& c) { c.heads = 24; }, [](auto& c) { c.num_hidden_layers = 1024; },
           [](auto& c) { c.attn_dropout_ratio = 0.9999; },
           [](auto& c) { c.initializer_range = 0.0; }, [](auto& c) { c.seed = 0; },
           [](auto& c) { c.seed = std::numeric_limits<int64_t>::max(); },
           [](auto& c) { c.local_rank = 0; }, [](auto& c) { c.max_contexts = 1024; },
           [](auto& c) { c.initial_loss_scale = 1; },
           [](auto& c) { c.initial_loss_scale = 0x1p24; },
           [](auto& c) { c.min_loss_scale = 65536; },
           [](auto& c) { c.loss_scale_hysteresis = 1; }}) {
    StackConfig config = SmallConfig();
    edge(config);
    EXPECT_OK(Resolve(config, 0).status());
  }
}

TEST(Resolve, TakesEveryFlag) {
  for (const auto flag :
       {&StackConfig::normalize_invertible, &StackConfig::gelu_checkpoint,
        &StackConfig::attn_dropout_checkpoint, &StackConfig::activation_checkpointing,
        &StackConfig::stochastic_mode, &StackConfig::causal, &StackConfig::dynamic_loss_scale}) {
    StackConfig config = SmallConfig();
    config.*flag = true;
    EXPECT_TRUE(Value(Resolve(config, 0)).*flag);
  }
}

TEST(ConfigJson, RoundTripsEveryField) {
  StackConfig config;
  config.batch_size = 2;
  config.max_seq_length = 3;
  config.hidden_size = 4;
  config.intermediate_size = 5;
  config.heads = 6;
  config.num_hidden_layers = 7;
  config.attn_dropout_ratio = 0.1;
  config.hidden_dropout_ratio = 0.3;
  config.initializer_range = 0.017;
  config.layer_norm_eps = 1e-7;
  config.local_rank = 8;
  config.seed = std::numeric_limits<int64_t>::max();
  config.fp16 = true;
  config.dtype = DType::kF16;
  config.pre_layer_norm = false;
  config.normalize_invertible = true;
  config.gelu_checkpoint = true;
  config.attn_dropout_checkpoint = true;
  config.activation_checkpointing = true;
  config.stochastic_mode = true;
  config.adjust_init_range = false;
  config.training = false;
  config.causal = true;
  config.gelu = GeluKind::kTanh;
  config.dynamic_loss_scale = true;
  config.initial_loss_scale = 128;
  config.loss_scale_growth_interval = 10;
  config.loss_scale_growth_factor = 3;
  config.loss_scale_backoff_factor = 0.25;
  config.loss_scale_hysteresis = 4;
  config.min_loss_scale = 0.125;
  config.max_contexts = 9;
  const StackConfig back = Value(StackConfigFromJson(ToJson(config)));
  EXPECT_EQ(back.batch_size, 2);
  EXPECT_EQ(back.max_seq_length, 3);
  EXPECT_EQ(back.hidden_size, 4);
  EXPECT_EQ(back.intermediate_size, 5);
  EXPECT_EQ(back.heads, 6);
  EXPECT_EQ(back.num_hidden_layers, 7);
  EXPECT_EQ(back.attn_dropout_ratio, 0.1);
  EXPECT_EQ(back.hidden_dropout_ratio, 0.3);
  EXPECT_EQ(back.initializer_range, 0.017);
  EXPECT_EQ(back.layer_norm_eps, 1e-7);
  EXPECT_EQ(back.local_rank, 8);
  EXPECT_EQ(back.seed, config.seed);
  EXPECT_TRUE(back.fp16);
  EXPECT_EQ(back.dtype, DType::kF16);
  EXPECT_FALSE(back.pre_layer_norm);
  EXPECT_TRUE(back.normalize_invertible);
  EXPECT_TRUE(back.gelu_checkpoint);
  EXPECT_TRUE(back.attn_dropout_checkpoint);
  EXPECT_TRUE(back.activation_checkpointing);
  EXPECT_TRUE(back.stochastic_mode);
  EXPECT_FALSE(back.adjust_init_range);
  EXPECT_FALSE(back.training);
  EXPECT_TRUE(back.causal);
  EXPECT_TRUE(back.dynamic_loss_scale);
  EXPECT_EQ(back.initial_loss_scale, 128);
  EXPECT_EQ(back.loss_scale_growth_interval, 10);
  EXPECT_EQ(back.loss_scale_growth_factor, 3);
  EXPECT_EQ(back.loss_scale_backoff_factor, 0.25);
  EXPECT_EQ(back.loss_scale_hysteresis, 4);
  EXPECT_EQ(back.min_loss_scale, 0.125);
  EXPECT_EQ(back.gelu, GeluKind::kTanh);
  EXPECT_EQ(back.max_contexts, 9);
  EXPECT_EQ(ToJson(back), ToJson(config));
}

TEST(ConfigJson, MissingFieldsTakeTheirDefaults) {
  EXPECT_EQ(ToJson(Value(StackConfigFromJson("{}"))), ToJson(StackConfig{}));
  const StackConfig config = Value(StackConfigFromJson(R"({"heads": 5, "layer_norm_eps": 1})"));
  EXPECT_EQ(config.heads, 5);
  EXPECT_EQ(config.layer_norm_eps, 1.0);
}

TEST(ConfigJson, SaysWhatIsWrong) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "not valid JSON"},
      {"{", "not valid JSON"},
      {"[]", "must be a JSON object"},
      {"null", "must be a JSON object"},
      {R"({"head": 3})", "unknown field \"head\""},
      {R"({"heads": 3.5})", "heads is 3.5; it must be an integer"},
      {R"({"heads": "3"})", "heads is \"3\"; it must be an integer"},
      {R"({"seed": 9223372036854775808})", "seed is 9223372036854775808; it must be an integer"},
      {R"({"local_rank": 4294967296})", "local_rank is 4294967296; it must be an integer of 32"},
      {R"({"layer_norm_eps": null})", "layer_norm_eps is null; it must be a number"},
      {R"({"fp16": 1})", "fp16 is 1; it must be true or false"},
      {R"({"dtype": "fp64"})", "dtype is \"fp64\"; it must be \"fp32\", \"bf16\" or \"fp16\""},
      {R"({"dtype": 1})", "dtype is 1; it must be"},
      {R"({"gelu": "relu"})", "gelu is \"relu\"; it must be \"erf\" or \"tanh\""},
  };
  for (const auto& [json, message] : cases)
    EXPECT_THAT(StackConfigFromJson(json).status(), IsStatus(StatusCode::kInvalidArgument, message))
        << json;
}

}  // namespace
}  // namespace lamina::testing
