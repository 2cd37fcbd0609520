// Checkpoints: bit for bit there and back, every kind of damage, and a crash at the worst moment.
#include "server/engine/checkpoint.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine_rig.h"
#include "file_faults.h"
#include "nlohmann/json.hpp"
#include "server/engine/mutation_log.h"

namespace lamina::testing {
namespace {

using Json = nlohmann::json;
constexpr auto kDataLoss = absl::StatusCode::kDataLoss;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream bytes;
  bytes << file.rdbuf();
  return bytes.str();
}
void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

uint64_t HeaderLength(const std::string& file) {
  uint64_t length = 0;
  std::memcpy(&length, file.data(), 8);
  return length;
}
Json HeaderOf(const std::string& file) { return Json::parse(file.substr(8, HeaderLength(file))); }
std::string DataOf(const std::string& file) { return file.substr(8 + HeaderLength(file)); }

// A file of this header and data with the digest that belongs to it.
std::string Assemble(Json header, const std::string& data) {
  if (header.contains("__metadata__"))
    header["__metadata__"]["lamina.sha256"] = std::string(64, '0');
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  const uint64_t length = text.size();
  std::string file(reinterpret_cast<const char*>(&length), 8);
  file += text + data;
  const BodyDigest digest = DigestOf(file);
  const std::string key = "\"lamina.sha256\":\"";
  const size_t at = file.find(key);
  if (at != std::string::npos)
    file.replace(at + key.size(), 64,
                 absl::BytesToHexString(absl::string_view(
                     reinterpret_cast<const char*>(digest.data()), digest.size())));
  return file;
}

class CheckpointTest : public ::testing::Test {
 protected:
  Engine& engine() { return rig_.engine(); }
  std::string Path(const std::string& name) { return CheckpointPath(folder_.path(), name); }
  absl::Status Load(const std::string& stack, const std::string& name, bool create = false) {
    return engine().LoadCheckpoint(stack, name, create, {}).status();
  }
  CheckpointInfo Save(const std::string& stack, const std::string& name = "") {
    return Value(engine().SaveCheckpoint(stack, name, {}));
  }

  TemporaryFolder folder_;
  Rig rig_{{.checkpoint_dir = folder_.path()}};
};

// --- there and back ---

class RoundTrip : public CheckpointTest, public ::testing::WithParamInterface<DType> {};

TEST_P(RoundTrip, TrainingGoesOnBitForBit) {
  rig_.Create("s", TinyConfig(GetParam()));
  rig_.Step("s", kSession, 10);
  rig_.Step("s", kSession, 20);
  rig_.ForwardBackward("s", kSession, 30);  // gradients are accumulated when it is saved
  const CheckpointInfo info = Save("s");
  EXPECT_EQ(info.path, Path("s"));
  EXPECT_EQ(info.bytes, std::filesystem::file_size(info.path));
  EXPECT_EQ(info.step, 2);
  const std::string saved = rig_.Snapshot("s");
  const std::string continued = rig_.Step("s", kSession, 40) + rig_.Step("s", kSession, 50);
  const std::string end = rig_.Snapshot("s");
  EXPECT_NE(saved, end);

  // Into the stack that has gone on.
  ASSERT_OK(Load("s", ""));
  EXPECT_EQ(rig_.Snapshot("s"), saved);
  EXPECT_EQ(rig_.Step("s", kSession, 40) + rig_.Step("s", kSession, 50), continued);
  EXPECT_EQ(rig_.Snapshot("s"), end);

  // Into a daemon that was started anew.
  Rig fresh({.checkpoint_dir = folder_.path()});
  const StackInfo loaded = Value(fresh.engine().LoadCheckpoint("s", "", true, {}));
  EXPECT_EQ(loaded.counters.optimizer_step, 2);
  EXPECT_EQ(loaded.counters.rng_counter, 5u);
  EXPECT_EQ(fresh.Snapshot("s"), saved);
  EXPECT_EQ(fresh.Step("s", kSession, 40) + fresh.Step("s", kSession, 50), continued);
  EXPECT_EQ(fresh.Snapshot("s"), end);

  // As on a card, and under another name.
  Rig staged({.host_memory = false, .checkpoint_dir = folder_.path()});
  ASSERT_OK(staged.engine().LoadCheckpoint("t", "s", true, {}).status());
  EXPECT_EQ(staged.Snapshot("t"), saved);
}

TEST_P(RoundTrip, TheFileIsWhatSafetensorsSays) {
  rig_.Create("s", TinyConfig(GetParam()));
  rig_.ForwardBackward("s", kSession, 1);
  Save("s");
  const std::string file = ReadFile(Path("s"));
  ASSERT_GT(file.size(), 8u);
  EXPECT_EQ(HeaderLength(file) % 8, 0u);
  EXPECT_EQ(file[8], '{');
  const Json header = HeaderOf(file);
  for (const auto& [key, value] : header["__metadata__"].items()) EXPECT_TRUE(value.is_string());
  EXPECT_EQ(Json::parse(header["__metadata__"]["lamina.config"].get<std::string>())["hidden_size"],
            16);
  const char* dtype = GetParam() == DType::kF32   ? "F32"
                      : GetParam() == DType::kF16 ? "F16"
                                                  : "BF16";
  EXPECT_EQ(header["layers.0.attn_qkvw"]["dtype"], dtype);
  EXPECT_EQ(header["layers.0.attn_qkvw"]["shape"], Json::array({48, 16}));
  EXPECT_EQ(header.contains("master.layers.0.attn_qkvw"), GetParam() != DType::kF32);
  // Without gaps or overlaps, to the end; every tensor aligned to its elements.
  std::map<uint64_t, uint64_t> ranges;
  for (const auto& [key, value] : header.items())
    if (key != "__metadata__") ranges[value["data_offsets"][0]] = value["data_offsets"][1];
  uint64_t end = 0;
  for (const auto& [from, to] : ranges) {
    EXPECT_EQ(from, end);
    end = to;
  }
  EXPECT_EQ(end, DataOf(file).size());
  // The values: those that a client reads.
  std::vector<char> values(48 * 16 * SizeOf(GetParam()));
  ASSERT_OK(engine().ReadParameters("s", {"layers.0.attn_qkvw"}, GetParam(), false, values.data(),
                                    values.size(), {}));
  const uint64_t at = header["layers.0.attn_qkvw"]["data_offsets"][0];
  EXPECT_EQ(DataOf(file).substr(at, values.size()), std::string(values.begin(), values.end()));
}

INSTANTIATE_TEST_SUITE_P(DTypes, RoundTrip,
                         ::testing::Values(DType::kF32, DType::kBF16, DType::kF16),
                         [](const auto& test) { return Name(test.param); });

// --- the loss scale ---

class LossScaleCheckpoint : public CheckpointTest {
 protected:
  static StackConfig Config() {
    StackConfig config = TinyConfig(DType::kF16);
    config.causal = true;
    config.gelu_checkpoint = true;
    config.dynamic_loss_scale = true;
    config.initial_loss_scale = 4096;
    config.loss_scale_growth_interval = 3;
    config.loss_scale_growth_factor = 1.7;  // so that the scale has all of a double's digits
    config.loss_scale_backoff_factor = 0.3;
    config.loss_scale_hysteresis = 2;
    return config;
  }
  // One with an infinite gradient: a step of it is skipped.
  static void Overflow(Rig& rig) {
    const std::string id = rig.Forward("s", kSession, 1);
    OwnedTensor grad = Noise(2, DType::kF16, {3, 8, 16});
    const uint16_t infinity = 0x7C00;
    std::memcpy(grad.bytes.data(), &infinity, sizeof(infinity));
    Value(rig.engine().Backward(
        {.stack = "s", .session = kSession, .context_id = id, .output_grad = grad.view()}, {}));
    EXPECT_FALSE(
        Value(rig.engine().ApplyGradients("s", {.learning_rate = 1e-3}, true, {})).result.applied);
  }
  // Steps, one of them skipped; what the stack is afterwards.
  static std::string GoOn(Rig& rig) {
    std::string all = rig.Step("s", kSession, 40);
    Overflow(rig);
    all += rig.Step("s", kSession, 50) + rig.Step("s", kSession, 60) + rig.Step("s", kSession, 70);
    return all + rig.Snapshot("s");
  }
};

TEST_F(LossScaleCheckpoint, GoesOnBitForBit) {
  rig_.Create("s", Config());
  for (uint64_t seed = 10; seed < 50; seed += 10) rig_.Step("s", kSession, seed);
  Overflow(rig_);
  const StackCounters counters = Value(engine().GetStack("s")).counters;
  EXPECT_EQ(counters.loss_scale, 4096 * 1.7) << "three clean steps";
  EXPECT_EQ(counters.skipped_steps, 1);
  Save("s");
  const std::string saved = rig_.Snapshot("s");
  const std::string end = GoOn(rig_);

  Rig fresh({.checkpoint_dir = folder_.path()});
  EXPECT_EQ(Value(fresh.engine().LoadCheckpoint("s", "", true, {})).loss_scale, 4096 * 1.7);
  EXPECT_EQ(fresh.Snapshot("s"), saved);
  EXPECT_EQ(GoOn(fresh), end);
  ASSERT_OK(Load("s", ""));
  EXPECT_EQ(rig_.Snapshot("s"), saved);
  EXPECT_EQ(GoOn(rig_), end);
}

TEST_F(LossScaleCheckpoint, BeginsAnewWhereTheFileHasNone) {
  StackConfig plain = Config();
  plain.dynamic_loss_scale = false;
  rig_.Create("s", plain);
  Save("s", "plain");
  ASSERT_OK(engine().DeleteStack("s", {}));
  rig_.Create("s", Config());
  const std::string initial = rig_.Snapshot("s");
  Overflow(rig_);
  Overflow(rig_);
  EXPECT_LT(Value(engine().GetStack("s")).loss_scale, 4096);
  ASSERT_OK(Load("s", "plain"));
  EXPECT_EQ(rig_.Snapshot("s"), initial);
  // And a stack without one takes none.
  Save("s", "dynamic");
  ASSERT_OK(engine().DeleteStack("s", {}));
  rig_.Create("s", plain);
  const std::string before = rig_.Snapshot("s");
  ASSERT_OK(Load("s", "dynamic"));
  EXPECT_EQ(rig_.Snapshot("s"), before);
}

TEST_F(LossScaleCheckpoint, StaysWithinTheStacksBounds) {
  rig_.Create("s", Config());
  Overflow(rig_);
  Overflow(rig_);
  Save("s");
  ASSERT_OK(engine().DeleteStack("s", {}));
  StackConfig config = Config();
  config.min_loss_scale = 2048;
  config.loss_scale_hysteresis = 1;
  rig_.Create("s", config);
  ASSERT_OK(Load("s", ""));
  const StackCounters counters = Value(engine().GetStack("s")).counters;
  EXPECT_EQ(counters.loss_scale, 2048) << "1228.8 in the file";
  EXPECT_LE(counters.overflows_tolerated, 1);
}

// What the version before dynamic loss scaling wrote: no loss scale, none of the new settings.
TEST_F(CheckpointTest, FilesOfTheVersionBeforeLoad) {
  rig_.Create("s", TinyConfig());
  rig_.Step("s", kSession, 1);
  Save("s");
  const std::string saved = rig_.Snapshot("s");
  const std::string file = ReadFile(Path("s"));
  Json header = HeaderOf(file);
  Json& metadata = header["__metadata__"];
  for (const char* key : {"lamina.loss_scale", "lamina.clean_steps", "lamina.overflows_tolerated"})
    EXPECT_EQ(metadata.erase(key), 1u) << key;
  Json config = Json::parse(metadata["lamina.config"].get<std::string>());
  for (const char* key :
       {"activation_checkpointing", "causal", "dynamic_loss_scale", "initial_loss_scale",
        "loss_scale_growth_interval", "loss_scale_growth_factor", "loss_scale_backoff_factor",
        "loss_scale_hysteresis", "min_loss_scale"})
    EXPECT_EQ(config.erase(key), 1u) << key;
  metadata["lamina.config"] = config.dump();
  WriteFile(Path("s"), Assemble(header, DataOf(file)));
  const std::string continued = rig_.Step("s", kSession, 5);
  ASSERT_OK(Load("s", ""));
  EXPECT_EQ(rig_.Snapshot("s"), saved);
  ASSERT_OK(engine().DeleteStack("s", {}));
  ASSERT_OK(Load("s", "", true));
  EXPECT_EQ(rig_.Snapshot("s"), saved);
  EXPECT_EQ(rig_.Step("s", kSession, 5), continued);
}

TEST_F(CheckpointTest, GradientsThatAreZeroTakeNoSpace) {
  rig_.Create("s", TinyConfig());
  rig_.Step("s", kSession, 1);
  Save("s", "zero");
  rig_.ForwardBackward("s", kSession, 2);
  Save("s", "some");
  EXPECT_FALSE(HeaderOf(ReadFile(Path("zero"))).contains("gradient.layers.0.attn_ow"));
  EXPECT_TRUE(HeaderOf(ReadFile(Path("some"))).contains("gradient.layers.0.attn_ow"));
  ASSERT_OK(Load("s", "zero"));
  std::vector<float> gradient(16, 1.0f);
  ASSERT_OK(engine().ReadParameters("s", {"layers.0.norm_w"}, DType::kF32, true, gradient.data(),
                                    64, {}));
  EXPECT_EQ(gradient, std::vector<float>(16, 0.0f));
}

TEST_F(CheckpointTest, TrainingMayBeOffOnEitherSide) {
  rig_.Create("s", TinyConfig());
  rig_.Step("s", kSession, 1);
  Save("s", "training");
  const auto weights = [&] {
    std::vector<char> values(48 * 16 * 4);
    EXPECT_OK(engine().ReadParameters("s", {"layers.0.attn_qkvw"}, DType::kF32, false,
                                      values.data(), values.size(), {}));
    return values;
  };
  const std::vector<char> trained = weights();
  ASSERT_OK(engine().UpdateStack("s", {.training = false}, {}).status());
  OwnedTensor zeros = Zeros(DType::kF32, {48, 16});
  ASSERT_OK(engine().WriteParameters("s", {{"layers.0.attn_qkvw", zeros.view()}}, {}));
  ASSERT_OK(Load("s", "training"));
  EXPECT_EQ(weights(), trained);
  EXPECT_EQ(Value(engine().GetStack("s")).counters.optimizer_step, 0) << "the moments are gone";
  Save("s", "weights");
  EXPECT_FALSE(HeaderOf(ReadFile(Path("weights"))).contains("exp_avg.layers.0.attn_qkvw"));
  ASSERT_OK(engine().UpdateStack("s", {.training = true}, {}).status());
  const std::string clean = rig_.Snapshot("s");
  rig_.Step("s", kSession, 1);
  ASSERT_OK(Load("s", "weights"));
  EXPECT_EQ(rig_.Snapshot("s"), clean);
}

TEST_F(CheckpointTest, ContextsOutliveALoad) {
  rig_.Create("s", TinyConfig());
  Save("s");
  const std::string id = rig_.Forward("s", kSession, 1);
  ASSERT_OK(Load("s", ""));
  OwnedTensor grad = Noise(2, DType::kF32, {3, 8, 16});
  EXPECT_OK(
      engine()
          .Backward(
              {.stack = "s", .session = kSession, .context_id = id, .output_grad = grad.view()}, {})
          .status());
}

// --- names and states ---

TEST_F(CheckpointTest, NamesAndStatesAreChecked) {
  rig_.Create("s", TinyConfig());
  for (const char* name : {"../s", "a/b", ".s", "/etc/passwd", "a\n"}) {
    EXPECT_THAT(engine().SaveCheckpoint("s", name, {}).status(), IsStatus(kInvalid, "name:"));
    EXPECT_THAT(Load("s", name), IsStatus(kInvalid, "name:"));
  }
  EXPECT_THAT(engine().SaveCheckpoint("../s", "", {}).status(), IsStatus(kInvalid, "stack:"));
  EXPECT_THAT(Load("../s", "x"), IsStatus(kInvalid, "stack:"));
  EXPECT_THAT(engine().SaveCheckpoint("none", "", {}).status(), IsStatus(kNotFound, "none"));
  EXPECT_THAT(Load("s", "absent"), IsStatus(kNotFound, "no checkpoint \"absent\""));
  EXPECT_TRUE(folder_.Files().empty());
  Save("s");
  EXPECT_THAT(Load("none", "s"), IsStatus(kNotFound, "none"));
  EXPECT_THAT(Load("s", "", true), IsStatus(kExists, "there is a stack \"s\""));
  std::filesystem::create_directory(Path("folder"));
  EXPECT_THAT(Load("s", "folder"), IsStatus(kInvalid, "no regular file"));
  ASSERT_EQ(mkfifo(Path("fifo").c_str(), 0600), 0);
  EXPECT_THAT(Load("s", "fifo"), IsStatus(kInvalid, "no regular file"));

  Rig without;
  without.Create("s", TinyConfig());
  EXPECT_THAT(without.engine().SaveCheckpoint("s", "", {}).status(),
              IsStatus(kPrecondition, "without a checkpoint folder"));
  EXPECT_EQ(without.engine().LoadCheckpoint("s", "", false, {}).status().code(), kPrecondition);
}

TEST_F(CheckpointTest, CreateRefusesAPlanThatDoesNotFit) {
  rig_.Create("s", TinyConfig());
  Save("s");
  rig_.backend().free_bytes = 1000;
  EXPECT_THAT(Load("t", "s", true), IsStatus(kExhausted, "1000"));
  EXPECT_EQ(engine().ListStacks().size(), 1u);
}

TEST_F(CheckpointTest, SavesAreCounted) {
  rig_.Create("s", TinyConfig());
  const CheckpointInfo info = Save("s");
  EXPECT_EQ(rig_.Metric("lamina_checkpoint_bytes"), static_cast<double>(info.bytes));
  EXPECT_GT(rig_.Metric("lamina_checkpoint_last_success_timestamp_seconds"), 1.6e9);
  EXPECT_EQ(rig_.Metric("lamina_checkpoint_duration_seconds_count{op=\"save\"}"), 1);
  ASSERT_OK(Load("s", ""));
  EXPECT_EQ(rig_.Metric("lamina_checkpoint_duration_seconds_count{op=\"load\"}"), 1);
}

TEST_F(CheckpointTest, ALoadWhoseDeadlinePassesInTheQueueChangesNothing) {
  rig_.Create("s", TinyConfig());
  Save("s");
  rig_.Step("s", kSession, 1);
  const std::string before = rig_.Snapshot("s");
  {
    Blocker blocker(engine());
    const CallControl control{.deadline = absl::Now() + absl::Milliseconds(50)};
    EXPECT_EQ(engine().LoadCheckpoint("s", "", false, control).status().code(),
              absl::StatusCode::kDeadlineExceeded);
    EXPECT_EQ(engine().SaveCheckpoint("s", "late", control).status().code(),
              absl::StatusCode::kDeadlineExceeded);
  }
  EXPECT_EQ(rig_.Snapshot("s"), before);
  EXPECT_THAT(folder_.Files(), ::testing::ElementsAre("s.safetensors"));
}

// --- damage ---

class Damage : public CheckpointTest {
 protected:
  Damage() {
    StackConfig config = TinyConfig();
    config.num_hidden_layers = 1;
    config.hidden_size = 4;
    config.intermediate_size = 4;
    rig_.Create("s", config);
    rig_.ForwardBackward("s", kSession, 1);
    Save("s");
    file_ = ReadFile(Path("s"));
    before_ = rig_.Snapshot("s");
  }
  // Loads `bytes` as a checkpoint; what it answers. The stack stays as it was unless that is OK.
  absl::Status LoadBytes(const std::string& bytes) {
    WriteFile(Path("d"), bytes);
    const absl::Status status = Load("s", "d");
    if (!status.ok()) {
      EXPECT_EQ(rig_.Snapshot("s"), before_) << status;
      EXPECT_EQ(Load("fresh", "d", true).code(), status.code());
      EXPECT_EQ(engine().ListStacks().size(), 1u);
    }
    return status;
  }
  // With the header changed and the digest made to fit.
  absl::Status LoadChanged(const std::function<void(Json&)>& change) {
    Json header = HeaderOf(file_);
    change(header);
    return LoadBytes(Assemble(header, DataOf(file_)));
  }

  std::string file_, before_;
};

TEST_F(Damage, AssembledFilesLoad) {
  // Guards the cases below: they fail for what they change, not for how they are made.
  EXPECT_OK(LoadBytes(Assemble(HeaderOf(file_), DataOf(file_))));
}

TEST_F(Damage, TruncationAtAnyLength) {
  const size_t header_end = 8 + HeaderLength(file_);
  std::vector<size_t> lengths = {0,
                                 1,
                                 7,
                                 8,
                                 9,
                                 header_end - 1,
                                 header_end,
                                 header_end + 1,
                                 file_.size() - 4,
                                 file_.size() - 1};
  for (size_t n = 16; n < file_.size(); n += file_.size() / 40) lengths.push_back(n);
  for (const size_t n : lengths)
    EXPECT_THAT(LoadBytes(file_.substr(0, n)), IsStatus(kDataLoss, "damaged")) << n;
  EXPECT_THAT(LoadBytes(file_ + "x"), IsStatus(kDataLoss, "1 bytes follow the last tensor"));
}

TEST_F(Damage, AnyByteThatChanged) {
  const size_t header_end = 8 + HeaderLength(file_);
  for (size_t at = 0; at < file_.size(); at += at < header_end ? 7 : 97)
    for (const char mask : {'\x01', '\x40'}) {
      std::string bytes = file_;
      bytes[at] = static_cast<char>(bytes[at] ^ mask);
      WriteFile(Path("d"), bytes);
      EXPECT_EQ(Load("s", "d").code(), kDataLoss) << "byte " << at << " of " << header_end;
    }
  EXPECT_EQ(rig_.Snapshot("s"), before_);
}

TEST_F(Damage, HeaderLengths) {
  for (const uint64_t length :
       {uint64_t{0}, uint64_t{100'000'001}, uint64_t{1} << 40, std::numeric_limits<uint64_t>::max(),
        std::numeric_limits<uint64_t>::max() - 7, uint64_t{file_.size()},
        uint64_t{file_.size() - 7}}) {
    std::string bytes = file_;
    std::memcpy(bytes.data(), &length, 8);
    EXPECT_THAT(LoadBytes(bytes), IsStatus(kDataLoss, "header")) << length;
  }
}

TEST_F(Damage, HeadersThatAreNoHeaders) {
  for (const char* text : {"", "{", "[]", "7", "null", "{\"a\":}", "{\"a\" 1}", "\xff\xfe"}) {
    const uint64_t length = std::strlen(text);
    std::string bytes(reinterpret_cast<const char*>(&length), 8);
    EXPECT_THAT(LoadBytes(bytes + text), IsStatus(kDataLoss, "no JSON object")) << text;
  }
  std::string nested(100000, '[');
  const uint64_t length = nested.size();
  EXPECT_EQ(LoadBytes(std::string(reinterpret_cast<const char*>(&length), 8) + nested).code(),
            kDataLoss);
  const std::string twice =
      R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
  const uint64_t twice_length = twice.size();
  EXPECT_THAT(LoadBytes(std::string(reinterpret_cast<const char*>(&twice_length), 8) + twice + "x"),
              IsStatus(kDataLoss, "a key twice"));
}

TEST_F(Damage, TensorsWhereTheyCannotBe) {
  const std::string name = "layers.0.attn_ow";  // 4 x 4 fp32
  const auto offsets = [&](Json from, Json to) {
    return LoadChanged([&](Json& h) { h[name]["data_offsets"] = {from, to}; });
  };
  const uint64_t size = DataOf(file_).size();
  const uint64_t begin = HeaderOf(file_)[name]["data_offsets"][0];
  constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
  EXPECT_THAT(offsets(size, size + 64), IsStatus(kDataLoss, "truncated"));
  EXPECT_THAT(offsets(kMax - 63, kMax), IsStatus(kDataLoss, name));
  EXPECT_THAT(offsets(kMax, 63), IsStatus(kDataLoss, name));
  EXPECT_THAT(offsets(begin + 64, begin), IsStatus(kDataLoss, name));
  EXPECT_THAT(offsets(begin, begin + 60), IsStatus(kDataLoss, "60 bytes; its shape needs 64"));
  EXPECT_THAT(offsets(-64, 0), IsStatus(kDataLoss, "malformed"));
  EXPECT_THAT(offsets(0.5, 64.5), IsStatus(kDataLoss, "malformed"));
  EXPECT_THAT(offsets("0", "64"), IsStatus(kDataLoss, "malformed"));
  EXPECT_THAT(offsets(begin - 4, begin + 60), IsStatus(kDataLoss, "overlaps"));
  EXPECT_THAT(offsets(begin + 4, begin + 68), IsStatus(kDataLoss, "gap"));
  EXPECT_THAT(LoadChanged([&](Json& h) { h.erase(name); }), IsStatus(kDataLoss, "gap"));
}

TEST_F(Damage, EntriesThatAreMalformed) {
  const std::string name = "layers.0.attn_ow";
  const auto change = [&](const char* key, Json value) {
    return LoadChanged([&](Json& h) { h[name][key] = value; });
  };
  EXPECT_THAT(change("dtype", "F128"), IsStatus(kDataLoss, "dtype that is not known"));
  EXPECT_THAT(change("dtype", 7), IsStatus(kDataLoss, "malformed"));
  EXPECT_THAT(change("shape", "4x4"), IsStatus(kDataLoss, "malformed"));
  EXPECT_THAT(change("shape", {4, -4}), IsStatus(kDataLoss, "shape"));
  EXPECT_THAT(change("shape", {4.0, 4}), IsStatus(kDataLoss, "shape"));
  EXPECT_THAT(change("shape", {uint64_t{1} << 62, 4}), IsStatus(kDataLoss, "beyond the file"));
  EXPECT_THAT(change("shape", {uint64_t{1} << 63, uint64_t{1} << 63, 4, 4}),
              IsStatus(kDataLoss, "beyond the file"));
  EXPECT_THAT(change("data_offsets", {0}), IsStatus(kDataLoss, "malformed"));
  EXPECT_THAT(LoadChanged([&](Json& h) { h[name] = 3; }), IsStatus(kDataLoss, "malformed"));
  EXPECT_THAT(LoadChanged([&](Json& h) { h[name].erase("dtype"); }),
              IsStatus(kDataLoss, "malformed"));
}

TEST_F(Damage, FilesOfOthers) {
  EXPECT_THAT(LoadChanged([](Json& h) { h.erase("__metadata__"); }),
              IsStatus(kInvalid, "not one of Lamina's"));
  const auto metadata = [&](const char* key, Json value) {
    return LoadChanged([&](Json& h) { h["__metadata__"][key] = value; });
  };
  EXPECT_THAT(metadata("lamina.format", "2"), IsStatus(kInvalid, "lamina.format is \"2\""));
  EXPECT_THAT(metadata("lamina.config", "{\"hidden_size\":"), IsStatus(kInvalid, "config"));
  EXPECT_THAT(metadata("lamina.config", "{\"hidden_sizes\":4}"),
              IsStatus(kInvalid, "hidden_sizes"));
  EXPECT_THAT(metadata("lamina.rng_counter", "many"), IsStatus(kInvalid, "counters"));
  EXPECT_THAT(metadata("lamina.optimizer_step", "-1"), IsStatus(kInvalid, "counters"));
  EXPECT_THAT(metadata("lamina.skipped_steps", 3), IsStatus(kInvalid, "counters"));
  for (const char* scale : {"0", "-1", "inf", "nan", "1e999", "much", ""})
    EXPECT_THAT(metadata("lamina.loss_scale", scale), IsStatus(kInvalid, "loss scale")) << scale;
  EXPECT_THAT(metadata("lamina.loss_scale", 1.0), IsStatus(kInvalid, "loss scale"));
  EXPECT_THAT(metadata("lamina.clean_steps", "-1"), IsStatus(kInvalid, "loss scale"));
  EXPECT_THAT(metadata("lamina.overflows_tolerated", "-1"), IsStatus(kInvalid, "loss scale"));
  EXPECT_THAT(LoadChanged([](Json& h) { h["__metadata__"].erase("lamina.clean_steps"); }),
              IsStatus(kInvalid, "loss scale"));
}

TEST_F(Damage, TensorsThatDoNotFit) {
  const std::string name = "layers.0.attn_ow";
  const auto rename = [&](const char* from, const char* to) {
    return LoadChanged([&](Json& h) {
      h[to] = h[from];
      h.erase(from);
    });
  };
  EXPECT_THAT(
      LoadChanged([&](Json& h) {
        h[name]["shape"] = {2, 8};
      }),
      IsStatus(kInvalid, "layers.0.attn_ow: is fp32 [2, 8] in checkpoint \"d\" and fp32 [4, 4]"));
  EXPECT_THAT(LoadChanged([&](Json& h) {
                h[name]["shape"] = {4, 8};
                h[name]["dtype"] = "F16";
              }),
              IsStatus(kInvalid, "layers.0.attn_ow: is fp16 [4, 8]"));
  EXPECT_THAT(rename("layers.0.attn_ow", "layers.0.other"),
              IsStatus(kInvalid, "layers.0.attn_ow: the stack has it"));
  EXPECT_THAT(rename("exp_avg.layers.0.norm_b", "exp_avg.layers.0.norm_c"),
              IsStatus(kInvalid, "exp_avg.layers.0.norm_b: the stack has it"));
  EXPECT_THAT(rename("gradient.layers.0.norm_b", "gradient.layers.0.norm_c"),
              IsStatus(kInvalid, "gradient.layers.0.norm_b: the stack has it"));
  Json header = HeaderOf(file_);
  const std::string data = DataOf(file_);
  header["extra"] = {
      {"dtype", "U8"}, {"shape", {1}}, {"data_offsets", {data.size(), data.size() + 1}}};
  EXPECT_THAT(LoadBytes(Assemble(header, data + "x")),
              IsStatus(kInvalid, "extra: checkpoint \"d\" has it, the stack has not"));
}

TEST_F(CheckpointTest, OtherStacksAreRefused) {
  rig_.Create("s", TinyConfig());
  Save("s");
  const auto refused = [&](const char* text, const std::function<void(StackConfig&)>& change) {
    SCOPED_TRACE(text);
    StackConfig config = TinyConfig();
    change(config);
    rig_.Create("other", config);
    const std::string before = rig_.Snapshot("other");
    EXPECT_THAT(Load("other", "s"), IsStatus(kInvalid, text));
    EXPECT_EQ(rig_.Snapshot("other"), before);
    EXPECT_OK(engine().DeleteStack("other", {}));
  };
  refused("layers.0.attn_qkvw: is fp32 [48, 16] in checkpoint \"s\" and fp32 [96, 32]",
          [](StackConfig& c) { c.hidden_size = 32; });
  refused("layers.0.inter_w", [](StackConfig& c) { c.intermediate_size = 48; });
  refused("layers.0.attn_qkvw: is fp32 [48, 16] in checkpoint \"s\" and bf16",
          [](StackConfig& c) { c.dtype = DType::kBF16; });
  refused("layers.2.attn_qkvw: the stack has it", [](StackConfig& c) { c.num_hidden_layers = 3; });
  refused("layers.1.", [](StackConfig& c) { c.num_hidden_layers = 1; });
  refused("config.heads: is 2", [](StackConfig& c) { c.heads = 4; });
  refused("config.pre_layer_norm", [](StackConfig& c) { c.pre_layer_norm = false; });
  refused("config.gelu", [](StackConfig& c) { c.gelu = GeluKind::kTanh; });
  refused("config.causal: is false in checkpoint \"s\" and true in the stack",
          [](StackConfig& c) { c.causal = true; });
  refused("config.layer_norm_eps", [](StackConfig& c) { c.layer_norm_eps = 1e-5; });
  // What does not decide the function may differ, and stays the stack's.
  StackConfig config = TinyConfig();
  config.seed = 99;
  config.batch_size = 1;
  config.hidden_dropout_ratio = 0.5;
  config.gelu_checkpoint = true;
  config.activation_checkpointing = true;
  config.stochastic_mode = true;
  rig_.Create("other", config);
  EXPECT_OK(Load("other", "s"));
  EXPECT_EQ(Value(engine().GetStack("other")).config.seed, 99);
}

// --- writing that fails ---

TEST_F(CheckpointTest, AFailureKeepsTheOldFileAndLeavesNoOther) {
  rig_.Create("s", TinyConfig());
  Save("s");
  const std::string old = ReadFile(Path("s"));
  rig_.Step("s", kSession, 1);
  const struct {
    FileOp op;
    int error;
    int nth;
    absl::StatusCode code;
  } kFaults[] = {{FileOp::kPwrite, ENOSPC, 0, kExhausted},
                 {FileOp::kPwrite, EDQUOT, 40, kExhausted},
                 {FileOp::kPwrite, EIO, 3, absl::StatusCode::kInternal},
                 {FileOp::kFallocate, ENOSPC, 0, kExhausted},
                 {FileOp::kFsync, EIO, 0, absl::StatusCode::kInternal},
                 {FileOp::kFsync, ENOSPC, 0, kExhausted},
                 {FileOp::kRename, EACCES, 0, absl::StatusCode::kInternal}};
  for (const auto& fault : kFaults) {
    SCOPED_TRACE(absl::StrCat(static_cast<int>(fault.op), " ", std::strerror(fault.error)));
    FileFault failing(fault.op, fault.error, fault.nth);
    EXPECT_THAT(engine().SaveCheckpoint("s", "", {}).status(),
                IsStatus(fault.code, std::strerror(fault.error)));
    EXPECT_TRUE(failing.hit());
    EXPECT_EQ(ReadFile(Path("s")), old);
    EXPECT_THAT(folder_.Files(), ::testing::ElementsAre("s.safetensors"));
    EXPECT_OK(engine().health());  // the disk failed, not the device
  }
  {
    FileFault unsupported(FileOp::kFallocate, EOPNOTSUPP);
    EXPECT_OK(engine().SaveCheckpoint("s", "", {}).status());
  }
  EXPECT_NE(ReadFile(Path("s")), old);
  EXPECT_OK(Load("s", ""));
}

TEST_F(CheckpointTest, AnotherProcessMayNotWriteTheSameOne) {
  rig_.Create("s", TinyConfig());
  const std::string temporary = Path("s") + ".tmp";
  const int fd = open(temporary.c_str(), O_RDWR | O_CREAT, 0600);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(flock(fd, LOCK_EX), 0);
  EXPECT_THAT(engine().SaveCheckpoint("s", "", {}).status(),
              IsStatus(kPrecondition, "another process"));
  EXPECT_THAT(folder_.Files(), ::testing::ElementsAre("s.safetensors.tmp")) << "theirs";
  close(fd);
  EXPECT_OK(engine().SaveCheckpoint("s", "", {}).status());
  EXPECT_THAT(folder_.Files(), ::testing::ElementsAre("s.safetensors"));
}

TEST_F(CheckpointTest, TheTemporaryIsNoWayElsewhere) {
  rig_.Create("s", TinyConfig());
  TemporaryFolder elsewhere;
  const std::string target = elsewhere.path() + "/precious";
  WriteFile(target, "keep");
  std::filesystem::create_symlink(target, Path("s") + ".tmp");
  EXPECT_EQ(engine().SaveCheckpoint("s", "", {}).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(ReadFile(target), "keep");
}

// No engine here: the process that dies must have one thread.
TEST(CheckpointCrash, BetweenWriteAndRenameLeavesTheOldFile) {
  TemporaryFolder folder;
  const std::unique_ptr<Backend> backend = Value(Backend::Create("cpu", 1));
  const auto stack = Value(Stack::Create(*backend, Value(Resolve(TinyConfig(), 0))));
  const auto save = [&] {
    return Value(Value(CheckpointWriter::Write(*stack, folder.path(), "s"))->Commit());
  };
  save();
  const std::string path = CheckpointPath(folder.path(), "s");
  const std::string old = ReadFile(path);
  stack->set_counters({.optimizer_step = 9, .rng_counter = 9});
  EXPECT_EXIT(
      {
        ExitAtRename(7);
        save();
      },
      ::testing::ExitedWithCode(7), "");
  EXPECT_EQ(ReadFile(path), old);
  EXPECT_THAT(folder.Files(), ::testing::ElementsAre("s.safetensors", "s.safetensors.tmp"));
  EXPECT_OK(CheckpointReader::Open(folder.path(), "s").status());
  // The next save takes over what the dead one left.
  EXPECT_EQ(save().step, 9);
  EXPECT_NE(ReadFile(path), old);
  EXPECT_THAT(folder.Files(), ::testing::ElementsAre("s.safetensors"));
  EXPECT_OK(CheckpointReader::Open(folder.path(), "s").status());
}

TEST_F(CheckpointTest, ManySaversLeaveOneWholeFile) {
  rig_.Create("s", TinyConfig());
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 4; ++i) EXPECT_OK(engine().SaveCheckpoint("s", "", {}).status());
    });
  threads.emplace_back([&] {
    for (int i = 0; i < 4; ++i)
      Value(engine().ApplyGradients("s", {.learning_rate = 1e-3}, true, {}));
  });
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(folder_.Files(), ::testing::ElementsAre("s.safetensors"));
  EXPECT_OK(Load("s", ""));
}

}  // namespace
}  // namespace lamina::testing
