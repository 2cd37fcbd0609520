#include "tests/server/service/service_rig.h"

#include <grpcpp/create_channel.h>
#include <spdlog/sinks/ostream_sink.h>
#include <spdlog/spdlog.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "server/service/device_memory.h"
#include "tests/server/session/broker_client.h"

namespace lamina::testing {

Service::Service(const ServiceOptions& options)
    : address_("unix:" + folder_.path() + "/s.sock"),
      metrics_({.version = "0", .commit = "", .backend = "cpu", .device = "test"}) {
  logger_ = std::make_shared<spdlog::logger>(
      "test", std::make_shared<spdlog::sinks::ostream_sink_mt>(log_));
  logger_->set_pattern("%v");
  spdlog::set_default_logger(logger_);
  auto backend = std::make_unique<CountingBackend>(Value(Backend::Create("cpu", 1)));
  backend->set_host_memory(options.host_memory);
  backend_ = backend.get();
  engine_ = Value(Engine::Create(std::move(backend), &metrics_,
                                 {.checkpoint_dir = options.checkpoints ? checkpoints_.path() : "",
                                  .queue_capacity = options.queue_capacity,
                                  .inline_cap_bytes = options.inline_cap_bytes,
                                  .ready_cap = options.ready_cap}));
  SessionHooks hooks;
  if (!options.host_memory) {
    hooks.register_host = [this](void* data, size_t bytes) {
      return engine_->RegisterHost(data, bytes);
    };
    hooks.unregister_host = [this](void* data) { engine_->UnregisterHost(data); };
    hooks.make_device_memory = [this](size_t bytes, RegionKind kind) {
      return MakeDeviceMemory(*engine_, bytes, kind);
    };
  }
  hooks.ended = [this](uint64_t key, const std::string& reason) {
    engine_->EndSession(key);
    mutations_.Forget(key);
    std::lock_guard<std::mutex> lock(mutex_);
    ended_.push_back(reason);
  };
  sessions_ = SessionManager::Create(options.sessions, std::move(hooks));
  const std::string broker = folder_.path() + "/broker.sock";
  broker_ = Value(Broker::Start({.path = broker}, *sessions_));
  access_ = Value(Access::Open({}));
  state_ = std::make_unique<SharedState>(SharedState{.engine = *engine_,
                                                     .sessions = *sessions_,
                                                     .access = *access_,
                                                     .metrics = metrics_,
                                                     .mutations = mutations_,
                                                     .gate = gate_,
                                                     .broker_path = broker,
                                                     .version = "1.2.3",
                                                     .commit = "abc",
                                                     .started = absl::Now()});
  std::vector<std::string> listen = {address_};
  listen.insert(listen.end(), options.also_listen.begin(), options.also_listen.end());
  server_ = Value(GrpcServer::Start({.listen = listen}, *state_));
  server_->SetServing(true);
}

Service::~Service() {
  server_.reset();
  broker_.reset();
  sessions_.reset();
  spdlog::set_default_logger(std::make_shared<spdlog::logger>("none"));
}

std::string Service::Log() {
  spdlog::default_logger()->flush();
  return log_.str();
}

std::vector<std::string> Service::ended() {
  std::lock_guard<std::mutex> lock(mutex_);
  return ended_;
}

double Service::Metric(const std::string& line) {
  for (absl::string_view text : absl::StrSplit(metrics_.Text(), '\n')) {
    double value = 0;
    if (absl::StartsWith(text, line + " ") &&
        absl::SimpleAtod(text.substr(line.size() + 1), &value)) {
      return value;
    }
  }
  return 0;
}

v1::StackConfig TinyProto() {
  v1::StackConfig c;
  c.set_batch_size(kB);
  c.set_max_seq_length(kS);
  c.set_hidden_size(kH);
  c.set_intermediate_size(32);
  c.set_heads(2);
  c.set_num_hidden_layers(2);
  c.set_seed(7);
  c.set_max_contexts(2);
  return c;
}

v1::Tensor InlineNoise(uint64_t seed, const std::vector<int64_t>& shape) {
  v1::Tensor tensor;
  tensor.set_dtype(v1::DATA_TYPE_FLOAT32);
  int64_t count = 1;
  for (const int64_t extent : shape) {
    tensor.add_shape(extent);
    count *= extent;
  }
  const std::vector<char> bytes = NoiseBytes(seed, count, DType::kF32);
  tensor.set_inline_data(bytes.data(), bytes.size());
  return tensor;
}

v1::Tensor InlineIntegers(const std::vector<int32_t>& values) {
  v1::Tensor tensor;
  tensor.set_dtype(v1::DATA_TYPE_INT32);
  tensor.add_shape(static_cast<int64_t>(values.size()));
  tensor.set_inline_data(values.data(), values.size() * sizeof(int32_t));
  return tensor;
}

v1::Tensor SliceOf(const std::string& region, uint64_t offset, uint64_t size,
                   const std::vector<int64_t>& shape) {
  v1::Tensor tensor;
  tensor.set_dtype(v1::DATA_TYPE_FLOAT32);
  for (const int64_t extent : shape) tensor.add_shape(extent);
  *tensor.mutable_slice() = TargetOf(region, offset, size).slice();
  return tensor;
}

v1::TensorTarget TargetOf(const std::string& region, uint64_t offset, uint64_t size) {
  v1::TensorTarget target;
  target.mutable_slice()->set_region_id(region);
  target.mutable_slice()->set_offset_bytes(offset);
  target.mutable_slice()->set_size_bytes(size);
  return target;
}

absl::Status FromGrpc(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

std::unique_ptr<grpc::ClientContext> NewContext() {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  return context;
}

MappedRegion::MappedRegion(MappedRegion&& other) noexcept
    : id(std::move(other.id)), data(std::exchange(other.data, nullptr)), length(other.length) {}

MappedRegion::~MappedRegion() {
  if (data != nullptr) munmap(data, length);
}

Client::Client(const std::string& address)
    : channel(grpc::CreateChannel(address, grpc::InsecureChannelCredentials())),
      layer(v1::LayerService::NewStub(channel)),
      config(v1::ConfigService::NewStub(channel)),
      sessions(v1::SessionService::NewStub(channel)) {
  v1::CreateSessionRequest request;
  request.set_client_name("test");
  const v1::CreateSessionResponse opened = Do(request);
  session_id = opened.session_id();
  broker_path = opened.broker_path();
}

v1::Mutation Client::Next() const {
  v1::Mutation mutation;
  mutation.set_session_id(session_id);
  mutation.set_sequence(sequence + 1);
  return mutation;
}

v1::ForwardRequest Client::EvalRequest(uint64_t seed) const {
  v1::ForwardRequest request;
  request.set_stack("s");
  request.set_session_id(session_id);
  request.set_training(false);
  *request.mutable_input() = InlineNoise(seed);
  return request;
}

v1::ForwardRequest Client::TrainRequest(uint64_t seed) const {
  v1::ForwardRequest request = EvalRequest(seed);
  request.set_training(true);
  *request.mutable_mutation() = Next();
  return request;
}

v1::BackwardRequest Client::BackwardRequestFor(const std::string& context, uint64_t seed) const {
  v1::BackwardRequest request;
  request.set_stack("s");
  *request.mutable_mutation() = Next();
  request.set_context_id(context);
  *request.mutable_output_grad() = InlineNoise(seed);
  return request;
}

v1::ApplyGradientsRequest Client::ApplyRequest() const {
  v1::ApplyGradientsRequest request;
  request.set_stack("s");
  *request.mutable_mutation() = Next();
  request.set_learning_rate(0.01);
  return request;
}

v1::ZeroGradientsRequest Client::ZeroRequest() const {
  v1::ZeroGradientsRequest request;
  request.set_stack("s");
  *request.mutable_mutation() = Next();
  return request;
}

v1::SetParametersRequest Client::SetRequest() const {
  v1::SetParametersRequest request;
  request.set_stack("s");
  *request.mutable_mutation() = Next();
  v1::NamedTensor* tensor = request.add_tensors();
  tensor->set_name("layers.0.norm_w");
  *tensor->mutable_tensor() = InlineNoise(3, {kH});
  return request;
}

void Client::Create(const std::string& name, const v1::StackConfig& stack) {
  v1::CreateStackRequest request;
  request.set_name(name);
  *request.mutable_config() = stack;
  Do(request);
}

std::string Client::Train(uint64_t seed) {
  std::string context = Do(TrainRequest(seed)).context_id();
  Took();
  return context;
}

void Client::Back(const std::string& context) {
  Do(BackwardRequestFor(context));
  Took();
}

v1::Stack Client::Describe(const std::string& name) {
  v1::GetStackRequest request;
  request.set_name(name);
  return Do(request).stack();
}

std::string Client::Parameters(bool gradients) {
  v1::StreamParametersRequest request;
  request.set_stack("s");
  request.set_gradients(gradients);
  const auto context = NewContext();
  const auto reader = config->StreamParameters(context.get(), request);
  std::string all;
  for (v1::StreamParametersResponse chunk; reader->Read(&chunk);) all += chunk.data();
  if (const grpc::Status status = reader->Finish(); !status.ok())
    throw std::runtime_error(status.error_message());
  return all;
}

MappedRegion Client::Region(size_t bytes, v1::RegionKind kind) {
  v1::CreateRegionRequest request;
  request.set_session_id(session_id);
  request.set_size_bytes(bytes);
  request.set_kind(kind);
  MappedRegion region;
  region.id = Do(request).region().region_id();
  BrokerClient broker(broker_path);
  BrokerClient::Answer answer = broker.Ask(session_id, region.id);
  if (answer.descriptor < 0) answer.descriptor = dup(std::atoi(answer.handle.c_str()));
  region.length = answer.length;
  void* data =
      mmap(nullptr, region.length, PROT_READ | PROT_WRITE, MAP_SHARED, answer.descriptor, 0);
  close(answer.descriptor);
  if (data == MAP_FAILED) throw std::runtime_error("can't map the region");
  region.data = static_cast<char*>(data);
  return region;
}

}  // namespace lamina::testing
