#include "tests/fuzz/daemon.h"

#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <thread>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/service/config_calls.h"
#include "server/service/layer_calls.h"
#include "server/service/session_calls.h"
#include "tests/fuzz/target.h"

namespace lamina::fuzz {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

constexpr size_t kDeviceBytes = size_t{1} << 20;
constexpr size_t kRegionBytes = size_t{1} << 16;
// Inputs until the stacks are made anew: weights drift with what changes them, which no check here
// depends on, and making them takes longer than most inputs.
constexpr int64_t kStackInputs = 1000;
constexpr const char* kStacks[] = {"s", "h", "e"};

template <typename T>
T Must(absl::StatusOr<T> value) {
  if (!value.ok()) Broken(absl::StrCat("the rig itself fails: ", value.status().ToString()));
  return *std::move(value);
}

absl::Status FromGrpc(const grpc::Status& status) {
  return {static_cast<absl::StatusCode>(status.error_code()), status.error_message()};
}

StackConfig ConfigOf(absl::string_view name) {
  StackConfig config;
  config.batch_size = 2;
  config.max_seq_length = 4;
  config.hidden_size = 8;
  config.heads = 2;
  config.intermediate_size = 16;
  config.num_hidden_layers = 2;
  config.seed = 7;
  if (name == "s") config.attn_dropout_ratio = config.hidden_dropout_ratio = 0.1;
  if (name == "h") {
    config.dtype = DType::kBF16;
    config.pre_layer_norm = false;
    config.dynamic_loss_scale = true;
    config.activation_checkpointing = true;
    config.gelu = GeluKind::kTanh;
  }
  if (name == "e") {
    config.dtype = DType::kF16;
    config.causal = true;
    config.training = false;
  }
  return config;
}

}  // namespace

Daemon& Daemon::Get() {
  static auto* const daemon = new Daemon;
  return *daemon;
}

Daemon::Daemon() : metrics_({.version = "0", .commit = "", .backend = "cpu", .device = "fuzz"}) {
  spdlog::set_level(spdlog::level::off);
  // In memory, where there is such a folder: every checkpoint is synced.
  const char* const base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
  checkpoints_ = absl::StrCat(base, "/lamina-fuzz-XXXXXX");
  if (mkdtemp(checkpoints_.data()) == nullptr) Broken("the rig can make a folder");
  std::atexit([] {
    std::error_code ignored;
    std::filesystem::remove_all(Daemon::Get().checkpoints_, ignored);
  });
  auto backend = std::make_unique<testing::CountingBackend>(Must(Backend::Create("cpu", 1)));
  backend_ = backend.get();
  // Nobody is there to store the number that a call's `ready` waits for.
  engine_ = Must(Engine::Create(std::move(backend), &metrics_,
                                {.checkpoint_dir = checkpoints_,
                                 .queue_capacity = 64,
                                 .inline_cap_bytes = kRegionBytes,
                                 .ready_cap = absl::Milliseconds(2)}));
  SessionHooks hooks;
  hooks.ended = [this](uint64_t key, const std::string&) {
    engine_->EndSession(key);
    mutations_.Forget(key);
  };
  sessions_ = SessionManager::Create({.lease = absl::Hours(24),
                                      .session_cap = 4,
                                      .region_cap = 3,
                                      .region_cap_bytes = 4 * kRegionBytes,
                                      .total_region_cap_bytes = 6 * kRegionBytes},
                                     std::move(hooks));
  access_ = Must(Access::Open({}));
  state_ = std::make_unique<SharedState>(SharedState{.engine = *engine_,
                                                     .sessions = *sessions_,
                                                     .access = *access_,
                                                     .metrics = metrics_,
                                                     .mutations = mutations_,
                                                     .gate = gate_,
                                                     .broker_path = "/broker.sock",
                                                     .version = "0",
                                                     .commit = "0",
                                                     .started = absl::Now()});
  AddHandlers();
  RestoreStacks();
}

void Daemon::CreateStack(const std::string& name) {
  backend_->free_bytes = testing::CountingBackend::kAsItIs;
  Must(engine_->CreateStack(name, ConfigOf(name), {}));
}

// So many more than the three stacks take.
void Daemon::SetFreeBytes() {
  const size_t live = backend_->live_bytes;
  backend_->free_bytes = live < 2 * kDeviceBytes ? 2 * kDeviceBytes - live : 0;
}

template <typename Request, typename Response>
void Daemon::Add() {
  handlers_[Request::descriptor()] = [this](const Message& message) {
    const auto& request = static_cast<const Request&>(message);
    Response response;
    const absl::Status status = RunCall(*state_, request, {}, &response);
    if (status.ok()) Note(request, response);
    return status;
  };
}

void Daemon::AddHandlers() {
  Add<v1::ForwardRequest, v1::ForwardResponse>();
  Add<v1::BackwardRequest, v1::BackwardResponse>();
  Add<v1::ApplyGradientsRequest, v1::ApplyGradientsResponse>();
  Add<v1::ZeroGradientsRequest, v1::ZeroGradientsResponse>();
  Add<v1::ReleaseContextRequest, v1::ReleaseContextResponse>();
  Add<v1::GetServerInfoRequest, v1::GetServerInfoResponse>();
  Add<v1::CreateStackRequest, v1::CreateStackResponse>();
  Add<v1::GetStackRequest, v1::GetStackResponse>();
  Add<v1::ListStacksRequest, v1::ListStacksResponse>();
  Add<v1::UpdateStackRequest, v1::UpdateStackResponse>();
  Add<v1::DeleteStackRequest, v1::DeleteStackResponse>();
  Add<v1::PlanMemoryRequest, v1::PlanMemoryResponse>();
  Add<v1::GetParametersRequest, v1::GetParametersResponse>();
  Add<v1::SetParametersRequest, v1::SetParametersResponse>();
  Add<v1::GetGradientsRequest, v1::GetGradientsResponse>();
  Add<v1::SaveCheckpointRequest, v1::SaveCheckpointResponse>();
  Add<v1::LoadCheckpointRequest, v1::LoadCheckpointResponse>();
  Add<v1::CreateSessionRequest, v1::CreateSessionResponse>();
  Add<v1::DeleteSessionRequest, v1::DeleteSessionResponse>();
  Add<v1::CreateRegionRequest, v1::CreateRegionResponse>();
  Add<v1::ListRegionsRequest, v1::ListRegionsResponse>();
  Add<v1::ReleaseRegionRequest, v1::ReleaseRegionResponse>();
  handlers_[v1::StreamParametersRequest::descriptor()] = [this](const Message& request) {
    return StreamParameters(*state_, static_cast<const v1::StreamParametersRequest&>(request), {},
                            [](const v1::StreamParametersResponse& chunk) {
                              if (chunk.data().empty())
                                Broken("StreamParameters sends no empty chunk");
                              return true;
                            });
  };
  handlers_[ExecuteStream::descriptor()] = [this](const Message& request) {
    return Execute(static_cast<const ExecuteStream&>(request));
  };
}

absl::Status Daemon::Call(const Message& request) {
  SetFreeBytes();
  const absl::Status status = handlers_.at(request.GetDescriptor())(request);
  Check(status);
  return status;
}

void Daemon::Serve() {
  if (server_ != nullptr) return;
  layer_ = std::make_unique<LayerServiceImpl>(*state_, workers_);
  session_ = std::make_unique<SessionServiceImpl>(*state_, workers_);
  grpc::ServerBuilder builder;
  builder.RegisterService(layer_.get());
  builder.RegisterService(session_.get());
  server_ = builder.BuildAndStart();
  const auto channel = server_->InProcessChannel({});
  layer_stub_ = v1::LayerService::NewStub(channel);
  session_stub_ = v1::SessionService::NewStub(channel);
}

void Daemon::StopServing() {
  layer_stub_.reset();
  session_stub_.reset();
  server_->Shutdown();
  server_.reset();
  session_.reset();
  layer_.reset();
}

absl::Status Daemon::Execute(const ExecuteStream& stream) {
  Serve();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  const auto sent = layer_stub_->Execute(&context);
  // Answers come meanwhile: more messages than a stream takes in would wait for them for ever.
  std::map<uint64_t, const v1::ExecuteRequest*> by_id;  // an id that comes again ends the stream
  uint32_t calls = 0, answers = 0;
  for (const v1::ExecuteRequest& request : stream.requests()) {
    by_id.emplace(request.id(), &request);
    if (request.call_case() != v1::ExecuteRequest::kCancel) ++calls;
  }
  std::thread reader([&] {
    uint64_t last = 0;
    const auto hears = [&] {
      return !stream.has_answers_heard() || answers < stream.answers_heard();
    };
    for (v1::ExecuteResponse response; hears() && sent->Read(&response); ++answers) {
      if (response.id() <= last) Broken("Execute answers in the order of the calls");
      last = response.id();
      Check({static_cast<absl::StatusCode>(response.code()), response.message()});
      const v1::ExecuteRequest& request = *by_id.at(response.id());
      if (response.code() == 0 && request.has_forward())
        NoteContext(request.forward(), response.forward());
    }
    if (!hears()) context.TryCancel();
  });
  for (const v1::ExecuteRequest& request : stream.requests())
    if (!sent->Write(request)) break;
  sent->WritesDone();
  reader.join();
  const absl::Status status = FromGrpc(sent->Finish());
  // Then the stream goes on with the calls that it has taken in, and nobody but the server, whose
  // end waits for its streams, knows for how long. The next input is not to meet them, nor the
  // process's end.
  if (absl::IsCancelled(status)) StopServing();
  if (absl::IsDeadlineExceeded(status)) Broken("an Execute stream whose client says no more ends");
  if (status.ok() && answers != calls) Broken("Execute answers every call");
  return status;
}

void Daemon::KeepAlive(const KeepAliveStream& stream) {
  Serve();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  const auto sent = session_stub_->KeepAlive(&context);
  v1::KeepAliveResponse response;
  for (const v1::KeepAliveRequest& request : stream.requests())
    if (!sent->Write(request) || !sent->Read(&response)) break;
  if (stream.cancelled()) {
    context.TryCancel();
  } else {
    sent->WritesDone();
  }
  const absl::Status status = FromGrpc(sent->Finish());
  if (absl::IsDeadlineExceeded(status)) Broken("a KeepAlive stream that is closed ends");
  Check(status);
}

void Daemon::Check(const absl::Status& status) {
  static const bool show = std::getenv("LAMINA_FUZZ_SHOW") != nullptr;
  if (show) std::fprintf(stderr, "answer: %s\n", status.ToString().c_str());
  if (status.ok()) {
    ++answered_ok_;
    return;
  }
  const int code = static_cast<int>(status.code());
  if (code < 1 || code > 16 || absl::IsInternal(status) || absl::IsUnknown(status))
    Broken(absl::StrCat("no request makes a handler answer ", status.ToString()));
  for (const Client& client : clients_) {
    std::vector<std::string> secrets = client.regions;
    secrets.push_back(client.id);
    for (const std::string& secret : secrets)
      if (absl::StrContains(status.message(), secret))
        Broken(absl::StrCat("no message tells a capability: ", status.message()));
  }
}

void Daemon::NoteContext(const v1::ForwardRequest& request, const v1::ForwardResponse& response) {
  if (response.context_id().empty()) return;
  contexts_made_ = true;
  for (Client& client : clients_)
    if (client.id == request.session_id()) client.contexts.push_back(response.context_id());
}

void Daemon::Note(const Message& request, const Message& response) {
  using v1::CreateRegionRequest;
  if (const auto* const forward = dynamic_cast<const v1::ForwardRequest*>(&request))
    NoteContext(*forward, static_cast<const v1::ForwardResponse&>(response));
  if (const auto* const session = dynamic_cast<const v1::CreateSessionResponse*>(&response))
    clients_.push_back({.id = session->session_id()});
  if (const auto* const region = dynamic_cast<const CreateRegionRequest*>(&request))
    for (Client& client : clients_)
      if (client.id == region->session_id())
        client.regions.push_back(
            static_cast<const v1::CreateRegionResponse&>(response).region().region_id());
  if (const auto* const saved = dynamic_cast<const v1::SaveCheckpointResponse*>(&response))
    saved_.insert(saved->path());
  // Whatever makes or changes a stack answers with it.
  const google::protobuf::Descriptor* const type = request.GetDescriptor();
  const bool changes = response.GetDescriptor()->FindFieldByName("stack") != nullptr &&
                       type != v1::GetStackRequest::descriptor();
  if (!changes && type != v1::DeleteStackRequest::descriptor()) return;
  for (const char* field : {"stack", "name"})
    if (const FieldDescriptor* const found = type->FindFieldByName(field); found != nullptr)
      changed_.insert(request.GetReflection()->GetString(request, found));
}

std::string Daemon::SessionId() {
  if (clients_.empty()) clients_.push_back({.id = Must(sessions_->Open("fuzz")).id});
  return clients_.back().id;
}

std::string Daemon::RegionId() {
  const std::string session = SessionId();
  std::vector<std::string>& regions = clients_.back().regions;
  if (regions.empty()) {
    const auto region = Must(Must(sessions_->Find(session))->CreateRegion(kRegionBytes));
    std::fill_n(static_cast<char*>(region->data()), 4096, '\1');
    regions.push_back(region->id());
  }
  return regions.back();
}

std::string Daemon::Bound(const std::string& field, const std::string& value) {
  const bool other = value == "other";
  if (!other && value != "live") return value;
  if (field == "session_id") {
    const std::string live = SessionId();
    return other && clients_.size() > 1 ? clients_[clients_.size() - 2].id : live;
  }
  // The session may be gone by now: then nothing is made in it.
  const std::string session = SessionId();
  const auto found = sessions_->Find(session);
  if (field == "region_id") {
    if (found.ok()) RegionId();
    const std::vector<std::string>& regions = clients_.back().regions;
    if (regions.empty()) return value;
    return regions[regions.size() - (other && regions.size() > 1 ? 2 : 1)];
  }
  std::vector<std::string>& contexts = clients_.back().contexts;
  if (contexts.empty() && found.ok()) {
    std::vector<float> input(2 * 4 * 8, 0.5f);
    ForwardCall call;
    call.stack = "s";
    call.session = (*found)->key();
    call.training = true;
    call.input = {.data = input.data(), .shape = {2, 4, 8}, .transport = TensorTransport::kInline};
    const auto forward = engine_->Forward(call, {});
    contexts_made_ = true;
    if (forward.ok()) contexts.push_back(forward->context_id);
  }
  if (contexts.empty()) return value;
  return contexts[contexts.size() - (other && contexts.size() > 1 ? 2 : 1)];
}

void Daemon::Bind(Message* message) {
  const Reflection* const reflection = message->GetReflection();
  std::vector<const FieldDescriptor*> fields;
  reflection->ListFields(*message, &fields);
  for (const FieldDescriptor* field : fields) {
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING && !field->is_repeated() &&
        absl::EndsWith(field->name(), "_id")) {
      const std::string value = reflection->GetString(*message, field);
      reflection->SetString(message, field, Bound(field->name(), value));
    } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && field->is_repeated()) {
      for (int i = 0; i < reflection->FieldSize(*message, field); ++i)
        Bind(reflection->MutableRepeatedMessage(message, field, i));
    } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      Bind(reflection->MutableMessage(message, field));
    }
  }
}

void Daemon::RestoreStacks() {
  for (const StackInfo& stack : engine_->ListStacks()) {
    const bool ours = std::count(std::begin(kStacks), std::end(kStacks), stack.name) > 0;
    if (ours && changed_.count(stack.name) == 0) continue;
    if (const absl::Status status = engine_->DeleteStack(stack.name, {}); !status.ok())
      Broken(absl::StrCat("a stack can be deleted: ", status.ToString()));
  }
  for (const char* name : kStacks)
    if (!engine_->GetStack(name).ok()) CreateStack(name);
  for (const std::string& path : saved_) std::filesystem::remove(path);
  saved_.clear();
  for (const char* name : kStacks)
    if (access(absl::StrCat(checkpoints_, "/", name, ".safetensors").c_str(), F_OK) != 0)
      Must(engine_->SaveCheckpoint(name, name, {}));
}

void Daemon::End() {
  for (const Client& client : clients_) (void)sessions_->Delete(client.id);
  const bool had_sessions = !clients_.empty();
  clients_.clear();
  // A session that something still held ends on that one's thread, and its contexts before its
  // regions: that the manager knows of neither any more says nothing of contexts.
  const auto late = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  const auto contexts = [&] {
    int64_t sum = 0;
    if (had_sessions && contexts_made_)
      for (const StackInfo& stack : engine_->ListStacks()) sum += stack.outstanding_contexts;
    return sum;
  };
  const auto gone = [&] {
    return sessions_->live_sessions() == 0 && sessions_->live_regions() == 0 && contexts() == 0;
  };
  while (!gone() && std::chrono::steady_clock::now() < late) std::this_thread::yield();
  if (contexts() != 0) Broken("no context outlives its session");
  if (!gone() || sessions_->region_bytes() != 0)
    Broken(absl::StrFormat("nothing is left of ended sessions: %d sessions, %d regions, %d bytes",
                           sessions_->live_sessions(), sessions_->live_regions(),
                           sessions_->region_bytes()));
  if (absl::Status health = engine_->health(); !health.ok())
    Broken(absl::StrCat("no request fails the device: ", health.ToString()));
  if (++inputs_ % kStackInputs == 0) changed_.insert(std::begin(kStacks), std::end(kStacks));
  if (!changed_.empty() || !saved_.empty()) RestoreStacks();
  changed_.clear();
  contexts_made_ = false;
}

}  // namespace lamina::fuzz
