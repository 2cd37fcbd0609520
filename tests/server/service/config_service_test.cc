// ConfigService: stacks, plans, parameters and checkpoints, and each status that the contract
// lists.
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>

#include "absl/strings/str_cat.h"
#include "tests/server/service/service_rig.h"

namespace lamina::testing {
namespace {

class ConfigServiceTest : public ::testing::Test {
 protected:
  v1::CreateStackRequest CreateRequest(const std::string& name = "s") {
    v1::CreateStackRequest request;
    request.set_name(name);
    *request.mutable_config() = TinyProto();
    return request;
  }
  v1::GetParametersRequest GetRequest(std::vector<std::string> names = {}) {
    v1::GetParametersRequest request;
    request.set_stack("s");
    for (std::string& name : names) request.add_names(std::move(name));
    return request;
  }
  int Stacks() { return client.Do(v1::ListStacksRequest()).stacks_size(); }

  Service service;
  Client client{service.address()};
};

TEST_F(ConfigServiceTest, GetServerInfo) {
  const v1::GetServerInfoResponse info = client.Do(v1::GetServerInfoRequest());
  EXPECT_EQ(info.version(), "1.2.3");
  EXPECT_EQ(info.build_commit(), "abc");
  EXPECT_EQ(info.backend(), "cpu");
  EXPECT_EQ(info.inline_cap_bytes(), 1u << 16);
  EXPECT_EQ(info.replay_window(), MutationLog::kReplayWindow);
  EXPECT_TRUE(info.checkpoints_enabled());
  EXPECT_GT(info.device_free_bytes(), 0u);
  EXPECT_GE(info.device_total_bytes(), info.device_free_bytes());
  EXPECT_GE(info.uptime_seconds(), 0);
  ASSERT_EQ(info.transports_size(), 2);
  EXPECT_EQ(info.transports(0), v1::TRANSPORT_INLINE);
  EXPECT_EQ(info.transports(1), v1::TRANSPORT_MEMFD);
}

TEST_F(ConfigServiceTest, CreateStackFillsTheDefaultsIn) {
  v1::CreateStackRequest request;
  request.set_name("s");
  v1::StackConfig& config = *request.mutable_config();
  config.set_batch_size(2);
  config.set_max_seq_length(4);
  config.set_hidden_size(8);
  config.set_heads(2);
  config.set_num_hidden_layers(1);
  const v1::Stack stack = client.Do(request).stack();
  const v1::StackConfig& c = stack.config();
  EXPECT_EQ(c.intermediate_size(), 32);
  EXPECT_EQ(c.initializer_range(), 0.02);
  EXPECT_EQ(c.layer_norm_eps(), 1e-12);
  EXPECT_EQ(c.dtype(), v1::DATA_TYPE_FLOAT32);
  EXPECT_EQ(c.gelu(), v1::GELU_ERF);
  EXPECT_EQ(c.max_contexts(), 2);
  EXPECT_TRUE(c.pre_layer_norm());
  EXPECT_TRUE(c.adjust_init_range());
  EXPECT_TRUE(c.training());
  EXPECT_FALSE(c.fp16());
  EXPECT_FALSE(c.causal());
  EXPECT_FALSE(c.dynamic_loss_scale());
  EXPECT_EQ(c.initial_loss_scale(), 65536);
  EXPECT_EQ(c.loss_scale_growth_interval(), 1000);
  EXPECT_EQ(c.loss_scale_growth_factor(), 2);
  EXPECT_EQ(c.loss_scale_backoff_factor(), 0.5);
  EXPECT_EQ(c.loss_scale_hysteresis(), 2);
  EXPECT_EQ(c.min_loss_scale(), 1);
  EXPECT_EQ(stack.loss_scale(), 1);
  EXPECT_GE(c.seed(), 0) << "drawn, and reported";
  EXPECT_EQ(stack.parameter_count(), 4 * 8 * 8 + 2 * 8 * 32 + 9 * 8 + 32);
  uint64_t sum = 0;
  for (const v1::MemoryPlanEntry& entry : stack.plan().entries()) sum += entry.size_bytes();
  EXPECT_EQ(stack.plan().total_bytes(), sum);
  EXPECT_EQ(client.Describe().SerializeAsString(), stack.SerializeAsString());
}

TEST_F(ConfigServiceTest, EverySettingComesBack) {
  v1::CreateStackRequest request = CreateRequest();
  v1::StackConfig& c = *request.mutable_config();
  c.set_attn_dropout_ratio(0.25);
  c.set_hidden_dropout_ratio(0.125);
  c.set_initializer_range(0.5);
  c.set_layer_norm_eps(1e-5);
  c.set_pre_layer_norm(false);
  c.set_adjust_init_range(false);
  c.set_training(false);
  c.set_dtype(v1::DATA_TYPE_BFLOAT16);
  c.set_gelu(v1::GELU_TANH);
  c.set_max_contexts(5);
  c.set_normalize_invertible(true);
  c.set_gelu_checkpoint(true);
  c.set_attn_dropout_checkpoint(true);
  c.set_activation_checkpointing(true);
  c.set_stochastic_mode(true);
  c.set_causal(true);
  c.set_dynamic_loss_scale(true);
  c.set_initial_loss_scale(512);
  c.set_loss_scale_growth_interval(7);
  c.set_loss_scale_growth_factor(1.5);
  c.set_loss_scale_backoff_factor(0.25);
  c.set_loss_scale_hysteresis(3);
  c.set_min_loss_scale(0.5);
  v1::StackConfig got = client.Do(request).stack().config();
  c.set_local_rank(got.local_rank());
  EXPECT_EQ(got.SerializeAsString(), c.SerializeAsString());
  EXPECT_EQ(client.Describe().loss_scale(), 512);
  request = CreateRequest("h");
  request.mutable_config()->set_fp16(true);
  got = client.Do(request).stack().config();
  EXPECT_EQ(got.dtype(), v1::DATA_TYPE_FLOAT16);
  EXPECT_TRUE(got.fp16());
}

TEST_F(ConfigServiceTest, CreateStackNamesTheFieldAtFault) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  using C = v1::StackConfig;
  const auto refused = [&](const char* field, auto set, auto value) {
    v1::CreateStackRequest request = CreateRequest();
    (request.mutable_config()->*set)(value);
    EXPECT_THAT(client.Send(request), IsStatus(kInvalid, field)) << value;
    v1::PlanMemoryRequest plan;
    *plan.mutable_config() = request.config();
    EXPECT_THAT(client.Send(plan), IsStatus(kInvalid, field)) << value;
  };
  for (const int64_t bad : {int64_t{0}, int64_t{-1}, int64_t{65537}})
    refused("batch_size", &C::set_batch_size, bad);
  for (const int64_t bad : {0, -1, 8193}) refused("max_seq_length", &C::set_max_seq_length, bad);
  for (const int64_t bad : {0, -16, 17}) refused("hidden_size", &C::set_hidden_size, bad);
  for (const int64_t bad : {0, -2}) refused("heads", &C::set_heads, bad);
  refused("hidden_size", &C::set_heads, int64_t{3});
  for (const int64_t bad : {0, -2}) refused("intermediate_size", &C::set_intermediate_size, bad);
  for (const int64_t bad : {0, -1}) refused("num_hidden_layers", &C::set_num_hidden_layers, bad);
  for (const double bad : {1.0, -0.1, nan, 2.0}) {
    refused("attn_dropout_ratio", &C::set_attn_dropout_ratio, bad);
    refused("hidden_dropout_ratio", &C::set_hidden_dropout_ratio, bad);
  }
  for (const double bad : {-1.0, nan}) refused("initializer_range", &C::set_initializer_range, bad);
  for (const double bad : {0.0, -1.0, nan}) refused("layer_norm_eps", &C::set_layer_norm_eps, bad);
  refused("local_rank", &C::set_local_rank, 7);
  refused("seed", &C::set_seed, int64_t{-2});
  for (const int64_t bad : {0, -1, 1025}) refused("max_contexts", &C::set_max_contexts, bad);
  for (const double bad : {0.0, -1.0, nan, 3.0, 0x1p25})
    refused("initial_loss_scale", &C::set_initial_loss_scale, bad);
  refused("loss_scale_growth_interval", &C::set_loss_scale_growth_interval, int64_t{0});
  for (const double bad : {1.0, 0.5, nan})
    refused("loss_scale_growth_factor", &C::set_loss_scale_growth_factor, bad);
  for (const double bad : {0.0, 1.0, nan})
    refused("loss_scale_backoff_factor", &C::set_loss_scale_backoff_factor, bad);
  refused("loss_scale_hysteresis", &C::set_loss_scale_hysteresis, int64_t{0});
  for (const double bad : {0.0, -1.0, nan}) refused("min_loss_scale", &C::set_min_loss_scale, bad);
  refused("dtype", &C::set_dtype, v1::DATA_TYPE_INT32);
  refused("dtype", &C::set_dtype, static_cast<v1::DataType>(42));
  refused("gelu", &C::set_gelu, static_cast<v1::Gelu>(42));
  v1::CreateStackRequest request = CreateRequest();
  request.clear_config();
  EXPECT_EQ(client.Send(request).code(), kInvalid);
  for (const std::string& name : {std::string(), std::string(".x"), std::string("a/b"),
                                  std::string("a b"), std::string(65, 'a'), std::string("a\0", 2)})
    EXPECT_THAT(client.Send(CreateRequest(name)), IsStatus(kInvalid, "name"));
  EXPECT_EQ(Stacks(), 0);
}

TEST_F(ConfigServiceTest, CreateStackRefusesANameThatIsTaken) {
  client.Create();
  EXPECT_THAT(client.Send(CreateRequest()), IsStatus(kExists, "s"));
  EXPECT_EQ(Stacks(), 1);
}

TEST_F(ConfigServiceTest, WhatDoesNotFitIsRefusedWithThePlansNumbers) {
  v1::PlanMemoryRequest plan;
  *plan.mutable_config() = TinyProto();
  const v1::PlanMemoryResponse planned = client.Do(plan);
  EXPECT_TRUE(planned.fits());
  service.backend().free_bytes = planned.plan().total_bytes() - 1;
  const v1::PlanMemoryResponse tight = client.Do(plan);
  EXPECT_FALSE(tight.fits());
  EXPECT_EQ(tight.device_free_bytes(), planned.plan().total_bytes() - 1);
  const size_t live = service.backend().live_bytes;
  const absl::Status refused = client.Send(CreateRequest());
  EXPECT_THAT(refused, IsStatus(kExhausted, absl::StrCat(planned.plan().total_bytes())));
  EXPECT_THAT(refused, IsStatus(kExhausted, absl::StrCat(planned.plan().total_bytes() - 1)));
  EXPECT_EQ(service.backend().live_bytes, live) << "nothing was allocated";
  service.backend().free_bytes = planned.plan().total_bytes();
  EXPECT_EQ(client.Do(CreateRequest()).stack().plan().SerializeAsString(),
            planned.plan().SerializeAsString());
}

TEST_F(ConfigServiceTest, ListGetDelete) {
  client.Create("b");
  client.Create("a");
  const v1::ListStacksResponse list = client.Do(v1::ListStacksRequest());
  ASSERT_EQ(list.stacks_size(), 2);
  EXPECT_EQ(list.stacks(0).name(), "a");
  EXPECT_EQ(list.stacks(1).name(), "b");
  v1::GetStackRequest get;
  get.set_name("a");
  EXPECT_EQ(client.Do(get).parameters_size(), 24);
  EXPECT_EQ(client.Do(get).parameters(0).name(), "layers.0.attn_qkvw");
  v1::DeleteStackRequest remove;
  remove.set_name("a");
  client.Do(remove);
  EXPECT_THAT(client.Send(remove), IsStatus(kNotFound, "a"));
  EXPECT_THAT(client.Send(get), IsStatus(kNotFound, "a"));
  EXPECT_EQ(Stacks(), 1);
}

TEST_F(ConfigServiceTest, UpdateStack) {
  client.Create();
  v1::UpdateStackRequest update;
  update.set_name("s");
  EXPECT_EQ(client.Send(update).code(), kInvalid) << "nothing to change";
  update.set_attn_dropout_ratio(0.5);
  EXPECT_EQ(client.Do(update).stack().config().attn_dropout_ratio(), 0.5);
  EXPECT_EQ(client.Describe().config().hidden_dropout_ratio(), 0);
  for (const double bad : {1.0, -0.5, std::numeric_limits<double>::quiet_NaN()}) {
    update.set_attn_dropout_ratio(bad);
    EXPECT_THAT(client.Send(update), IsStatus(kInvalid, "attn_dropout_ratio"));
  }
  update.Clear();
  update.set_name("s");
  using U = v1::UpdateStackRequest;
  using C = v1::StackConfig;
  const std::vector<std::pair<void (U::*)(bool), bool (C::*)() const>> flags = {
      {&U::set_normalize_invertible, &C::normalize_invertible},
      {&U::set_gelu_checkpoint, &C::gelu_checkpoint},
      {&U::set_attn_dropout_checkpoint, &C::attn_dropout_checkpoint},
      {&U::set_activation_checkpointing, &C::activation_checkpointing},
      {&U::set_stochastic_mode, &C::stochastic_mode}};
  for (const auto& [set, get] : flags)
    for (const bool on : {true, false}) {
      update.Clear();
      update.set_name("s");
      (update.*set)(on);
      const v1::Stack updated = client.Do(update).stack();
      EXPECT_EQ((updated.config().*get)(), on);
      v1::PlanMemoryRequest plan;
      *plan.mutable_config() = updated.config();
      EXPECT_EQ(client.Do(plan).plan().SerializeAsString(), updated.plan().SerializeAsString());
    }
  update.Clear();
  update.set_name("s");
  update.set_training(false);
  const std::string context = client.Train();
  EXPECT_THAT(client.Send(update), IsStatus(kPrecondition, "context"));
  v1::UpdateStackRequest flag;
  flag.set_name("s");
  flag.set_attn_dropout_ratio(0.125);
  flag.set_activation_checkpointing(true);
  const std::string before = client.Describe().SerializeAsString();
  EXPECT_THAT(client.Send(flag), IsStatus(kPrecondition, "context"));
  EXPECT_EQ(client.Describe().SerializeAsString(), before) << "all or none";
  client.Back(context);
  EXPECT_FALSE(client.Do(update).stack().config().training());
  service.backend().free_bytes = 1;
  update.set_training(true);
  EXPECT_EQ(client.Send(update).code(), kExhausted);
  service.backend().free_bytes = CountingBackend::kAsItIs;
  EXPECT_TRUE(client.Do(update).stack().config().training());
  update.set_name("none");
  EXPECT_THAT(client.Send(update), IsStatus(kNotFound, "none"));
}

// --- parameters ---

TEST_F(ConfigServiceTest, ParametersByEveryWay) {
  client.Create();
  const std::vector<std::string> names = {"layers.1.inter_b", "layers.0.attn_qkvw",
                                          "layers.0.attn_kw"};
  const v1::GetParametersResponse plain = client.Do(GetRequest(names));
  ASSERT_EQ(plain.tensors_size(), 3);
  std::string all;
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(plain.tensors(i).name(), names[static_cast<size_t>(i)]);
    all += plain.tensors(i).tensor().inline_data();
  }
  EXPECT_EQ(plain.tensors(2).tensor().inline_data(),
            plain.tensors(1).tensor().inline_data().substr(kH * kH * 4, kH * kH * 4));

  const MappedRegion region = client.Region();
  v1::GetParametersRequest request = GetRequest(names);
  request.set_session_id(client.session_id);
  *request.mutable_target() = TargetOf(region.id, 512, all.size());
  const v1::GetParametersResponse sliced = client.Do(request);
  EXPECT_EQ(std::string(region.data + 512, all.size()), all);
  EXPECT_EQ(sliced.tensors(0).tensor().slice().offset_bytes(), 512u);
  EXPECT_EQ(sliced.tensors(1).tensor().slice().offset_bytes(), 512u + 32 * 4);
  EXPECT_EQ(sliced.tensors(1).tensor().slice().size_bytes(), 3u * kH * kH * 4);
  EXPECT_EQ(sliced.tensors(1).tensor().shape(0), 3 * kH);

  // Written back by slice, the part of a fused one too.
  std::memset(region.data, 0, region.length);
  v1::SetParametersRequest set;
  set.set_stack("s");
  *set.mutable_mutation() = client.Next();
  v1::NamedTensor* tensor = set.add_tensors();
  tensor->set_name("layers.0.attn_kw");
  *tensor->mutable_tensor() = SliceOf(region.id, 1024, kH * kH * 4, {kH, kH});
  client.Do(set);
  client.Took();
  const std::string after = client.Do(GetRequest(names)).tensors(1).tensor().inline_data();
  EXPECT_EQ(after.substr(kH * kH * 4, kH * kH * 4), std::string(kH * kH * 4, '\0'));
  EXPECT_EQ(after.substr(0, kH * kH * 4), all.substr(32 * 4, kH * kH * 4));
}

TEST_F(ConfigServiceTest, TheStreamIsChunkedAndWhole) {
  v1::StackConfig config = TinyProto();
  config.set_hidden_size(320);
  config.set_heads(4);
  client.Create("s", config);
  v1::StreamParametersRequest request;
  request.set_stack("s");
  request.add_names("layers.0.attn_qkvw");
  const auto context = NewContext();
  const auto reader = client.config->StreamParameters(context.get(), request);
  uint64_t offset = 0;
  int chunks = 0;
  for (v1::StreamParametersResponse chunk; reader->Read(&chunk); ++chunks) {
    EXPECT_EQ(chunk.name(), "layers.0.attn_qkvw");
    EXPECT_EQ(chunk.shape(0), 960);
    EXPECT_EQ(chunk.offset_bytes(), offset);
    offset += chunk.data().size();
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(offset, 960u * 320 * 4);
  EXPECT_GT(chunks, 1);
  EXPECT_THAT(client.Send(GetRequest()),
              IsStatus(kInvalid, "passes the cap of 65536; use StreamParameters or a slice"));
}

TEST_F(ConfigServiceTest, ParametersThatAreRefused) {
  client.Create();
  EXPECT_THAT(client.Send(GetRequest({"layers.2.norm_w"})), IsStatus(kNotFound, "layers.2.norm_w"));
  v1::GetParametersRequest get = GetRequest();
  get.set_stack("none");
  EXPECT_THAT(client.Send(get), IsStatus(kNotFound, "none"));
  get = GetRequest();
  for (const v1::DataType bad : {v1::DATA_TYPE_INT32, static_cast<v1::DataType>(9)}) {
    get.set_dtype(bad);
    EXPECT_THAT(client.Send(get), IsStatus(kInvalid, "dtype"));
  }
  const MappedRegion region = client.Region(4096);
  get = GetRequest({"layers.0.norm_w"});
  get.set_session_id(client.session_id);
  *get.mutable_target() = TargetOf(region.id, 0, 60);
  EXPECT_THAT(client.Send(get), IsStatus(kInvalid, "target.slice.size_bytes: 60 must be 64"));
  *get.mutable_target() = TargetOf(region.id, 4096 - 60, 64);
  EXPECT_THAT(client.Send(get), IsStatus(kInvalid, "target.slice: offset_bytes"));
  *get.mutable_target() = TargetOf("none", 0, 64);
  EXPECT_THAT(client.Send(get), IsStatus(kNotFound, "target.slice.region_id"));

  const std::string before = client.Parameters();
  const auto refused = [&](const char* name, const v1::Tensor& tensor, absl::StatusCode code,
                           const char* words) {
    v1::SetParametersRequest set = client.SetRequest();
    v1::NamedTensor* second = set.add_tensors();
    second->set_name(name);
    *second->mutable_tensor() = tensor;
    EXPECT_THAT(client.Send(set), IsStatus(code, words));
  };
  refused("layers.0.norm_b", InlineNoise(1, {kH + 1}), kInvalid, "tensors[1]");
  refused("layers.0.norm_b", v1::Tensor(), kInvalid, "tensors[1].tensor.dtype");
  refused("layers.0.norm_b", SliceOf(region.id, 4096, 64, {kH}), kInvalid,
          "tensors[1].tensor.slice");
  refused("layers.0.norm_b", SliceOf("none", 0, 64, {kH}), kNotFound, "tensors[1].tensor.slice");
  refused("layers.0.nothing", InlineNoise(1, {kH}), kNotFound, "layers.0.nothing");
  refused("layers.0.norm_w", InlineNoise(1, {kH}), kInvalid, "tensors[1]");
  v1::SetParametersRequest set = client.SetRequest();
  set.set_stack("none");
  EXPECT_THAT(client.Send(set), IsStatus(kNotFound, "none"));
  EXPECT_EQ(client.Parameters(), before) << "all or none";
}

TEST_F(ConfigServiceTest, GetGradients) {
  client.Create();
  v1::GetGradientsRequest request;
  request.set_stack("s");
  request.add_names("layers.1.output_w");
  EXPECT_EQ(client.Do(request).tensors(0).tensor().inline_data(), std::string(kH * 32 * 4, '\0'));
  client.Back(client.Train());
  const std::string gradients = client.Do(request).tensors(0).tensor().inline_data();
  EXPECT_NE(gradients, std::string(kH * 32 * 4, '\0'));
  const MappedRegion region = client.Region();
  request.set_session_id(client.session_id);
  *request.mutable_target() = TargetOf(region.id, 4, gradients.size());
  client.Do(request);
  EXPECT_EQ(std::string(region.data + 4, gradients.size()), gradients);
  request.clear_target();
  request.add_names("nothing");
  EXPECT_THAT(client.Send(request), IsStatus(kNotFound, "nothing"));
  v1::UpdateStackRequest update;
  update.set_name("s");
  update.set_training(false);
  client.Do(update);
  EXPECT_THAT(client.Send(request), IsStatus(kPrecondition, "training"));
}

// --- checkpoints ---

TEST_F(ConfigServiceTest, Checkpoints) {
  client.Create();
  client.Back(client.Train());
  client.Do(client.ApplyRequest());
  client.Took();
  const std::string saved_parameters = client.Parameters();
  v1::SaveCheckpointRequest save;
  save.set_stack("s");
  save.set_name("one");
  const v1::SaveCheckpointResponse saved = client.Do(save);
  EXPECT_EQ(saved.path(), service.checkpoints() + "/one.safetensors");
  EXPECT_EQ(saved.size_bytes(), std::filesystem::file_size(saved.path()));
  EXPECT_EQ(saved.step(), 1);
  client.Do(client.ApplyRequest());
  EXPECT_NE(client.Parameters(), saved_parameters);
  v1::LoadCheckpointRequest load;
  load.set_stack("s");
  load.set_name("one");
  EXPECT_EQ(client.Do(load).stack().step(), 1);
  EXPECT_EQ(client.Parameters(), saved_parameters);

  load.set_create(true);
  EXPECT_THAT(client.Send(load), IsStatus(kExists, "s"));
  load.set_stack("t");
  EXPECT_EQ(client.Do(load).stack().step(), 1);
  load.set_create(false);
  load.set_stack("u");
  EXPECT_EQ(client.Send(load).code(), kNotFound) << "no such stack";
  load.set_stack("s");
  load.set_name("two");
  EXPECT_EQ(client.Send(load).code(), kNotFound) << "no such file";
  save.set_stack("u");
  EXPECT_EQ(client.Send(save).code(), kNotFound);
  save.set_stack("s");
  for (const char* name : {"../x", "a/b", ".x", "x y"}) {
    save.set_name(name);
    load.set_name(name);
    EXPECT_THAT(client.Send(save), IsStatus(kInvalid, "name"));
    EXPECT_THAT(client.Send(load), IsStatus(kInvalid, "name"));
  }
  v1::StackConfig wide = TinyProto();
  wide.set_hidden_size(32);
  client.Create("w", wide);
  load.set_stack("w");
  load.set_name("one");
  EXPECT_EQ(client.Send(load).code(), kInvalid);
  service.backend().free_bytes = 1;
  load.set_stack("x");
  load.set_create(true);
  EXPECT_EQ(client.Send(load).code(), kExhausted);
  service.backend().free_bytes = CountingBackend::kAsItIs;
  std::filesystem::resize_file(saved.path(), saved.size_bytes() - 1);
  EXPECT_EQ(client.Send(load).code(), kDataLoss);
  std::filesystem::remove_all(service.checkpoints());
  save.set_name("three");
  EXPECT_EQ(client.Send(save).code(), absl::StatusCode::kInternal);
}

TEST_F(ConfigServiceTest, CheckpointsWithoutAFolder) {
  Service without({.checkpoints = false});
  Client other(without.address());
  other.Create();
  EXPECT_FALSE(other.Do(v1::GetServerInfoRequest()).checkpoints_enabled());
  v1::SaveCheckpointRequest save;
  save.set_stack("s");
  EXPECT_EQ(other.Send(save).code(), kPrecondition);
  v1::LoadCheckpointRequest load;
  load.set_stack("s");
  EXPECT_EQ(other.Send(load).code(), kPrecondition);
}

}  // namespace
}  // namespace lamina::testing
