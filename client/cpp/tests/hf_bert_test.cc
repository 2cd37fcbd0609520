#include "cli/hf_bert.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using Json = nlohmann::json;

Json BertConfig() {
  return {{"model_type", "bert"},
          {"hidden_size", 8},
          {"num_attention_heads", 2},
          {"num_hidden_layers", 2},
          {"intermediate_size", 12}};
}

TEST(HfBertConfig, TellsTheStacksFields) {
  Json config = BertConfig();
  config.update({{"hidden_act", "gelu_new"},
                 {"layer_norm_eps", 1e-5},
                 {"attention_probs_dropout_prob", 0.2},
                 {"hidden_dropout_prob", 0.3},
                 {"initializer_range", 0.04},
                 {"max_position_embeddings", 20},
                 {"vocab_size", 99}});
  EXPECT_EQ(StackFieldsFromHfBert(config).value(), Json::parse(R"({
    "hidden_size": 8, "heads": 2, "num_hidden_layers": 2, "intermediate_size": 12,
    "layer_norm_eps": 1e-5, "attn_dropout_ratio": 0.2, "hidden_dropout_ratio": 0.3,
    "initializer_range": 0.04, "gelu": "tanh", "pre_layer_norm": false, "batch_size": 8,
    "max_seq_length": 20})"));
}

TEST(HfBertConfig, TakesBertsDefaults) {
  const Json fields = StackFieldsFromHfBert(BertConfig()).value();
  EXPECT_EQ(fields["layer_norm_eps"], 1e-12);
  EXPECT_EQ(fields["attn_dropout_ratio"], 0.1);
  EXPECT_EQ(fields["gelu"], "erf");
  EXPECT_EQ(fields["max_seq_length"], 512);
}

TEST(HfBertConfig, RefusesWithTheField) {
  const auto error = [](const char* key, const Json& value) {
    Json config = BertConfig();
    config[key] = value;
    return std::string(StackFieldsFromHfBert(config).status().message());
  };
  EXPECT_THAT(error("hidden_act", "relu"), AllOf(HasSubstr("\"relu\""), HasSubstr("gelu_new")));
  EXPECT_THAT(error("hidden_act", 3), HasSubstr("a string"));
  EXPECT_THAT(error("model_type", "deberta"), HasSubstr("\"deberta\""));
  EXPECT_THAT(error("position_embedding_type", "relative_key"), HasSubstr("absolute"));
  EXPECT_THAT(error("add_cross_attention", true), HasSubstr("cross"));
  EXPECT_THAT(error("hidden_size", nullptr), HasSubstr("'hidden_size' is missing"));
  EXPECT_THAT(error("hidden_size", "8"), HasSubstr("an integer"));
  EXPECT_THAT(error("hidden_size", -8), HasSubstr("[1, "));
  EXPECT_THAT(error("num_hidden_layers", 1'000'000'000), HasSubstr("[1, 1024]"));
  EXPECT_THAT(error("layer_norm_eps", "small"), HasSubstr("a number"));
}

TEST(HfBertConfig, WhatIsWrittenIsReadAsTheSame) {
  client::StackConfig config{.batch_size = 8, .max_seq_length = 33, .hidden_size = 8};
  config.intermediate_size = 12;
  config.heads = 2;
  config.num_hidden_layers = 2;
  config.layer_norm_eps = 1e-5;
  config.gelu = client::Gelu::kTanh;
  EXPECT_TRUE(CheckSameEncoder(HfBertFromStack(config), config).ok());
  const Json written = HfBertFromStack(config);
  config.heads = 4;
  config.gelu = client::Gelu::kErf;
  EXPECT_THAT(std::string(CheckSameEncoder(written, config).message()),
              AllOf(HasSubstr("heads 2, the stack's is 4"), HasSubstr("gelu"),
                    Not(HasSubstr("hidden_size"))));
}

class HfBertFolder : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = absl::StrCat(::testing::TempDir(), "lamina_hf_bert_test_", getpid());
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directory(folder_);
    config_.hidden_size = 8;
    config_.intermediate_size = 12;
    config_.heads = 2;
    config_.num_hidden_layers = 2;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::vector<NewSafetensorsTensor> Encoder(const std::string& prefix) const {
    std::vector<NewSafetensorsTensor> tensors;
    for (int i = 0; i < 2; ++i) {
      for (const HfBertTensor& tensor : HfBertLayer(config_)) {
        tensors.push_back({.name = prefix + "layer." + std::to_string(i) + "." + tensor.name,
                           .shape = tensor.shape});
      }
    }
    return tensors;
  }
  void Write(const char* name, const std::vector<NewSafetensorsTensor>& tensors) const {
    size_t bytes = 0;
    for (const NewSafetensorsTensor& tensor : tensors) {
      size_t size = client::SizeOf(tensor.dtype);
      for (const int64_t extent : tensor.shape) size *= static_cast<size_t>(extent);
      bytes += size;
    }
    WriteText(name, SafetensorsStart(tensors, {}) + std::string(bytes, '\0'));
  }
  void WriteText(const char* name, const std::string& text) const {
    std::ofstream(folder_ / name, std::ios::binary) << text;
  }
  std::string OpenError() const {
    return std::string(HfBertFiles::Open(folder_).status().message());
  }

  std::filesystem::path folder_;
  client::StackConfig config_;
};

TEST_F(HfBertFolder, FindsTheModelFile) {
  EXPECT_THAT(OpenError(), HasSubstr("no model.safetensors"));
  Write("a.safetensors", Encoder("encoder."));
  EXPECT_TRUE(HfBertFiles::Open(folder_).ok());
  EXPECT_TRUE(HfBertFiles::Open(folder_.string() + "/").ok());
  EXPECT_TRUE(HfBertFiles::Open(folder_ / "a.safetensors").ok());
  Write("b.safetensors", {});
  EXPECT_THAT(OpenError(), HasSubstr("a.safetensors, b.safetensors"));
  Write("model.safetensors", Encoder("bert.encoder."));
  const HfBertFiles files = HfBertFiles::Open(folder_).value();
  EXPECT_EQ(HfBertPrefix(files, "").value(), "bert.encoder.");
  EXPECT_EQ(files.config_path(), folder_ / "config.json");
}

TEST_F(HfBertFolder, ChoosesAmongEncoders) {
  std::vector<NewSafetensorsTensor> both = Encoder("query.encoder.");
  for (NewSafetensorsTensor& tensor : Encoder("passage.encoder.")) {
    both.push_back(std::move(tensor));
  }
  Write("model.safetensors", both);
  const HfBertFiles files = HfBertFiles::Open(folder_).value();
  EXPECT_THAT(std::string(HfBertPrefix(files, "").status().message()),
              AllOf(HasSubstr("--prefix"), HasSubstr("'passage.encoder.', 'query.encoder.'")));
  EXPECT_EQ(HfBertPrefix(files, "query.encoder.").value(), "query.encoder.");
  EXPECT_THAT(std::string(HfBertPrefix(files, "bert.").status().message()),
              HasSubstr("begins with 'bert.layer.'"));
  EXPECT_EQ(MatchHfBert(files, "query.encoder.", config_)->size(), 32u);
  Write("model.safetensors", {{.name = "pooler.dense.bias", .shape = {8}}});
  EXPECT_THAT(std::string(HfBertPrefix(*HfBertFiles::Open(folder_), "").status().message()),
              HasSubstr("has no tensor of an encoder"));
}

TEST_F(HfBertFolder, TakesOldNorms) {
  std::vector<NewSafetensorsTensor> tensors = Encoder("encoder.");
  tensors[8].name = "encoder.layer.0.attention.output.LayerNorm.gamma";
  tensors[9].name = "encoder.layer.0.attention.output.LayerNorm.beta";
  Write("model.safetensors", tensors);
  const HfBertFiles files = HfBertFiles::Open(folder_).value();
  const auto matches = MatchHfBert(files, "encoder.", config_);
  ASSERT_TRUE(matches.ok()) << matches.status();
  EXPECT_EQ((*matches)[8].parameter, "layers.0.attn_nw");
  EXPECT_EQ((*matches)[9].parameter, "layers.0.attn_nb");
}

TEST_F(HfBertFolder, ListsAllThatIsWrong) {
  std::vector<NewSafetensorsTensor> tensors = Encoder("encoder.");
  tensors[0].name = "encoder.layer.0.attention.self.query.wait";
  tensors[3].shape = {9};
  tensors[20].dtype = client::DType::kInt32;
  tensors[31].name = "encoder.layer.2.output.LayerNorm.bias";
  tensors.push_back({.name = "encoder.layer.1.output.LayerNorm.gamma", .shape = {8}});
  tensors.push_back({.name = "encoder.layers_of_no_concern", .shape = {1}});
  Write("model.safetensors", tensors);
  const HfBertFiles files = HfBertFiles::Open(folder_).value();
  const auto matches = MatchHfBert(files, "encoder.", config_);
  EXPECT_EQ(matches.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(
      std::string(matches.status().message()),
      AllOf(HasSubstr("7 tensors do not fit 2 layers"),
            HasSubstr("missing: 'encoder.layer.0.attention.self.query.weight' [8, 8]"),
            HasSubstr("not of these layers: 'encoder.layer.0.attention.self.query.wait' [8, 8]"),
            HasSubstr("wrong shape: 'encoder.layer.0.attention.self.key.bias' is [9], expected"),
            HasSubstr("wrong elements: 'encoder.layer.1.attention.self.value.weight' is I32"),
            HasSubstr("missing: 'encoder.layer.1.output.LayerNorm.bias'"),
            HasSubstr("not of these layers: 'encoder.layer.2.output.LayerNorm.bias'"),
            HasSubstr("not of these layers: 'encoder.layer.1.output.LayerNorm.gamma'"),
            Not(HasSubstr("concern"))));
}

TEST_F(HfBertFolder, ReadsShards) {
  std::vector<NewSafetensorsTensor> all = Encoder("encoder.");
  const std::vector<NewSafetensorsTensor> first(all.begin(), all.begin() + 10);
  const std::vector<NewSafetensorsTensor> second(all.begin() + 10, all.end());
  Write("m-1.safetensors", first);
  Write("m-2.safetensors", second);
  Json map = Json::object();
  for (const auto& tensor : first) map[tensor.name] = "m-1.safetensors";
  for (const auto& tensor : second) map[tensor.name] = "m-2.safetensors";
  const auto index = [&](const Json& weight_map) {
    WriteText("model.safetensors.index.json", Json{{"weight_map", weight_map}}.dump());
  };
  index(map);
  const auto files = HfBertFiles::Open(folder_);
  ASSERT_TRUE(files.ok()) << files.status();
  EXPECT_EQ(files->files().size(), 2u);
  EXPECT_EQ(MatchHfBert(*files, "encoder.", config_)->size(), 32u);

  Json changed = map;
  changed[first[0].name] = "m-2.safetensors";
  index(changed);
  EXPECT_THAT(OpenError(), HasSubstr("is not in 'm-2.safetensors'"));
  for (const char* path : {"../m-1.safetensors", "/etc/x.safetensors", "passwd", ""}) {
    changed[first[0].name] = path;
    index(changed);
    EXPECT_THAT(OpenError(), HasSubstr("beside it")) << path;
  }
  changed[first[0].name] = 3;
  index(changed);
  EXPECT_THAT(OpenError(), HasSubstr("beside it"));
  changed[first[0].name] = "m-3.safetensors";
  index(changed);
  EXPECT_THAT(OpenError(), HasSubstr("No such file"));
  Write("m-3.safetensors", {first[0]});
  index(changed);
  EXPECT_THAT(OpenError(), HasSubstr("and in"));  // m-1 has it too
  WriteText("model.safetensors.index.json", "{\"weight_map\": {}}");
  EXPECT_THAT(OpenError(), HasSubstr("weight_map"));
  WriteText("model.safetensors.index.json", "nonsense");
  EXPECT_THAT(OpenError(), HasSubstr("not a JSON object"));
}

}  // namespace
}  // namespace lamina::cli
