// A whole server in the test's process (engine, sessions, broker, gRPC), and a client of it that
// sends what it is told to.
#pragma once

#include <grpcpp/channel.h>
#include <spdlog/logger.h>

#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "lamina/v1/config_service.grpc.pb.h"
#include "lamina/v1/layer_service.grpc.pb.h"
#include "lamina/v1/session_service.grpc.pb.h"
#include "server/service/grpc_server.h"
#include "server/service/shared_state.h"
#include "server/session/broker.h"
#include "server/session/session_manager.h"
#include "tests/server/engine/engine_rig.h"

namespace lamina::testing {

inline constexpr auto kCancelled = absl::StatusCode::kCancelled;
inline constexpr auto kDeadline = absl::StatusCode::kDeadlineExceeded;
inline constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;
inline constexpr auto kDataLoss = absl::StatusCode::kDataLoss;

struct ServiceOptions {
  int queue_capacity = 256;
  size_t inline_cap_bytes = size_t{1} << 16;
  absl::Duration ready_cap = absl::Seconds(60);
  bool checkpoints = true;
  // False: tensors are staged, regions registered, and some of them device memory, as on a card.
  bool host_memory = true;
  SessionOptions sessions;
  std::vector<std::string> also_listen;
};

class Service {
 public:
  explicit Service(const ServiceOptions& options = {});
  ~Service();

  Engine& engine() { return *engine_; }
  CountingBackend& backend() { return *backend_; }  // only while no call is on its way
  SessionManager& sessions() { return *sessions_; }
  Gate& gate() { return gate_; }
  GrpcServer& server() { return *server_; }
  MutationLogs& mutations() { return mutations_; }
  const std::string& address() const { return address_; }
  const std::string& checkpoints() const { return checkpoints_.path(); }
  // "<reason>" of each ended session, in order.
  std::vector<std::string> ended();
  double Metric(const std::string& line);
  // What was logged since this service began.
  std::string Log();
  SharedState& state() { return *state_; }

 private:
  TemporaryFolder folder_, checkpoints_;
  std::ostringstream log_;
  // Lives as long as the threads that log to it, also where another service has put its own in.
  std::shared_ptr<spdlog::logger> logger_;
  std::string address_;
  MetricSet metrics_;
  CountingBackend* backend_ = nullptr;
  std::unique_ptr<Engine> engine_;
  MutationLogs mutations_;
  std::mutex mutex_;
  std::vector<std::string> ended_;  // guarded by mutex_
  std::unique_ptr<SessionManager> sessions_;
  std::unique_ptr<Broker> broker_;
  Gate gate_;
  std::unique_ptr<Access> access_;
  std::unique_ptr<SharedState> state_;
  std::unique_ptr<GrpcServer> server_;
};

// B 3, S 8, H 16, A 2, I 32, L 2, no dropout, seed 7, 2 contexts; fp32.
v1::StackConfig TinyProto();
inline constexpr int64_t kB = 3, kS = 8, kH = 16;
inline constexpr size_t kBytes = kB * kS * kH * sizeof(float);

// Noise of this shape, inline, fp32.
v1::Tensor InlineNoise(uint64_t seed, const std::vector<int64_t>& shape = {kB, kS, kH});
// int32 [n], inline.
v1::Tensor InlineIntegers(const std::vector<int32_t>& values);
v1::Tensor SliceOf(const std::string& region, uint64_t offset, uint64_t size = kBytes,
                   const std::vector<int64_t>& shape = {kB, kS, kH});
v1::TensorTarget TargetOf(const std::string& region, uint64_t offset, uint64_t size = kBytes);

absl::Status FromGrpc(const grpc::Status& status);
// With a deadline that only a hanging test reaches.
std::unique_ptr<grpc::ClientContext> NewContext();

// A region, mapped as a client maps it.
struct MappedRegion {
  std::string id;
  char* data = nullptr;
  size_t length = 0;

  MappedRegion() = default;
  MappedRegion(MappedRegion&& other) noexcept;
  MappedRegion& operator=(MappedRegion&&) = delete;
  ~MappedRegion();
};

// One session.
class Client {
 public:
  explicit Client(const std::string& address);

  // For each RPC: Send gives its status, Do its answer or an exception that ends the test.
#define LAMINA_RPC(service, Name)                                                     \
  absl::Status Send(const v1::Name##Request& request, v1::Name##Response* response) { \
    return FromGrpc(service->Name(NewContext().get(), request, response));            \
  }                                                                                   \
  absl::Status Send(const v1::Name##Request& request) {                               \
    v1::Name##Response response;                                                      \
    return Send(request, &response);                                                  \
  }                                                                                   \
  v1::Name##Response Do(const v1::Name##Request& request) {                           \
    v1::Name##Response response;                                                      \
    if (absl::Status status = Send(request, &response); !status.ok())                 \
      throw std::runtime_error(#Name ": " + status.ToString());                       \
    return response;                                                                  \
  }
  LAMINA_RPC(layer, Forward)
  LAMINA_RPC(layer, Backward)
  LAMINA_RPC(layer, ApplyGradients)
  LAMINA_RPC(layer, ZeroGradients)
  LAMINA_RPC(layer, ReleaseContext)
  LAMINA_RPC(config, GetServerInfo)
  LAMINA_RPC(config, CreateStack)
  LAMINA_RPC(config, GetStack)
  LAMINA_RPC(config, ListStacks)
  LAMINA_RPC(config, UpdateStack)
  LAMINA_RPC(config, DeleteStack)
  LAMINA_RPC(config, PlanMemory)
  LAMINA_RPC(config, GetParameters)
  LAMINA_RPC(config, SetParameters)
  LAMINA_RPC(config, GetGradients)
  LAMINA_RPC(config, SaveCheckpoint)
  LAMINA_RPC(config, LoadCheckpoint)
  LAMINA_RPC(sessions, CreateSession)
  LAMINA_RPC(sessions, DeleteSession)
  LAMINA_RPC(sessions, CreateRegion)
  LAMINA_RPC(sessions, ListRegions)
  LAMINA_RPC(sessions, ReleaseRegion)
#undef LAMINA_RPC

  // The next mutation of the session; Took says that it was applied.
  v1::Mutation Next() const;
  void Took() { ++sequence; }

  // --- requests that are in order, for the stack "s" ---
  v1::ForwardRequest EvalRequest(uint64_t seed = 1) const;
  v1::ForwardRequest TrainRequest(uint64_t seed = 1) const;
  v1::BackwardRequest BackwardRequestFor(const std::string& context, uint64_t seed = 2) const;
  v1::ApplyGradientsRequest ApplyRequest() const;
  v1::ZeroGradientsRequest ZeroRequest() const;
  v1::SetParametersRequest SetRequest() const;  // layers.0.norm_w to noise

  // --- sent, and the sequence kept ---
  void Create(const std::string& name = "s", const v1::StackConfig& config = TinyProto());
  std::string Train(uint64_t seed = 1);  // a training Forward; its context
  void Back(const std::string& context);
  v1::Stack Describe(const std::string& name = "s");
  std::string Parameters(bool gradients = false);  // all of "s", as bytes
  // Device memory is what CountingBackend has for it.
  MappedRegion Region(size_t bytes = 65536, v1::RegionKind kind = v1::REGION_KIND_MEMFD);

  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::LayerService::Stub> layer;
  std::unique_ptr<v1::ConfigService::Stub> config;
  std::unique_ptr<v1::SessionService::Stub> sessions;
  std::string session_id, broker_path;
  uint64_t sequence = 0;  // the last that was applied
};

}  // namespace lamina::testing
